"""Sums over pairs of neighbouring runs, by the number of ones in each: what the law of a subset is computed by.

A table ``[a, runs, ...]`` has for each run of items a number for 0, 1, ..., a - 1 ones. Three maps of tables, each
linear in each of its halves or tensors, have all their derivatives among them. On a CPU they go row by row, which is
faster there than all terms at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stochastic_layers.auxiliary import kernels_usable

__all__ = ["halves", "joined", "outside", "paired"]


def halves(table: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right one of each pair of neighbouring runs: ``[a, runs, ...]`` -> ``[a, runs / 2, ...]``."""
    return table[:, 0::2], table[:, 1::2]


def _shifted_terms(x: Tensor, y: Tensor) -> Tensor:
    """Terms ``x[i] y[t - i]`` of a product of polynomials: ``[a, ...]``, ``[c, ...]`` -> ``[a, a + c - 1, ...]``.

    They come with i falling. The compiler takes windows, and stumbles over a view whose rows are longer by one.
    """
    margin = y.new_zeros(len(x) - 1, *y.shape[1:])
    windows = torch.cat([margin, y, margin]).unfold(0, len(x), 1)  # window t begins with y[t - a + 1]
    return x.flip(0).unsqueeze(1) * windows.movedim(-1, 0)


def _add_product(result: Tensor, x: Tensor, y: Tensor) -> None:
    for i, row in enumerate(x.unbind()[: len(result)]):
        count = min(len(y), len(result) - i)
        result[i : i + count].addcmul_(row, y[:count])


def _add_correlation(result: Tensor, x: Tensor, y: Tensor) -> None:
    for i, row in enumerate(y.unbind()[: len(x)]):
        count = min(len(result), len(x) - i)
        result[:count].addcmul_(row, x[i : i + count])


class _Paired(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(table)
        left, right = halves(table)
        result = table.new_zeros(size, *left.shape[1:])
        _add_product(result, left, right)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return outside(grad, table), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, table)
        (left, right), (x_left, x_right) = halves(table), halves(x)
        result = table.new_zeros(size, *left.shape[1:])
        _add_product(result, x_left, right)
        _add_product(result, x_right, left)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, table = ctx.saved_tensors
        return outside(grad, table), outside(grad, x), None


class _Outside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, around: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(around, table)
        result = torch.zeros_like(table)
        (left, right), (to_left, to_right) = halves(table), halves(result)
        _add_correlation(to_left, around, right)
        _add_correlation(to_right, around, left)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        around, table = ctx.saved_tensors
        return joined(grad, table, len(around)), outside(around, grad)


def _by_formula(tensor: Tensor) -> bool:
    """Whether few large operations are better than many small ones, or have to be."""
    return tensor.device.type != "cpu" or not kernels_usable()


def paired(table: Tensor, size: int) -> Tensor:
    """The first ``size`` coefficients of (left) (right), of each pair of runs.

    Args:
        table: ``[a, runs, ...]``.
        size: At most 2 a - 1.

    Returns:
        ``[size, runs / 2, ...]``.
    """
    if _by_formula(table):
        return _shifted_terms(*halves(table))[:, :size].sum(0)
    result: Tensor = _Paired.apply(table, size)  # type: ignore[no-untyped-call]
    return result


def joined(x: Tensor, table: Tensor, size: int) -> Tensor:
    """The derivative of :func:`paired` by the table, in the direction of x, a table too."""
    if _by_formula(x):
        (left, right), (x_left, x_right) = halves(table), halves(x)
        return (_shifted_terms(x_left, right) + _shifted_terms(x_right, left))[:, :size].sum(0)
    result: Tensor = _Joined.apply(x, table, size)  # type: ignore[no-untyped-call]
    return result


def outside(around: Tensor, table: Tensor) -> Tensor:
    """The gradient by the table of ``(around * paired(table)).sum()``: ``[a, runs, ...]``.

    Where ``around`` has the probabilities of what is outside each pair, by the number of ones in the pair, these are
    those of what is outside each run, by the number of ones in the run.

    Args:
        around: ``[size, runs / 2, ...]``.
        table: ``[a, runs, ...]``.
    """
    if _by_formula(around):
        a = len(table)
        around = torch.cat([around, around.new_zeros(2 * a - 1 - len(around), *around.shape[1:])])
        sides = [_shifted_terms(around, half.flip(0))[:, a - 1 : 2 * a - 1].sum(0) for half in reversed(halves(table))]
        return torch.stack(sides, 2).flatten(1, 2)
    result: Tensor = _Outside.apply(around, table)  # type: ignore[no-untyped-call]
    return result
