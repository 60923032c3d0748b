"""Rules of numerical integration: what the expectations of families, with which layers are proven, are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["gauss_hermite", "gauss_legendre", "half_line", "interval_nodes", "product_rule", "sphere", "unit_interval"]


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
    """Tanh-sinh rule on (0, 1), as far as 1 - x is a number: nodes, log weights.

    What a law with a singularity at 1 has beyond the last node may well be 1e-5; see :func:`interval_nodes`.
    """
    t = torch.arange(-5.3, 3.1, step, dtype=torch.float64)
    logit = math.pi * t.sinh()
    derivative = torch.nn.functional.logsigmoid(logit) + torch.nn.functional.logsigmoid(-logit)
    return torch.sigmoid(logit), derivative + (math.pi * step * t.cosh()).log()


def interval_nodes(law: Distribution, step: float) -> tuple[Tensor, Tensor]:
    """The product rule for the expectation under independent laws on (0, 1).

    The mass at either end is on one node: below 1e-15, and near 1, where hardly a number is left, all that is on no
    other node. The weights of each variable have sum 1, and so have their products.

    Args:
        law: Batch shape ``[*batch, D]``.
        step: Step of :func:`unit_interval`.

    Returns:
        Nodes ``[N, *batch, D]`` and weights ``[N, *batch]``, differentiable in the parameters of the law.
    """
    x, log_volume = (t.view(-1, *[1] * len(law.batch_shape)) for t in unit_interval(step))  # float64, whatever the law
    weights = (law.log_prob(x) + log_volume).exp()
    end = int((x < 1e-15).sum())
    weights = torch.cat([weights[:end].sum(0, keepdim=True), weights[end:-1]])
    weights = torch.cat([weights, 1 - weights.sum(0, keepdim=True)])  # [n, *batch, D]
    dim = law.batch_shape[-1]
    index = product_rule(torch.arange(len(weights)), torch.ones(len(weights)), dim)[0]  # [N, D]
    points = x.flatten()[end - 1 :][index].view(-1, *[1] * (len(law.batch_shape) - 1), dim)
    each = torch.stack([weights[index[:, d], ..., d] for d in range(dim)], -1)
    dtype = law.mean.dtype
    return points.to(dtype).expand(-1, *law.batch_shape), each.prod(-1).to(dtype)


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
