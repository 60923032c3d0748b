"""Options of layers against the annotations of their constructors: a value of another kind is named at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["check_options"]

LARGEST = 2**31 - 1  # no size of a layer is larger; torch and Python loops would answer in ways of their own


def check_options(name: str, constructor: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options whose kind is not the annotated one; what has no annotation, or one of another kind, passes.

    Args:
        name: Of the layer, for the message.
        constructor: The layer's class.
        options: Values by name.

    Raises:
        ValueError: A value is of another kind, NaN, or an integer that no layer can use.
    """
    try:
        hints = get_type_hints(constructor.__init__)
    except Exception:  # annotations of a foreign layer may name what cannot be resolved
        return
    for option, value in options.items():
        if option not in hints or _fits(value, hints[option]):
            continue
        if get_origin(hints[option]) is Literal:
            *others, last = map(repr, get_args(hints[option]))
            raise ValueError(f"needed {option} {', '.join(others)} or {last}, got {value!r}; see {name!r}.")
        kind = str(hints[option]) if get_origin(hints[option]) else getattr(hints[option], "__name__", "")
        raise ValueError(f"needed {option} of {name!r} as {kind}, got {value!r} ({type(value).__name__}).")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str | int | None) and value in args
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if origin is tuple and Ellipsis not in args:
        sequence = isinstance(value, tuple | list) and len(value) == len(args)
        return sequence and all(_fits(v, arg) for v, arg in zip(value, args, strict=True))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, args[0]) for v in value)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True
