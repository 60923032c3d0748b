"""Bernoulli draws of pixels that depend only on (seed, epoch, example), not on the history of a generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["bernoulli", "fixed_permutation", "mix64"]

UInt64 = npt.NDArray[np.uint64]

# SplitMix64, "Fast splittable pseudorandom number generators" (Steele, Lea, Flood 2014): a Weyl sequence with this
# step, scrambled by a bijection whose output bits each depend on all input bits.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _scramble(x: UInt64) -> UInt64:
    """Scramble in place; arrays wrap around silently, numpy scalars would warn."""
    x ^= x >> np.uint64(30)
    x *= _FACTORS[0]
    x ^= x >> np.uint64(27)
    x *= _FACTORS[1]
    x ^= x >> np.uint64(31)
    return x


def mix64(*words: int) -> int:
    """Hash integers into one unsigned 64-bit integer; every bit of every word matters, and so does their order.

    Example:
        >>> mix64(0, 1) == mix64(0, 1), mix64(0, 1) == mix64(1, 0)
        (True, False)
    """
    state = 0  # Python's integers: a tenth of the time of NumPy's scalars
    for word in words:
        state = (state + int(_STEP) + word) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _keys(stream: int, indices: Tensor) -> UInt64:
    """One 64-bit key for each example; those of different examples are far apart on SplitMix64's cycle."""
    return _scramble(np.uint64(stream) + indices.numpy().astype(np.uint64) * _STEP)


def bernoulli(pixels: Tensor, levels: int, stream: int, indices: Tensor) -> Tensor:
    """Draw each pixel from Bernoulli(pixels / levels).

    The draw of an example is a function of ``stream``, its index and its pixels alone, so it does not change with the
    batch size, the number of processes, or a restart. Pixels 0 and ``levels`` are never changed; the probability of
    the others is within 1e-7 of the one asked for. This is faster than ``torch.rand`` with a seeded CPU generator.

    Args:
        pixels: ``[B, *shape]``, uint8 in ``0..levels`` or float32 in [0, 1] (with ``levels`` 1).
        levels: The pixel value that stands for probability one.
        stream: A 64-bit number out of :func:`mix64`.
        indices: ``[B]``, int64: the number of each example in its data set.

    Returns:
        Zeros and ones, uint8, in the shape of ``pixels``.
    """
    flat = pixels.reshape(len(pixels), -1).numpy()  # [B, D]
    half = (flat.shape[1] + 1) // 2
    steps = np.arange(1, half + 1, dtype=np.uint64) * _STEP
    bits = _scramble(_keys(stream, indices)[:, None] + steps).view(np.uint32)[:, : flat.shape[1]]
    # 31 bits, and thresholds rounded up, so that `levels` is always above and 0 never is
    thresholds: npt.NDArray[Any]
    thresholds = (
        flat * np.uint32(-(-(2**31) // levels)) if flat.dtype == np.uint8 else (flat * 2.0**31).astype(np.uint32)
    )
    drawn = (bits >> np.uint32(1)) < thresholds
    return torch.from_numpy(drawn.view(np.uint8)).view(pixels.shape)


def fixed_permutation(size: int) -> Tensor:
    """A permutation ``[size]`` that is the same on every machine and for every version of torch and numpy."""
    return torch.from_numpy(np.argsort(_keys(0, torch.arange(size)), kind="stable"))
