"""ELBO and gradient variance of a VAE with 200 bits on dynamic MNIST, one run for each estimator and seed.

Serves the decision which estimator to take for bits, and the check that ours have the variance that was published.

The setting is that of "Gradient Estimation with Discrete Stein Operators" (Shi, Zhou, Hwang, Titsias, Mackey, 2022):
784-200-200-200 with LeakyReLU(0.3) both ways, Glorot initialisation, batch 100, Adam 1e-3, a uniform prior that is not
trained, pixels drawn anew each time, no centring of the input and no initial bias of the output. The cost of a draw is
log q(z) - log p(x, z), whose log q is a sample too: no KL in closed form. The variance is the mean over the encoder's
parameters of E[g^2] - E[g]^2, with both moments running means of decay 0.999 (so that it contains the variance between
batches and the drift of the mean over some thousand steps), in units of the mean over the batch.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stochastic_layers as sl
from benchmarks.evidence import published
from benchmarks.evidence.mnist import batches, pixels
from benchmarks.evidence.networks import perceptron
from benchmarks.evidence.record import Record, arguments, read, save_figure, save_state

LATENTS, HIDDEN, BATCH, DECAY = 200, 200, 100, 0.999
EVERY, EVALUATED = 1000, 5000  # steps between two points of a curve; examples that the ELBO is measured on
# The estimator's options, at two evaluations of the cost, three for those that are made for three.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "disarm": {"num_samples": 2},
    "leave_one_out": {"num_samples": 2},
    "double_cv": {"num_samples": 2},
    "rodeo": {"num_samples": 2},
    "arm": {"num_samples": 2},
    "arms": {"num_samples": 3},
    "rebar": {"num_samples": 1},
    "relax": {"num_samples": 1, "control_variate": "both"},
    "straight_through": {"num_samples": 2},
    "reinmax": {"num_samples": 2},
    "gumbel_softmax": {"num_samples": 2},
}


def negative_elbo(decoder: nn.Module, x: Tensor, z: Tensor, logits: Tensor) -> Tensor:
    """log q(z | x) - log p(x, z) ``[S, B]`` in nats of z ``[S, B, L]``; linear in z between the bits."""
    output = decoder(z)
    log_likelihood = (x * output - F.softplus(output)).sum(-1)
    log_q = (z * logits - F.softplus(logits)).sum(-1)
    return log_q - log_likelihood + z.shape[-1] * math.log(2.0)


class Moments:
    """Running moments of the gradients of some parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float = DECAY) -> None:
        self.parameters, self.decay, self.weight = parameters, decay, 0.0
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]

    def update(self) -> None:
        """Count the gradients that the parameters hold now."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_lerp_(self.first, gradients, 1 - self.decay)
        torch._foreach_mul_(self.second, self.decay)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - self.decay)
        self.weight += (1 - self.decay) * (1 - self.weight)

    def variance(self, *, corrected: bool = True) -> float:
        """The mean variance; without the correction for the start it is what an average that starts at 0 shows."""
        weight = self.weight if corrected else 1.0
        pairs = zip(self.first, self.second, strict=True)
        total = sum(float((s / weight - (f / weight).square()).sum(dtype=torch.float64)) for f, s in pairs)
        return total / sum(p.numel() for p in self.parameters)


class Model(nn.Module):
    """Encoder, layer and decoder; ``temperature`` holds that of ``rebar`` and ``relax`` where it is."""

    def __init__(self, name: str, temperature: float | None = None) -> None:
        super().__init__()
        self.encoder = perceptron([784, HIDDEN, HIDDEN, LATENTS], nn.LeakyReLU(0.3))
        self.decoder = perceptron([LATENTS, HIDDEN, HIDDEN, 784], nn.LeakyReLU(0.3))
        self.layer = sl.create(name, latent_dim=LATENTS, family="bernoulli", **ESTIMATORS[name])
        if temperature is not None:
            self.layer.temperature = temperature
            self.layer.log_temperature.requires_grad_(False)

    def loss(self, x: Tensor) -> Tensor:
        """The negative ELBO ``[B]`` as the layer estimates it, with its gradient."""
        logits = self.encoder(x)
        sample = self.layer.sample(logits)
        # log q has a gradient through z only: that by its own logits is zero on average, and is left out
        return sample.surrogate(negative_elbo(self.decoder, x, sample.z, logits.detach()))

    @torch.no_grad()
    def bound(self, x: Tensor, num_samples: int) -> Tensor:
        """The importance-weighted bound ``[B]`` with exact draws; one draw gives the ELBO."""
        logits = self.encoder(x)
        z = torch.bernoulli(torch.sigmoid(logits).expand(num_samples, *logits.shape))
        weights = -negative_elbo(self.decoder, x, z, logits)
        return weights.logsumexp(0) - math.log(num_samples)


def measure(model: Model, images: Tensor, num_samples: int, chunk: int) -> float:
    """Mean bound over images, binarized now; random numbers are left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return float(torch.cat([model.bound(torch.bernoulli(x), num_samples) for x in images.split(chunk)]).mean())


