"""The closing table of a run: bound, KL, gradient variance, time, and where the pictures are."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from lightning_modules.base import LatentVariableModel
from lightning_modules.due import ends_a_step, log_interval, step_is_due

__all__ = ["Report"]

ROWS = (
    ("test/elbo", "test ELBO (nats per example)", "{:.2f}"),
    ("test/iwae", "test importance-weighted bound (nats per example)", "{:.2f}"),
    ("test/reconstruction", "test reconstruction, E_q log p(x|z) (nats)", "{:.2f}"),
    ("test/kl", "test KL (nats)", "{:.2f}"),
    ("test/active_units", "active latent units on the test data", "{:.0f}"),
    ("test/perplexity", "effective number of categories or codes on the test data", "{:.1f}"),
    ("train/grad_variance", "gradient variance at the layer's params (mean over the run)", "{:.3g}"),
    ("train/grad_snr", "gradient signal-to-noise ratio (mean over the run)", "{:.3g}"),
)


class Report(Callback):
    """Prints a table after testing, on rank zero: what was trained, how well, and at what cost.

    Logs ``time/sec_per_step`` with each validation: wall-clock seconds of an optimizer step, of all batches that it
    accumulates, without their loading; the mean since the validation before.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._seconds = 0.0
        self._steps = 0
        self._start = 0.0
        self._logged = (0.0, 0)  # seconds and steps, when they were logged

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._start
        if not ends_a_step(trainer):
            return
        self._steps += 1
        if step_is_due(trainer, log_interval(trainer)):
            for key in ("train/grad_variance", "train/grad_snr"):
                if key in trainer.callback_metrics:
                    total, count = self._sums.get(key, (0.0, 0))
                    self._sums[key] = (total + float(trainer.callback_metrics[key]), count + 1)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds, steps = self._logged
        if self._steps > steps:
            self._logged = self._seconds, self._steps
            # not every ten steps: these calls would take 0.8 % of a run on digits
            pl_module.log("time/sec_per_step", (self._seconds - seconds) / (self._steps - steps), sync_dist=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            Console().print(self.table(trainer, pl_module))

    def table(self, trainer: Trainer, pl_module: LightningModule) -> Table:
        """The table, from what was seen of training and the Trainer's metrics of testing."""
        title = pl_module.title if isinstance(pl_module, LatentVariableModel) else type(pl_module).__name__
        table = Table(title=title, show_header=False)
        means = {key: total / count for key, (total, count) in self._sums.items()}
        for key, label, fmt in ROWS:
            value = trainer.callback_metrics.get(key, means.get(key))
            if value is not None:
                if key == "test/iwae" and isinstance(pl_module, LatentVariableModel):
                    label += f", {pl_module.iwae_samples['test']} draws"
                table.add_row(label, fmt.format(float(value)))
        if self._steps:
            table.add_row("time per training step", f"{1e3 * self._seconds / self._steps:.2f} ms")
            table.add_row("training steps", str(self._steps))
        return table
