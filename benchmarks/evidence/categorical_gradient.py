r"""Bias, spread and direction of every categorical estimator against the exact gradient, at one trained model.

Serves the decision which estimator to take for categorical latents.

The setting is that of :mod:`benchmarks.evidence.categorical_vae`: 4 variables of 8 categories, so that 4,096 outcomes
can be summed. The model is trained with ReinMax for ``--steps`` steps; or it is the one that was trained there to the
end (``--trained``; a result of its own, ``categorical_gradient_trained``). Then each layer's gradient of the
reconstruction cost, by the logits of ``--examples`` test images at once, is drawn ``--draws`` times and compared with
the exact one, g:

* relative bias: \|E h - g\| / \|g\|, less the part that the finite number of draws adds to its square;
* relative deviation: sqrt(trace Cov h) / \|g\|; times sqrt(evaluations) it is what a fixed budget of decoder calls
  leaves;
* cosine of E h with g, and mean cosine of a single h with g.

Layers with parameters or running statistics of their own first see ``--warm-up`` batches at the fixed model.
``sparsemax_marginalization`` is left out: its law is another one, whose gradient at an example may be zero.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import stochastic_layers as sl
from benchmarks.evidence.categorical_vae import BATCH, IMAGES, SHAPE, Model, state_path
from benchmarks.evidence.mnist import batches, pixels
from benchmarks.evidence.record import Record, arguments, read, save_figure
from stochastic_layers.diagnostics import preserved
from stochastic_layers.testing import enumerate_outcomes


def train(model: Model, data: Iterator[Tensor], steps: int) -> float:
    """Train by ReinMax; the mean negative ELBO of the last tenth of the steps."""
    layer = sl.create("reinmax", **SHAPE)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, fused=True)
    last = []
    for step in range(steps):
        loss = model.loss(layer, next(data)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - max(1, steps // 10):
            last.append(loss.item())
    return sum(last) / len(last)


def warm_up(layer: sl.StochasticLayer, model: Model, data: Iterator[Tensor], steps: int) -> None:
    """Train what the layer trains, at the fixed model."""
    own = list(layer.parameters())
    if not own and not list(layer.buffers()):
        return
    optimizer = torch.optim.Adam(own, lr=1e-3) if own else None
    for _ in range(steps):
        x = next(data)
        params = model.encoder(x).detach().requires_grad_()
        sample = layer.sample(params)
        loss = sample.surrogate(model.cost(sample.z, x)).mean()
        if optimizer is None:
            torch.autograd.grad(loss, params)
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def exact_gradient(layer: sl.StochasticLayer, model: Model, logits: Tensor, x: Tensor) -> Tensor:
    """The gradient ``[B, 32]`` of the expected cost, by summation over all outcomes."""
    logits = logits.detach().requires_grad_()
    outcomes = enumerate_outcomes(layer).to(logits.dtype)
    for example, pixel in zip(logits.unbind(), x.unbind(), strict=True):
        with torch.no_grad():
            cost = model.cost(outcomes, pixel)
        probs = layer.family.log_prob(layer.law(example), outcomes).exp()
        (probs * cost).sum().backward()
    assert logits.grad is not None
    return logits.grad.double()


def draws_of(layer: sl.StochasticLayer, model: Model, logits: Tensor, x: Tensor, draws: int) -> Tensor:
    """Gradients ``[draws, B, 32]``; each is drawn from the layer's state as it is."""
    gradients = []
    for draw in range(draws):
        torch.manual_seed(draw)
        with preserved(layer):
            params = logits.detach().clone().requires_grad_()
            sample = layer.sample(params)
            (gradient,) = torch.autograd.grad(sample.surrogate(model.cost(sample.z, x)).sum(), params)
        gradients.append(gradient.double())
    return torch.stack(gradients)


def compare(h: Tensor, g: Tensor) -> dict[str, float]:
    """The figures of gradients ``[draws, N]`` next to the exact one ``[N]``."""
    mean, variance = h.mean(0), float(h.var(0).sum())
    squared = float((mean - g).square().sum()) - variance / len(h)
    norm = float(g.norm())
    return {
        "relative_bias": math.sqrt(max(squared, 0.0)) / norm,
        "bias_resolution": math.sqrt(variance / len(h)) / norm,
        "relative_deviation": math.sqrt(variance) / norm,
        "cosine_of_mean": float(F.cosine_similarity(mean, g, dim=0)),
        "mean_cosine": float(F.cosine_similarity(h, g.expand_as(h), dim=-1).mean()),
    }


