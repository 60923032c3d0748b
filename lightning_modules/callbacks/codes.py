"""What ``stochastic-layers predict`` leaves: a file of the latent codes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from lightning_modules.callbacks.pictures import run_folder
from lightning_modules.whole_files import whole_file

__all__ = ["LatentCodes"]


class LatentCodes(Callback):
    """Writes the predictions of all batches, in the order of the data, to ``codes.pt`` in the run's folder.

    Raises:
        ValueError: As prediction is set up, several processes: each has a part, in an order of its loader's.
    """

    def __init__(self) -> None:
        self._codes: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict" and trainer.world_size > 1:
            raise ValueError(
                f"needed one process to predict, so that codes are in the order of the data, got {trainer.world_size}; "
                "set --trainer.devices=1."
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._codes = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._codes.append(outputs.cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        codes, file = torch.cat(self._codes), run_folder(trainer) / "codes.pt"
        with whole_file(file) as partial:
            torch.save(codes, partial)
        Console(soft_wrap=True).print(f"latent codes {list(codes.shape)}: {file}", markup=False, highlight=False)
