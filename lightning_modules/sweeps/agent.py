"""How a run that ``wandb agent`` has started is asked to end, by early termination or by the user: with SIGTERM."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["AgentStop"]


class AgentStop(Callback):
    """Ends training after the batch in which SIGTERM came to any rank, on all ranks together, with exit status 0.

    The agent signals the first process alone, and kills it 30 seconds later. Lightning's own handler calls a collective
    at whatever moment the signal comes; other ranks are then in another one, and all wait for each other.
    """

    def __init__(self) -> None:
        self._asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._ask)  # in the place of Lightning's, which it takes away after training

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            raise SIGTERMException(0)
