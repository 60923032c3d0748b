"""The table of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

import math

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_modules.comparison.result import Comparison, Metric, Summary
from lightning_modules.terminal import InParts

__all__ = ["columns", "markdown_table", "notes", "report", "rich_table"]

CAPTION = "mean ± standard deviation over the seeds; of a bias its standard error. Bold: the best of a column."


def _shown(comparison: Comparison) -> list[Metric]:
    """Metrics that can be better or worse; steps are in the title, where they are the budget."""
    steps = {row.get("steps") for row in comparison.rows if row["status"] == "ok"}
    return [m for m in comparison.metrics if m.better or (m.name == "steps" and len(steps) > 1)]


def _cell(metric: Metric, summary: Summary) -> str:
    if metric.name not in summary.mean:
        return ""
    mean, spread = summary.mean[metric.name], summary.spread[metric.name]
    if metric.error:
        spread = summary.mean[metric.error]
    text = format(mean, metric.digits)
    if math.isnan(spread):
        return text
    digits = format(spread, ".1g" if metric.digits.endswith("g") else metric.digits)  # one digit of a spread is known
    return f"{text} ± {digits if 'e' in text or 'e' not in digits else format(float(digits), 'g')}"


def _rows(comparison: Comparison, sort: str | None) -> list[tuple[Summary, list[str], set[int]]]:
    """Each layer, its cells, and the numbers of those cells that are the best of their column."""
    summaries = comparison.summary(sort)
    rows = []
    for summary in summaries:
        evaluations = summary.row["evaluations"]
        cells = [summary.label, "" if evaluations is None else str(evaluations)]
        best = set()
        for number, metric in enumerate(_shown(comparison), start=len(cells)):
            cells.append(_cell(metric, summary))
            values = [s.mean[metric.name] for s in summaries if metric.name in s.mean]
            extreme = {"high": max, "low": min}.get(metric.better)
            if extreme and len(values) > 1 and summary.mean.get(metric.name) == extreme(values):
                best.add(number)
        if summary.failed:
            cells[2] = f"{cells[2]} {summary.failed} FAILED".strip()
        rows.append((summary, cells, best))
    return rows


def rich_table(comparison: Comparison, sort: str | None = None) -> Table:
    """The layers, the best first, with mean and standard deviation over the seeds."""
    table = Table(title=comparison.title, caption=CAPTION, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns(comparison)):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for summary, cells, best in _rows(comparison, sort):
        marked = [Text(cell, style="bold" if number in best else "") for number, cell in enumerate(cells)]
        table.add_row(*marked, style=None if summary.runs else "red")
    return table


def columns(comparison: Comparison) -> list[str]:
    """The headings."""
    return ["layer", "evaluations", *(metric.heading for metric in _shown(comparison))]


def notes(comparison: Comparison) -> list[str]:
    """A sentence for each layer of which a run failed, and for each that was left out."""
    failed = [
        f"{s.label}: {s.failed} of {s.failed + s.runs} failed: {s.error}" for s in comparison.summary() if s.failed
    ]
    return failed + [f"{label} was left out: {reason}" for label, reason in comparison.refused.items()]


def report(comparison: Comparison, sort: str | None = None) -> Group:
    """The table, and below it why runs failed and layers were left out."""
    return Group(InParts(rich_table(comparison, sort)), *(Text(note, style="dim") for note in notes(comparison)))


def markdown_table(comparison: Comparison, sort: str | None = None) -> str:
    """The same as a Markdown table."""
    headings = columns(comparison)
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    for _, cells, best in _rows(comparison, sort):
        name, *rest = [f"**{cell}**" if number in best else cell for number, cell in enumerate(cells)]
        lines.append("| " + " | ".join((f"`{name}`", *rest)) + " |")
    return "\n".join([*lines, *(f"\n{note}" for note in notes(comparison))])
