"""Auxiliary losses where no surrogate is built: their gradient rides on the draw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["with_gradient_of"]


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)


def with_gradient_of(z: Tensor, losses: Iterable[Tensor]) -> Tensor:
    """z unchanged, through which a backward pass also adds the gradient of the mean of each loss.

    It is the gradient of ``objective + sum(loss.mean() for loss in losses)`` for whatever objective z enters, at scale
    one: right where the objective is a mean over the batch, as torch's losses are by default, and is not scaled.
    """
    total = sum((loss.mean() for loss in losses), torch.zeros((), device=z.device))
    result: Tensor = _WithGradientOf.apply(z, total)  # type: ignore[no-untyped-call]
    return result
