"""What is measured of a run: bounds on exact draws, gradient moments, time and memory of the training steps alone."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.base import LatentVariableModel, data_of
from lightning_modules.data.binarize import mix64
from stochastic_layers.preserved import preserved, seed_generators

__all__ = ["Measurement", "bounds", "held_out", "peak_memory"]

CURVE_EXAMPLES, CURVE_DRAWS = 2048, 4
FINAL_DRAWS = 32
PROBE_EXAMPLES, PROBE_DRAWS = 16, 64
EVALUATION = mix64(5)  # the seed of all draws in evaluation: of every layer, seed and point in training


@torch.no_grad()
def bounds(model: LatentVariableModel[Any], batches: Iterable[Tensor], num_draws: int) -> dict[str, float]:
    """``elbo`` and ``iwae`` (of ``num_draws`` draws) in nats per example, on exact draws from the same random numbers.

    The ELBO is the mean of log p(x, z) - log q(z | x), whatever the layer and the objective; beta is 1.
    """
    elbo = iwae = torch.zeros((), dtype=torch.float64)
    count = 0
    modes = {m: m.training for m in model.modules()}
    with preserved(model):
        model.eval()
        for number, x in enumerate(batches):
            seed_generators(mix64(EVALUATION, number), model.device)
            x = x.to(model.device)
            log_weights = model.log_weights(x, model.encode(x), num_draws).double()  # [num_draws, B]
            elbo = elbo + log_weights.mean(0).sum().cpu()
            iwae = iwae + (log_weights.logsumexp(0) - math.log(num_draws)).sum().cpu()
            count += len(x)
    for module, training in modes.items():
        module.training = training
    return {"elbo": float(elbo) / count, "iwae": float(iwae) / count}


class Measurement(Callback):
    """Stops training when the budget is spent, and measures on the way with the clock stopped.

    Args:
        steps: Budget of optimizer steps, or
        seconds: budget of training time: of the steps and the data they take, not of what is measured in between.
        points: Number of measurements, evenly over the budget.
        report: Called with the spent fraction of the budget, and the ELBO where it was measured.

    Attributes:
        curve: One list for each of ``step``, ``seconds``, ``elbo``, ``grad_variance``, ``grad_snr``.

    Raises:
        FloatingPointError: The ELBO is not finite.
    """

    def __init__(
        self,
        steps: int | None,
        seconds: float | None,
        points: int,
        report: Callable[[float, float | None], None] = lambda fraction, elbo: None,
    ) -> None:
        self.steps = steps
        self.seconds = seconds
        self.points = points
        self.report = report
        self.curve: dict[str, list[float]] = {k: [] for k in ("step", "seconds", "elbo", "grad_variance", "grad_snr")}
        self.step_times: list[float] = []  # mean seconds of a step between two measurements
        self.memory: float | None = None
        self._batches: list[Tensor] = []
        self._spent = 0.0
        self._started = 0.0
        self._last_step = 0
        self._reported = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = held_out(cast(Any, trainer).datamodule.val_dataloader())
        self._memory_before = reset_peak_memory(pl_module.device)
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        spent = self._spent + now - self._started
        fraction = trainer.global_step / self.steps if self.steps else spent / (self.seconds or 1.0)
        if fraction * self.points >= len(self.curve["step"]) + 1 or fraction >= 1:
            self._measure(trainer, pl_module)
            self.report(fraction, self.curve["elbo"][-1])
        elif now - self._reported > 0.5:
            self._reported = now
            self.report(fraction, None)
        if fraction >= 1:
            trainer.should_stop = True

    def _measure(self, trainer: Trainer, model: LightningModule) -> None:
        assert isinstance(model, LatentVariableModel)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # work that was only queued belongs to the time
        segment = time.perf_counter() - self._started
        self._spent += segment
        if self.memory is None:  # of the first steps, before anything is evaluated
            self.memory = peak_memory(model.device, self._memory_before)
        step = trainer.global_step
        self.step_times.append(segment / max(1, step - self._last_step))
        sizes = [len(x) for x in self._batches]
        some = -(-CURVE_EXAMPLES // max(sizes))
        elbo = bounds(model, islice(self._batches, some), CURVE_DRAWS)["elbo"]
        if not math.isfinite(elbo):
            raise FloatingPointError(f"the ELBO is {elbo} after step {step}; it was finite at step {self._last_step}.")
        (moments,) = model.probe(self._batches[0][:PROBE_EXAMPLES].to(model.device), PROBE_DRAWS)
        values = (step, self._spent, elbo, moments.total_variance, moments.snr)
        for name, value in zip(self.curve, values, strict=True):
            self.curve[name].append(float(value))
        self._last_step = step
        self._started = time.perf_counter()

    def result(self, model: LatentVariableModel[Any]) -> dict[str, Any]:
        """The values of the finished run: bounds on all validation data, medians over the run of the rest."""
        final = bounds(model, self._batches, FINAL_DRAWS)
        if not math.isfinite(final["elbo"]):
            raise FloatingPointError(f"the ELBO is {final['elbo']} at the end of training.")
        variance, snr = (statistics.median(self.curve[key]) for key in ("grad_variance", "grad_snr"))
        step_time = statistics.median(self.step_times)
        return {
            **final,
            "grad_variance": variance,
            "grad_snr": snr,
            "step_ms": 1e3 * step_time,
            "variance_time": 1e3 * step_time * variance,
            "peak_memory_mib": self.memory,
            "steps": int(self.curve["step"][-1]),
            "seconds": self._spent,
        }


def held_out(loaders: Any) -> list[Tensor]:
    """The validation data of one loader, or of several, in the order of the file.

    Raises:
        ValueError: The data module holds out none.
    """
    batches = [data_of(batch) for loader in (loaders if isinstance(loaders, list) else [loaders]) for batch in loader]
    if not batches:
        raise ValueError("needed validation data to compare on, got none; set --data.val_size.")
    return batches


def _status(key: str) -> float:
    """A field of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def reset_peak_memory(device: torch.device) -> float:
    """Start measuring; the memory in use now, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    try:
        # getrusage's ru_maxrss will not do: a process inherits that of the one that started it
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:  # not Linux
        return 0.0


def peak_memory(device: torch.device, before: float) -> float | None:
    """Peak since the start in MiB: what a GPU allocated, else by how much the resident set grew (known on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        return _status("VmHWM") - before
    except OSError:
        return None
