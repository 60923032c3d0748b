"""Find the five columns out of fifty that matter, by gates that pay for being open.

Every column of a table has a gate. The loss is the error of the prediction plus a price for each gate that may open, so
that gates of useless columns close. Gates are drawn for each row, and are 0 or 1, or (``hard_concrete``) mostly so::

    python docs/examples/feature_selection.py --layer hard_concrete disarm reinmax

Where it is known how many columns may be used, no price is needed: the layer chooses exactly so many::

    python docs/examples/feature_selection.py --exactly 5
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import stochastic_layers as sl

COLUMNS, USEFUL, PRICE = 50, 5, 0.05
LAYERS = ["hard_concrete", "disarm", "straight_through", "reinmax", "gumbel_softmax"]
CHOOSERS = ["leave_one_out", "double_cv", "straight_through"]
OPTIONS = {"gumbel_softmax": {"family": "bernoulli", "temperature": 0.5}}


def table_of(rows, generator):
    """Columns ``[N, 50]``, neighbours correlated, and a target of the first five ``[N]`` with a little noise."""
    noise = torch.randn(rows, COLUMNS + 1, generator=generator)
    x = 0.8 * noise[:, 1:] + 0.6 * noise[:, :-1]
    y = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + x[:, 3].abs() - x[:, 4]
    return x, y + 0.1 * torch.randn(rows, generator=generator)


def chance_of_being_open(layer, logits):
    """P(gate > 0) of each column ``[COLUMNS]``, with its gradient."""
    q = layer.distribution(logits)
    return 1 - q.base_dist.log_prob_zero.exp() if layer.family.name == "hard_concrete" else q.mean.flatten()


def gates_of(name, exactly):
    """A layer with a gate for each column, or one that chooses a number of them, and the price of a gate."""
    if exactly is None:
        return sl.create(name, latent_dim=COLUMNS, **OPTIONS.get(name, {})), PRICE
    family = {"name": "subset", "size": exactly}
    return sl.create(name, latent_dim=1, num_categories=COLUMNS, family=family), 0.0


def train(name, steps, seed, exactly=None):
    """Gates ``[COLUMNS]``, the chance that each is open, and the share of the variance that is not explained."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = table_of(2000, generator)
    layer, price = gates_of(name, exactly)
    logits = nn.Parameter(torch.full((COLUMNS,), 1.0))
    network = nn.Sequential(nn.Linear(COLUMNS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    groups = [{"params": network.parameters(), "lr": 2e-3}, {"params": [logits, *layer.parameters()], "lr": 0.02}]
    optimizer = torch.optim.Adam(groups)
    for _ in range(steps):
        rows = torch.randint(len(x), (200,))
        sample = layer.sample(logits.expand(200, -1))
        cost = (network(sample.z * x[rows]).squeeze(-1) - y[rows]).square()
        loss = sample.surrogate(cost).mean() + price * chance_of_being_open(layer, logits).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test_x, test_y = table_of(2000, generator)
    with torch.no_grad():
        gates = layer.mode(logits)
        error = (network(gates * test_x).squeeze(-1) - test_y).square().mean() / test_y.var()
        return gates, chance_of_being_open(layer, logits.detach()), float(error)


def main(words=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gates = sorted({*sl.list_layers(family="bernoulli"), "hard_concrete"})
    parser.add_argument("--layer", nargs="+", choices=gates, metavar="L")
    parser.add_argument("--exactly", type=int, metavar="K", help="choose K columns, instead of gates that have a price")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    options = parser.parse_args(words)

    names = options.layer or (LAYERS if options.exactly is None else CHOOSERS)
    if options.exactly is not None and (wrong := set(names) - set(sl.list_layers(family="subset"))):
        parser.error(f"needed layers that choose subsets, got {sorted(wrong)}: {sl.list_layers(family='subset')}")
    title = f"{USEFUL} of {COLUMNS} columns matter; {options.seeds} seeds"
    table = Table("layer", "useful columns kept", "others kept", "test variance not explained", title=title)
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(names) + 1))
    pictures = []
    for name in names:
        runs = [train(name, options.steps, seed, options.exactly) for seed in range(options.seeds)]
        kept = [gates > 0 for gates, _, _ in runs]
        useful = ", ".join(str(int(k[:USEFUL].sum())) for k in kept)
        others = ", ".join(str(int(k[USEFUL:].sum())) for k in kept)
        table.add_row(name, useful, others, ", ".join(f"{100 * error:.0f} %" for _, _, error in runs))
        pictures.append(torch.stack([chance for _, chance, _ in runs]).mean(0))
    image = axes.imshow(torch.stack(pictures).numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=f"column (the first {USEFUL} matter)", title="chance that the gate is open")
    figure.colorbar(image)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "feature_selection.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    Console().print(table)


if __name__ == "__main__":
    main()
