"""What does watching the gradient cost? Decides the default cadence of ``GradientVarianceMonitor``.

One run trains a VAE and turns its monitor on and off, cycle after cycle of ``log_every_n_steps`` steps, so that both
sides see the same machine, model and data. A cycle with the monitor holds one measurement. Reported is the time of the
steps of a cycle with, over that of its neighbour without, as median and quartiles over the pairs. Loading data,
validation and what Lightning does between epochs are left out: they would make the ratio look better. ::

    python -m benchmarks.monitor_overhead
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from benchmarks.measure import Row, accelerator, clock, parse, parser, summary, write
from lightning_modules import VAE, GradientVarianceMonitor
from lightning_modules.data import TensorData

CYCLE = 50  # Lightning's default for log_every_n_steps
LOO = {"latent_dim": 200, "num_samples": 2, "baseline": "leave_one_out"}
MODELS: dict[str, dict[str, Any]] = {
    "digits, batch 64": {"data_shape": (1, 8, 8), "batch": 64, "options": {**LOO, "latent_dim": 32}},
    "28x28, batch 100": {"data_shape": (1, 28, 28), "batch": 100, "options": LOO},
}
MONITORS: dict[str, dict[str, Any]] = {
    "default": {},
    "with moving moments": {"decay": 0.999},
    "with weights": {"weights": True},
    "with a basket of two": {"basket": ["disarm", "reinforce"]},
}


class Switched(L.Callback):
    """Turns a monitor on in every other cycle, and times the cycles."""

    def __init__(self, monitor: GradientVarianceMonitor, decay: float | None, device: str) -> None:
        self.monitor, self.decay, self.device = monitor, decay, device
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.start = self.sum = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        cycle, within = divmod(trainer.global_step, CYCLE)
        if within == 0:
            on = cycle % 2 == 1
            self.monitor.every_n_steps = CYCLE if on else 0
            self.monitor.decay = self.decay if on else None
            self.sum = 0.0
        self.start = clock(self.device)  # this callback comes before the monitor

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sum += clock(self.device) - self.start
        cycle, within = divmod(trainer.global_step - 1, CYCLE)
        if within == CYCLE - 1 and cycle >= 2:  # the first two warm up
            self.times[cycle % 2 == 1].append(self.sum)


def measure(group: str, model: Mapping[str, Any], title: str, pairs: int, device: str) -> list[Row]:
    """Time ``pairs`` pairs of cycles of one model with one monitor."""
    options = MONITORS[title]
    L.seed_everything(0, verbose=False)
    monitor = GradientVarianceMonitor(**options)
    switch = Switched(monitor, options.get("decay"), device)
    x = torch.rand(model["batch"] * CYCLE, *model["data_shape"]).round()
    trainer = L.Trainer(
        accelerator=accelerator(device),
        devices=1,
        max_steps=2 * CYCLE * (pairs + 1),
        log_every_n_steps=CYCLE,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[switch, monitor],
    )
    vae = VAE("reinforce", model["options"], data_shape=model["data_shape"])
    trainer.fit(vae, TensorData(x, batch_size=model["batch"]))
    on, off = ([seconds / CYCLE for seconds in switch.times[side]] for side in (True, False))
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    none, ones = f"without, beside {title}", (1.0,) * len(off)
    return [
        Row(group, none, "s", *summary(off), len(off), none, *summary(ones)),
        Row(group, title, "s", *summary(on), len(on), none, *summary(ratios)),
    ]


def main() -> None:
    """Measure every pair of model and monitor, and write the result."""
    options = parser(__doc__ or "")
    options.add_argument("--pairs", type=int, default=15, help="pairs of cycles for each case")
    options.add_argument("--monitors", nargs="+", choices=MONITORS, default=list(MONITORS), help="which to measure")
    arguments = parse(options)
    rows: list[Row] = []
    for title in arguments.monitors:
        for name, model in MODELS.items():
            rows += measure(name, model, title, arguments.pairs, arguments.device)
            print(f"{name:20s} {title:22s} {rows[-1].ratio:.3f} [{rows[-1].ratio_q1:.3f}, {rows[-1].ratio_q3:.3f}]")
            # after every case, so that none is lost
            write(
                "monitor_overhead", "What does watching the gradient cost a training step?", rows,
                device=arguments.device, folder=arguments.folder,
            )  # fmt: skip


if __name__ == "__main__":
    main()
