"""Variance of score-function, pathwise and measure-valued gradients of three one-dimensional Gaussian integrals.

Serves the decision which estimator to take for continuous latents, and the check that our layers have the variance that
the theory gives.

The setting is that of section 3 of "Monte Carlo Gradient Estimation in Machine Learning" (Mohamed, Rosca, Figurnov,
Mnih, 2019): x ~ N(1, 1), costs (x - k)^2, exp(-k x^2), cos(k x), gradients by the mean and by the standard deviation.
Lines are numerical integrals of the variance, as in the paper; marks are the layers' own gradients, whose variance is
measured over ``--draws`` draws. ``optimal_baseline`` is the score function less the constant of least variance.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stochastic_layers as sl
from benchmarks.evidence.record import Record, arguments, read, save_figure

Cost = Callable[[Tensor, float], Tensor]
MEAN = 1.0
COSTS: dict[str, tuple[Cost, list[float]]] = {
    "(x - k)^2": (lambda x, k: (x - k).square(), np.linspace(-3.0, 3.0, 13).tolist()),
    "exp(-k x^2)": (lambda x, k: torch.exp(-k * x.square()), np.logspace(-1, 1, 13).tolist()),
    "cos(k x)": (lambda x, k: torch.cos(k * x), np.logspace(math.log10(0.5), math.log10(5), 13).tolist()),
}
BY = ("mean", "scale")
ESTIMATORS = ("score_function", "optimal_baseline", "pathwise", "measure_valued")


class Constant(sl.Baseline):
    """A fixed number as baseline."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, cost: Tensor, context: Tensor) -> Tensor:
        return cost.new_tensor(self.value)


def hermite(size: int = 180) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(e) for e ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(size)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def integrals(cost: Cost, k: float) -> dict[str, dict[str, float]]:
    """Variance of each estimator by numerical integration, and the gradient and the optimal baselines."""
    e, weight = hermite()
    x = (MEAN + e).requires_grad_()
    f = cost(x, k)
    (slope,) = torch.autograd.grad(f.sum(), x)
    f = f.detach()
    result: dict[str, dict[str, float]] = {name: {} for name in (*ESTIMATORS, "gradient", "baseline")}
    for by, score, path in (("mean", e, torch.ones_like(e)), ("scale", e.square() - 1, e)):

        def mean(values: Tensor) -> float:
            return float((weight * values).sum())

        gradient = mean(f * score)
        baseline = mean(f * score.square()) / mean(score.square())
        result["gradient"][by], result["baseline"][by] = gradient, baseline
        result["score_function"][by] = mean((f * score).square()) - gradient**2
        result["optimal_baseline"][by] = mean(((f - baseline) * score).square()) - gradient**2
        result["pathwise"][by] = mean((slope * path).square()) - gradient**2
    # the mean: W of density w exp(-w^2 / 2); the scale: M of density m^2 exp(-m^2 / 2) / sqrt(2 pi), U uniform
    w = torch.linspace(0, 12, 20001, dtype=torch.float64)
    difference = (cost(MEAN + w, k) - cost(MEAN - w, k)) / math.sqrt(2 * math.pi)
    square = torch.trapezoid(w * (-w.square() / 2).exp() * difference.square(), w)
    result["measure_valued"]["mean"] = float(square) - result["gradient"]["mean"] ** 2
    m = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    u = (torch.arange(400, dtype=torch.float64).unsqueeze(-1) + 0.5) / 400
    difference = cost(MEAN + m, k) - cost(MEAN + u * m, k)
    density = m.square() * (-m.square() / 2).exp() / math.sqrt(2 * math.pi)
    square = torch.trapezoid(density * difference.square(), m, dim=-1).mean()
    result["measure_valued"]["scale"] = float(square) - result["gradient"]["scale"] ** 2
    return result


