"""The pictures of a comparison as PNG files: curves over the run, and one dot for each run and metric."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from lightning_modules.comparison.result import Comparison
from lightning_modules.whole_files import whole_file

__all__ = ["draw", "mean_curve", "picture_names", "ratio"]

# Okabe and Ito's colours, which people of all kinds of colour vision tell apart; yellow is left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
EXACT = 1e-9  # part of the largest value below which there is nothing but rounding
STYLES = ("solid", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))


def draw(comparison: Comparison, folder: Path, sort: str | None = None) -> list[Path]:
    """Write the pictures and return their paths; none where every run failed."""
    labels = [s.label for s in comparison.summary(sort) if s.runs]
    if not labels:
        return []
    figures = [dots(comparison, labels)]
    if comparison.curves:
        figures += [elbo_curves(comparison, labels), variance_curves(comparison, labels)]
    paths = [folder / f"{name}.png" for name in picture_names(comparison)]
    for path, figure in zip(paths, figures, strict=True):
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=130, format="png")
    return paths


def picture_names(comparison: Comparison) -> list[str]:
    """Names of the pictures, without ``.png``; none where every run failed."""
    if all(row["status"] != "ok" for row in comparison.rows):
        return []
    return [f"{comparison.kind}-{name}" for name in ("dots", *(("elbo", "variance") if comparison.curves else ()))]


def style(number: int) -> dict[str, Any]:
    """Colour and line of the layer of this rank: 28 that differ."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}


def mean_curve(comparison: Comparison, label: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """Means over the seeds at each measurement."""
    seeds: dict[Any, list[dict[str, Any]]] = {}
    for point in comparison.curves:
        if point["label"] == label:
            seeds.setdefault(point["seed"], []).append(point)
    xs, ys = [], []
    for points in zip(*seeds.values(), strict=False):  # under a budget of seconds one may have a point more
        xs.append(statistics.fmean(p[x] for p in points))
        ys.append(statistics.fmean(p[y] for p in points))
    return xs, ys


def elbo_curves(comparison: Comparison, labels: Sequence[str]) -> Figure:
    """ELBO against steps and against seconds of training, means over the seeds; the names serve both panels."""
    figure = Figure(figsize=(12, _height(labels)), layout="constrained")
    figure.suptitle(comparison.title, fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, x in ((left, "step"), (right, "seconds")):
        curves = [mean_curve(comparison, label, x, "elbo") for label in labels]
        for number, (xs, ys) in enumerate(curves):
            axes.plot(xs, ys, linewidth=1.3, **style(number))
            axes.plot(xs[-1], ys[-1], marker="o", markersize=3.5, color=style(number)["color"])
    left.set_ylim(*_range([ys for _, ys in curves]))
    left.set(xlabel="optimizer step", ylabel="validation ELBO (nats per example)")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("seconds of training")
    _name_ends(figure, left, {label: ys[-1] for label, (_, ys) in zip(labels, curves, strict=True)}, labels)
    return figure


def variance_curves(comparison: Comparison, labels: Sequence[str]) -> Figure:
    """Gradient variance against steps, logarithmic, means over the seeds."""
    figure = Figure(figsize=(8.5, _height(labels)), layout="constrained")
    figure.suptitle(comparison.title, fontsize=10)
    axes = figure.subplots()
    ends = {}
    for number, label in enumerate(labels):
        xs, ys = mean_curve(comparison, label, "step", "grad_variance")
        if ys[-1] > EXACT:  # an exact layer has none
            axes.plot(xs, ys, linewidth=1.3, **style(number))
            ends[label] = ys[-1]
    silent = [label for label in labels if label not in ends]
    if silent:
        axes.set_title(f"without noise: {', '.join(silent)}", fontsize=8, loc="left", wrap=True)
    axes.set_yscale("log")
    axes.set(xlabel="optimizer step", ylabel="gradient variance at the layer's params")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_ends(figure, axes, ends, labels)
    return figure


def dots(comparison: Comparison, labels: Sequence[str]) -> Figure:
    """One dot for each run and metric, the layers in the order of the table."""
    metrics = [metric for metric in comparison.metrics if metric.drawn and metric.better]
    figure = Figure(figsize=(2.2 + 2.1 * len(metrics), _height(labels)), layout="constrained")
    figure.suptitle(comparison.title, fontsize=10)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        every = [row[metric.name] for row in comparison.rows if row[metric.name] is not None]
        floor = EXACT * max(every, default=0.0) if metric.log else -math.inf
        factor = ratio([value for value in every if value > floor])
        for number, label in enumerate(labels):
            rows = [r for r in comparison.rows if r["label"] == label and r[metric.name] is not None]
            values = [row[metric.name] for row in rows if row[metric.name] > floor]
            colour = COLOURS[0] if metric.better == "high" else COLOURS[1]
            axes.plot(values, [number] * len(values), "o", markersize=5, alpha=0.75, color=colour)
            if len(values) < len(rows):  # nothing but rounding: a logarithmic scale has no place for it
                axes.text(
                    0.03, number, "0", transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=colour
                )
            if metric.error:
                errors = [row[metric.error] for row in rows]
                axes.errorbar(values, [number] * len(values), xerr=errors, fmt="none", linewidth=1, color=colour)
        arrow = "better \N{RIGHTWARDS ARROW}" if metric.better == "high" else "\N{LEFTWARDS ARROW} better"
        axes.set_title(f"{metric.heading}\n{arrow}", fontsize=9)
        axes.grid(axis="y", linewidth=0.4, color="0.85")
        axes.tick_params(axis="x", labelsize=8)
        if metric.log and factor > 20:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if factor < 300 else (1.0,), numticks=5))
            axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    return figure


