"""Proof by enumeration: polynomial costs, their exact expectations, and a test of the law of a layer's draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Independent

from stochastic_layers.codes import Codes
from stochastic_layers.continuous_families import ContinuousFamily
from stochastic_layers.invertible_gaussian import InvertibleGaussianDistribution, InvertibleGaussianFamily
from stochastic_layers.layer import StochasticLayer
from stochastic_layers.point_mass import QuantizedFamily
from stochastic_layers.quadrature import integrate

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
    if family.name not in ("bernoulli", "categorical"):
        raise ValueError(f"needed a family with finitely many outcomes, got {family.name!r}.")
    if family.num_categories is None:
        return torch.tensor(list(itertools.product((0.0, 1.0), repeat=family.latent_dim)), dtype=torch.float64)
    eye = torch.eye(family.num_categories, dtype=torch.float64)
    return torch.stack([torch.cat(rows) for rows in itertools.product(eye, repeat=family.latent_dim)])


def _all_indices(codes: Codes) -> Tensor:
    every = itertools.product(range(codes.num_codes), repeat=math.prod(codes.index_shape))
    return torch.tensor(list(every)).view(-1, *codes.index_shape)


def exact_value(layer: StochasticLayer, params: Tensor, cost_fn: Callable[[Tensor], Tensor]) -> Tensor:
    """E_q[cost] ``[*batch]``, exact and differentiable: its autograd gradient is what an unbiased layer estimates.

    Families with finitely many outcomes are summed over them. The others are summed over the product of a rule for each
    coordinate, of which the Gaussian's is exact for the polynomial costs and the others' are to rounding error.
    """
    family = layer.family
    batch = params.shape[:-1]
    if isinstance(family, QuantizedFamily):  # all mass on one code, which does not move with params
        return cost_fn(family.mode(layer.law(params)).detach()) + 0.0 * params.sum(-1)
    if family.name in ("bernoulli", "categorical"):
        outcomes = enumerate_outcomes(layer).to(params.dtype)
        z = outcomes.view(-1, *[1] * len(batch), family.out_features).expand(-1, *batch, -1)  # [N, *batch, out]
        return (family.log_prob(layer.law(params), z).exp() * cost_fn(z)).sum(0)
    if isinstance(family, ContinuousFamily):
        return integrate(family, params, cost_fn)
    nodes, weights = _rule(layer, params)  # [n, *batch, D]
    index = torch.cartesian_prod(*[torch.arange(nodes.shape[0])] * nodes.shape[-1]).view(-1, nodes.shape[-1])
    index = index.view(-1, *[1] * len(batch), nodes.shape[-1]).expand(-1, *batch, -1)  # [n^D, *batch, D]
    z = nodes.gather(0, index)
    if isinstance(family, InvertibleGaussianFamily):
        law = layer.distribution(params)
        assert isinstance(law, Independent) and isinstance(law.base_dist, InvertibleGaussianDistribution)
        z = law.base_dist.to_simplex(z.reshape(*z.shape[:-1], family.latent_dim, -1)).flatten(-2)
    return (weights.gather(0, index).prod(-1) * cost_fn(z)).sum(0)


def _rule(layer: StochasticLayer, params: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[n, *batch, D]`` that integrate over each coordinate, differentiable in params."""
    import numpy as np

    family, q = layer.family, layer.distribution(params)
    column = (-1, *[1] * params.dim())
    if family.name in ("gaussian", "invertible_gaussian"):  # Gauss-Hermite
        points = np.polynomial.hermite_e.hermegauss(6 if family.name == "gaussian" else 40)
        x, w = (torch.from_numpy(a).to(params.dtype).view(column) for a in points)
        loc, log_variance = params.chunk(2, -1)
        nodes = loc + (0.5 * log_variance).exp() * x
        return nodes, (w / w.sum()).expand_as(nodes)
    if family.name == "poisson":
        highest = float(q.mean.detach().max())
        counts = torch.arange(int(highest + 12 * math.sqrt(highest) + 25), dtype=params.dtype)
        nodes = counts.view(column).expand(-1, *params.shape)
        assert isinstance(q, Independent)
        return nodes, q.base_dist.log_prob(nodes).exp()
    if family.name == "hard_concrete":  # the atoms, and Gauss-Legendre in z between them
        assert isinstance(q, Independent)
        x, w = (torch.from_numpy(a).to(params.dtype) for a in np.polynomial.legendre.leggauss(60))
        nodes = torch.cat([torch.zeros(1), 0.5 + 0.5 * x, torch.ones(1)]).to(params.dtype)
        nodes = nodes.view(column).expand(-1, *params.shape)
        weights = torch.cat([torch.ones(1), 0.5 * w, torch.ones(1)]).to(params.dtype).view(column)
        return nodes, weights * q.base_dist.log_prob(nodes).exp()
    raise ValueError(f"needed a family whose expectations can be computed, got {family.name!r}.")


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
