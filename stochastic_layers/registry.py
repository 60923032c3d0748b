"""Names for layers: register, create, list and describe them; installed packages add theirs through entry points."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from stochastic_layers.options import check_kinds, check_values

if TYPE_CHECKING:
    from stochastic_layers.layer import StochasticLayer

__all__ = ["Description", "create", "describe", "known_families", "layer_class", "list_layers", "nearest", "register"]

ENTRY_POINT_GROUP = "stochastic_layers.layers"
NEEDS = ("cost", "cost_gradient", "relaxable_cost")

_LAYERS: dict[str, type[StochasticLayer]] = {}
_BROKEN: dict[str, str] = {}  # entry points that could not be loaded, and why
_pending_entry_points: bool = True
_Layer = TypeVar("_Layer", bound="type[StochasticLayer]")


@dataclass(frozen=True)
class Description:
    """What a registered layer can do and what it asks of the cost.

    Attributes:
        name: The registered name.
        families: Names of the distribution families it accepts.
        unbiased: ``True``, ``False``, or a sentence "when ..." that says under which condition it is.
        needs: What the estimator uses: ``"cost"`` (values of the cost at ``Sample.z``), ``"cost_gradient"`` (the cost
            is differentiated with respect to ``z``), ``"relaxable_cost"`` (the cost is evaluated at points outside the
            support of q).
        evaluations: Number of points at which the cost is evaluated in one training step, a number or a formula in the
            layer's options.
        exact_draws: Whether the training draws, counted by their weights, follow q exactly.
        reference: Title (authors, year) and a link.
        summary: The first line of the class docstring.
    """

    name: str
    families: tuple[str, ...]
    unbiased: bool | str
    needs: tuple[str, ...]
    evaluations: int | str
    exact_draws: bool
    reference: str
    summary: str


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence that names the valid choices closest to ``name``, or all of them where none is close."""
    names = sorted(names)
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    if close:
        return _question(lower[n] for n in close)
    return "valid names: " + ", ".join(repr(n) for n in names) + "."


def _question(names: Iterable[str]) -> str:
    return "did you mean " + " or ".join(repr(name) for name in names) + "?"


def _meant(name: str) -> str:
    """As :func:`nearest` of the layers; what has another name in the papers is found by the layers' summaries."""
    word = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    known_as = sorted(other for other, cls in _LAYERS.items() if word.search(_summary(cls)))
    if 0 < len(known_as) <= 3 and not difflib.get_close_matches(name.lower(), _LAYERS, cutoff=0.8):
        return _question(known_as)
    return nearest(name, _LAYERS)


def register(name: str) -> Callable[[_Layer], _Layer]:
    """Class decorator that gives a :class:`StochasticLayer` a name for :func:`create`.

    Args:
        name: The name; lower case with underscores by convention.

    Raises:
        ValueError: The name is taken by another class, or the class does not declare its capabilities.
    """

    def decorate(cls: _Layer) -> _Layer:
        taken = _LAYERS.get(name)
        if taken is not None and taken is not cls:
            raise ValueError(
                f"needed a name that is free, got {name!r}, which is already {taken.__module__}.{taken.__qualname__}; "
                "register the layer under another name."
            )
        for attribute in ("families", "unbiased", "needs"):
            if not hasattr(cls, attribute):
                raise ValueError(
                    f"needed the class attributes families, unbiased and needs, got {cls.__qualname__} without "
                    f"{attribute!r}; declare it in the class body."
                )
        unknown = set(cls.needs) - set(NEEDS)
        if unknown:
            raise ValueError(f"needed a subset of {NEEDS} as needs, got {sorted(unknown)} in {cls.__qualname__}.")
        cls.name = name
        _LAYERS[name] = cls
        return cls

    return decorate


