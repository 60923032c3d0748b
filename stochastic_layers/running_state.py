"""Modules whose running statistics keep their precision when the model is converted to a half one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RunningState"]

_HALF = (torch.float16, torch.bfloat16)


class RunningState(nn.Module):
    """Base of modules with running statistics in buffers, which stay in at least float32.

    A moving average stands still in bfloat16: with a decay of 0.99 its steps are below the spacing of the numbers.
    Therefore ``module.bfloat16()``, ``module.half()`` and a half default dtype change the parameters alone; double
    precision changes the buffers as well.
    """

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and tensor.dtype in _HALF:
            tensor = tensor.float()
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # what .to(), .half() and .bfloat16() call, whatever module they are called on
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype in _HALF:
                self._buffers[name] = old.to(buffer.device)  # the value from before it was rounded
        return self
