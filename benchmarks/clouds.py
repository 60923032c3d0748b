"""How do the estimators' gradients lie around the true one? Pictures for docs/sampling-and-gradients.md.

Serves a reader's decision, not a benchmark's: with two parameters a gradient is a point in the plane, so that bias (the
distance of the cloud's centre from the true gradient) and variance (its width) can be seen.

    python benchmarks/clouds.py --folder docs/images
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import stochastic_layers as sl
from stochastic_layers import bayesian

BITS = torch.tensor([0.8, -0.5])  # logits of two bits
NORMAL = torch.tensor([0.5, -0.6])  # loc and log-variance
NUM_DRAWS = 2000
COLOR, TRUE = "#0072B2", "#D55E00"


def cost_of_bits(z: Tensor) -> Tensor:
    """A cubic of two bits ``[..., 2]`` with a constant far from zero, as a negative log-likelihood has."""
    return (z[..., 0] + 2 * z[..., 1] - 1.4) ** 3 + 6


def cost_of_number(z: Tensor) -> Tensor:
    """A quadratic of one number ``[..., 1]``, likewise."""
    return (z[..., 0] - 1.4) ** 2 + 6


def gradients(layer: sl.StochasticLayer, params: Tensor, cost: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """``n`` independent gradient estimates ``[n, in_features]``, in one pass."""
    leaf = params.expand(n, -1).clone().requires_grad_()
    sample = layer.sample(leaf)
    sample.surrogate(cost(sample.z)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def clouds(
    panels: list[tuple[str, str, dict[str, Any]]],
    params: Tensor,
    cost: Callable[[Tensor], Tensor],
    exact: Tensor,
    labels: tuple[str, str],
    latent_dim: int,
) -> Figure:
    """One panel for each estimator: draws, their mean and the true gradient, on the same axes."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    everything = []
    for ax, (title, name, options) in zip(axes, panels, strict=False):
        layer = sl.create(name, latent_dim=latent_dim, **options)
        draws = gradients(layer, params, cost, NUM_DRAWS)
        everything.append(draws)
        mean, spread = draws.mean(0), float(draws.var(0).sum() ** 0.5)
        points, counts = (draws * 1e4).round().unique(dim=0, return_counts=True)  # few outcomes: area is probability
        sizes = 500 * counts / NUM_DRAWS if len(points) < 50 else 5
        ax.scatter(*(points / 1e4).T, s=sizes, alpha=0.6 if len(points) < 50 else 0.25, color=COLOR, linewidths=0)
        ax.scatter(*exact, marker="+", s=130, linewidths=2, color=TRUE, label="true gradient", zorder=3)
        ax.scatter(*mean, marker="o", s=36, facecolors="none", edgecolors="black", label="mean of the draws", zorder=4)
        evaluations = layer.sample(params).z.shape[0]
        ax.set_title(f"{title}\n{evaluations} evaluation{'s' * (evaluations > 1)}, spread {spread:.2g}", fontsize=10)
        ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        ax.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    both = torch.cat(everything)
    low, high = both.quantile(0.004, 0), both.quantile(0.996, 0)
    pad = 0.08 * (high - low)
    axes[0].set_xlim(float((low - pad)[0]), float((high + pad)[0]))
    axes[0].set_ylim(float((low - pad)[1]), float((high + pad)[1]))
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", frameon=False, fontsize=9, ncols=2)
    return figure


def steps() -> Figure:
    """A draw as a function of the probability, for fixed noise; and the average of many."""
    figure = Figure(figsize=(6.2, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    p = torch.linspace(0, 1, 1001)
    noise = torch.rand(2000)
    draws = (noise[:, None] < p).float()
    for u in (0.2, 0.45, 0.8):
        axes[0].plot(p, (u < p).float(), linewidth=1.6, label=f"u = {u}")
    axes[0].legend(frameon=False, title="noise")
    axes[0].set(title="one draw: flat, with a jump", xlabel="probability p", ylabel="z = 1 where u < p, else 0")
    axes[1].plot(p, draws.mean(0), color=COLOR, label="mean of 2,000 draws")
    axes[1].plot(p, p, color=TRUE, linestyle="--", label="E[z] = p")
    axes[1].legend(frameon=False)
    axes[1].set(title="the expectation: smooth", xlabel="probability p")
    return figure


def flipout() -> Figure:
    """Variance of a minibatch gradient against its size, for noise that examples share or do not share."""
    classes = {
        "one draw of the weights for the batch": bayesian.ReparameterizationLinear,
        "Flipout": bayesian.FlipoutLinear,
        "local reparameterization": bayesian.LocalReparameterizationLinear,
    }
    sizes = (1, 4, 16, 64, 256, 1024)
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    ax = figure.subplots()
    x = torch.randn(max(sizes), 5)
    for (label, cls), color, marker in zip(classes.items(), (TRUE, COLOR, "#009E73"), "os^", strict=True):
        torch.manual_seed(0)  # the same means and scales for all three
        layer = cls(5, 3)
        variances = []
        for size in sizes:
            draws = []
            for _ in range(300):
                layer.zero_grad()
                (layer(x[:size]).tanh() - 0.5).square().sum(-1).mean().backward()
                grad = layer.weight.loc.grad
                assert grad is not None
                draws.append(grad.flatten().clone())
            variances.append(float(torch.stack(draws).var(0).sum()))
        ax.plot(sizes, variances, marker=marker, color=color, label=label)
    ax.set(xscale="log", yscale="log", xlabel="examples in the batch", ylabel="variance of the gradient (weight means)")
    ax.legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    """Make every picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/images"), help="where the pictures go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    exact_bits = gradients(sl.create("enumeration", latent_dim=2), BITS, cost_of_bits, 1)[0]
    # d/dloc E[(z - a)^2] = 2 (loc - a); d/dlog-variance = variance
    exact_normal = torch.stack([2 * (NORMAL[0] - 1.4), NORMAL[1].exp()])
    of_bits = ("derivative by the first logit", "derivative by the second logit")
    of_normal = ("derivative by the loc", "derivative by the log-variance")
    two = {"num_samples": 2}
    figures = {
        "steps": steps(),
        "cloud-gaussian": clouds(
            [
                ("gaussian (reparameterized)", "gaussian", {}),
                ("reinforce", "reinforce", {"family": "gaussian"}),
                ("leave_one_out", "leave_one_out", {"family": "gaussian", **two}),
            ],
            NORMAL, cost_of_number, exact_normal, of_normal, 1,
        ),
        "cloud-unbiased": clouds(
            [
                ("reinforce", "reinforce", {}),
                ("leave_one_out", "leave_one_out", two),
                ("disarm", "disarm", {}),
                ("rebar", "rebar", {}),
                ("local_expectation", "local_expectation", {}),
                ("enumeration", "enumeration", {}),
            ],
            BITS, cost_of_bits, exact_bits, of_bits, 2,
        ),
        "cloud-biased": clouds(
            [
                ("gumbel_softmax, temperature 1", "gumbel_softmax", {"family": "bernoulli", "temperature": 1.0}),
                ("gumbel_softmax, temperature 0.3", "gumbel_softmax", {"family": "bernoulli", "temperature": 0.3}),
                ("gumbel_softmax, temperature 0.1", "gumbel_softmax", {"family": "bernoulli", "temperature": 0.1}),
                ("straight_through", "straight_through", {}),
                ("reinmax", "reinmax", {}),
                ("gumbel_rao, temperature 1", "gumbel_rao", {"temperature": 1.0}),
            ],
            BITS, cost_of_bits, exact_bits, of_bits, 2,
        ),
        "flipout": flipout(),
    }  # fmt: skip
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
