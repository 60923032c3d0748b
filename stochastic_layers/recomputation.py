"""Activation checkpointing: a recomputed layer repeats its forward pass, with the noise and the state of then."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["Pass", "Passes", "may_be_recomputed", "recomputing", "refuse_recomputation", "refuse_reentrant"]


def recomputing() -> bool:
    """Whether this code runs inside a backward pass, where ``torch.utils.checkpoint`` calls a region again."""
    # under torch.compile the recomputation is part of the compiled graph, and no Python code runs again
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def may_be_recomputed() -> bool:
    """Whether a backward pass may compute this code again, and needs what the forward pass has used.

    Non-reentrant checkpointing sets hooks on saved tensors while its region runs. Reentrant checkpointing runs its
    region without gradients, so that there is no graph to keep anything; compiled code does not run again as Python.
    """
    if torch.compiler.is_compiling():
        return False
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch before 2.8 cannot be asked
    return hooks is None or hooks(True) is not None


def refuse_recomputation(state: str) -> None:
    """Stop before state is updated again by a recomputation, from which the draws would differ as well.

    Args:
        state: What would be updated, for the message.

    Raises:
        RuntimeError: The caller is being recomputed.
    """
    if recomputing():
        raise RuntimeError(
            f"needed a layer with {state} outside the region of activation checkpointing, got one inside: computed "
            "again in the backward pass, it would count the batch twice. Checkpoint the networks before and after it."
        )


def refuse_reentrant() -> None:
    """Stop where reentrant checkpointing recomputes the caller: its forward pass had no gradients to carry.

    Its sample is with whoever computes the loss, and nothing that happens in the backward pass gets there: the credit
    of the draws and the auxiliary losses would be lost.

    Raises:
        RuntimeError: It does.
    """
    caller = inspect.currentframe()
    while caller is not None:
        if caller.f_code is CheckpointFunction.backward.__code__:
            raise RuntimeError(
                "needed activation checkpointing with use_reentrant=False, got reentrant checkpointing around a layer "
                "that gets a gradient from the cost or from an auxiliary loss: its forward pass ran without gradients, "
                "so that this one would be lost."
            )
        caller = caller.f_back


class Pass:
    """What one forward pass has used: its input, the buffers before their update, and the random numbers it took.

    Args:
        x: The input, by which the pass is recognised.

    Attributes:
        buffers: Copies of the buffers that the pass has used.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach()
        self.buffers: list[Tensor] = []
        self._random = [_random_state(x.device)]

    def keep(self, module: nn.Module) -> None:
        """Copy the buffers, before they are updated."""
        self.buffers = [buffer.clone() for buffer in module.buffers()]

    def updated(self) -> None:
        """Note how far the update has moved the random state, for the draws that come after it."""
        self._random.append(_random_state(self.x.device))

    def skip_update(self) -> None:
        """Move the random state as the update did, if it is the one that the pass began with."""
        before, after = self._random
        # checkpoint(..., preserve_rng_state=False) does not put it back, and then it is not ours to move
        if all(map(torch.equal, before, _random_state(self.x.device))):
            torch.set_rng_state(after[0])
            for state in after[1:]:
                getattr(torch, self.x.device.type).set_rng_state(state, self.x.device)

    @contextmanager
    def buffers_of_then(self, module: nn.Module) -> Iterator[None]:
        """The module has the buffers that the pass has used; on leaving, its own again."""
        places = [(owner, name) for owner in module.modules() for name, _ in owner.named_buffers(recurse=False)]
        now = [getattr(owner, name) for owner, name in places]
        try:
            for (owner, name), buffer in zip(places, self.buffers, strict=True):
                setattr(owner, name, buffer)
            yield
        finally:
            for (owner, name), buffer in zip(places, now, strict=True):
                setattr(owner, name, buffer)


class Passes:
    """The forward passes of a layer whose graphs are alive: those that may be computed again.

    A pass is kept by the graph itself, and goes with it: where nothing is checkpointed, after the backward pass of the
    step.
    """

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[Pass] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self._alive)

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return type(self), ()  # a copy of the layer is in no graph

    def add(self, this: Pass, z: Tensor) -> None:
        """Keep a pass for as long as the graph of its output lives."""
        if z.grad_fn is not None:
            node: Any = z.grad_fn  # its stub says that metadata is a method
            node.metadata["stochastic_layers"] = this
            self._alive.add(this)

    def find(self, x: Tensor) -> Pass:
        """The pass with this input.

        Raises:
            RuntimeError: There is none, or several that have used different buffers.
        """
        found = [p for p in self._alive if p.x.shape == x.shape and torch.equal(p.x, x)]
        if not found:
            raise RuntimeError(
                "needed a forward pass with gradients and the same params, to compute it again, got none; use "
                "activation checkpointing with use_reentrant=False and without changes in place, or leave this layer, "
                "which has a codebook, outside and checkpoint the networks before and after it."
            )
        first, *others = found
        if not all(map(torch.equal, first.buffers * len(others), [b for p in others for b in p.buffers])):
            raise RuntimeError(
                f"needed one forward pass with these params to compute again, got {len(found)} between which the "
                "codebook was updated; leave this layer outside the region of activation checkpointing."
            )
        return first


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, getattr(torch, device.type).get_rng_state(device)]
