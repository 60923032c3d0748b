"""The arguments of a model, checked, and as plain data, which a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

__all__ = ["example_shape", "is_marked", "plain_options"]

_OBJECT = "<object>"  # stands in the saved hyperparameters for an argument that was an object


def plain_options(owner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as plain data, which a checkpoint can hold; objects leave a mark.

    Raises:
        ValueError: An argument is such a mark: a checkpoint was loaded without the object.
    """
    for name, value in options.items():
        if is_marked(value):
            raise ValueError(
                f"needed {name}=..., got a checkpoint of a model whose {name} was or held an object, which checkpoints "
                f"do not keep; pass the same object: {owner}.load_from_checkpoint(path, {name}=...)."
            )
    return {name: _plain(value) for name, value in options.items()}


def is_marked(value: Any) -> bool:
    """Whether a saved argument was or held an object."""
    if isinstance(value, Mapping):
        return any(is_marked(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(is_marked(v) for v in value)
    return isinstance(value, str) and value == _OBJECT


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else _OBJECT


def example_shape(data_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one example as a tuple of plain integers.

    Raises:
        ValueError: It is no sequence of positive integers.
    """
    try:
        sizes = tuple(index(size) for size in data_shape)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"needed data_shape as the sizes of one example without the batch, such as (1, 28, 28), got {data_shape!r}."
        )
    return sizes