def ratio(values: Sequence[float]) -> float:
    """The largest value over the smallest; 0 where a logarithmic scale cannot show them."""
    return max(values) / min(values) if values and min(values) > 0 else 0.0


def _height(labels: Sequence[str]) -> float:
    """Inches that leave every name its line."""
    return max(4.0, 0.2 * len(labels) + 1.4)


def _range(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits that leave out the steep first quarter of the run, and layers that end far below most others."""
    ends = sorted(ys[-1] for ys in curves)
    top = max(y for ys in curves for y in ys)
    bottom = min(statistics.median(ys[len(ys) // 4] for ys in curves), ends[len(ends) // 4])
    bottom = max(bottom, min(y for ys in curves for y in ys))
    margin = 0.05 * (top - bottom) or 1.0
    return bottom - margin, top + margin


def _name_ends(figure: Figure, axes: Axes, ends: dict[str, float], labels: Sequence[str]) -> None:
    """Names at the right of the axes, each joined to the end of its line, moved apart where they would overlap."""
    height = 72 * figure.get_figheight() * 0.8  # of the axes, in points, about
    names = sorted(ends, key=lambda label: ends[label])
    x = axes.get_xlim()[1]
    scaled = axes.transScale.transform([(x, ends[name]) for name in names])
    wanted = [min(1.0, max(0.0, y)) for _, y in axes.transLimits.transform(scaled)]
    for name, wish, place in zip(names, wanted, spread(wanted, 10 / height), strict=True):
        number = labels.index(name)
        axes.annotate(
            name,
            xy=(1.0, wish),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=style(number)["color"],
            # joined to the middle of the name's left end: a line to its centre would cross the names between
            arrowprops={"arrowstyle": "-", "linewidth": 0.8, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 0}
            | style(number),
            annotation_clip=False,
        )
    axes.margins(x=0.0)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Sorted positions moved apart to at least ``gap``, as little as that takes.

    Example:
        >>> [round(p, 2) for p in spread([0.0, 0.5, 0.5, 1.0], 0.1)]
        [0.0, 0.45, 0.55, 1.0]
    """
    groups: list[list[float]] = []  # [centre, size]: names that touch share their mean
    for position in positions:
        groups.append([position, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (b, m), (a, n) = groups.pop(), groups.pop()
            groups.append([(a * n + b * m) / (n + m), n + m])
    return [centre + gap * (i - (size - 1) / 2) for centre, size in groups for i in range(int(size))]
