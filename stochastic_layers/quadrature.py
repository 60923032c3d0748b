"""Expectations of continuous families by numerical integration: the reference that the tests compare with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from stochastic_layers.distributions import PowerSpherical
from stochastic_layers.families import Family

__all__ = ["integrate"]


def integrate(family: Family, params: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """E_q[function] ``[*batch]`` of a continuous family, for one to three free coordinates.

    The nodes do not depend on params: the gradient flows through the density alone, and so shares nothing with that of
    a pathwise draw. The relative error is below 1e-6 for smooth functions and concentrations
    above 1/2, and below 1e-3 down to a concentration of 0.4.

    Args:
        family: A continuous family.
        params: ``[*batch, in_features]`` in float64.
        function: Maps z ``[N, *batch, out_features]`` to ``[N, *batch]``.

    Raises:
        ValueError: The family has no rule.
    """
    q = family.distribution(params)
    z, log_weight = _rule(family, q, params.detach())
    return ((family.log_prob(q, z) + log_weight).exp() * function(z)).sum(0)


def _rule(family: Family, q: Distribution, params: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes ``[N, *batch, out_features]`` and the logarithm of their weights ``[N, *batch]``."""
    batch = params.shape[:-1]
    if family.name in ("gaussian_full", "gaussian_low_rank", "gaussian"):
        return _hermite(family, q)
    if isinstance(q, PowerSpherical):
        z, log_weight = _sphere(family.latent_dim, params.dtype)
        return z.view(-1, *[1] * len(batch), family.latent_dim).expand(-1, *batch, -1), _as_column(log_weight, batch)
    if family.name == "dirichlet":
        sticks, log_weight = _product(
            *_unit_interval(params.dtype), family.latent_dim * ((family.num_categories or 0) - 1)
        )
        sticks = sticks.view(-1, family.latent_dim, (family.num_categories or 0) - 1)  # [N, L, C - 1]
        rest = (1 - sticks).cumprod(-1)
        ones = torch.ones_like(rest[..., :1])
        z = torch.cat([sticks, ones], -1) * torch.cat([ones, rest], -1)
        log_weight = log_weight + rest[..., :-1].log().sum((-2, -1))  # each stick is a share of what is left
        return z.flatten(1).view(-1, *[1] * len(batch), family.out_features).expand(-1, *batch, -1), _as_column(
            log_weight, batch
        )
    if not isinstance(q, Independent):
        raise ValueError(f"needed a continuous family of this library, got {family.name!r}.")
    base = q.base_dist
    support = base.support
    if support is constraints.unit_interval:
        x, log_weight = _unit_interval(params.dtype)
        center, scale = torch.zeros_like(base.mean), torch.ones_like(base.mean)
    elif support is constraints.real:
        half, log_half = _half_line(params.dtype)
        x, log_weight = torch.cat([half, -half]), torch.cat([log_half, log_half])
        center, scale = base.loc, base.scale
    elif support in (constraints.positive, constraints.nonnegative):
        x, log_weight = _half_line(params.dtype)
        center, scale = torch.zeros_like(base.mean), base.mean
    else:
        raise ValueError(f"needed a family on an interval, got {family.name!r} on {support}.")
    grid, log_weight = _product(x, log_weight, family.latent_dim)
    grid = grid.view(-1, *[1] * len(batch), family.latent_dim)
    scale = scale.detach()
    return center.detach() + scale * grid, _as_column(log_weight, batch) + scale.log().sum(-1)


def _as_column(values: Tensor, batch: torch.Size) -> Tensor:
    return values.view(-1, *[1] * len(batch)).expand(-1, *batch)


def _product(x: Tensor, log_weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The product of a rule on a line with itself: nodes ``[n^dim, dim]``."""
    grid = torch.cartesian_prod(*[x] * dim).view(-1, dim)
    return grid, torch.cartesian_prod(*[log_weight] * dim).view(-1, dim).sum(-1)


def _half_line(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Double-exponential rule on (0, inf), also for singularities at 0 and algebraic tails."""
    step = 0.08
    t = torch.arange(-4.2, 4.2, step, dtype=dtype)
    log_x = 0.5 * math.pi * t.sinh()
    return log_x.exp(), log_x + (0.5 * math.pi * step * t.cosh()).log()


def _unit_interval(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tanh-sinh rule on (0, 1), as far as 1 - x is a number."""
    step = 0.08
    t = torch.arange(-3.08, 3.1, step, dtype=dtype)
    logit = math.pi * t.sinh()
    x = torch.sigmoid(logit)
    derivative = torch.nn.functional.logsigmoid(logit) + torch.nn.functional.logsigmoid(-logit)
    return x, derivative + (math.pi * step * t.cosh()).log()


def _hermite(family: Family, q: Distribution) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite, exact for polynomials: weights are relative to the density at the present params."""
    import numpy as np

    mean = q.mean.detach()
    covariance = getattr(q, "covariance_matrix", None)
    factor = torch.diag_embed(q.stddev) if covariance is None else torch.linalg.cholesky(covariance)
    x, weight = (torch.from_numpy(a).to(mean.dtype) for a in np.polynomial.hermite_e.hermegauss(8))
    grid, log_weight = _product(x, (weight / weight.sum()).log(), family.latent_dim)
    grid = grid.view(-1, *[1] * (mean.dim() - 1), family.latent_dim)
    z = mean + torch.einsum("...ij,n...j->n...i", factor.detach(), grid.expand(-1, *mean.shape))
    return z, _as_column(log_weight, mean.shape[:-1]) - family.log_prob(q, z).detach()


def _sphere(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Equidistant angles on the circle, and Gauss-Legendre latitudes for the sphere in three dimensions."""
    import numpy as np

    angle = torch.arange(200, dtype=dtype) * (2 * math.pi / 200)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    if dim == 2:
        return circle, torch.full((200,), math.log(2 * math.pi / 200), dtype=dtype)
    if dim != 3:
        raise ValueError(f"needed the sphere in 2 or 3 dimensions, got {dim}.")
    height, weight = (torch.from_numpy(a).to(dtype) for a in np.polynomial.legendre.leggauss(100))
    around = (1 - height.square()).sqrt().view(-1, 1, 1) * circle  # [100, 200, 2]
    z = torch.cat([around, height.view(-1, 1, 1).expand(-1, 200, 1)], -1)
    return z.flatten(0, 1), (weight * (2 * math.pi / 200)).log().repeat_interleave(200)
