"""Draws with more to them: the slope of soft ones, auxiliary losses, and that they are still what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_drawn", "eager_on_cpu", "kernels_usable", "with_gradient_of", "with_value"]


def kernels_usable() -> bool:
    """Whether an ``autograd.Function`` may stand for a formula.

    Under ``torch.compile`` the formula is better: the compiler fuses its passes, and sees through it. Under the
    transforms of ``torch.func`` it is needed, as it has a derivative in every mode.
    """
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether calls on a tensor run as they are made, on a CPU, where a look at a value waits for nothing."""
    return tensor.device.type == "cpu" and kernels_usable()


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_value(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, exactly, and the gradient of ``soft``: ``hard + (soft - soft.detach())`` without a pass.

    Args:
        hard: ``[S, ...]``, without gradient.
        soft: ``[S, ...]`` or, the same for every draw, ``[...]``.
    """
    if soft.dim() < hard.dim():
        soft = soft.unsqueeze(0)  # for S = 1 nothing is left to expand, and backward to sum
    if not kernels_usable():
        return hard + (soft - soft.detach())
    result: Tensor = _WithValue.apply(soft.expand_as(hard), hard)  # type: ignore[no-untyped-call]
    return result


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


def as_drawn(z: Tensor) -> Callable[[], Tensor]:
    """A function that returns z, to be read after the model has had it, as long as it is what was drawn.

    What autograd saves it guards itself; but log q(z) and the like are computed when the cost is known. Under
    ``torch.compile``, where a tensor has no version, the function returns a copy, which the compiler makes only where
    the model does change z.

    Raises:
        RuntimeError: From the function: z was changed in place.
    """
    if torch.compiler.is_compiling():
        copy = z.clone()
        return lambda: copy
    if z.is_inference():  # nor has it a version there
        return lambda: z
    version = z._version

    def read() -> Tensor:
        if z._version != version:
            raise RuntimeError(
                "needed the draws z as they were drawn, got them changed in place: log q(z) would be that of other "
                "points, and the gradient wrong. Write 2 * z - 1 instead of z.mul_(2).sub_(1), say, and "
                "inplace=False in the module after the layer."
            )
        return z

    return read
