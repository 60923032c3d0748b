"""Rules of numerical integration: what the expectations of families, with which layers are proven, are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gauss_hermite", "gauss_legendre", "half_line", "product_rule", "sphere", "unit_interval"]


def _golub_welsch(off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes, and weights of sum 1, of the Gauss rule of a symmetric weight function, from its recurrence."""
    values, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return values, vectors[0].square()


def gauss_hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[count]`` for E f(x), x standard normal; exact for polynomials of degree 2 count - 1."""
    return _golub_welsch(torch.arange(1, count, dtype=torch.float64).sqrt())


def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights ``[count]`` for the integral over (0, 1); exact for polynomials of degree 2 count - 1."""
    k = torch.arange(1, count, dtype=torch.float64)
    nodes, weights = _golub_welsch(k / (4 * k.square() - 1).sqrt())
    return 0.5 + 0.5 * nodes, weights


def half_line(step: float) -> tuple[Tensor, Tensor]:
    """Double-exponential rule on (0, inf), also for singularities at 0 and algebraic tails: nodes, log weights."""
    t = torch.arange(-4.2, 4.2, step, dtype=torch.float64)
    log_x = 0.5 * math.pi * t.sinh()
    return log_x.exp(), log_x + (0.5 * math.pi * step * t.cosh()).log()


def unit_interval(step: float) -> tuple[Tensor, Tensor]:
    """Tanh-sinh rule on (0, 1), as far as 1 - x is a number: nodes, log weights."""
    t = torch.arange(-3.08, 3.1, step, dtype=torch.float64)
    logit = math.pi * t.sinh()
    derivative = torch.nn.functional.logsigmoid(logit) + torch.nn.functional.logsigmoid(-logit)
    return torch.sigmoid(logit), derivative + (math.pi * step * t.cosh()).log()


def sphere(dim: int, count: int) -> tuple[Tensor, Tensor]:
    """Equidistant angles on the circle, with Gauss-Legendre heights on the sphere in three dimensions.

    Args:
        dim: 2 or 3.
        count: Number of angles; of heights half as many.

    Returns:
        Nodes ``[N, dim]`` and log weights ``[N]``.

    Raises:
        ValueError: Another dimension.
    """
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    if dim == 2:
        return circle, torch.full((count,), math.log(2 * math.pi / count), dtype=torch.float64)
    if dim != 3:
        raise ValueError(f"needed the sphere in 2 or 3 dimensions for an expectation, got {dim}.")
    share, weight = gauss_legendre(count // 2)
    height = 2 * share - 1
    around = (1 - height.square()).sqrt().view(-1, 1, 1) * circle  # [heights, angles, 2]
    z = torch.cat([around, height.view(-1, 1, 1).expand(-1, count, 1)], -1)
    return z.flatten(0, 1), (2 * weight * (2 * math.pi / count)).log().repeat_interleave(count)


def product_rule(nodes: Tensor, weights: Tensor, dim: int, *, log: bool = False) -> tuple[Tensor, Tensor]:
    """The product of a rule on a line with itself.

    Args:
        nodes: ``[n]``.
        weights: ``[n]``, or their logarithms.
        dim: Number of dimensions; the rule has ``n ** dim`` nodes.
        log: Whether weights are logarithms.

    Returns:
        Nodes ``[n ** dim, dim]`` and weights ``[n ** dim]``.

    Raises:
        ValueError: There would be more than 4 million nodes.
    """
    if len(nodes) ** dim > 4_000_000:
        raise ValueError(f"needed few free coordinates for an expectation by a rule, got {dim}; test a smaller layer.")
    grid = torch.cartesian_prod(*[nodes] * dim).view(-1, dim)
    each = torch.cartesian_prod(*[weights] * dim).view(-1, dim)
    return grid, each.sum(-1) if log else each.prod(-1)
