"""The perceptrons of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

__all__ = ["perceptron"]


def perceptron(sizes: Sequence[int], activation: nn.Module) -> nn.Sequential:
    """Linear maps with Glorot-uniform weights and zero biases, and the activation between them; the last is linear."""
    modules: list[nn.Module] = []
    for before, after in pairwise(sizes):
        linear = nn.Linear(before, after)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        modules += [linear, activation]
    return nn.Sequential(*modules[:-1])
