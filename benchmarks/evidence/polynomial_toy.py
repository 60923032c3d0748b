"""Minimise E mean |z - 0.45|^p over 128 bits that are written as pairs of categories, for p = 1.5, 2 and 3.

Serves the decision between straight-through estimators: the cost is smooth, its minimum is known (every z = 0), and
only the curvature of the cost between 0 and 1 differs with p.

The setting is that of "Bridging Discrete and Backpropagation: Straight-Through and Beyond" (Liu, Dong, Liu, Yu, Gao,
2023): 128 categorical variables of 2 categories, logits from U(-0.01, 0.01), batch 64, Adam 1e-3, 40 epochs of 200
steps, temperature 1. The loss shown is the exact expectation at the current logits. ``exact`` follows its gradient.
The published figures are plots without numbers; the optimum 0.45^p is the only one quoted here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochastic_layers as sl
from benchmarks.evidence.record import Record, arguments, read, save_figure

BITS, BATCH, TARGET, EPOCH = 128, 64, 0.45, 200
POWERS = (1.5, 2.0, 3.0)
ESTIMATORS: dict[str, dict[str, Any]] = {
    "straight_through": {},
    "straight_through_gumbel": {"temperature": 1.0},
    "gapped_straight_through": {},
    "reinmax": {},
    "leave_one_out": {"num_samples": 2},
}


def exact(logits: Tensor, power: float) -> Tensor:
    """The expected cost, a scalar for logits ``[2 * BITS]``; z is the first of each pair."""
    p = logits.view(BITS, 2).softmax(-1)
    return (p[:, 0] * (1 - TARGET) ** power + p[:, 1] * TARGET**power).mean()


def run(name: str, power: float, seed: int, epochs: int) -> list[float]:
    """The expected cost after each epoch, from the start on."""
    torch.manual_seed(seed)
    layer = None
    if name != "exact":
        layer = sl.create(name, latent_dim=BITS, family="categorical", num_categories=2, **ESTIMATORS[name])
    logits = torch.empty(2 * BITS).uniform_(-0.01, 0.01).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=1e-3, fused=True)
    curve = [float(exact(logits.detach(), power))]
    for step in range(1, epochs * EPOCH + 1):
        optimizer.zero_grad()
        if layer is None:
            exact(logits, power).backward()
        else:
            sample = layer.sample(logits.expand(BATCH, -1))
            cost = (sample.z.unflatten(-1, (BITS, 2))[..., 0] - TARGET).abs().pow(power).mean(-1)
            sample.surrogate(cost).mean().backward()
        optimizer.step()
        if step % EPOCH == 0:
            curve.append(float(exact(logits.detach(), power)))
    return curve


def plot(out: Path) -> None:
    """The expected cost over epochs, one panel for each power."""
    import matplotlib.pyplot as plt

    content = read(out / "polynomial_toy.json")
    figure, panels = plt.subplots(1, len(content["curves"]), figsize=(15, 4.5), squeeze=False)
    for axes, (power, curves) in zip(panels[0], content["curves"].items(), strict=True):
        for color, (name, runs) in enumerate(curves.items()):
            for number, curve in enumerate(runs):
                style = {"linestyle": "--", "linewidth": 2} if name == "exact" else {"linewidth": 1}
                axes.plot(curve, color=f"C{color}", label=None if number else name, **style)
        axes.axhline(TARGET ** float(power), color="black", linewidth=0.8, linestyle=":", label="optimum 0.45$^p$")
        axes.set(xlabel="epoch (200 steps)", ylabel="expected cost", title=f"p = {power}")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    save_figure(figure, out / "polynomial_toy.png")
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=40)
    options: argparse.Namespace = parser.parse_args(words)
    torch.set_num_threads(1)
    if not options.plot:
        record = Record("polynomial_toy", options.out / "polynomial_toy.json", options)
        curves: dict[str, dict[str, Any]] = {}
        for power in POWERS:
            for name in [*ESTIMATORS, "exact"]:
                runs = [run(name, power, seed, options.epochs) for seed in options.seeds]
                curves.setdefault(str(power), {})[name] = runs
                record.write(curves=curves)
    plot(options.out)


if __name__ == "__main__":
    main()