def run(
    name: str,
    seed: int,
    steps: int,
    images: tuple[Tensor, Tensor],
    record: Record,
    every: int = EVERY,
    temperature: float | None = None,
) -> None:
    """Train one model and write its curve as it grows; goes on from the state beside the record if there is one."""
    torch.manual_seed(seed)
    train, test = images
    model = Model(name, temperature)
    encoder = list(model.encoder.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7, fused=True)
    moments, curve, objective = Moments(encoder), [], torch.zeros(())
    saved = record.path.with_suffix(".pt")
    start = 0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        moments.first, moments.second, moments.weight = state["first"], state["second"], state["weight"]
        torch.set_rng_state(state["random"])
        start, before = state["step"], read(record.path)
        curve = before["curve"][: state["points"]]
        record.content["resumed_at"] = [*before.get("resumed_at", []), start]
        record.started, record.started_cpu = (
            record.started - before["seconds"],
            record.started_cpu - before["cpu_seconds"],
        )
    points = {1, 100, 300} | set(range(every, steps + 1, every)) | {steps}
    # after an interruption the data come in an order of their own
    for step, x in zip(range(start + 1, steps + 1), batches(train, BATCH, seed + 1000 * start), strict=False):
        optimizer.zero_grad()
        loss = model.loss(x).sum()
        loss.backward()
        moments.update()
        optimizer.step()
        objective += loss.detach() / BATCH
        if step in points:
            last = curve[-1]["step"] if curve else 0
            point = {
                "step": step,
                "variance": moments.variance() / BATCH**2,
                "variance_uncorrected": moments.variance(corrected=False) / BATCH**2,
                "elbo": measure(model, train[:EVALUATED], 1, 500),
                "objective": -float(objective) / (step - last),
            }
            point |= {key: p.item() for key, p in model.layer.named_parameters() if p.numel() == 1}
            curve.append(point)
            objective.zero_()
            record.write(curve=curve, complete=False)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "weight": moments.weight}
            state |= {"first": moments.first, "second": moments.second, "random": torch.get_rng_state()}
            save_state(state | {"step": step, "points": len(curve)}, saved)
    record.write(test_bound_100=measure(model, test[:1000], 100, 20), complete=True)


def evaluations(name: str) -> int:
    """How often the cost is evaluated for a step: the draws, and two relaxations of each in ``rebar`` and ``relax``."""
    draws: int = ESTIMATORS[name]["num_samples"]
    return 3 * draws if name in ("rebar", "relax") else draws


def curves(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs that are there, by estimator, seeds in order; those with a temperature held are not drawn."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((out / "binary_vae").glob("*-seed*.json")):
        content = read(path)
        if content["options"].get("temperature") is None:
            found[content["options"]["estimator"]].append(content)
    return dict(found)


def plot(out: Path) -> None:
    """Variance and ELBO over steps, with the published variance on the same axes."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    colors = dict(zip(ESTIMATORS, (*plt.get_cmap("tab20").colors[::2], "black"), strict=True))
    for name, runs in sorted(curves(out).items(), key=lambda item: list(ESTIMATORS).index(item[0])):
        for number, content in enumerate(runs):
            points = content["curve"]
            steps = [p["step"] for p in points]
            label = f"{name} ({evaluations(name)})" if not number else None
            left.plot(steps, [p["variance"] for p in points], color=colors[name], label=label, linewidth=1, marker=".")
            right.plot(steps, [p["elbo"] for p in points], color=colors[name], label=label, linewidth=1, marker=".")
    for (name, _), series in published.RODEO_VARIANCE.items():
        left.plot(*zip(*series, strict=True), "o--", color=colors[name], markersize=4, linewidth=0.8)
    left.plot([], [], "ko--", markersize=4, linewidth=0.8, label="published (read off the figure)")
    left.set(
        xlabel="step",
        ylabel="gradient variance",
        yscale="log",
        ylim=(2e-5, 0.2),
        title="running variance of the encoder gradient",
    )
    right.set(xlabel="step", ylabel="ELBO (nats)", ylim=(-170, None), title="training ELBO, one exact draw")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(250, 22000)  # before, the running moments are those of a few steps
        axes.set_xticks([300, 1000, 3000, 10000, 20000], ["300", "1,000", "3,000", "10,000", "20,000"])
        axes.grid(alpha=0.3)
    left.legend(fontsize=8, ncols=2, loc="lower right")
    right.legend(fontsize=8)
    save_figure(figure, out / "binary_vae" / "curves.png")
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--estimator", choices=ESTIMATORS, nargs="+", default=["disarm"], help="run one after another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--temperature", type=float, help="hold the temperature of rebar and relax at this value")
    options: argparse.Namespace = parser.parse_args(words)
    if options.temperature is not None and not {"rebar", "relax"}.issuperset(options.estimator):
        parser.error("needed the estimators rebar and relax for --temperature; the others have none that is tuned.")
    torch.set_num_threads(1)
    if not options.plot:
        images = pixels(options.data)
        for name in options.estimator:
            single = argparse.Namespace(**{**vars(options), "estimator": name})
            held = "" if options.temperature is None else f"-temperature{options.temperature:g}"
            path = options.out / "binary_vae" / f"{name}{held}-seed{options.seed}.json"
            record = Record("binary_vae", path, single)
            run(name, options.seed, options.steps, images, record, temperature=options.temperature)
    plot(options.out)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of the whole process, so that a caller of main() is spared it
    main()
