"""Training ELBO of a VAE with 4 variables of 8 categories on grey MNIST, one run for each estimator and seed.

Serves the decision between estimators for categories: what is the bias of each worth, once training has ended?

The setting is that of "Bridging Discrete and Backpropagation: Straight-Through and Beyond" (Liu, Dong, Liu, Yu, Gao,
2023) at "8x4": 784-512-256-32 and back with ReLU, all 60,000 training images with grey pixels as targets of the
cross-entropy (so that this is no likelihood, and comparable to nothing but itself), closed-form KL to the uniform
prior, batch 100, Adam, 160 epochs. The figure is the mean of the negative ELBO over the steps of an epoch, with one
draw each. Published with ReinMax are its learning rate, 5e-4, and its temperature, 1.3; those of the others were
searched for and are not given. Here they have the same rate, and temperature 1. ``unordered_set``, not in the paper, is
the best unbiased layer of :mod:`benchmarks.evidence.categorical_gradient`, at four evaluations.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stochastic_layers as sl
from benchmarks.evidence import published
from benchmarks.evidence.mnist import batches, pixels
from benchmarks.evidence.record import Record, arguments, read, save_figure, save_state

CATEGORIES, LATENTS, BATCH, IMAGES = 8, 4, 100, 60000
SHAPE: dict[str, Any] = {"latent_dim": LATENTS, "family": "categorical", "num_categories": CATEGORIES}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "reinmax": {"temperature": 1.3},
    "straight_through": {},
    "straight_through_gumbel": {"temperature": 1.0},
    "gapped_straight_through": {"temperature": 1.0, "gap": 1.0},
    "gumbel_rao": {"temperature": 1.0, "num_replicates": 100},
    "unordered_set": {"num_samples": 4},
}


def network(sizes: Sequence[int]) -> nn.Sequential:
    """A perceptron with ReLU, torch's own initialisation."""
    modules: list[nn.Module] = []
    for before, after in pairwise(sizes):
        modules += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Model(nn.Module):
    """Encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = network([784, 512, 256, CATEGORIES * LATENTS])
        self.decoder = network([CATEGORIES * LATENTS, 256, 512, 784])

    def cost(self, z: Tensor, x: Tensor) -> Tensor:
        """Cross-entropy in nats ``[..., B]`` of draws ``[..., B, 32]`` and grey pixels ``[B, 784]``."""
        output = self.decoder(z)
        return (F.softplus(output) - x * output).sum(-1)

    def loss(self, layer: sl.StochasticLayer, x: Tensor) -> Tensor:
        """The negative ELBO ``[B]`` as the layer estimates it, with its gradient."""
        logits = self.encoder(x)
        sample = layer.sample(logits)
        log_q = logits.unflatten(-1, (LATENTS, CATEGORIES)).log_softmax(-1)
        kl = (log_q.exp() * (log_q + math.log(CATEGORIES))).sum((-2, -1))
        return sample.surrogate(self.cost(sample.z, x)) + kl


def state_path(out: Path, name: str, seed: int) -> Path:
    """Where the weights of a trained model are."""
    return out / "categorical_vae" / f"{name}-seed{seed}.pt"


def run(name: str, seed: int, epochs: int, images: tuple[Tensor, Tensor], record: Record) -> None:
    """Train one model; write its curve as it grows, and its weights at the end."""
    torch.manual_seed(seed)
    train, test = images
    model, layer = Model(), sl.create(name, **SHAPE, **ESTIMATORS[name])
    optimizer = torch.optim.Adam([*model.parameters(), *layer.parameters()], lr=5e-4, fused=True)
    data, curve = batches(train, BATCH, seed, binarize=False), []
    steps = max(1, len(train) // BATCH)
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), dtype=torch.float64)
        for x in islice(data, steps):
            optimizer.zero_grad()
            loss = model.loss(layer, x).mean()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        with torch.no_grad(), torch.random.fork_rng():
            layer.eval()
            torch.manual_seed(0)
            held_out = torch.cat([model.loss(layer, x) for x in test.split(500)]).mean()
            layer.train()
        curve.append({"epoch": epoch, "training": float(total) / steps, "test": float(held_out)})
        record.write(curve=curve, complete=epoch == epochs)
    save_state(model.state_dict(), record.path.with_suffix(".pt"))


def curves(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs that are there, by estimator, seeds in order."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((out / "categorical_vae").glob("*-seed*.json")):
        content = read(path)
        found[content["options"]["estimator"]].append(content)
    return dict(found)


def plot(out: Path) -> None:
    """The negative ELBO over epochs, with its published ends."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    colors = {name: f"C{number}" for number, name in enumerate(ESTIMATORS)}
    found = curves(out)
    for name, runs in sorted(found.items(), key=lambda item: list(ESTIMATORS).index(item[0])):
        for number, content in enumerate(runs):
            line = [(p["epoch"], p["training"]) for p in content["curve"]]
            label = None if number else name
            axes.plot(*zip(*line, strict=True), color=colors[name], label=label, linewidth=1)
    for name in found.keys() & published.CATEGORICAL_VAE.keys():
        value = published.CATEGORICAL_VAE[name]
        axes.plot(160, value, "D", color=colors[name], markersize=6, markeredgecolor="black", clip_on=False, zorder=3)
    axes.plot([], [], "D", color="white", markeredgecolor="black", label="published, mean of 10 seeds")
    axes.set(xlabel="epoch", ylabel="negative ELBO, training (nats)", ylim=(118, 160), xlim=(0, 165))
    axes.set_title("4 variables of 8 categories, grey MNIST")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, out / "categorical_vae" / "curves.png")
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--estimator", choices=ESTIMATORS, nargs="+", default=["reinmax"], help="run one after another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=160)
    options: argparse.Namespace = parser.parse_args(words)
    torch.set_num_threads(1)
    if not options.plot:
        images = pixels(options.data, IMAGES)
        for name in options.estimator:
            single = argparse.Namespace(**{**vars(options), "estimator": name})
            path = state_path(options.out, name, options.seed).with_suffix(".json")
            run(name, options.seed, options.epochs, images, Record("categorical_vae", path, single))
    plot(options.out)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of the whole process, so that a caller of main() is spared it
    main()