def _load_entry_points() -> None:
    """Import the layers that installed packages announce; once, and only when a name is looked up.

    One that cannot be imported, is no layer, or claims a name that is taken is reported and left out: a broken package
    must not take the other layers with it.
    """
    global _pending_entry_points
    if not _pending_entry_points:
        return
    _pending_entry_points = False
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            cls = entry.load()
            if _LAYERS.get(entry.name) is not cls:  # the module may have used the decorator itself
                register(entry.name)(cls)
        except Exception as error:  # whatever a foreign module raises as it is imported
            package = f" of the package {entry.dist.name!r}" if entry.dist is not None else ""
            _BROKEN[entry.name] = (
                f"the entry point {entry.name!r} = {entry.value!r}{package} could not be loaded: "
                f"{type(error).__name__}: {error}"
            )
            warnings.warn(
                f"{_BROKEN[entry.name]} Correct or uninstall it; the other layers are not affected.",
                RuntimeWarning,
                stacklevel=3,
            )


def _summary(cls: type[StochasticLayer]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def layer_class(name: str) -> type[StochasticLayer]:
    """The class registered under ``name``.

    Raises:
        ValueError: No layer has this name; the message names the nearest ones, or says why an installed package could
            not provide it.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"needed the name of a registered layer, got {name!r}; build a layer of a class by calling it."
        )
    if name not in _LAYERS:
        _load_entry_points()
    if name not in _LAYERS:
        reason = _BROKEN.get(name) or _meant(name)
        raise ValueError(f"needed the name of a registered layer, got {name!r}; {reason}")
    return _LAYERS[name]


def create(name: str, **options: Any) -> StochasticLayer:
    """Build a registered layer.

    Args:
        name: A name out of :func:`list_layers`.
        **options: The layer's constructor arguments, ``latent_dim`` among them.

    Raises:
        ValueError: Unknown name, unknown option, or a bad value or kind of value of an option.

    Example:
        >>> import stochastic_layers as sl
        >>> layer = sl.create("reinforce", latent_dim=8, family="bernoulli", num_samples=4, baseline="leave_one_out")
        >>> layer.in_features, layer.out_features
        (8, 8)
    """
    cls = layer_class(name)
    parameters = inspect.signature(cls).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(f"{name!r} has no option {option!r}; {nearest(option, parameters)}")
    missing = [p for p, spec in parameters.items() if spec.default is spec.empty and p not in options]
    if missing:
        raise ValueError(f"needed the option {missing[0]!r} of {name!r}, got none; pass {missing[0]}=...")
    check_kinds(name, cls, options)
    layer = cls(**options)
    check_values(name, cls, options)
    return layer


def known_families() -> set[str]:
    """The names of the families that any registered layer accepts."""
    _load_entry_points()
    return {family for cls in _LAYERS.values() for family in cls.families}


def list_layers(
    *,
    family: str | None = None,
    unbiased: bool | None = None,
    needs: str | None = None,
    exact_draws: bool | None = None,
) -> list[str]:
    """Sorted names of the registered layers, filtered by capability.

    Args:
        family: Only layers that accept this distribution family.
        unbiased: ``True``: only layers that are unbiased without condition; ``False``: all others.
        needs: Only layers that need this of the cost (``"cost"``, ``"cost_gradient"``, ``"relaxable_cost"``).
        exact_draws: Only layers whose training draws do (or do not) follow q exactly.

    Raises:
        ValueError: Unknown family or need.
    """
    _load_entry_points()
    if needs is not None and needs not in NEEDS:
        raise ValueError(f"needed one of {NEEDS} as needs, got {needs!r}.")
    known = known_families()
    if family is not None and family not in known:
        raise ValueError(f"needed the name of a family, got {family!r}; {nearest(family, known)}")
    return sorted(
        name
        for name, cls in _LAYERS.items()
        if (family is None or family in cls.families)
        and (unbiased is None or (cls.unbiased is True) == unbiased)
        and (needs is None or needs in cls.needs)
        and (exact_draws is None or cls.exact_draws == exact_draws)
    )


def describe(name: str) -> Description:
    """The capabilities of a registered layer as a frozen record."""
    cls = layer_class(name)
    return Description(
        name=name,
        families=tuple(cls.families),
        unbiased=cls.unbiased,
        needs=tuple(cls.needs),
        evaluations=cls.evaluations,
        exact_draws=cls.exact_draws,
        reference=cls.reference,
        summary=_summary(cls),
    )
