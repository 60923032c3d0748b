"""Route each input to one expert, and let the router learn from what that expert did.

The target is made of four planes, one in each quarter of a square. Four linear experts can fit it, if a router sends
every point to the right one. The router draws one expert for a point, and the cost is that of this expert alone::

    python docs/examples/mixture_of_experts.py --layer reinmax leave_one_out

``enumeration`` tries all experts at every point, which is exact. (These experts are rows of one matrix, so that all are
computed and one is kept; with large ones, run each on the points that were sent to it.)
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import stochastic_layers as sl

EXPERTS, BALANCE = 4, 1.0
LAYERS = ["enumeration", "leave_one_out", "straight_through", "reinmax", "gumbel_softmax"]
OPTIONS = {"leave_one_out": {"num_samples": 2}, "gumbel_softmax": {"temperature": 0.5}}


def target(x):
    """Four planes over the quarters of [-1, 1]^2: ``[..., 2]`` -> ``[...]``."""
    slopes = torch.tensor([[3.0, -1.0], [-2.0, 2.0], [1.0, 3.0], [-3.0, -2.0]])
    quarter = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()
    return (x * slopes[quarter]).sum(-1) + quarter.float() - 1.5


class Mixture(nn.Module):
    """A router, the layer that draws its choice, and linear experts."""

    def __init__(self, layer):
        super().__init__()
        self.router = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, layer.in_features))
        self.layer = layer
        self.experts = nn.Linear(2, EXPERTS)  # each row is an expert

    def forward(self, x):
        return (self.layer(self.router(x)) * self.experts(x)).sum(-1)  # [B], or [S, B] for several draws

    def imbalance(self, x):
        """KL of the share of each expert in a batch from equal shares, in nats: without it experts are left unused."""
        shares = self.layer.distribution(self.router(x)).mean.mean((0, 1))
        return (shares * (EXPERTS * shares).log()).sum()


def train(name, steps, seed):
    """A mixture whose router learned by the layer."""
    torch.manual_seed(seed)
    shape = {"latent_dim": 1, "family": "categorical", "num_categories": EXPERTS}
    model = Mixture(sl.create(name, **shape, **OPTIONS.get(name, {})))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        x = 2 * torch.rand(256, 2) - 1
        with sl.capture() as samples:
            prediction = model(x)
        cost = (prediction - target(x)).square()
        loss = sl.surrogate(cost, samples).mean() + BALANCE * model.imbalance(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main(words=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="+", default=LAYERS, choices=sl.list_layers(family="categorical"), metavar="L")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    options = parser.parse_args(words)

    axis = torch.linspace(-0.995, 0.995, 200)
    grid = torch.cartesian_prod(axis, axis)
    variance = target(grid).var()
    table = Table("layer", "variance not explained", "experts in use", title=f"{options.seeds} seeds, median and worst")
    figure, panels = plt.subplots(1, len(options.layer), figsize=(2.6 * len(options.layer), 3), squeeze=False)
    for axes, name in zip(panels[0], options.layer, strict=True):
        errors, used = [], []
        for seed in range(options.seeds):
            model = train(name, options.steps, seed).eval()
            with torch.no_grad():
                choice = model.layer.mode(model.router(grid))
                error = ((choice * model.experts(grid)).sum(-1) - target(grid)).square().mean() / variance
            errors.append(100 * float(error))
            used.append(int((choice.mean(0) > 0.05).sum()))
            if seed == 0:
                regions = choice.argmax(-1).view(200, 200).T.numpy()
                axes.imshow(regions, origin="lower", extent=(-1, 1, -1, 1), cmap="Set2", vmin=0, vmax=7)
                axes.set(title=name, xticks=[], yticks=[])
        median = sorted(errors)[len(errors) // 2]
        table.add_row(name, f"{median:.1f} %, {max(errors):.1f} %", ", ".join(map(str, used)))
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "mixture_of_experts.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    Console().print(table)


if __name__ == "__main__":
    main()
