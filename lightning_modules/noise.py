"""Noise that differs between ranks, survives resuming bit for bit, and is not disturbed by evaluation."""

from __future__ import annotations

import os
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.data.binarize import mix64
from stochastic_layers.preserved import seed_generators

__all__ = ["ReproducibleNoise", "own_noise"]

_FIT, _VALIDATE, _TEST, _PREDICT, _ORDER = range(5)


class ReproducibleNoise(Callback):
    """Seeds torch before every batch from (seed, rank, epoch, batch), and isolates evaluation.

    ``seed_everything`` gives every rank the same noise, and a resumed run repeats that of the first epoch. With this
    callback ranks draw different noise, the noise of a batch does not depend on how the run got there, and validation
    neither moves the training noise nor changes its own from epoch to epoch. Each epoch begins with a seed of (seed,
    epoch): validation does not change the order of a ``DataLoader`` that shuffles either. ``VAE`` has it by default;
    add it to the Trainer of your own module.

    Args:
        seed: Base seed; by default that of ``seed_everything``, else a random one that the checkpoint keeps.
        mode: ``"per_rank"``, or ``"shared"`` to give all ranks the same noise.

    Raises:
        ValueError: Another mode.
    """

    def __init__(self, seed: int | None = None, mode: Literal["per_rank", "shared"] = "per_rank") -> None:
        if mode not in ("per_rank", "shared"):
            raise ValueError(f"needed mode 'per_rank' or 'shared', got {mode!r}.")
        self.seed = seed
        self.mode = mode
        self._saved: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.seed is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
            self.seed = int(trainer.strategy.broadcast(seed))

    def _reseed(self, trainer: Trainer, *position: int) -> None:
        assert self.seed is not None
        seed = mix64(self.seed, trainer.global_rank if self.mode == "per_rank" else 0, *position)
        seed_generators(seed, trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # for loaders that shuffle by torch's generator, from which the loader of validation draws as well; on all ranks
        # the same, as seed_everything has it: a sampler may deal out a common order
        assert self.seed is not None
        seed_generators(mix64(self.seed, 0, _ORDER, trainer.current_epoch), trainer.strategy.root_device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._reseed(trainer, _FIT, trainer.current_epoch, batch_idx)

    def _enter(self) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._saved.append((torch.get_rng_state(), cuda))

    def _leave(self) -> None:
        if self._saved:
            cpu, cuda = self._saved.pop()
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._reseed(trainer, _VALIDATE, dataloader_idx, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._reseed(trainer, _TEST, dataloader_idx, batch_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._reseed(trainer, _PREDICT, dataloader_idx, batch_idx)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        while self._saved:
            self._leave()

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]


def own_noise(trainer: Trainer) -> list[Callback]:
    """:class:`ReproducibleNoise`, unless the Trainer has one."""
    return [] if any(isinstance(c, ReproducibleNoise) for c in cast(Any, trainer).callbacks) else [ReproducibleNoise()]