def rows(options: argparse.Namespace, model: Model, data: Iterator[Tensor], test: Tensor) -> Iterator[dict[str, Any]]:
    """One row for each layer, with the number of evaluations of the cost that a gradient takes."""
    logits = model.encoder(test).detach()
    model.requires_grad_(False)
    every = [name for name in sl.list_layers(family="categorical") if name != "sparsemax_marginalization"]
    for name in options.layers or every:
        torch.manual_seed(options.seed)
        layer = sl.create(name, **SHAPE)
        warm_up(layer, model, data, options.warm_up)
        points = layer.sample(logits).z.shape[0]
        draws = 2 if name == "enumeration" else options.draws  # it has no variance
        g = exact_gradient(layer, model, logits, test).flatten()
        h = draws_of(layer, model, logits, test, draws).flatten(1)
        row: dict[str, Any] = {"layer": name, "evaluations": points, "draws": draws}
        row |= {"unbiased": sl.describe(name).unbiased, **compare(h, g)}
        row["deviation_at_equal_cost"] = row["relative_deviation"] * points**0.5
        yield row


def plot(path: Path) -> None:
    """Bias, deviation and direction, one line for each layer of a result, as a picture beside it."""
    import matplotlib.pyplot as plt

    table = [r for r in read(path)["rows"] if r["layer"] != "enumeration"]
    table.sort(key=lambda r: (r["unbiased"] is True, -r["deviation_at_equal_cost"]))
    figure, panels = plt.subplots(1, 3, figsize=(14, 0.32 * len(table) + 1.5), sharey=True)
    for line, row in enumerate(table):
        color = "tab:blue" if row["unbiased"] is True else "tab:red"
        if row["relative_bias"] > 2 * row["bias_resolution"]:
            panels[0].plot(row["relative_bias"], line, "o", color=color)
        panels[0].plot([1e-3, 2 * row["bias_resolution"]], [line, line], color=color, alpha=0.4)
        panels[1].plot(row["deviation_at_equal_cost"], line, "o", color=color)
        panels[1].plot(row["relative_deviation"], line, "o", color=color, fillstyle="none")
        panels[2].plot(row["cosine_of_mean"], line, "o", color=color)
        panels[2].plot(row["mean_cosine"], line, "o", color=color, fillstyle="none")
    panels[0].set(xscale="log", xlabel="relative bias (bar: not resolved)", xlim=(3e-3, 10))
    panels[1].set(xscale="log", xlabel="relative deviation (ring), at equal cost (dot)")
    panels[2].set(xlabel="cosine of the mean (dot), of one draw (ring)", xlim=(-0.3, 1.05))
    panels[0].set_yticks(range(len(table)), [f"{r['layer']} ({r['evaluations']})" for r in table])
    panels[0].plot([], [], "o", color="tab:blue", label="unbiased by theory")
    panels[0].plot([], [], "o", color="tab:red", label="biased by theory")
    panels[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path.with_suffix(".png"))
    plt.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", nargs="*", default=[], help="names (default: all); the rows of others are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the model")
    parser.add_argument(
        "--trained",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="take the weights that categorical_vae has left",
    )
    parser.add_argument("--warm-up", type=int, default=200, help="training steps of a layer's own parameters")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--draws", type=int, default=512)
    options: argparse.Namespace = parser.parse_args(words)
    torch.set_num_threads(1)
    path = options.out / f"categorical_gradient{'_trained' if options.trained else ''}.json"
    if not options.plot:
        torch.manual_seed(options.seed)
        kept = read(path)["rows"] if options.layers and path.is_file() else []
        record = Record("categorical_gradient", path, options)
        images, test = pixels(options.data, IMAGES)
        data, model = batches(images, BATCH, options.seed, binarize=False), Model()
        if options.trained:
            weights = state_path(options.out, "reinmax", options.seed)
            if not weights.is_file():
                parser.error(f"needed {weights} for --trained, got no such file; run categorical_vae first.")
            model.load_state_dict(torch.load(weights, weights_only=True))
        else:
            record.write(negative_elbo=train(model, data, options.steps))
        table = [row for row in kept if row["layer"] not in options.layers]
        for row in rows(options, model, data, test[: options.examples]):
            table.append(row)
            record.write(rows=table)
    plot(path)


if __name__ == "__main__":
    main()
