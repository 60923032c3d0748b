"""Checks of what is drawn: support and law of the draws in eval() and train(), and the mode."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from stochastic_layers.layer import StochasticLayer
from stochastic_layers.testing.contract import expect
from stochastic_layers.testing.exact import enumerate_outcomes
from stochastic_layers.testing.subject import NotApplicable, Subject, step

__all__ = ["density_gradient", "describe_law", "draws_in_eval", "draws_in_training", "mode_of_q", "support_in_training"]

NUM_DRAWS = 40_000
NUM_DRAWS_OF_MOMENTS = 8_000  # where there are no outcomes to count
FALSE_ALARM = 1e-6
SLOPES = 32
MAX_OUTCOMES = 256


def outcomes_of(layer: StochasticLayer) -> Tensor | None:
    """Every outcome ``[N, out_features]`` of a family with finitely many, else ``None``."""
    radix = layer.family.num_outcomes
    return enumerate_outcomes(layer) if radix and radix**layer.latent_dim <= MAX_OUTCOMES else None


def draws_for(layer: StochasticLayer) -> int:
    """Number of draws for a test of the law."""
    return NUM_DRAWS_OF_MOMENTS if outcomes_of(layer) is None else NUM_DRAWS


def describe_law(layer: StochasticLayer) -> str:
    """The law in words."""
    outcomes = outcomes_of(layer)
    if outcomes is None:
        return f"{layer.family.name}, {layer.latent_dim} latent"
    of = f" of {layer.num_categories}" if layer.num_categories else ""
    return f"{layer.family.name}, {layer.latent_dim} latent{of}, {len(outcomes)} outcomes"


def outside_support(layer: StochasticLayer, q: Distribution, z: Tensor) -> int:
    """Number of points of z ``[S, *batch, out_features]`` that q cannot draw, by its declared support."""
    event = q.event_shape
    if math.prod(event) != layer.out_features:
        raise NotApplicable(f"q has events of shape {list(event)}, z {layer.out_features} features")
    try:
        support = q.support
        assert support is not None
        inside: Tensor = support.check(z.detach().reshape(*z.shape[:-1], *event))  # type: ignore[no-untyped-call]
    except NotImplementedError:
        raise NotApplicable(f"{type(q).__name__} declares no support") from None
    return int((~inside).sum())


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """The p-value of counts ``[N]`` under probabilities ``[N]``; outcomes expected less than 5 times are pooled."""
    total = counts.sum()
    expected = probs * total
    expect(not bool(counts[probs == 0].any()), "an outcome of probability zero was drawn")
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=probs.dtype)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(counts) > 1 else 1.0


def largest_z(draws: Tensor, mean: Tensor) -> float:
    """Largest deviation of the mean of draws ``[R, *shape]`` from ``mean``, in standard errors."""
    error = draws.std(0) / math.sqrt(draws.shape[0])
    return float(((draws.mean(0) - mean) / (error + 1e-9 * (1 + mean.abs()))).abs().max())


def moments(q: Distribution, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Location and spread of each draw of continuous z ``[S, R, out]``, less what q itself gives: zero in the mean.

    The location is compared with the mean of q, the spread with that of as many draws of q, through a bounded function,
    as squares of a heavy-tailed law have no variance.
    """
    try:
        mean, deviation = q.mean.reshape(z.shape[1:]), q.stddev.reshape(z.shape[1:])
    except (NotImplementedError, RuntimeError):
        raise NotApplicable(f"{type(q).__name__} has neither finitely many outcomes nor a known variance") from None
    weights = weights.view(*weights.shape, *[1] * (z.dim() - weights.dim()))

    def spread(points: Tensor) -> Tensor:
        distance = (points - mean).abs()
        return distance / (distance + deviation + torch.finfo(z.dtype).tiny)

    first = (weights * (z - mean)).sum(0)
    second = (weights * spread(z)).sum(0) - spread(q.sample().reshape(z.shape[1:]))
    return torch.cat([first, second], -1), torch.zeros(2 * z.shape[-1], dtype=z.dtype)


def draws_in_eval(subject: Subject) -> str:
    """In eval(): hard draws, without gradient, of the right law (chi-square, false alarms 1e-6)."""
    layer = subject.build().eval()
    params = subject.params().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        sample = layer.sample(params.expand(draws_for(layer), -1))
    z = sample.z
    expect(not z.requires_grad and not sample.weights.requires_grad, "the draws of eval() carry a gradient")
    outside = outside_support(layer, sample.q, z)
    expect(not outside, f"{outside} of {z[..., 0].numel()} draws of eval() lie outside the support of q: they are soft")
    run = step(layer, subject.params(4), subject.cost("linear"))
    expect(not run.encoder.any(), "the surrogate of eval() gives the encoder a gradient")
    expect(run.decoder.any(), "the surrogate of eval() gives the decoder no gradient")
    outcomes = outcomes_of(layer)
    if outcomes is None:
        deviation = largest_z(*moments(sample.q, z[:1], torch.ones(1, dtype=z.dtype)))
        expect(deviation < 5, f"mean or variance of the draws is {deviation:.1f} standard errors off")
        return f"mean and variance of {z.shape[1]} draws, |z| {deviation:.1f}"
    with torch.no_grad():
        probs = layer.family.log_prob(layer.distribution(params), outcomes).exp()
    counts = (torch.cdist(z[0], outcomes, p=1) == 0).sum(0).to(probs.dtype)
    p_value = chi_square(counts, probs)
    expect(p_value > FALSE_ALARM, f"the draws of eval() do not follow q: chi-square p = {p_value:.2g}")
    return f"chi-square over {len(outcomes)} outcomes, p = {p_value:.2g}"


