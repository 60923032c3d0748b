"""Test log-likelihood of a VAE trained with the importance-weighted bound of K = 1, 5, 50 draws, with two gradients.

Serves the decision how many draws to take and whether DReG is worth its second backward pass, and the check that the
order of the published table comes out.

The setting is that of "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov, 2015) for one layer:
784-200-200-50 with tanh both ways, initial output bias from the pixels' mean, 59,600 training images drawn anew each
time, batch 20, the gradient summed over the batch, Adam with beta1 0.99, epsilon 1e-4 and second moments that start at
1. Their schedule has 3^(i-1) epochs at learning rate 1e-3 10^(-(i-1)/7) for i = 1..8, 3,280 epochs in all; ``--steps``
truncates it. The log-likelihood is the bound with ``--test-samples`` draws on the first ``--test-images`` test images.
DReG is that of "Doubly Reparameterized Gradient Estimators" (Tucker, Lawson, Gu, Maddison, 2018).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence import published
from benchmarks.evidence.mnist import batches, pixels
from benchmarks.evidence.networks import perceptron
from benchmarks.evidence.record import Record, arguments, read, save_figure
from lightning_modules import VAE

BATCH, TRAIN, LATENTS = 20, 59600, 50


class Encoder(nn.Module):
    """Two linear heads, the mean and the logarithm of the scale, which the layer takes as a log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(perceptron([784, 200, 200], nn.Tanh()), nn.Tanh())
        self.loc, self.log_scale = perceptron([200, LATENTS], nn.Tanh()), perceptron([200, LATENTS], nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 784]`` -> ``[B, 2 * LATENTS]``."""
        h = self.body(x)
        return torch.cat([self.loc(h), 2 * self.log_scale(h)], -1)


def build(gradient: str, num_samples: int, mean: Tensor) -> VAE:
    """The model; ``mean`` ``[784]`` sets the output's bias."""
    decoder = perceptron([LATENTS, 200, 200, 784], nn.Tanh())
    with torch.no_grad():
        decoder[-1].bias.copy_(mean.clamp(0.001, 0.999).logit())
    return VAE(
        "gaussian",
        {"latent_dim": LATENTS, "num_samples": num_samples},
        encoder=Encoder(),
        decoder=decoder,
        objective={"name": "iwae", "gradient": gradient},
        data_shape=(784,),
    )


def schedule(step: int) -> float:
    """Learning rate at a step, counted from 0."""
    epoch, stage, end = step // (TRAIN // BATCH), 1, 1
    while epoch >= end:
        stage, end = stage + 1, end + 3**stage
    return 1e-4 * round(10 ** (1 - (stage - 1) / 7), 1)


def optimizer_for(model: nn.Module) -> torch.optim.Adam:
    """Adam as in the published code: second moments start at 1, so that the first steps are small."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.99, 0.999), eps=1e-4, fused=True)
    for p in model.parameters():
        state = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
        optimizer.state[p] = state
    return optimizer


def log_likelihood(model: VAE, images: Tensor, num_samples: int) -> float:
    """Mean bound in nats on images binarized with a fixed seed; random numbers are left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.bernoulli(images)
        return float(torch.cat([model.importance_weighted_bound(part, num_samples) for part in x.split(100)]).mean())


def run(options: argparse.Namespace, images: tuple[Tensor, Tensor], record: Record) -> None:
    """Train one model and write its curve as it grows."""
    torch.manual_seed(options.seed)
    train, test = images[0], images[1][: options.test_images]
    model = build(options.gradient, options.num_samples, train.mean(0))
    optimizer, curve = optimizer_for(model), []
    for step, x in zip(range(options.steps), batches(train, BATCH, options.seed), strict=False):
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.zero_grad()
        model.loss(model.terms(x)).sum().backward()
        optimizer.step()
        done = step + 1
        if done % options.every == 0 or done == options.steps:
            point = {"step": done, "epochs": done * BATCH / TRAIN}
            curve.append(point | {"log_likelihood": log_likelihood(model, test, options.test_samples)})
            record.write(curve=curve, complete=done == options.steps)


def table(out: Path) -> list[dict[str, Any]]:
    """The last point of every run that is there, next to the published end of training."""
    rows = []
    for path in sorted((out / "iwae").glob("*.json")):
        content = read(path)
        options, last = content["options"], content["curve"][-1]
        row = {key: options[key] for key in ("gradient", "num_samples", "seed")}
        key = (options["gradient"], options["num_samples"])
        rows.append(row | last | {"published_end": published.IWAE_NLL.get(key), "cpu_seconds": content["cpu_seconds"]})
    return rows


def plot(out: Path) -> None:
    """Negative log-likelihood over epochs, and the published ends of training."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    colors, seen = {1: "tab:gray", 5: "tab:blue", 50: "tab:red"}, set()
    for path in sorted((out / "iwae").glob("*.json")):
        content = read(path)
        k, gradient = content["options"]["num_samples"], content["options"]["gradient"]
        points = [(p["epochs"], -p["log_likelihood"]) for p in content["curve"]]
        label = None if (k, gradient) in seen else f"K = {k}, {gradient}"
        style = "--" if gradient == "dreg" else "-"
        axes.plot(*zip(*points, strict=True), style, color=colors.get(k, "black"), label=label, marker=".")
        seen.add((k, gradient))
    for (gradient, k), nll in published.IWAE_NLL.items():
        if gradient == "pathwise":
            axes.axhline(nll, color=colors[k], linewidth=0.8, linestyle=":")
    axes.plot([], [], "k:", linewidth=0.8, label="published, after 3,280 epochs")
    axes.set(xlabel="epochs", ylabel="-log p(x), test (nats)", ylim=(84, 112), title="IWAE on dynamic MNIST, truncated")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save_figure(figure, out / "iwae" / "curves.png")
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--gradient", choices=("pathwise", "dreg"), default="pathwise")
    parser.add_argument("--num-samples", type=int, default=1, metavar="K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2 * TRAIN // BATCH, help="2,980 are an epoch (default: two)")
    parser.add_argument("--every", type=int, default=745, help="steps between two measurements")
    parser.add_argument("--test-samples", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=500)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    if not options.plot:
        name = f"{options.gradient}-k{options.num_samples}-seed{options.seed}.json"
        run(options, pixels(options.data, TRAIN), Record("iwae", options.out / "iwae" / name, options))
    for row in table(options.out):
        print(row)
    plot(options.out)


if __name__ == "__main__":
    main()
