"""E[(b - t)^2] for one bit b: the toy of the REBAR (t = 0.45) and RELAX (t = 0.499) papers.

Serves the check that REINFORCE, REBAR and RELAX behave as published; it does not separate modern estimators.

The setting is that of "Backpropagation through the Void" (Grathwohl, Choi, Wu, Roeder, Duvenaud, 2017): one logit that
starts at 0, one draw, Adam 0.01 for the logit and for the control variate, 10,000 steps (3,000 for t = 0.45). The loss
is the exact E[(b - t)^2] at the current logit, less t^2 where b = 0 is right. The layers ``rebar`` and ``relax`` are
the library's, with its own defaults: REBAR starts at temperature 0.5, RELAX's control variate is a network alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stochastic_layers as sl
from benchmarks.evidence import published
from benchmarks.evidence.record import Record, arguments, read, save_figure

STEPS = {0.45: 3000, 0.499: 10000}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "enumeration": {},
    "reinforce": {"baseline": None},
    "leave_one_out": {"num_samples": 2},
    "disarm": {"num_samples": 2},
    "rebar": {},
    "relax": {"hidden_features": 10},
}
TRAINED = ("rebar", "relax")  # layers with parameters of their own: one layer for each seed, not one for all


def exact(logits: Tensor, target: float) -> Tensor:
    """E[(b - t)^2], elementwise."""
    p = torch.sigmoid(logits)
    return p * (1 - target) ** 2 + (1 - p) * target**2


def run(name: str, target: float, seed: int, repeats: int, steps: int, every: int) -> list[dict[str, Any]]:
    """``repeats`` independent logits side by side; the losses and the mean squared error of the gradient."""
    torch.manual_seed(seed)
    layer = sl.create(name, latent_dim=1, family="bernoulli", **ESTIMATORS[name])
    logits = torch.zeros(repeats, 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits, *layer.parameters()], lr=0.01, fused=True)
    curve, deviation = [], torch.zeros(())
    for step in range(steps + 1):
        if step % every == 0:
            losses = exact(logits.detach(), target).flatten()
            point = {"step": step, "losses": losses.tolist()}
            if step:
                point["mean_squared_deviation"] = float(deviation) / every
            curve.append(point)
            deviation.zero_()
        optimizer.zero_grad()
        sample = layer.sample(logits)
        sample.surrogate((sample.z - target).square().squeeze(-1)).sum().backward()
        p = torch.sigmoid(logits.detach())
        assert logits.grad is not None
        deviation += (logits.grad - p * (1 - p) * (1 - 2 * target)).square().mean()
        optimizer.step()
    return curve


def merged(curves: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean, standard error and count of the loss over all seeds, and the mean variance."""
    points = []
    for same in zip(*curves, strict=True):
        losses = torch.tensor([loss for p in same for loss in p["losses"]], dtype=torch.float64)
        spread = float(losses.std()) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
        point = {"step": same[0]["step"], "loss": float(losses.mean()), "standard_error": spread, "runs": len(losses)}
        if "mean_squared_deviation" in same[0]:
            point["variance"] = sum(p["mean_squared_deviation"] for p in same) / len(same)
        points.append(point)
    return points


def plot(out: Path) -> None:
    """The loss over steps for both targets, with the published curves as marks."""
    import matplotlib.pyplot as plt

    content = read(out / "one_bit_toy.json")
    figure, panels = plt.subplots(1, len(content["curves"]), figsize=(13, 5), squeeze=False)
    for axes, (target, curves) in zip(panels[0], content["curves"].items(), strict=True):
        for color, (name, curve) in enumerate(curves.items()):
            steps, losses = [p["step"] for p in curve], [p["loss"] for p in curve]
            low = [p["loss"] - 2 * p["standard_error"] for p in curve]
            high = [p["loss"] + 2 * p["standard_error"] for p in curve]
            axes.plot(steps, losses, color=f"C{color}", label=f"{name} ({curve[0]['runs']} runs)", linewidth=1)
            axes.fill_between(steps, low, high, color=f"C{color}", alpha=0.2)
            marks = published.ONE_BIT_LOSS[target].get(name, [])
            axes.scatter([m[0] for m in marks], [m[1] for m in marks], color=f"C{color}", zorder=3, s=18)
        axes.scatter([], [], color="black", s=18, label="published (single runs)")
        axes.set(xlabel="step", ylabel="exact loss", title=f"E (b - {target})$^2$; bands: two standard errors")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, out / "one_bit_toy.png")
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=100, help="runs of layers without parameters of their own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of those that have some")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=[], help="default: all; others are kept")
    parser.add_argument("--shorten", type=int, default=1, help="divide the number of steps by this")
    options: argparse.Namespace = parser.parse_args(words)
    torch.set_num_threads(1)
    if not options.plot:
        path = options.out / "one_bit_toy.json"
        curves: dict[str, dict[str, Any]] = read(path)["curves"] if options.estimators and path.is_file() else {}
        record = Record("one_bit_toy", path, options)
        for target, total in STEPS.items():
            steps = total // options.shorten
            for name in options.estimators or ESTIMATORS:
                seeds, repeats = (options.seeds, 1) if name in TRAINED else ([0], options.repeats)
                runs = [run(name, target, seed, repeats, steps, max(1, steps // 20)) for seed in seeds]
                curves.setdefault(str(target), {})[name] = merged(runs)
                record.write(curves=curves)
    plot(options.out)


if __name__ == "__main__":
    main()