def draws_in_training(subject: Subject) -> str:
    """In train(), where ``exact_draws`` is stated: the points, counted by their weights, follow q (|z| < 5)."""
    layer = subject.build()
    if not layer.exact_draws:
        raise NotApplicable("the layer states that its training draws do not follow q")
    params = subject.params().expand(draws_for(layer), -1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(subject.seed)
        sample = layer.sample(params)
        q = layer.distribution(params)
    z, weights = sample.z.detach(), sample.weights
    outcomes = outcomes_of(layer)
    if outcomes is None:
        deviation = largest_z(*moments(q, z, weights))
    else:
        used = weights if weights.dim() == 1 else weights.amax(1)
        auxiliary = used == 0  # such points need not be outcomes
        hits = torch.stack([(torch.cdist(points, outcomes, p=1) == 0).to(z.dtype) for points in z])  # [S, R, N]
        off = int((hits.sum(-1)[~auxiliary] == 0).sum())
        expect(not off, f"{off} training draws are no outcome of q, although exact_draws is stated")
        weights = weights.view(*weights.shape, *[1] * (3 - weights.dim()))
        probs = layer.family.log_prob(layer.distribution(params[0]), outcomes).exp()
        deviation = largest_z((weights * hits).sum(0), probs)
    expect(deviation < 5, f"the training draws do not follow q: {deviation:.1f} standard errors off")
    return f"{z.shape[1]} draws, |z| {deviation:.1f}"


def support_in_training(subject: Subject) -> str:
    """A layer that does not list ``relaxable_cost`` asks for the cost inside the support of q only."""
    layer = subject.build()
    if "relaxable_cost" in layer.needs:
        raise NotApplicable("the layer states relaxable_cost")
    sample = layer.sample(subject.params(256))
    outside = outside_support(layer, sample.q, sample.z)
    total = sample.z[..., 0].numel()
    expect(not outside, f"{outside} of {total} points lie outside the support of q; state needs 'relaxable_cost'")
    return f"{total} points"


def mode_of_q(subject: Subject) -> str:
    """``mode()`` is as probable as any outcome."""
    layer = subject.build().eval()
    params = subject.params()
    outcomes = outcomes_of(layer)
    if outcomes is None and subject.family != "gaussian":
        raise NotApplicable("no finitely many outcomes to compare with")
    with torch.no_grad():
        others = layer.sample(params.expand(1000, -1)).z[0] if outcomes is None else outcomes
        q = layer.distribution(params)
        mode = layer.mode(params)
        highest = float(layer.family.log_prob(q, others).max())
        expect(not outside_support(layer, q, mode), "mode() lies outside the support of q")
        reached = float(layer.family.log_prob(q, mode.unsqueeze(0)))
    expect(reached >= highest - 1e-9, f"log q(mode) is {reached:.4g}, another outcome has {highest:.4g}")
    return f"log q = {reached:.3g}"


def density_gradient(subject: Subject) -> str:
    """The derivative of log q(z) by params is that of finite differences: no part of the law is detached.

    The references of the other checks are made of q; a law that forgot a derivative would make them forget it too.
    """
    layer, params = subject.build(), subject.params(SLOPES)
    if layer.family.name == "quantized":
        raise NotApplicable("a point mass has no density")
    z = layer.family.sample(layer.distribution(params), 1)  # points that do not move with params
    direction = torch.randn_like(params)

    def log_prob(shift: float) -> Tensor:
        return layer.family.log_prob(layer.distribution(params + shift * direction), z).squeeze(0)

    leaf = params.clone().requires_grad_()
    value = layer.family.log_prob(layer.distribution(leaf), z).sum()
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True) if value.requires_grad else (None,)
    slope = torch.zeros_like(params) if gradient is None else gradient
    step = 1e-5
    with torch.no_grad():
        difference = (log_prob(step) - log_prob(-step)) / (2 * step)
    exact = (slope * direction).sum(-1)
    expect(
        torch.allclose(exact, difference, rtol=1e-4, atol=1e-4),
        f"d log q(z) is {exact.tolist()} by autograd and {difference.tolist()} by finite differences; is a part of "
        "params detached in law()?",
    )
    return f"finite differences agree at {SLOPES} draws"
