"""Which list collects the samples of the layers that are called now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from stochastic_layers.layer import Sample

__all__ = ["capture", "innermost"]

# A ContextVar, so that threads and tasks do not mix.
_captured: ContextVar[list[Sample] | None] = ContextVar("captured", default=None)

# The compiler cannot read a ContextVar. For code that it traces there are instead the captures opened in the same
# graph, which nothing outside of it sees, and whether any thread has one open outside, which guards the graph.
_traced: list[list[Sample]] = []
_any_open = False
_number_open = 0
_lock = Lock()


def innermost() -> list[Sample] | None:
    """The list that the innermost :func:`capture` fills, ``None`` outside."""
    if torch.compiler.is_dynamo_compiling():
        if _traced:
            return _traced[-1]
        if not _any_open:
            return None
    return _captured.get()  # a graph breaks here, so that this is read at each call


def _count(change: int) -> None:
    global _any_open, _number_open
    with _lock:
        _number_open += change
        _any_open = _number_open > 0


@contextmanager
def capture() -> Iterator[list[Sample]]:
    """Collect the :class:`Sample` of every layer called inside, in the order of the calls.

    Each thread and each asyncio task has its own captures; of nested ones the innermost collects. In a function that is
    compiled it is part of the graph; opened around one, it breaks the graph at each layer.

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("reinforce", latent_dim=3, family="bernoulli")
        >>> with sl.capture() as samples:
        ...     z = layer(torch.zeros(5, 3))
        >>> len(samples), z.shape
        (1, torch.Size([5, 3]))
    """
    samples: list[Sample] = []
    if torch.compiler.is_dynamo_compiling():
        _traced.append(samples)
        try:
            yield samples
        finally:
            _traced.pop()
        return
    token = _captured.set(samples)
    _count(1)
    try:
        yield samples
    finally:
        _count(-1)
        _captured.reset(token)
