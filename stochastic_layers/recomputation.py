"""Activation checkpointing: a recomputed layer redraws its noise, but must not count a batch a second time."""

from __future__ import annotations

import torch

__all__ = ["recomputing", "refuse_recomputation"]


def recomputing() -> bool:
    """Whether this code runs inside a backward pass, where ``torch.utils.checkpoint`` calls a region again."""
    # under torch.compile the recomputation is part of the compiled graph, and no Python code runs again
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
