"""Find a good design through a simulator that has no gradient.

A cut of a graph is a bit for each of its 16 nodes; its value is what a function in plain Python returns, which autograd
knows nothing of. One logit for each bit is the whole model. All estimators get the same number of simulations::

    python docs/examples/black_box_design.py --layer reinforce disarm arms

With 16 bits all designs can be tried, so that the best one is known.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import stochastic_layers as sl

NODES = 16
LAYERS = ["reinforce", "leave_one_out", "disarm", "arms", "local_expectation"]
OPTIONS = {"leave_one_out": {"num_samples": 4}, "disarm": {"num_samples": 4}, "arms": {"num_samples": 4}}


class Simulator:
    """The value of cuts of a random graph, in NumPy, and how often it was asked for."""

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        weights = np.triu(random.random((NODES, NODES)) * (random.random((NODES, NODES)) < 0.5), 1)
        self.weights, self.calls = weights, 0

    def __call__(self, bits):
        """Bits ``[N, NODES]`` -> weight of the edges between the two sides ``[N]``."""
        self.calls += len(bits)
        return (self.weights * (bits[:, :, None] != bits[:, None, :])).sum((1, 2))

    def best(self):
        """The largest value of all 2^16 designs; by symmetry the first bit may be 0."""
        designs = (np.arange(2 ** (NODES - 1))[:, None] >> np.arange(NODES)) & 1
        return max(self(part).max() for part in np.array_split(designs, 64))


def search(name, simulator, budget, seed):
    """Pairs (simulations so far, mean value of the designs drawn) and the best value that was seen."""
    torch.manual_seed(seed)
    layer = sl.create(name, latent_dim=NODES, **OPTIONS.get(name, {}))
    logits = nn.Parameter(0.01 * torch.randn(1, NODES))
    optimizer = torch.optim.Adam([logits], lr=0.1)
    simulator.calls, curve, best = 0, [], 0.0
    while simulator.calls < budget:
        sample = layer.sample(logits)
        values = simulator(sample.z.detach().flatten(0, 1).numpy())
        cost = -torch.from_numpy(values).float().view(-1, 1)  # [S, 1]
        loss = sample.surrogate(cost).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        best = max(best, values.max())
        curve.append((simulator.calls, -loss.item()))
    return curve, best


def main(words=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    black_boxes = sl.list_layers(family="bernoulli", needs="cost")
    parser.add_argument("--layer", nargs="+", default=LAYERS, choices=black_boxes, metavar="L")
    parser.add_argument("--budget", type=int, default=2000, help="simulations of one run")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    options = parser.parse_args(words)

    simulator = Simulator()
    optimum = simulator.best()
    title = f"share of the best cut ({optimum:.2f}), {options.seeds} seeds"
    table = Table("layer", "mean of the last designs", "best design seen", "runs that saw the best", title=title)
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in options.layer:
        runs = [search(name, simulator, options.budget, seed) for seed in range(options.seeds)]
        x = [calls for calls, _ in runs[0][0]]
        width = max(1, len(x) // 20)
        curves = np.array([[value for _, value in curve] for curve, _ in runs]) / optimum
        best = np.array([best for _, best in runs]) / optimum
        last = f"{curves[:, -width:].mean():.3f}"
        table.add_row(name, last, f"{best.mean():.3f}", f"{(best > 1 - 1e-6).sum()} of {options.seeds}")
        smooth = np.apply_along_axis(np.convolve, 1, curves, np.ones(width) / width, "valid").mean(0)
        axes.plot(x[width - 1 :], smooth, label=name)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="simulations", ylabel="value of the designs drawn / optimum")
    axes.grid(alpha=0.3)
    axes.legend()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "black_box_design.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    Console().print(table)


if __name__ == "__main__":
    main()
