"""The setting of ``binary_vae`` for a million steps, with the seeds stacked in one batched model: made for one GPU.

Serves the same decision as ``binary_vae``, at the ends of the published tables (DisARM, Double CV, RODEO: ELBO and
gradient variance after 1,000,000 steps, 5 seeds).

These networks are far too small for a GPU: a step is bound by the launch of its kernels. So the weights of all seeds
are one tensor ``[seeds, in, out]``, a step is one batched product per layer, and on a GPU the step is compiled and
replayed as a CUDA graph (``--compile``). Every seed has its own data, noise, layer and moments, so that a seed means
what it means alone. Layers without parameters and statistics of their own are called once for all seeds; the others
once for each.

It runs anywhere; on a CPU, ``--steps 20`` takes seconds. It has not been run to its end.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stochastic_layers as sl
from benchmarks.evidence.binary_vae import BATCH, DECAY, ESTIMATORS, HIDDEN, LATENTS
from benchmarks.evidence.mnist import pixels
from benchmarks.evidence.record import Record, arguments
from benchmarks.measure import refuse_missing_gpu


class StackedLinear(nn.Module):
    """One linear map for each seed: ``[R, N, in]`` -> ``[R, N, out]``."""

    def __init__(self, seeds: int, before: int, after: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (before + after))  # Glorot
        self.weight = nn.Parameter(torch.empty(seeds, before, after).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(seeds, 1, after))

    def forward(self, x: Tensor) -> Tensor:
        """All seeds in one batched product."""
        return torch.baddbmm(self.bias, x, self.weight)


def network(seeds: int, sizes: Sequence[int]) -> nn.Sequential:
    """A stacked perceptron with LeakyReLU(0.3)."""
    modules: list[nn.Module] = []
    for before, after in pairwise(sizes):
        modules += [StackedLinear(seeds, before, after), nn.LeakyReLU(0.3)]
    return nn.Sequential(*modules[:-1])


class StackedVAE(nn.Module):
    """R independent models of ``binary_vae``."""

    def __init__(self, name: str, seeds: int) -> None:
        super().__init__()
        self.encoder = network(seeds, [784, HIDDEN, HIDDEN, LATENTS])
        self.decoder = network(seeds, [LATENTS, HIDDEN, HIDDEN, 784])
        layers = [sl.create(name, latent_dim=LATENTS, family="bernoulli", **ESTIMATORS[name]) for _ in range(seeds)]
        stateless = not list(layers[0].parameters()) and not list(layers[0].buffers())
        self.layers = nn.ModuleList(layers[:1] if stateless else layers)

    def cost(self, z: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        """log q(z | x) - log p(x, z) ``[S, R, B]`` of z ``[S, R, B, L]``."""
        draws, seeds, batch, _ = z.shape
        output = self.decoder(z.transpose(0, 1).reshape(seeds, draws * batch, -1))
        output = output.view(seeds, draws, batch, -1).transpose(0, 1)
        log_likelihood = (x * output - F.softplus(output)).sum(-1)
        log_q = (z * logits - F.softplus(logits)).sum(-1)
        return log_q - log_likelihood + LATENTS * math.log(2.0)

    def forward(self, x: Tensor) -> Tensor:
        """The negative ELBO ``[R, B]`` of data ``[R, B, 784]``, with its gradient."""
        logits = self.encoder(x)
        if len(self.layers) == 1:
            sample = self.layers[0].sample(logits)
            return sample.surrogate(self.cost(sample.z, x, logits.detach()))
        samples = [layer.sample(part) for layer, part in zip(self.layers, logits.unbind(), strict=True)]
        cost = self.cost(torch.stack([s.z for s in samples], 1), x, logits.detach())
        return torch.stack([s.surrogate(c) for s, c in zip(samples, cost.unbind(1), strict=True)])


class Moments:
    """Running moments of the encoder's gradients, as tensors that a graph updates in place; one variance per seed."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]

    def update(self) -> None:
        """Count the gradients that the parameters hold now."""
        for p, first, second in zip(self.parameters, self.first, self.second, strict=True):
            assert p.grad is not None
            first.lerp_(p.grad, 1 - DECAY)
            second.lerp_(p.grad.square(), 1 - DECAY)

    def variance(self, step: int) -> list[float]:
        """The mean variance ``[R]``, corrected for the start of the averages."""
        weight = 1 - DECAY**step
        pairs = zip(self.first, self.second, strict=True)
        total = torch.stack([(s / weight - (f / weight).square()).flatten(1).double().sum(1) for f, s in pairs]).sum(0)
        return (total / sum(p[0].numel() for p in self.parameters)).tolist()


def run(options: argparse.Namespace, record: Record) -> None:
    """Train, and write a point of the curve every ``--every`` steps."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    images = pixels(options.data)[0].to(device)
    model = StackedVAE(options.estimator, options.seeds).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7, fused=True)
    moments, loss_of, curve = Moments(list(model.encoder.parameters())), model, []
    if options.compile:
        torch._dynamo.config.trace_autograd_ops = True
        loss_of = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    total = torch.zeros(options.seeds, device=device)
    for step in range(1, options.steps + 1):
        index = torch.randint(len(images), (options.seeds, BATCH), device=device)  # with replacement, by its cost
        loss = loss_of(torch.bernoulli(images[index])).sum(-1)
        optimizer.zero_grad()
        loss.sum().backward()
        moments.update()
        optimizer.step()
        total += loss.detach() / BATCH
        if step % options.every == 0 or step == options.steps:
            since = step - (curve[-1]["step"] if curve else 0)
            variance = [v / BATCH**2 for v in moments.variance(step)]
            curve.append({"step": step, "variance": variance, "objective": (-total / since).tolist()})
            total.zero_()
            record.write(curve=curve, device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--estimator", choices=ESTIMATORS, default="disarm")
    parser.add_argument("--seed", type=int, default=0, help="seed of all the stacked runs together")
    parser.add_argument("--seeds", type=int, default=5, help="number of stacked runs")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    options = parser.parse_args(words)
    refuse_missing_gpu(parser, options.device)
    run(options, Record("million_steps", options.out / "million_steps" / f"{options.estimator}.json", options))


if __name__ == "__main__":
    main()
