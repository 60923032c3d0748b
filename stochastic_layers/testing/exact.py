"""Proof by enumeration: polynomial costs, their exact expectations, and a test of the law of a layer's draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stochastic_layers.codes import Codes
from stochastic_layers.layer import StochasticLayer
from stochastic_layers.point_mass import QuantizedFamily

__all__ = ["COSTS", "PolynomialCost", "check_law", "enumerate_outcomes", "exact_value"]

COSTS = ("constant", "linear", "quadratic", "cubic", "asymmetric")


class PolynomialCost(nn.Module):
    """A cost of z with parameters of its own, so that the gradients of encoder and decoder can both be checked.

    Args:
        kind: One of :data:`COSTS`. ``"asymmetric"`` treats every coordinate differently and mixes neighbours.
        features: Size of z's last dimension.
        seed: Seed of the fixed coefficients.

    Shape:
        z ``[..., features]`` -> ``[...]``.
    """

    def __init__(self, kind: str, features: int, seed: int = 0) -> None:
        super().__init__()
        if kind not in COSTS:
            raise ValueError(f"needed one of {COSTS}, got {kind!r}.")
        self.kind = kind
        generator = torch.Generator().manual_seed(seed)
        self.theta = nn.Parameter(torch.randn(features, generator=generator, dtype=torch.float64))
        self.register_buffer("matrix", torch.randn(features, features, generator=generator, dtype=torch.float64))
        self.matrix: Tensor

    def forward(self, z: Tensor) -> Tensor:
        z = z.to(self.theta.dtype)
        if self.kind == "constant":
            return 3.0 + 0.0 * (z * self.theta).sum(-1)
        linear = (z * self.theta).sum(-1)
        if self.kind == "linear":
            return linear
        if self.kind == "quadratic":
            return linear + torch.einsum("...i,ij,...j->...", z, self.matrix, z)
        if self.kind == "cubic":
            return (linear - 0.3) ** 3 + linear
        order = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        return linear * (z * order).sum(-1) + (z * z.roll(1, -1) * self.matrix[0]).sum(-1) ** 2


def enumerate_outcomes(layer: StochasticLayer) -> Tensor:
    """Every outcome of a discrete layer's z: ``[N, out_features]``."""
    family = layer.family
    if isinstance(family, QuantizedFamily):
        codes = family.codes.decode(_all_indices(family.codes), torch.float64)
        return torch.stack([torch.cat(rows) for rows in itertools.product(codes, repeat=family.latent_dim)])
    return family.outcomes(torch.float64)


def _all_indices(codes: Codes) -> Tensor:
    every = itertools.product(range(codes.num_codes), repeat=math.prod(codes.index_shape))
    return torch.tensor(list(every)).view(-1, *codes.index_shape)


def exact_value(
    layer: StochasticLayer, params: Tensor, cost_fn: Callable[[Tensor], Tensor], refinement: int = 0
) -> Tensor:
    """E_q[cost] ``[*batch]``, differentiable: its autograd gradient is what an unbiased layer estimates.

    By :meth:`Family.nodes`: exact up to rounding for families with finitely many outcomes and for polynomial costs of
    Gaussians; else with an error that a ``refinement`` of 1 shows.

    Raises:
        ValueError: The family has no nodes, or too many variables for them.
    """
    z, weights = layer.family.nodes(layer.law(params), refinement)
    value: Tensor = (weights * cost_fn(z)).sum(0)
    return value if value.requires_grad or not params.requires_grad else value + 0.0 * params.sum(-1)


def check_law(layer: StochasticLayer, params: Tensor, *, num_draws: int = 50_000, false_alarm: float = 1e-6) -> None:
    """Assert by a chi-square test that the draws z of a layer follow q, jointly over its latent variables.

    Args:
        layer: A layer of a family with finitely many outcomes, in training or evaluation mode.
        params: ``[in_features]``, of one law.
        num_draws: Number of draws.
        false_alarm: Probability that the test fails although the draws follow q.

    Raises:
        AssertionError: z is no outcome of the family, or the frequencies are off.
    """
    outcomes = enumerate_outcomes(layer)
    with torch.no_grad():
        z = layer.sample(params.expand(num_draws, -1)).z[0].to(outcomes.dtype)  # coupled layers: one point
        probs = layer.family.log_prob(layer.distribution(params.to(outcomes.dtype)), outcomes).exp()
    matches = torch.cdist(z, outcomes, p=1) == 0  # [draws, outcomes]
    assert bool(matches.any(-1).all()), f"{layer}: some draws are no outcome of {layer.family.name!r}"
    counts, expected = matches.sum(0).to(probs.dtype), probs * z.shape[0]
    rare = expected < 5  # pooled, as the chi-square law is an approximation for large counts
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    assert bool((counts[expected == 0] == 0).all()), f"{layer}: drew an outcome of probability zero"
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    p_value = float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=probs.dtype), statistic / 2))
    assert p_value > false_alarm, f"{layer}: the draws do not follow q, p = {p_value:.2g}: {counts} against {expected}"
