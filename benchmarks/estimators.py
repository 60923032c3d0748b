"""What does an estimator cost beyond its evaluations of the network and its draws? Decides which one is affordable.

The reference is what the estimator cannot do without, in plain torch:

* the decoder, forward and backward, at as many points as the layer evaluates, the backward pass reaching the points
  where the layer is trained through them;
* exact draws of q at these points, from params, which are new in every step: their softmax, sigmoid or standard
  deviation is a part of it. Or copies of draws where points are enumerated or draws with a change; where the formula of
  the estimator has relaxed draws, as many of those instead, or as well (Gumbel-Rao redraws the noise of a draw R
  times): perturbed logits and their softmax or sigmoid;
* the slope of the cost at the points, taken before the backward pass, where the estimate is made of it: in one decoder
  call, since the layer is given the cost of all points. REBAR differentiates that slope, to tune its parameters;
* forward and backward of the estimator's own network (a learned baseline, the control variates of RELAX and RODEO) at
  as many inputs, called as the module that it is: what RELAX and RODEO save by not computing the same part of it twice
  is theirs; RELAX differentiates the slope of its network;
* the table of the log-probabilities of all outcomes, of layers that list them, and one sort of the categories of those
  that order them.

Everything else is overhead: checks, the law, log-probabilities, weights, statistics, how the noise is conditioned or
coupled, and the surrogate. Quantizers are left out: they estimate no expectation, and ``layers.py`` compares them with
their peers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import stochastic_layers as sl
from benchmarks.measure import Row, arguments, interleave, summary, write
from stochastic_layers.categorical import draw_categorical, softmax
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.exact import JointLayer
from stochastic_layers.families import Family
from stochastic_layers.gaussian_families import GaussianFamily
from stochastic_layers.registry import layer_class
from stochastic_layers.relaxed import perturbed

QUESTION = (
    "A training step of each estimator with 100 examples and a decoder with 200 hidden and 784 output units, against "
    "what it cannot do without: that decoder, forward and backward, at as many points, the draws, and, where its "
    "formula has them, slopes of the cost before the backward pass and a network of its own."
)
BATCH = 100
OPTIONS: dict[str, dict[str, Any]] = {
    "bernoulli": {"latent_dim": 200},
    "categorical": {"latent_dim": 20, "num_categories": 10},
    "gaussian": {"latent_dim": 20},
}
JOINT: dict[str, dict[str, Any]] = {  # for layers that list all outcomes
    "bernoulli": {"latent_dim": 8},
    "categorical": {"latent_dim": 3, "num_categories": 6},
}
SORTED = ("carms", "disarm", "entmax_gumbel")  # order the categories
SLOPES = ("double_cv", "muprop", "rebar", "rodeo")  # made of the slopes of the cost
RELAXED_POINTS = {"gumbel_softmax": 1, "straight_through_gumbel": 1, "entmax_gumbel": 1, "rebar": 2}  # for each draw
NOT_DRAWN = ("arsm", "coordinate_flip", "enumeration", "local_expectation", "measure_valued", "sum_and_sample")
LISTED = ("enumeration", "sum_and_sample", "unordered_set", "sparsemax_marginalization")  # all outcomes


def _decoder(features: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 200), nn.LeakyReLU(), nn.Linear(200, 784)).to(device)


def _cost(decoder: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    output = decoder(z)
    return nn.functional.binary_cross_entropy_with_logits(output, x.expand_as(output), reduction="none").sum(-1)


def _redraws(layer: Any) -> int:
    """Relaxed draws at which the cost is not evaluated."""
    if layer.name == "relax":
        return 2 * layer.num_samples
    replicates = getattr(layer, "num_replicates", 0)  # Gumbel-Rao and its relatives
    return layer.num_samples * (replicates + (layer.name == "reinmax_cv"))


def _draws(family: Family, params: Tensor, count: int) -> Tensor:
    """Exact draws ``[count, *batch, out_features]`` without gradient."""
    params = params.detach()
    if isinstance(family, CategoricalFamily):
        return draw_categorical(softmax(family.unflatten(params)), count).flatten(-2)
    if isinstance(family, GaussianFamily):
        loc, log_variance = params.chunk(2, -1)
        return torch.addcmul(loc, (0.5 * log_variance).exp(), torch.randn(count, *loc.shape, device=loc.device))
    return family.sample(family.distribution(params), count)


def _relaxed(layer: Any, params: Tensor, count: int) -> Tensor:
    """Draws of the tempered softmax or sigmoid of perturbed logits, without gradient."""
    scores = perturbed(layer.family, params.detach(), count).div_(0.5)
    return softmax(scores).flatten(-2) if isinstance(layer.family, CategoricalFamily) else scores.sigmoid_()


def _own_network(layer: Any, params: Tensor) -> Callable[[], object] | None:
    """Forward and backward of the network that an estimator brings along, at as many inputs as it has."""
    draws, device = layer.num_samples, params.device
    if layer.name == "nvil":
        return lambda: layer.baseline.network(params.detach()).mean().backward()
    if layer.name == "rodeo":  # a pair of draws, at one of them and at its neighbours
        inputs = torch.randn(draws * (draws - 1), BATCH, layer.latent_dim + 1, 2, device=device)
        return lambda: layer.network(inputs).mean().backward()
    if layer.name == "relax":
        inputs = torch.randn(2, draws, BATCH, layer.out_features + layer.context_features, device=device)
        inputs.requires_grad_()

        def differentiated_slope() -> None:
            value = layer.network(inputs)
            (slope,) = torch.autograd.grad(value.sum(), inputs, create_graph=True)
            (value.mean() + slope.square().mean()).backward()

        return differentiated_slope
    return None


def step(name: str, family: str, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One training step of a layer, and the work that it cannot do without."""
    options = JOINT if issubclass(layer_class(name), JointLayer) else OPTIONS
    layer = sl.create(name, family=family, **options[family]).to(device)
    decoder, x = _decoder(layer.out_features, device), torch.rand(BATCH, 784, device=device).round()
    params = torch.randn(BATCH, layer.in_features, device=device, requires_grad=True)
    trained = [params, *decoder.parameters(), *layer.parameters()]

    def ours() -> None:
        for tensor in trained:
            tensor.grad = None
        sample = layer.sample(params)
        sample.surrogate(_cost(decoder, sample.z, x)).mean().backward()

    points, through = layer.sample(params).z.shape[0], "cost_gradient" in layer.needs
    relaxed = RELAXED_POINTS.get(name, 0) * layer.num_samples
    drawn = layer.num_samples if name in NOT_DRAWN else points - relaxed
    redraws, network = _redraws(layer), _own_network(layer, params)

    def least() -> None:
        for tensor in trained:
            tensor.grad = None
        parts = [_draws(layer.family, params, drawn)] if drawn else []
        if name in NOT_DRAWN:
            parts = [parts[0].repeat(-(-points // drawn), 1, 1)[:points]]
        if relaxed:
            parts.append(_relaxed(layer, params, relaxed))
        if redraws:
            _relaxed(layer, params, redraws)
        if name in SORTED and family == "categorical":
            of = params.detach() if name != "entmax_gumbel" else parts[0]
            of.reshape(-1, *layer.family.unflatten(params).shape).sort(-1)
        if name in LISTED:
            layer.joint_log_probs(params.detach())
        z = (torch.cat(parts) if len(parts) > 1 else parts[0]).requires_grad_(through)
        cost = _cost(decoder, z, x)
        if name in SLOPES:
            (slope,) = torch.autograd.grad(cost.sum(), z, retain_graph=True, create_graph=name == "rebar")
            if name == "rebar":
                torch.autograd.grad(slope.square().sum(), z, retain_graph=True)
        if network is not None:
            network()
        cost.mean().backward()

    return ours, least


def main() -> None:
    """Measure and write ``estimators.json``."""
    options = arguments(QUESTION, seconds=3)
    rows = []
    for family in OPTIONS:
        for name in sl.list_layers(family=family):
            group = f"{name} ({family})"
            ours, least = step(name, family, options.device)
            times = interleave({"step": ours, "least": least}, seconds=options.seconds, device=options.device)
            ratios = [a / b for a, b in zip(times["step"], times["least"], strict=True)]
            count = len(ratios)
            rows.append(Row(group, "what it needs", "s", *summary(times["least"]), count))
            rows.append(Row(group, name, "s", *summary(times["step"]), count, "what it needs", *summary(ratios)))
            print(f"{group:40s} {1e3 * rows[-1].median:9.3f} ms {rows[-1].ratio:7.3f} x", flush=True)
    print(write("estimators", QUESTION, rows, device=options.device, folder=options.folder))


if __name__ == "__main__":
    main()
