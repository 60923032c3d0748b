"""Standard noise that is fast on a CPU and fine in its tails: Gumbel and logistic variables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["log_exponential", "logistic"]


def _odd_integers(shape: Sequence[int], like: Tensor) -> tuple[Tensor, int]:
    """Odd integers, uniform below ``2 ** bits``, and that number of bits."""
    dtype = torch.int64 if like.dtype == torch.float64 else torch.int32
    bits = torch.iinfo(dtype).bits - 1
    draw = traceable_integers if torch.compiler.is_compiling() else fast_integers
    return draw(tuple(shape), dtype, like.device).bitwise_or_(1), bits


def fast_integers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Integers of every size that is not negative; ``random_`` cannot be traced."""
    return torch.empty(shape, dtype=dtype, device=device).random_()


def traceable_integers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same law for ``torch.compile``; other numbers for the same seed, and 1.7 times the time."""
    return torch.randint(torch.iinfo(dtype).max, shape, dtype=dtype, device=device)


def _uniform(integers: Tensor, bits: int, like: Tensor) -> Tensor:
    """Odd integers as numbers in (0, 1), accurate near 0: steps of ``2 ** (1 - bits)``, not of eps / 2."""
    scale = 2.0**-bits * (1 - torch.finfo(like.dtype).eps / 2)  # so that none rounds to 1
    # into an empty tensor, as int32 * float would first be converted, in a pass of its own
    return torch.empty(integers.shape, dtype=like.dtype, device=like.device).copy_(integers).mul_(scale)


def log_exponential(shape: Sequence[int], like: Tensor) -> Tensor:
    """log E for E standard exponential, of the dtype and device of ``like``; its negative is a Gumbel variable.

    By inversion, ``E = -log(1 - u)``. u is fine near 0, where E is small and a Gumbel variable large: categories of
    probability ``2 ** -30`` still win as often as they should. ``Tensor.exponential_`` takes several times as long on a
    CPU.
    """
    u = _uniform(*_odd_integers(shape, like), like)
    return u.neg_().log1p_().neg_().log_()


def logistic(shape: Sequence[int], like: Tensor) -> Tensor:
    """A standard logistic variable, of the dtype and device of ``like``; both tails are equally fine."""
    integers, bits = _odd_integers(shape, like)
    sign = integers.bitwise_and(2).sub_(1)  # the second lowest bit; the magnitude depends on it by 2 ** (2 - bits) only
    tail = _uniform(integers, bits, like).mul_(0.5)  # uniform below 1/2
    return tail.logit_().mul_(sign)
