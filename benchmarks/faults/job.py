"""The job that faults happen to: a short training with a checkpoint every few steps, which continues where it can."""

from __future__ import annotations

import logging
import os
import signal
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from lightning_modules import VAE, VerifiedCheckpointIO
from lightning_modules.data import Digits

__all__ = ["INTERVAL", "LAYERS", "STEPS", "Plan", "main"]

STEPS = 14
INTERVAL = 3  # steps between checkpoints; an epoch has 5, so that most checkpoints lie inside one
LAYERS: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "reinforce": {"baseline": "moving_average"},
    "nvil": {},
    "rebar": {},
    "relax": {},
    "disarm": {},
    "gumbel_softmax": {},
    "vq": {"latent_dim": 2, "num_codes": 16, "revive_below": 0.3},
}


@dataclass(frozen=True)
class Plan:
    """What is to happen inside the job itself; what happens to it from outside is the campaign's.

    Attributes:
        resume: What ``Trainer.fit`` gets as ``ckpt_path``.
        nan_at: Put NaN into the batch of this step.
        kill_at_call: SIGKILL at this call of those that write a checkpoint (fsync, link, replace), counted from 1.
        wandb: ``""``, ``"offline"`` or ``"unreachable"``.
        environment: Variables to set.
    """

    resume: str = "last"
    nan_at: int | None = None
    kill_at_call: int | None = None
    wandb: str = ""
    environment: dict[str, str] = field(default_factory=dict)


class Journal(L.Callback):
    """Writes down where the job started and every step that it made; the campaign reads it afterwards."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, line: str) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(f"start {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write(f"step {trainer.global_step}")


class PoisonedBatch(L.Callback):
    """One NaN in one pixel of one batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step + 1 == self.step:
            batch[0][3, 0, 4, 4] = float("nan")


def _die_at_call(number: int) -> None:
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "link", "replace"):
        setattr(os, name, counted(getattr(os, name)))


def train(folder: Path, notes: Path, layer: str, plan: Plan) -> None:
    """Train to the end, from ``plan.resume``; the final state goes to ``notes``, checkpoints to ``folder``."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    L.seed_everything(1, verbose=False)
    callbacks: list[L.Callback] = [Journal(notes / f"journal{rank}")]
    if plan.nan_at is not None:
        callbacks.append(PoisonedBatch(plan.nan_at))
    if plan.kill_at_call is not None:
        _die_at_call(plan.kill_at_call)
    callbacks.append(ModelCheckpoint(folder, every_n_train_steps=INTERVAL, save_last=True))
    logger: Any = False
    if plan.wandb:
        logger = WandbLogger(project="faults", save_dir=str(notes), offline=plan.wandb == "offline")
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp" if world > 1 else "auto",
        devices=world,
        max_steps=STEPS,
        limit_train_batches=5,
        limit_val_batches=1,
        log_every_n_steps=2,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=[VerifiedCheckpointIO()],
    )
    model = VAE(layer, {"latent_dim": 6} | LAYERS[layer], encoder=_NETWORK, decoder=_NETWORK)
    trainer.fit(model, Digits(batch_size=24, binarization="dynamic"), ckpt_path=plan.resume)
    torch.save(model.state_dict(), notes / f"final{rank}.pt")


_NETWORK = {"name": "mlp", "hidden_features": [32]}


def main(folder: Path, notes: Path, layer: str, plan: Plan) -> int:
    """Run the job as a process does: an exception is written down, and gives the status 1."""
    os.environ.update(plan.environment)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "wandb"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        train(folder, notes, layer, plan)
    except BaseException as error:  # also KeyboardInterrupt and Lightning's own exception of SIGTERM
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        (notes / f"error{os.environ.get('RANK', 0)}").write_text(message)
        return 1
    return 0
