"""How does the time of a layer grow with draws, batch, latents and categories? Decides what can be scaled up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import stochastic_layers as sl
from benchmarks.measure import Row, arguments, interleave, summary, write

QUESTION = "Time of one sample and its surrogate, forward and backward, over the size of one dimension; 1 is linear."
BASE = {"draws": 4, "batch": 64, "latents": 16, "categories": 32}
SIZES = {
    "draws": [2, 4, 8, 16, 32],
    "batch": [32, 64, 128, 256, 512],
    "latents": [8, 16, 32, 64, 128],
    "categories": [16, 32, 64, 128, 256],
}
LAYERS = {
    "straight_through": "categorical",
    "reinmax": "categorical",
    "gumbel_softmax": "categorical",
    "reinforce": "categorical",
    "disarm": "bernoulli",
    "gaussian": "gaussian",
}


def step(name: str, family: str, sizes: dict[str, int], device: str) -> Callable[[], object]:
    """One sample with a cost that is cheap: the sum of z."""
    options: dict[str, Any] = {"latent_dim": sizes["latents"], "family": family}
    if family == "categorical":
        options["num_categories"] = sizes["categories"]
    else:  # as many numbers in all, so that arithmetic counts and not the calls
        options["latent_dim"] *= BASE["categories"]
    options["num_samples"] = sizes["draws"]
    layer = sl.create(name, **options).to(device)
    params = torch.randn(sizes["batch"], layer.in_features, device=device, requires_grad=True)

    def work() -> None:
        sample = layer.sample(params)
        torch.autograd.grad(sample.surrogate(sample.z.sum(-1)).sum(), params)

    return work


def exponent(x: Sequence[float], t: Sequence[float]) -> float:
    """Slope of log t over log x by least squares, over the larger half of the sizes, where constants count less."""
    start = len(x) // 2
    u, v = [math.log(a) for a in x[start:]], [math.log(b) for b in t[start:]]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def main() -> None:
    """Measure and write ``scaling.json``."""
    options = arguments(QUESTION, seconds=3)
    rows, findings = [], {}
    for dimension, sizes in SIZES.items():
        for name, family in LAYERS.items():
            if dimension == "categories" and family != "categorical":
                continue
            cases = {str(n): step(name, family, {**BASE, dimension: n}, options.device) for n in sizes}
            times = interleave(cases, seconds=options.seconds, device=options.device, min_rounds=7)
            new = [Row(dimension, name, "s", *summary(values), len(values), x=float(n)) for n, values in times.items()]
            rows += new
            key = f"exponent of {dimension}, {name}"
            findings[key] = round(exponent(sizes, [row.median for row in new]), 3)
            print(f"{key:48s} {findings[key]:6.3f}", flush=True)
    print(write("scaling", QUESTION, rows, device=options.device, findings=findings, folder=options.folder))


if __name__ == "__main__":
    main()
