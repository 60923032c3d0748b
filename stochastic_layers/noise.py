"""Standard noise that is fast on a CPU, fine in its tails, and drawn under ``torch.compile`` and ``vmap`` as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stochastic_layers.auxiliary import kernels_usable

__all__ = ["below", "double_uniform", "exponential", "laplace", "log_exponential", "logistic", "normal", "uniform"]


def fast_integers(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Integers of every size and sign; ``random_`` cannot be traced.

    ``vmap`` draws anew for each of its examples into memory that is made of a tensor of theirs.
    """
    lowest = torch.iinfo(torch.int64).min
    if dtype == torch.int32 and like.device.type == "cpu":  # two at once, which takes 0.7 of the time
        count = math.prod(shape)
        return like.new_empty((count + 1) // 2, dtype=torch.int64).random_(lowest, None).view(dtype)[:count].view(shape)
    return like.new_empty(shape, dtype=dtype).random_(torch.iinfo(dtype).min, None)


def traceable_integers(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """The same law for ``torch.compile``; other numbers for the same seed, and twice the time."""
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=dtype, device=like.device)


def _uniform(shape: Sequence[int], like: Tensor, *, negative: bool = False) -> Tensor:
    """Uniform in (-1, 1), or in (-1, 0): odd integers, scaled. Near 0 they are ``2 ** -30`` apart, and none is 0."""
    dtype = torch.int64 if like.dtype == torch.float64 else torch.int32
    largest = torch.iinfo(dtype).max
    scale = (1 - torch.finfo(like.dtype).eps / 2) / (largest + 1)  # so that none rounds to 1
    traced = torch.compiler.is_compiling()
    integers = (traceable_integers if traced else fast_integers)(tuple(shape), dtype, like).bitwise_or_(1)
    if negative:  # without the sign bit: a third of the time of a sign set on floats
        integers, scale = integers.bitwise_and_(largest), -scale
    # converted in place, number by number, where that is known to be safe: a tensor less to fetch from memory
    in_place = like.device.type == "cpu" and not traced
    floats = integers.view(like.dtype) if in_place else torch.empty_like(integers, dtype=like.dtype)
    return floats.copy_(integers).mul_(scale)


def double_uniform(shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform in [0, 1) with 53 bits, in float64; in float32 on a device that has no other.

    A compiled ``torch.rand`` is a float32 number whatever its dtype: near 1 there are none between multiples of
    ``2 ** -24``, and of three categories of probability 2e-8 two would never be drawn.
    """
    if device.type == "mps":
        return torch.rand(*shape, device=device)
    if torch.compiler.is_compiling():
        return torch.randint(2**53, tuple(shape), device=device).to(torch.float64).mul_(2.0**-53)
    return torch.rand(*shape, dtype=torch.float64, device=device)


def below(u: Tensor, probs: Tensor) -> Tensor:
    """``u < probs`` as ones and zeros of the dtype of ``u``, which is overwritten.

    In place it takes a fifth of the time of booleans that are converted.
    """
    return u.lt_(probs) if kernels_usable() else (u < probs).to(u.dtype)


def uniform(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uniform between 0 and 1, neither of them, and fine near 0; of the dtype and device of ``like``."""
    return _uniform(shape, like, negative=True).neg_()


def normal(shape: Sequence[int], like: Tensor) -> Tensor:
    """A standard normal variable, of the dtype and device of ``like``.

    The numbers are those of ``torch.distributions``, which however draws them in place: ``vmap`` does not allow that.
    """
    return torch.randn(*shape, dtype=like.dtype, device=like.device)


def exponential(shape: Sequence[int], like: Tensor) -> Tensor:
    """A standard exponential variable E, positive, of the dtype and device of ``like``.

    By inversion, ``E = -log(1 - u)``. u is fine near 0, where E is small and a Gumbel variable large: categories of
    probability ``2 ** -30`` still win as often as they should. ``Tensor.exponential_`` takes several times as long on a
    CPU.
    """
    return _uniform(shape, like, negative=True).log1p_().neg_()


def log_exponential(shape: Sequence[int], like: Tensor) -> Tensor:
    """log E for E standard exponential, of the dtype and device of ``like``; its negative is a Gumbel variable."""
    return exponential(shape, like).log_()


def laplace(shape: Sequence[int], like: Tensor) -> Tensor:
    """A standard Laplace variable, of the dtype and device of ``like``: fine in its tails."""
    u = _uniform(shape, like)
    return u.abs().log_().copysign_(u)


def logistic(shape: Sequence[int], like: Tensor) -> Tensor:
    """A standard logistic variable, of the dtype and device of ``like``; both tails are equally fine."""
    u = _uniform(shape, like)
    return u.abs().mul_(0.5).logit_().copysign_(u)
