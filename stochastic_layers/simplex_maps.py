"""Sparse maps onto the probability simplex: sparsemax and 1.5-entmax, exact by sorting, with exact Jacobians."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    result: Tensor = _Sparsemax.apply(scores)  # type: ignore[no-untyped-call]
    return result


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
    result: Tensor = _Entmax15.apply(scores)  # type: ignore[no-untyped-call]
    return result


def _sorted(scores: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores below their maximum, cut at -width (they have p = 0 there); the same, descending; and 1 .. C."""
    scores = (scores - scores.amax(-1, keepdim=True)).clamp_min(-width)
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    return scores, scores.sort(-1, descending=True).values, ranks


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        scores, descending, ranks = _sorted(scores, 1.0)
        cumulative = descending.cumsum(-1) - 1
        size = (ranks * descending > cumulative).sum(-1, keepdim=True)  # of the support
        threshold = cumulative.gather(-1, size - 1) / size
        p = (scores - threshold).clamp_min(0)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        p: Tensor = ctx.saved_tensors[0]
        support = (p > 0).to(grad.dtype)
        mean = (grad * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return support * (grad - mean)


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        scores, descending, ranks = _sorted(scores / 2, 1.0)
        # the threshold if the k largest were the support solves the quadratic sum_{i <= k} (x_i - t)^2 = 1
        mean = descending.cumsum(-1) / ranks
        spread = descending.square().cumsum(-1) / ranks - mean.square()
        candidates = mean - (1 / ranks - spread).clamp_min(0).sqrt()
        size = (candidates <= descending).sum(-1, keepdim=True)
        p = (scores - candidates.gather(-1, size - 1)).clamp_min(0).square()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        p: Tensor = ctx.saved_tensors[0]
        root = torch.where(p > 0, p, 1.0).sqrt() * (p > 0)  # twice differentiable at p = 0, unlike p.sqrt()
        mean = (grad * root).sum(-1, keepdim=True) / root.sum(-1, keepdim=True)
        return root * (grad - mean)