def measured(layer: sl.StochasticLayer, cost: Cost, k: float, draws: int) -> dict[str, list[float]]:
    """By mean and scale: the layer's mean gradient, its variance, and the standard errors of both."""
    params = torch.tensor([MEAN, 0.0], dtype=torch.float64).repeat(draws, 1).requires_grad_()
    sample = layer.sample(params)
    (gradient,) = torch.autograd.grad(sample.surrogate(cost(sample.z.squeeze(-1), k)).sum(), params)
    gradient = gradient * torch.tensor([1.0, 2.0], dtype=torch.float64)  # d log variance = 2 d scale at scale 1
    mean, variance = gradient.mean(0), gradient.var(0)
    error = (gradient - mean).square().var(0).sqrt() / draws**0.5
    numbers = torch.stack([mean, (variance / draws).sqrt(), variance, error]).T.tolist()
    return dict(zip(BY, numbers, strict=True))


def points(draws: int) -> list[dict[str, Any]]:
    """One row for each cost, k, derivative and estimator."""
    rows = []
    for name, (cost, ks) in COSTS.items():
        for k in ks:
            exact = integrals(cost, k)
            for estimator in ESTIMATORS:
                for by in BY:
                    layer = _layer(estimator, exact["baseline"][by])
                    mean, mean_error, variance, variance_error = measured(layer, cost, k, draws)[by]
                    row = {"cost": name, "k": k, "by": by, "estimator": estimator, "variance": variance}
                    row |= {"variance_error": variance_error, "integral": exact[estimator][by]}
                    row |= {"mean": mean, "mean_error": mean_error, "gradient": exact["gradient"][by]}
                    rows.append(row)
    return rows


def _layer(estimator: str, baseline: float) -> sl.StochasticLayer:
    if estimator in ("score_function", "optimal_baseline"):
        value = Constant(baseline if estimator == "optimal_baseline" else 0.0)
        return sl.create("reinforce", latent_dim=1, family="gaussian", num_samples=1, baseline=value)
    return sl.create(estimator, latent_dim=1, family="gaussian")


def plot(out: Path) -> None:
    """Variance over k, integrals as lines and layers as marks."""
    import matplotlib.pyplot as plt

    rows = read(out / "monte_carlo_integrals.json")["rows"]
    figure, panels = plt.subplots(2, len(COSTS), figsize=(15, 8))
    for (column, name), (line, by) in ((c, r) for c in enumerate(COSTS) for r in enumerate(BY)):
        axes = panels[line][column]
        for color, estimator in enumerate(ESTIMATORS):
            chosen = [r for r in rows if (r["cost"], r["by"], r["estimator"]) == (name, by, estimator)]
            k = [r["k"] for r in chosen]
            axes.plot(k, [r["integral"] for r in chosen], color=f"C{color}", linewidth=1)
            variance, error = [r["variance"] for r in chosen], [2 * r["variance_error"] for r in chosen]
            axes.errorbar(k, variance, error, fmt=".", color=f"C{color}", label=estimator)
        axes.set(yscale="log", xscale="linear" if column == 0 else "log", xlabel="k", title=f"{name}, by the {by}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylim(0.1, 1e3)  # the variance is 0 at k = 1
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, out / "monte_carlo_integrals.png")
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--draws", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=0)
    options: argparse.Namespace = parser.parse_args(words)
    torch.set_num_threads(1)
    if not options.plot:
        torch.manual_seed(options.seed)
        record = Record("monte_carlo_integrals", options.out / "monte_carlo_integrals.json", options)
        rows = points(options.draws)
        noisy = [r for r in rows if r["integral"] > 1e-20]  # a variance that is zero by theory is rounding alone
        variance = max(abs(r["variance"] - r["integral"]) / r["variance_error"] for r in noisy)
        mean = max(abs(r["mean"] - r["gradient"]) / r["mean_error"] for r in noisy)
        deviations = {"variance": variance, "mean": mean, "comparisons": len(noisy)}
        record.write(rows=rows, largest_deviations_in_standard_errors=deviations)
    plot(options.out)


if __name__ == "__main__":
    main()
