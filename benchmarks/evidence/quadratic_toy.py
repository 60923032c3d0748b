"""Variance and objective on 200 bits with a linear signal far below the noise: what a control variate is worth.

Serves the decision between leave-one-out, DisARM and Double CV, on a problem whose variance is known in closed form.

The setting is that of "Double Control Variates for Gradient Estimation in Discrete Latent Variable Models" (Titsias,
Shi, 2022): maximise E[mean_i (b_i - t)^2] over 200 logits, t = 0.499, two draws, logits 0 at the start, RMSprop 0.01,
2,000 steps, double precision. The cost is c sum_i b_i plus a constant with c = (1 - 2t) / 200, so that at the start the
variance of one coordinate is, by hand, 12.5 c^2 for leave-one-out, 199/16 c^2 for DisARM and 199/32 c^2 for the exact
mean as baseline. ``exact_mean`` is that baseline, which nobody has in practice; ``exact`` follows the exact gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochastic_layers as sl
from benchmarks.evidence import published
from benchmarks.evidence.record import Record, arguments, read, save_figure
from stochastic_layers.diagnostics import gradient_statistics

BITS, TARGET = 200, 0.499


def cost(z: Tensor) -> Tensor:
    """Minus the objective of draws ``[..., BITS]``."""
    return -(z - TARGET).square().mean(-1)


def objective(logits: Tensor) -> Tensor:
    """E[mean (b - t)^2] in closed form, a scalar for logits ``[BITS]``."""
    p = torch.sigmoid(logits)
    return (p * (1 - TARGET) ** 2 + (1 - p) * TARGET**2).mean()


class ExactMean(sl.Baseline):
    """E[cost] at the current logits, as baseline."""

    def forward(self, cost: Tensor, context: Tensor) -> Tensor:
        return -objective(context[..., :BITS].reshape(-1, BITS)[0])


LAYERS: dict[str, Callable[[], sl.StochasticLayer]] = {
    "reinforce": lambda: sl.create("reinforce", latent_dim=BITS, family="bernoulli", num_samples=2, baseline=None),
    "muprop": lambda: sl.create("muprop", latent_dim=BITS, num_samples=2),
    "leave_one_out": lambda: sl.create("leave_one_out", latent_dim=BITS, family="bernoulli", num_samples=2),
    "disarm": lambda: sl.create("disarm", latent_dim=BITS),
    "exact_mean": lambda: sl.create(
        "reinforce", latent_dim=BITS, family="bernoulli", num_samples=2, baseline=ExactMean()
    ),
    "double_cv": lambda: sl.create("double_cv", latent_dim=BITS),
}


def closed_form() -> dict[str, float]:
    """Variance of one coordinate of the gradient at logits 0."""
    c = (1 - 2 * TARGET) / BITS
    # with d_i = b_i - b'_i, of squares 1/2 on average, the gradient is c/2 d_i sum_j d_j, of mean c/4
    pair = c**2 * ((0.5 + (BITS - 1) / 4) / 4 - 1 / 16)
    antithetic = c**2 * (BITS - 1) / 16  # every bit disagrees
    return {"leave_one_out": pair, "disarm": antithetic, "double_cv": pair, "exact_mean": antithetic / 2}


def run(name: str, seed: int, steps: int, every: int, draws: int) -> list[dict[str, float]]:
    """One curve; the variance is the mean over coordinates, from redraws at fixed logits."""
    torch.manual_seed(seed)
    layer = LAYERS[name]().double() if name != "exact" else None
    logits = torch.zeros(BITS, dtype=torch.float64, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": [logits], "lr": 0.01}]
    if layer is not None and (own := list(layer.parameters())):
        groups.append({"params": own, "lr": 5e-4})
    optimizer = torch.optim.RMSprop(groups, alpha=0.9, eps=1e-7)
    curve = []
    for step in range(steps + 1):
        if step % every == 0:
            point = {"step": step, "objective": float(objective(logits.detach()))}
            if layer is not None:
                statistics = gradient_statistics(layer, logits.detach(), cost, num_draws=draws, chunk_size=draws)
                point["variance"] = float(statistics.variance.mean())
            curve.append(point)
        optimizer.zero_grad()
        if layer is None:
            loss = -objective(logits)
        else:
            sample = layer.sample(logits)
            loss = sample.surrogate(cost(sample.z))
        loss.backward()
        optimizer.step()
    return curve


def plot(out: Path) -> None:
    """Variance and objective over steps with the published ends as marks."""
    import matplotlib.pyplot as plt

    content = read(out / "quadratic_toy.json")
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for color, (name, runs) in enumerate(content["curves"].items()):
        for number, curve in enumerate(runs):
            options = {"color": f"C{color}", "label": None if number else name, "linewidth": 1}
            steps = [p["step"] for p in curve]
            if "variance" in curve[0]:
                left.plot(steps, [p["variance"] for p in curve], **options)
            right.plot(steps, [p["objective"] for p in curve], **options)
        for axes, marks in ((left, published.QUADRATIC_VARIANCE), (right, published.QUADRATIC_OBJECTIVE)):
            points = marks.get(name, [])
            axes.scatter([p[0] for p in points], [p[1] for p in points], color=f"C{color}", zorder=3, clip_on=False)
    left.scatter([], [], color="black", label="published (read off the figure)")
    left.set(xlabel="step", ylabel="variance of a coordinate", ylim=(0, 1.5e-9), title="gradient variance")
    right.set(xlabel="step", ylabel="objective", ylim=(0.2499, 0.2511), title="E mean (b - 0.499)$^2$, maximised")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, out / "quadratic_toy.png")
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--draws", type=int, default=2000, help="redraws for a variance")
    options: argparse.Namespace = parser.parse_args(words)
    torch.set_num_threads(1)
    if not options.plot:
        record = Record("quadratic_toy", options.out / "quadratic_toy.json", options)
        curves: dict[str, list[list[dict[str, float]]]] = {}
        for name in [*LAYERS, "exact"]:
            curves[name] = [run(name, seed, options.steps, options.every, options.draws) for seed in options.seeds]
            record.write(closed_form=closed_form(), curves=curves)
    plot(options.out)


if __name__ == "__main__":
    main()
