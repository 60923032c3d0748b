"""Name a digit from three glimpses: where to look is a hard choice.

One network sees a digit as four grey values and chooses 3 of the 16 patches of 2x2 pixels. Another sees those patches
and nothing else, and names the digit. Patches that were not chosen were never looked at, so that the choice has to be
hard; and a hard choice has no derivative. Both networks are trained at once, by any layer::

    python docs/examples/hard_attention.py --layer leave_one_out reinmax

``leave_one_out`` gets by with the value of the loss; the others pass a gradient through the mask.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import stochastic_layers as sl
from lightning_modules.data import Digits

GLIMPSES, PATCHES = 3, 16
LAYERS = ["leave_one_out", "straight_through", "reinmax", "gumbel_softmax"]


def mask_of(z):
    """Choices ``[..., GLIMPSES * PATCHES]`` -> the pixels that are seen ``[..., 8, 8]``; multilinear in z."""
    chosen = 1 - (1 - z.unflatten(-1, (GLIMPSES, PATCHES))).prod(-2)
    return chosen.unflatten(-1, (4, 4)).repeat_interleave(2, -1).repeat_interleave(2, -2)


class Reader(nn.Module):
    """Names the digit by what the mask lets through."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x, mask):
        return self.network(torch.cat([(x * mask).flatten(-2), mask.flatten(-2)], -1))


def glance(x):
    """Digits ``[B, 8, 8]`` as four grey values ``[B, 4]``."""
    return F.avg_pool2d(x, 4).flatten(1)


def train(name, x, y, steps):
    """A layer that chooses at random where ``name`` is "random", and one that is trained otherwise."""
    several = {"num_samples": 4} if name == "leave_one_out" else {}
    layer = sl.create(
        "straight_through" if name == "random" else name,
        latent_dim=GLIMPSES,
        family="categorical",
        num_categories=PATCHES,
        **several,
    )
    attention = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, layer.in_features))
    reader = Reader()
    optimizer = torch.optim.Adam([*attention.parameters(), *reader.parameters(), *layer.parameters()], lr=3e-3)
    for _ in range(steps):
        params = attention(glance(x))
        sample = layer.sample(torch.zeros_like(params) if name == "random" else params)
        logits = reader(x, mask_of(sample.z))  # [S, B, 10]
        cost = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(sample.z)), reduction="none").view(-1, len(y))
        loss = sample.surrogate(cost).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.eval()

    @torch.no_grad()
    def look(x):
        params = attention(glance(x))
        return mask_of(layer(torch.zeros_like(params)) if name == "random" else layer.mode(params))

    return look, reader


def main(words=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", nargs="+", default=LAYERS, choices=sl.list_layers(family="categorical"), metavar="L")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture")
    options = parser.parse_args(words)

    data = Digits().load()
    x, y = data.train_pixels.squeeze(1) / 16, data.train_labels
    test_x, test_y = data.test_pixels.squeeze(1) / 16, data.test_labels
    table = Table("layer", "test accuracy", title=f"{GLIMPSES} of {PATCHES} patches")
    figure, rows = plt.subplots(1 + len(options.layer), 11, figsize=(11, 1.2 * (1 + len(options.layer))))
    for row, name in zip(rows, ["random", *options.layer], strict=True):
        torch.manual_seed(0)
        look, reader = train(name, x, y, options.steps)
        mask = look(test_x)
        with torch.no_grad():
            accuracy = (reader(test_x, mask).argmax(-1) == test_y).float().mean()
        table.add_row(name, f"{100 * accuracy:.1f} %")
        row[0].imshow(mask.mean(0).numpy(), cmap="viridis", vmin=0, vmax=1)
        row[0].set_ylabel(name, fontsize=7)
        for axes, image, seen in zip(row[1:], test_x, mask, strict=False):
            axes.imshow(image.numpy(), cmap="gray_r", alpha=0.25, vmin=0, vmax=1)
            axes.imshow(torch.where(seen > 0, image, torch.nan).numpy(), cmap="gray_r", vmin=0, vmax=1)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    rows[0][0].set_title("how often", fontsize=7)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "hard_attention.png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    Console().print(table)


if __name__ == "__main__":
    main()
