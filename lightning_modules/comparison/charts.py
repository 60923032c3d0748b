"""The charts of a comparison in W&B: bars for the metrics, lines for the curves, as its own presets draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_modules.comparison.plots import EXACT, mean_curve, ratio
from lightning_modules.comparison.result import Comparison, Metric

__all__ = ["Chart", "charts"]

MANY = 20.0  # the largest value over the smallest, from which a linear scale shows only the largest


@dataclass(frozen=True)
class Chart:
    """A chart and the table that it is drawn from.

    Attributes:
        key: What it is logged as.
        preset: Name of the chart's definition on the server.
        fields: Field of that definition -> column of the table.
        strings: Constants of that definition: title and axis.
        columns: Headings of the table.
        rows: Its rows.
    """

    key: str
    preset: str
    fields: dict[str, str]
    strings: dict[str, str]
    columns: list[str]
    rows: list[list[Any]] = field(repr=False)

    @property
    def table_key(self) -> str:
        """What W&B logs the table as."""
        return f"{self.key}_table"


def charts(comparison: Comparison, sort: str | None = None) -> list[Chart]:
    """Bars of each metric's mean over the seeds, the layers in the order of the table, and lines of the mean curves.

    The presets have linear axes. Where a metric's values differ by a factor of more than twenty, and for the variance
    over the run, the common logarithm is drawn, which the title says; the table has the value beside it.
    """
    bars = [_bars(comparison, metric, sort) for metric in comparison.metrics if metric.drawn and metric.better]
    labels = [s.label for s in comparison.summary(sort) if s.runs]
    if not comparison.curves:
        return [chart for chart in bars if chart.rows]
    lines = [
        _lines(comparison, labels, "step", "elbo", "ELBO against optimizer steps"),
        _lines(comparison, labels, "seconds", "elbo", "ELBO against seconds of training"),
        _lines(comparison, labels, "step", "grad_variance", "log10 of gradient variance against optimizer steps"),
    ]
    return [chart for chart in [*bars, *lines] if chart.rows]


def _bars(comparison: Comparison, metric: Metric, sort: str | None) -> Chart:
    summaries = [s for s in comparison.summary(sort) if metric.name in s.mean]
    means = [s.mean[metric.name] for s in summaries]
    logarithmic = metric.log and ratio([mean for mean in means if mean > EXACT * max(means)]) > MANY
    if logarithmic:  # an exact layer has nothing but rounding, and no logarithm
        summaries = [s for s in summaries if s.mean[metric.name] > EXACT * max(means)]
    shown = f"log10 of {metric.heading}" if logarithmic else metric.heading
    rows = []
    for summary in summaries:
        mean, spread = summary.mean[metric.name], summary.spread[metric.name]
        height = math.log10(mean) if logarithmic else mean
        rows.append([summary.label, height, mean, None if math.isnan(spread) else spread, summary.runs])
    return Chart(
        f"compare/charts/{metric.name}",
        "wandb/bar/v0",
        {"label": "layer", "value": shown},
        {"title": f"{shown}, {'higher' if metric.better == 'high' else 'lower'} is better"},
        ["layer", shown, "mean", "standard deviation", "seeds"],
        rows,
    )


def _lines(comparison: Comparison, labels: Sequence[str], x: str, y: str, title: str) -> Chart:
    rows: list[list[Any]] = []
    for label in labels:
        for at, value in zip(*mean_curve(comparison, label, x, y), strict=True):
            if y != "grad_variance":
                rows.append([at, label, value])
            elif value > EXACT:
                rows.append([at, label, math.log10(value)])
    return Chart(
        f"compare/charts/{y}_by_{x}",
        "wandb/lineseries/v0",
        {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        {"title": title, "xname": "optimizer step" if x == "step" else "seconds of training"},
        ["step", "lineKey", "lineVal"],
        rows,
    )
