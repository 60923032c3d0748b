"""The registry in the terminal: every layer with its capabilities, or those that have what is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from inspect import getdoc
from typing import Any

from rich.console import Console
from rich.table import Table

import stochastic_layers as sl
from lightning_modules.compatibility import compatibility_markdown
from lightning_modules.untrusted import imports_are_restricted
from stochastic_layers.registry import NEEDS, layer_class

__all__ = ["capability_markdown", "capability_table", "describe_command", "list_command", "registered_name"]

COLUMNS = ("layer", "families", "unbiased", "needs of the cost", "evaluations", "exact draws")
SYMBOLS = {"num_samples": "S", "num_categories": "C", "latent_dim": "D"}
# of the table in a terminal: at 80 columns no name is broken, and the lists take what a wider one has
SIZES: dict[str, dict[str, Any]] = {
    "layer": {"width": 26},
    "families": {"ratio": 17},
    "unbiased": {"ratio": 11},
    "needs": {"width": 14},
    "points": {"width": 7},
}
_YES_NO = {True: "yes", False: "no"}


def _rows(names: Sequence[str]) -> list[tuple[str, ...]]:
    """One row of text per layer, in the order of :data:`COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for name in names:
        d = sl.describe(name)
        unbiased = d.unbiased if isinstance(d.unbiased, str) else _YES_NO[d.unbiased]
        families, needs = ", ".join(d.families), ", ".join(d.needs)
        rows.append((d.name, families, unbiased, needs, str(d.evaluations), _YES_NO[d.exact_draws]))
    return rows


def capability_table(names: Sequence[str]) -> Table:
    """Layers with their capabilities, for a terminal of 80 columns or more."""
    table = Table(title="stochastic layers", box=None, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    for column, size in SIZES.items():
        table.add_column(column, overflow="fold", **size)
    for *row, evaluations, _ in _rows(names):
        for option, symbol in SYMBOLS.items():
            evaluations = evaluations.replace(option, symbol)
        table.add_row(*row, evaluations)
    caption = "points: evaluations of the cost in a step; " + ", ".join(f"{s} {name}" for name, s in SYMBOLS.items())
    relaxed = [name for name in names if not sl.describe(name).exact_draws]
    if relaxed:
        caption += f"\nDraws in training do not follow q: {', '.join(relaxed)}"
    table.caption, table.caption_justify = caption, "left"
    return table


def capability_markdown(names: Sequence[str]) -> str:
    """The same as a Markdown table, with the references."""
    lines = ["| " + " | ".join((*COLUMNS, "reference")) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, *rest in _rows(names):
        title, _, link = sl.describe(name).reference.rpartition(" ")
        reference = f"[{title.rstrip('.')}]({link})" if link.startswith("http") else sl.describe(name).reference
        lines.append("| " + " | ".join((f"`{name}`", *rest, reference)) + " |")
    return "\n".join(lines)


def registered_name(word: str) -> str:
    """A name as it is; for a class path, the name that the class has once its module is imported.

    Raises:
        ValueError: The path leads to no registered layer, or class paths are restricted.
    """
    module, _, attribute = word.rpartition(".")
    if not module or word in sl.list_layers():
        return word
    if imports_are_restricted():
        raise ValueError(f"needed the name of a registered layer, as class paths are restricted, got {word!r}.")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"needed the name of a registered layer or the path of its class, got {word!r} ({error}); the folder of "
            "its module has to be on PYTHONPATH."
        ) from error
    names = [name for name in sl.list_layers() if layer_class(name) is cls]
    if not names:
        raise ValueError(f"needed a registered layer, got {word!r}; put @register(NAME) above the class.")
    return names[0]


def list_command(args: Sequence[str]) -> None:
    """Run ``stochastic-layers list``.

    Raises:
        ValueError: Unknown family, or no layer has all that was asked for.
    """
    parser = argparse.ArgumentParser(
        prog="stochastic-layers list", description="Layers and their capabilities; options narrow the list."
    )
    parser.add_argument("--family", help="only layers of this distribution family")
    parser.add_argument("--needs", choices=NEEDS, help="only layers that need this of the cost")
    either = argparse.BooleanOptionalAction
    parser.add_argument("--unbiased", action=either, help="only layers unbiased without condition, or all others")
    parser.add_argument("--exact-draws", action=either, help="only layers whose training draws follow q, or all others")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--names", action="store_true", help="print names only, one a line")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table, with references")
    form.add_argument("--compatibility", action="store_true", help="print the page docs/compatibility.md instead")
    options = parser.parse_args(list(args))
    if options.compatibility:
        return print(compatibility_markdown())
    names = sl.list_layers(
        family=options.family, unbiased=options.unbiased, needs=options.needs, exact_draws=options.exact_draws
    )
    if not names:
        raise ValueError(f"needed a layer with {' '.join(args)}, got none; leave out one of them.")
    if options.names:
        print(*names, sep="\n")
    elif options.markdown:
        print(capability_markdown(names))
    else:
        console = Console()
        console.print(capability_table(names), width=min(console.width, 120))


def describe_command(args: Sequence[str]) -> None:
    """Run ``stochastic-layers describe``.

    Raises:
        ValueError: No layer has this name or path.
    """
    parser = argparse.ArgumentParser(
        prog="stochastic-layers describe", description="One layer: what it needs, formula, options, references."
    )
    parser.add_argument("name", metavar="NAME", help="a name out of `stochastic-layers list`, or a class path")
    name = registered_name(parser.parse_args(list(args)).name)
    d = sl.describe(name)
    table = Table(title=d.name, show_header=False)
    for key in ("summary", "families", "unbiased", "needs", "evaluations", "exact_draws", "reference"):
        value = getattr(d, key)
        table.add_row(key.replace("_", " "), ", ".join(value) if isinstance(value, tuple) else str(value))
    console = Console()
    console.print(table)
    console.print(getdoc(layer_class(name)) or "", markup=False, highlight=False, soft_wrap=True)
