"""Sparse maps onto the probability simplex: sparsemax and 1.5-entmax, exact by sorting, with exact Jacobians."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochastic_layers.auxiliary import kernels_usable

__all__ = ["entmax15", "sparsemax"]


def sparsemax(scores: Tensor) -> Tensor:
    r"""Euclidean projection of the last dimension onto the simplex.

    .. math:: p_i = \max(x_i - t, 0), \qquad t: \sum_i p_i = 1

    Args:
        scores: ``[..., C]``.

    References:
        From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification (Andre F. T. Martins,
        Ramon Fernandez Astudillo, 2016), https://arxiv.org/abs/1602.02068

    Example:
        >>> import torch
        >>> sparsemax(torch.tensor([1.0, 0.5, -3.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    below, descending, ranks = _sorted(scores, square=False)
    cumulative = descending.cumsum(-1) - 1
    size = (ranks * descending > cumulative).sum(-1, keepdim=True)
    return _map(scores, below, cumulative.gather(-1, size - 1) / size, square=False)


def entmax15(scores: Tensor) -> Tensor:
    r"""The map halfway between softmax and sparsemax: sparse, with a continuous derivative.

    .. math:: p_i = \max(x_i / 2 - t, 0)^2, \qquad t: \sum_i p_i = 1

    Args:
        scores: ``[..., C]``.

    References:
        Sparse Sequence-to-Sequence Models (Ben Peters, Vlad Niculae, Andre F. T. Martins, 2019),
        https://arxiv.org/abs/1905.05702

    Example:
        >>> import torch
        >>> entmax15(torch.tensor([0.0, 0.0, -3.0]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    below, descending, ranks = _sorted(scores, square=True)
    # the threshold if the k largest were the support solves the quadratic sum_{i <= k} (x_i - t)^2 = 1
    means = descending.cumsum(-1) / ranks
    spreads = descending.square().cumsum(-1) / ranks - means.square()
    candidates = means - (1 / ranks - spreads).clamp_min(0).sqrt()
    size = (candidates <= descending).sum(-1, keepdim=True)
    return _map(scores, below, candidates.gather(-1, size - 1), square=True)


def _below(scores: Tensor, square: bool) -> Tensor:
    """x, scores ``[..., C]`` less their maximum; half of that for the square."""
    below = scores - scores.detach().amax(-1, keepdim=True)
    return below / 2 if square else below


def _sorted(scores: Tensor, square: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[..., C]``, cut at -1 where p = 0 for sure; the same, descending; and 1 .. C. All without gradient."""
    below = _below(scores.detach(), square).clamp_min_(-1)
    ranks = torch.arange(1, below.shape[-1] + 1, dtype=below.dtype, device=below.device)
    return below, below.sort(-1, descending=True).values, ranks


def _distance(below: Tensor, support: Tensor, square: bool) -> Tensor:
    """x - t on a known support, 0 elsewhere: more exact than by t, and differentiable."""
    count = support.sum(-1, keepdim=True)
    centered = (below - (below * support).sum(-1, keepdim=True) / count) * support
    if not square:
        return centered + support / count
    # > 0: the mean is in the support
    return (centered + ((1 - centered.square().sum(-1, keepdim=True)) / count).sqrt()) * support


class _Map(torch.autograd.Function):
    """p = d or p = d^2 of the distance d, with the Jacobian ``diag(s) - s s^T / sum(s)`` of s = 1[d > 0] or d."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, support: Tensor, distance: Tensor, square: bool) -> Tensor:
        ctx.save_for_backward(scores, support, distance)
        ctx.square = square
        return distance.square() if square else distance.view_as(distance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        scores, slope, distance = ctx.saved_tensors
        if ctx.square:
            # computed again where this gradient will itself be differentiated
            slope = _distance(_below(scores, True), slope, True) if torch.is_grad_enabled() else distance
        weighted = slope * grad
        return weighted - slope * (weighted.sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)), None, None, None


def _map(scores: Tensor, below: Tensor, threshold: Tensor, *, square: bool) -> Tensor:
    # above the threshold by more than rounding errors
    support = (below > threshold + 8 * torch.finfo(below.dtype).eps).to(below.dtype)
    if not kernels_usable():
        distance = _distance(_below(scores, square), support, square)
        return distance.square() if square else distance
    result: Tensor = _Map.apply(scores, support, _distance(below, support, square), square)  # type: ignore[no-untyped-call]
    return result
