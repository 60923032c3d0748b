"""The table of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

import math

from rich.table import Table

from lightning_modules.comparison.result import Comparison, Metric, Summary

__all__ = ["markdown_table", "rich_table"]


def _columns(comparison: Comparison) -> list[str]:
    return ["layer", "evaluations", *(metric.heading for metric in comparison.metrics)]


def _cell(metric: Metric, summary: Summary) -> str:
    if metric.name not in summary.mean:
        return ""
    mean, spread = summary.mean[metric.name], summary.spread[metric.name]
    text = format(mean, metric.digits)
    return text if math.isnan(spread) or not metric.better else f"{text} ± {format(spread, _spread_digits(metric))}"


def _spread_digits(metric: Metric) -> str:
    return ".1g" if metric.digits.endswith("g") else metric.digits


def _rows(comparison: Comparison, sort: str | None) -> list[tuple[Summary, list[str], set[int]]]:
    """Each layer, its cells, and the numbers of those cells that are the best of their column."""
    summaries = comparison.summary(sort)
    rows = []
    for summary in summaries:
        evaluations = summary.row["evaluations"]
        cells = [summary.label, "" if evaluations is None else str(evaluations)]
        best = set()
        for number, metric in enumerate(comparison.metrics, start=len(cells)):
            cells.append(_cell(metric, summary))
            values = [s.mean[metric.name] for s in summaries if metric.name in s.mean]
            extreme = {"high": max, "low": min}.get(metric.better)
            if extreme and values and summary.mean.get(metric.name) == extreme(values):
                best.add(number)
        rows.append((summary, cells, best))
    return rows


def _note(summary: Summary) -> str:
    if not summary.failed:
        return ""
    of = f"{summary.failed} of {summary.failed + summary.runs} runs failed" if summary.runs else "failed"
    return f"{of}: {summary.error}"


def rich_table(comparison: Comparison, sort: str | None = None) -> Table:
    """The layers, the best first: mean and standard deviation over the seeds, and why a run failed."""
    rows = _rows(comparison, sort)
    table = Table(title=comparison.title, caption=_caption(comparison))
    for number, column in enumerate(_columns(comparison)):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for summary, cells, best in rows:
        cells = [f"[bold]{cell}[/bold]" if number in best else cell for number, cell in enumerate(cells)]
        table.add_row(*cells, style=None if summary.runs else "red")
    notes = [(summary.label, _note(summary)) for summary, _, _ in rows if summary.failed]
    if notes:
        table.add_section()
        for label, note in notes:
            # the sentence takes the width of the table, not that of a column
            table.add_row(f"[red]{label}[/red]", *[""] * (len(_columns(comparison)) - 1))
            table.caption = f"{table.caption}\n{label}: {note}"
    return table


def _caption(comparison: Comparison) -> str:
    seeds = {row["seed"] for row in comparison.rows}
    spread = "± standard deviation over the seeds; " if len(seeds) > 1 else ""
    return f"{spread}the best of each column in bold"


def markdown_table(comparison: Comparison, sort: str | None = None) -> str:
    """The same as a Markdown table."""
    columns = _columns(comparison)
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for summary, cells, best in _rows(comparison, sort):
        name, *rest = [f"**{cell}**" if number in best else cell for number, cell in enumerate(cells)]
        if not summary.runs:
            rest[-1] = _note(summary)
        lines.append("| " + " | ".join((f"`{name}`", *rest)) + " |")
    return "\n".join(lines)
