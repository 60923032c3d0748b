"""Which layer, with which family, trains which objective: asked of the objectives themselves."""

from __future__ import annotations

from dataclasses import dataclass

import stochastic_layers as sl
from lightning_modules.build import OBJECTIVES, build_layer, build_objective
from stochastic_layers.families import takes_categories

__all__ = ["Compatibility", "compatibility", "compatibility_markdown", "smallest"]

LATENT_DIM, NUM_CATEGORIES = 2, 3


@dataclass(frozen=True)
class Compatibility:
    """One layer and family against every objective.

    Attributes:
        layer: The registered name.
        family: The distribution family.
        refusals: For every objective by name, why it refuses the layer; empty where it accepts it.
    """

    layer: str
    family: str
    refusals: dict[str, str]


def compatibility() -> list[Compatibility]:
    """Every registered layer and family, in order, against every objective at its default options.

    Example:
        >>> rows = {(row.layer, row.family): row.refusals for row in compatibility()}
        >>> rows["gaussian", "gaussian"]["elbo"]
        ''
    """
    objectives = {name: build_objective(name) for name in sorted(OBJECTIVES)}
    rows = []
    for name in sl.list_layers():
        for family in sl.describe(name).families:
            layer = smallest(name, family)
            refusals = {}
            for objective, check in objectives.items():
                try:
                    check.check(layer)
                    refusals[objective] = ""
                except ValueError as error:
                    refusals[objective] = str(error)
            rows.append(Compatibility(name, family, refusals))
    return rows


def smallest(name: str, family: str) -> sl.StochasticLayer:
    """A layer of few variables, and of one where it takes no more."""
    options = {"family": family} | ({"num_categories": NUM_CATEGORIES} if takes_categories(family) else {})
    try:
        return build_layer(name, options | {"latent_dim": LATENT_DIM})
    except ValueError:  # one joint variable has too many outcomes
        return build_layer(name, options | {"latent_dim": 1})


def compatibility_markdown() -> str:
    """The page ``docs/compatibility.md``: a table of yes and numbered reasons."""
    rows = compatibility()
    objectives = sorted(OBJECTIVES)
    reasons: dict[str, int] = {}
    table = [
        "| " + " | ".join(("layer", "family", *(f"`{name}`" for name in objectives))) + " |",
        "|---" * (len(objectives) + 2) + "|",
    ]
    for row in rows:
        cells = []
        for name in objectives:
            # the sentence is the same for every layer but for the layer's name
            reason = row.refusals[name].replace(repr(row.layer), "this layer")
            cells.append(f"no ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else "yes")
        table.append("| " + " | ".join((f"`{row.layer}`", row.family, *cells)) + " |")
    lines = [
        "# Which layer trains which objective",
        "",
        "<!-- generated: stochastic-layers list --compatibility > docs/compatibility.md -->",
        "",
        "Made from the registry by `stochastic-layers list --compatibility`; a test compares. Layers and objectives",
        "are at their default options. A combination that cannot work is refused as the model is built, with the",
        "sentence given below the table.",
        "",
        *table,
        "",
        *(f"{number}. {reason}" for reason, number in reasons.items()),
    ]
    return "\n".join(lines).rstrip()
