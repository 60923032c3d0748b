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
    scores, descending, ranks = _sorted(scores)
    cumulative = descending.cumsum(-1) - 1
    size = (ranks * descending > cumulative).sum(-1, keepdim=True)
    return _map(scores, _above(scores, cumulative.gather(-1, size - 1) / size), square=False)


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
    scores, descending, ranks = _sorted(scores / 2)
    # the threshold if the k largest were the support solves the quadratic sum_{i <= k} (x_i - t)^2 = 1
    means = descending.cumsum(-1) / ranks
    spreads = descending.square().cumsum(-1) / ranks - means.square()
    candidates = means - (1 / ranks - spreads).clamp_min(0).sqrt()
    size = (candidates <= descending).sum(-1, keepdim=True)
    return _map(scores, _above(scores, candidates.gather(-1, size - 1)), square=True)


def _distance(scores: Tensor, support: Tensor, square: bool) -> Tensor:
    """x - t on a known support, 0 elsewhere: once more, now differentiably."""
    count = support.sum(-1, keepdim=True)
    centered = (scores - (scores * support).sum(-1, keepdim=True) / count) * support
    if not square:
        return centered + support / count
    # > 0: the mean is in the support
    return (centered + ((1 - centered.square().sum(-1, keepdim=True)) / count).sqrt()) * support


class _Map(torch.autograd.Function):
    """p = d or p = d^2 of the distance d, with the Jacobian ``diag(s) - s s^T / sum(s)`` of s = 1[d > 0] or 2 d."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, support: Tensor, square: bool) -> Tensor:
        distance = _distance(scores, support, square)
        ctx.save_for_backward(scores, support, distance)
        ctx.square = square
        return distance.square() if square else distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, slope, distance = ctx.saved_tensors
        if ctx.square:
            # computed again where this gradient will itself be differentiated
            slope = 2 * (_distance(scores, slope, True) if torch.is_grad_enabled() else distance)
        weighted = slope * grad
        return weighted - slope * (weighted.sum(-1, keepdim=True) / slope.sum(-1, keepdim=True)), None, None


def _map(scores: Tensor, support: Tensor, *, square: bool) -> Tensor:
    if not kernels_usable():
        distance = _distance(scores, support, square)
        return distance.square() if square else distance
    result: Tensor = _Map.apply(scores, support, square)  # type: ignore[no-untyped-call]
    return result


def _sorted(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores below their maximum, cut at -1 where p = 0 for sure; the same, descending, a constant; and 1 .. C."""
    scores = (scores - scores.detach().amax(-1, keepdim=True)).clamp_min(-1)
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    return scores, scores.detach().sort(-1, descending=True).values, ranks


def _above(scores: Tensor, threshold: Tensor) -> Tensor:
    """1 for scores above the threshold by more than rounding errors, else 0."""
    return (scores.detach() > threshold + 8 * torch.finfo(scores.dtype).eps).to(scores.dtype)
