"""Looking without touching: the random state and every buffer of a module as they were before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["preserved", "restored_buffers", "seed_generators"]


@contextmanager
def preserved(*modules: nn.Module, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """On leaving, restore the random state and every buffer of the modules: baselines, codebooks, statistics.

    Args:
        *modules: Modules whose buffers are restored.
        devices: Devices whose random state is restored besides the CPU's and those of the modules' own tensors; a layer
            without parameters does not know on which device it draws.
    """
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    cuda = {d.index for d in (*devices, *(t.device for t in tensors)) if d.type == "cuda" and d.index is not None}
    with torch.random.fork_rng(devices=sorted(cuda)), restored_buffers(*modules):
        yield


@contextmanager
def restored_buffers(*modules: nn.Module) -> Iterator[None]:
    """On leaving, restore every buffer of the modules; the random state moves on."""
    owners = [owner for module in modules for owner in module.modules()]
    saved = [(m, name, b, b.detach().clone()) for m in owners for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in saved:
                if not torch.equal(buffer, value):  # an untouched buffer may be part of somebody's graph: do not write
                    buffer.copy_(value)
                if getattr(owner, name) is not buffer:
                    setattr(owner, name, buffer)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and that of a device."""
    # Not torch.manual_seed: without a GPU it appends the call, with a formatted stack, to a list that is played when
    # CUDA is initialised. At every batch that is a tenth of a small step, and the list grows for ever.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)
