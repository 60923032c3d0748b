"""What the commands share: tables that are wider than the terminal, being ended from outside, errors as a sentence."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import ENOSPC
from types import FrameType

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ["InParts", "interruptible", "sentence", "wandb_errors"]


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs SIGTERM is a KeyboardInterrupt, as Ctrl-C is: what it has started is ended with it."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def wandb_errors() -> tuple[type[Exception], ...]:
    """What W&B raises where it has no key or no server; nothing before it is imported."""
    error = getattr(sys.modules.get("wandb"), "Error", None)
    return (error,) if isinstance(error, type) else ()


def sentence(error: Exception) -> str:
    """What went wrong, and what to do about it, where Python's own words say too little."""
    if isinstance(error, wandb_errors()):
        return (
            f"needed a run of W&B, got {str(error).rstrip('.')!r}; call `wandb login`, or keep the run on this "
            "machine: --trainer.logger.offline=true."
        )
    if isinstance(error, ModuleNotFoundError):
        return f"needed a package that is not installed ({error}); install it: pip install {error.name or 'NAME'}."
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"needed to read or write {error.filename}, got {error.strerror!r}; give another path (where files go is "
            "said by --trainer.default_root_dir, --checkpoint.dirpath, --folder), or make room or rights for this one."
        )
    if isinstance(error, OSError) and error.errno == ENOSPC and not str(error.strerror).startswith("needed"):
        return f"needed room on the disk, got {error.strerror!r}; make room, and give the command again."
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


class InParts:
    """A table that is printed as several where the terminal is too narrow, each with the columns that name its rows.

    No cell is cut that way; left to itself, a table shortens its cells until they say nothing.

    Args:
        table: The table. A column takes the width of its longest cell where it is ``no_wrap``, else at least that of
            its longest word and its ``min_width``.
        names: Number of columns, from the first, that name a row.

    Example:
        >>> from rich.console import Console
        >>> table = Table("layer", "ELBO", "time", box=None)
        >>> table.add_row("disarm", "-101.25", "12.5 ms")
        >>> Console(width=80).print(InParts(table))  # doctest: +NORMALIZE_WHITESPACE
         layer   ELBO     time
         disarm  -101.25  12.5 ms
        >>> Console(width=20).print(InParts(table))  # doctest: +NORMALIZE_WHITESPACE
         layer   ELBO
         disarm  -101.25
         layer   time
         disarm  12.5 ms
    """

    def __init__(self, table: Table, names: int = 1) -> None:
        self.table, self.names = table, names

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        widths = [_width(column, console, options) for column in self.table.columns]
        groups: list[list[int]] = [[]]
        left = room = options.max_width - sum(widths[: self.names]) - 1  # a box has a line more than columns
        for number, width in enumerate(widths[self.names :], start=self.names):
            if groups[-1] and width > left:
                groups.append([])
                left = room
            groups[-1].append(number)
            left -= width
        for number, group in enumerate(groups):
            yield self._part([*range(self.names), *group], titled=number == 0, ends=number == len(groups) - 1)

    def _part(self, numbers: Sequence[int], *, titled: bool, ends: bool) -> Table:
        whole = self.table
        part = Table(
            title=whole.title if titled else None,
            caption=whole.caption if ends else None,
            title_justify=whole.title_justify,
            caption_justify=whole.caption_justify,
            box=whole.box,
        )
        columns = [whole.columns[number] for number in numbers]
        for column in columns:
            part.add_column(
                column.header,
                justify=column.justify,
                no_wrap=column.no_wrap,
                overflow=column.overflow,
                min_width=column.min_width,
            )
        for row, cells in zip(whole.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
            part.add_row(*cells, style=row.style)
        return part


def _width(column: Column, console: Console, options: ConsoleOptions) -> int:
    """What a column needs, with its padding and a line of the box."""
    found = [Measurement.get(console, options, cell) for cell in (column.header, *column.cells)]
    content = max(m.maximum if column.no_wrap else m.minimum for m in found)
    return max(content, column.min_width or 0) + 3
