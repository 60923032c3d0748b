"""What a trial tells the sweep that started it: a line of JSON for each validation; and how it is asked to end."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.sweeps.agent import AgentStop

__all__ = ["SWEEP_VARIABLE", "TRIAL_VARIABLE", "Record", "TrialRecord", "read_record", "stop_file"]

TRIAL_VARIABLE = "STOCHASTIC_LAYERS_TRIAL"  # path of the record, for the trial's process
SWEEP_VARIABLE = "STOCHASTIC_LAYERS_SWEEP"  # process id of the sweep
INIT = 1  # what takes the place of a parent that was killed


class TrialRecord(Callback):
    """Writes the metrics of a trial, and ends it when the sweep asks for that or is gone; on rank zero.

    The command line adds it to the trials of ``stochastic-layers sweep``. A program with a Trainer of its own passes
    ``callbacks=TrialRecord.from_environment()``, an empty list outside of a sweep.

    Args:
        path: The file, one JSON object a line.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        parent = os.getppid()
        # a sweep that was killed while this process was starting is not the parent any more
        self._parent = int(os.environ.get(SWEEP_VARIABLE, INIT)) if parent == INIT else parent

    @classmethod
    def from_environment(cls) -> list[Callback]:
        """The callback of this trial, if a sweep started the process, here or by ``wandb agent``."""
        if path := os.environ.get(TRIAL_VARIABLE):
            return [cls(path)]
        return [AgentStop()] if os.environ.get("WANDB_SWEEP_ID") else []

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _write_metrics(self, trainer: Trainer) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._write({"epoch": trainer.current_epoch, "trainer/global_step": trainer.global_step, **metrics})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            runs = [str(Path(x.experiment.dir).parent) for x in trainer.loggers if isinstance(x, WandbLogger)]
            self._write({"runs": runs})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        stop = False
        if trainer.is_global_zero:
            self._write_metrics(trainer)
            # a process whose parent was killed gets another parent
            stop = stop_file(self.path).exists() or os.getppid() != self._parent
        # all ranks end together
        trainer.should_stop = trainer.should_stop or trainer.strategy.broadcast(stop)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._write_metrics(trainer)


def stop_file(record: Path) -> Path:
    """The file whose existence asks a trial to end after its next validation."""
    return record.with_suffix(".stop")


@dataclass(frozen=True)
class Record:
    """What a trial has written so far.

    Attributes:
        history: Metrics in the order in which they were logged.
        runs: Folders of its W&B runs.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """The values of one metric."""
        return [line[metric] for line in self.history if metric in line]

    def last(self, metric: str) -> float | None:
        """The newest value of one metric."""
        values = self.values(metric)
        return values[-1] if values else None


def read_record(path: Path) -> Record:
    """Read a record; a last line that is being written is left out."""
    record = Record()
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            content = json.loads(line)
            if "runs" in content:
                record.runs.extend(content["runs"])
            else:
                record.history.append(content)
    return record
