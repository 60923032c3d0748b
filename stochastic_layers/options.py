"""Options of layers: what several constructors check, and what none should have to, by their annotations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = [
    "check_kinds",
    "check_points",
    "check_positive",
    "check_positive_int",
    "check_temperature",
    "check_values",
    "in_few_digits",
    "require_two",
]

MAX_NUMBERS = 2**28  # in the points of one example: 1 GiB of float32
LARGEST = 2**31 - 1  # no size of a layer is larger; torch and Python loops would answer in ways of their own


def check_positive_int(name: str, value: object, advice: str = "", *, least: int = 1) -> int:
    """Return ``value`` if it is a whole number of ``least`` or more.

    Args:
        name: Of the option, for the message.
        value: Of the option.
        advice: What is usual or what to do instead, for the message.
        least: The smallest that will do.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"needed {name} >= {least}, got {value!r}{'; ' if advice else ''}{advice}.")
    return value


def in_few_digits(number: int) -> str:
    """A positive whole number for a message; Python refuses to write out those of thousands of digits."""
    digits = math.log10(number)
    return str(number) if digits < 18 else f"1e{int(digits)}"


def check_positive(name: str, value: float, advice: str = "", *, or_zero: bool = False) -> float:
    """Return ``value`` if it is finite and positive, or zero where that will do; see :func:`check_positive_int`.

    Raises:
        ValueError: It is not.
    """
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except TypeError:
        number = math.nan
    if not (0 < number < math.inf or (or_zero and number == 0)):
        raise ValueError(f"needed {name} {'>=' if or_zero else '>'} 0, got {value!r}{'; ' if advice else ''}{advice}.")
    return value


def check_temperature(name: str, value: float, advice: str, *, least: float = 1e-6, most: float = 1e6) -> float:
    """Return ``value`` if logits can be divided by it; see :func:`check_positive_int`.

    Beyond these limits quotients of logits, and their derivatives, overflow in float32: NaN in silence.

    Args:
        name: Of the option, for the message.
        value: Of the option.
        advice: What is usual, for the message.
        least: The smallest that will do.
        most: The largest that will do.

    Raises:
        ValueError: It is not positive and finite, or out of the limits.
    """
    if not least <= check_positive(name, value, advice) <= most:
        raise ValueError(f"needed {name} from {least:g} to {most:g}, got {value!r}; {advice}.")
    return value


def check_points(name: str, points: int, features: int, advice: str) -> None:
    """Refuse a layer whose points do not fit into memory, be it for a single example.

    Args:
        name: Of the layer, for the message.
        points: Number of points of an example.
        features: Numbers of a point.
        advice: What to use instead.

    Raises:
        ValueError: They are more than 2 ** 28 numbers.
    """
    if points * features > MAX_NUMBERS:
        raise ValueError(
            f"needed at most {MAX_NUMBERS} numbers in the points of an example for {name!r}, got {points} points of "
            f"{features}; use {advice}."
        )


def require_two(num_samples: int) -> None:
    """Refuse a single draw.

    Raises:
        ValueError: ``num_samples < 2``.
    """
    if num_samples < 2:
        raise ValueError(
            f"needed num_samples >= 2, got {num_samples}: each draw is compared with the others. Raise it."
        )


def check_kinds(name: str, constructor: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options whose kind is not the annotated one; what has no annotation, or one of another kind, passes.

    Args:
        name: Of the layer, for the message.
        constructor: The layer's class.
        options: Values by name.

    Raises:
        ValueError: A value is of another kind, or an integer that no layer can use.
    """
    for option, hint in _hints(constructor).items():
        if option in options and not _fits(options[option], hint):
            value = options[option]
            kind = str(hint) if get_origin(hint) else getattr(hint, "__name__", "")
            raise ValueError(f"needed {option} of {name!r} as {kind}, got {value!r} ({type(value).__name__}).")


def check_values(name: str, constructor: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse what the constructor, which knows better what to say, has let through: a word out of no list, and NaN.

    Args:
        name: Of the layer, for the message.
        constructor: The layer's class.
        options: Values by name.

    Raises:
        ValueError: A string that is none of the annotated ones, or NaN.
    """
    for option, hint in _hints(constructor).items():
        value = options.get(option)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"needed a number as {option} of {name!r}, got nan.")
        if option in options and get_origin(hint) is Literal and value not in get_args(hint):
            *others, last = map(repr, get_args(hint))
            raise ValueError(f"needed {option} of {name!r} out of {', '.join(others)} and {last}, got {value!r}.")


def _hints(constructor: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(constructor.__init__)
    except Exception:  # annotations of a foreign layer may name what cannot be resolved
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) or value in args
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if origin is tuple and Ellipsis not in args:
        sequence = isinstance(value, tuple | list) and len(value) == len(args)
        return sequence and all(_fits(v, arg) for v, arg in zip(value, args, strict=True))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, args[0]) for v in value)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True
