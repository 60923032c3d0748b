"""What does an estimator cost beyond its evaluations of the network and its draws? Decides which one is affordable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import stochastic_layers as sl
from benchmarks.measure import Row, arguments, interleave, summary, write

QUESTION = (
    "A training step of each estimator on a decoder 200-200-784 with 100 examples, against the decoder alone, forward "
    "and backward at as many points, plus as many draws as the layer says it evaluates."
)
BATCH, OPTIONS = 100, {"bernoulli": {"latent_dim": 200}, "categorical": {"latent_dim": 20, "num_categories": 10}}


def _decoder(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(200, 200), nn.LeakyReLU(), nn.Linear(200, 784)).to(device)


def _cost(decoder: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    output = decoder(z)
    return nn.functional.binary_cross_entropy_with_logits(output, x.expand_as(output), reduction="none").sum(-1)


def step(name: str, family: str, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One training step of a layer, and the work that it cannot do without."""
    layer = sl.create(name, family=family, **OPTIONS[family]).to(device)
    decoder, x = _decoder(device), torch.rand(BATCH, 784, device=device).round()
    params = torch.randn(BATCH, layer.in_features, device=device, requires_grad=True)
    trained = [params, *decoder.parameters(), *layer.parameters()]

    def ours() -> None:
        for tensor in trained:
            tensor.grad = None
        sample = layer.sample(params)
        sample.surrogate(_cost(decoder, sample.z, x)).mean().backward()

    shape, needs_slope = layer.sample(params).z.shape, "cost_gradient" in layer.needs
    q = layer.family.distribution(params.detach())

    def least() -> None:
        for tensor in trained:
            tensor.grad = None
        z = layer.family.sample(q, shape[0]).requires_grad_(needs_slope)
        _cost(decoder, z, x).mean().backward()

    return ours, least


def main() -> None:
    """Measure and write ``estimators.json``."""
    options = arguments(QUESTION, seconds=3)
    rows, unavailable = [], {}
    for family in OPTIONS:
        for name in sl.list_layers(family=family):
            label, group = f"{name} ({family})", name
            try:
                ours, least = step(name, family, options.device)
                times = interleave({"step": ours, "least": least}, seconds=options.seconds, device=options.device)
            except ValueError as error:  # enumerates more outcomes than there is memory for
                unavailable[label] = str(error).splitlines()[0]
                continue
            group = label
            ratios = [a / b for a, b in zip(times["step"], times["least"], strict=True)]
            count = len(ratios)
            rows.append(Row(group, "decoder and draws", "s", *summary(times["least"]), count))
            rows.append(Row(group, name, "s", *summary(times["step"]), count, "decoder and draws", *summary(ratios)))
            print(f"{label:40s} {1e3 * rows[-1].median:9.3f} ms {rows[-1].ratio:7.3f} x", flush=True)
    print(write("estimators", QUESTION, rows, device=options.device, unavailable=unavailable, folder=options.folder))


if __name__ == "__main__":
    main()
