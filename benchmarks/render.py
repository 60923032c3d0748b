"""Pictures and a page from the JSON results; nothing on the page was typed by hand."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

from benchmarks.measure import RESULTS, Row, check

__all__ = ["page", "picture", "read"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def read(path: Path) -> dict[str, Any]:
    """A result, checked.

    Raises:
        ValueError: The file holds something else.
    """
    document: dict[str, Any] = json.loads(path.read_text())
    check(document)
    return document


def _groups(document: Mapping[str, Any]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for fields in document["rows"]:
        row = Row(**fields)
        groups.setdefault(row.group, []).append(row)
    return groups


def picture(document: Mapping[str, Any], path: Path) -> None:
    """Curves over x where rows have one, else bars of the ratios, or of the medians where there are none."""
    groups = _groups(document)
    curves = any(row.x is not None for row in next(iter(groups.values())))
    figure = _curves(groups) if curves else _bars(groups, document["findings"])
    figure.suptitle(document["benchmark"])
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=110, bbox_inches="tight")
    plt.close(figure)
    os.replace(temporary, path)


def _curves(groups: Mapping[str, list[Row]]) -> Any:
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, (group, rows) in zip(axes.flat, groups.items(), strict=False):
        for color, name in zip(COLORS * 4, dict.fromkeys(row.name for row in rows), strict=False):
            own = [row for row in rows if row.name == name]
            x = [row.x for row in own]
            axis.plot(x, [1e3 * row.median for row in own], marker="o", ms=3, label=name, color=color)
            axis.fill_between(x, [1e3 * r.q1 for r in own], [1e3 * r.q3 for r in own], alpha=0.15, color=color, lw=0)
        axis.set(xscale="log", yscale="log", xlabel=group, ylabel="ms")
        sizes = sorted({row.x for row in rows if row.x is not None})
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    return figure


def _is_drawn(row: Row) -> bool:
    return row.unit == "bytes" or (row.ratio is not None and row.name != row.reference)


def _bars(groups: Mapping[str, list[Row]], biases: Mapping[str, float]) -> Any:
    groups = {group: drawn for group, rows in groups.items() if (drawn := [row for row in rows if _is_drawn(row)])}
    unit = next(iter(groups.values()))[0].unit
    alone = all(len(rows) == 1 for rows in groups.values())  # then the group is the label, and needs no heading
    if alone:
        groups = dict(sorted(groups.items(), key=lambda item: item[1][0].ratio or 0.0))
    count = sum(len(rows) for rows in groups.values()) + (0 if alone else len(groups))
    figure, axis = plt.subplots(figsize=(8, 0.2 * count + 3), layout="constrained")
    labels, places, place = [], [], 0
    for group, rows in groups.items():
        if not alone:
            references = {row.reference for row in rows}
            over = f", over {references.pop()}" if len(references) == 1 and "" not in references else ""
            across = axis.get_yaxis_transform()
            axis.text(0, place - 0.1, f" {group}{over}", fontsize=7, weight="bold", va="center", transform=across)
            place += 1
        for row in rows:
            if unit == "bytes":
                value = low = high = row.median / 2**20
            else:
                value, low, high = row.ratio or 0.0, row.ratio_q1 or 0.0, row.ratio_q3 or 0.0
            if value == 0:  # has no place on a logarithmic axis
                axis.text(1, place, " 0", fontsize=7, va="center")
            else:
                color = COLORS[0] if value <= 1 or unit == "bytes" else COLORS[1]
                start = 0.0 if unit == "bytes" else 1.0  # a ratio is as long as it is far from equality
                axis.barh(place, value - start, left=start, color=color, height=0.8)
                axis.plot([low, high], [place, place], color="black", lw=1)
            bias, name = biases.get(f"relative bias of {row.name} ({group})"), group if alone else row.name
            labels.append(name if bias is None else f"{name} (bias {100 * bias:.{1 if bias < 0.1 else 0}f} %)")
            places.append(place)
            place += 1
    axis.set_yticks(places, labels, fontsize=7)
    axis.set_ylim(place, -1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    low, high = axis.get_xlim()
    if high < 4 * low:  # less than a decade, where a logarithmic axis has hardly a tick
        axis.set_xticks([tenth / 10 for tenth in range(math.ceil(10 * low), math.floor(10 * high) + 1)])
    axis.xaxis.set_minor_formatter(StrMethodFormatter("{x:.3g}") if high < 100 * low else NullFormatter())
    axis.tick_params(axis="x", which="both", labelsize=7)
    axis.set_xlabel(
        {
            "bytes": "MiB",
            "s": "time over that of the reference: left of 1 is faster; line: quartiles",
        }.get(unit, f"{unit}, over that of the reference: left of 1 is better; line: quartiles")
    )
    if unit != "bytes":
        axis.axvline(1, color="black", lw=0.8)
    axis.grid(axis="x", alpha=0.3)
    return figure


def _quantity(value: float, unit: str) -> str:
    if unit == "s":
        return f"{1e3 * value:.3g} ms"
    return f"{value / 2**20:.1f} MiB" if unit == "bytes" else f"{value:.4g} {unit}"


def reading(document: Mapping[str, Any]) -> str:
    """What the figures say, losses first."""
    rows = [Row(**fields) for fields in document["rows"]]
    compared = [row for row in rows if row.ratio is not None and row.name != row.reference]
    if not compared:
        return ""
    slower = [row for row in compared if (row.ratio_q1 or 0) > 1]
    faster = [row for row in compared if (row.ratio_q3 or 0) < 1]
    worse, better, extreme = (
        ("slower", "faster", "Slowest") if compared[0].unit == "s" else ("worse", "better", "Worst")
    )
    undecided = len(compared) - len(slower) - len(faster)
    lines = [
        f"Of {len(compared)} comparisons with a reference, {len(slower)} are {worse} by more than their quartiles, "
        f"{len(faster)} {better}, and {undecided} cannot be told apart."
    ]
    worst = sorted(slower, key=lambda row: -(row.ratio or 0))[:12]
    if worst:
        places = [row.group if row.name in row.group else f"{row.name} at {row.group}" for row in worst]
        named = [f"{place}, {row.ratio:.2f} times {row.reference}" for place, row in zip(places, worst, strict=True)]
        lines.append(f"{extreme}: {'; '.join(named)}.")
    return " ".join(lines)


def section(document: Mapping[str, Any]) -> str:
    """The part of the page that shows one result."""
    name, env = document["benchmark"], document["environment"]
    lines = [f"## {name}", "", document["question"], "", f"![{name}]({name}.png)", ""]
    versions = [f"{package} {version}" for package, version in env["versions"].items() if version != "not installed"]
    lines += [
        f"`{document['command']}`, {env['time']}, commit `{env['commit'][:10]}`"
        + (" with changes" if env["changed"] else "")
        + f", {env['processor'] if env['device'] == 'cpu' else env['device']}, {env['threads']} of {env['cores']} cores"
        + f", load {env['load']} at the end, Python {env['python']}, {', '.join(versions)}.",
        "",
    ]
    text = reading(document)
    if text:
        lines += [text, ""]
    for what, reason in document["unavailable"].items():
        lines.append(f"* not measured: {what} ({reason})")
    if document["findings"]:
        lines += ["| finding | value |", "|---|---:|"]
        lines += [f"| {what} | {value:g} |" for what, value in document["findings"].items()]
        lines.append("")
    if any(row["x"] is not None for row in document["rows"]):
        return "\n".join(lines)
    lines += [
        "",
        "| work | by | median | quartiles | ratio | quartiles | rounds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for fields in document["rows"]:
        row = Row(**fields)
        ratio = "" if row.ratio is None else f"{row.ratio:.3f} x {row.reference}"
        spread = "" if row.ratio is None else f"{row.ratio_q1:.3f} to {row.ratio_q3:.3f}"
        quartiles = f"{_quantity(row.q1, row.unit)} to {_quantity(row.q3, row.unit)}"
        lines.append(
            f"| {row.group} | {row.name} | {_quantity(row.median, row.unit)} | {quartiles} | {ratio} | {spread} | "
            f"{row.rounds} |"
        )
    return "\n".join([*lines, ""])


def page(folder: Path) -> Path:
    """Draw every result in ``folder`` and write its README.md."""
    parts = [
        "# Results",
        "",
        "Made by `python -m benchmarks.render` from the JSON files beside it; see ../README.md for",
    ]
    parts += ["the method. Ratios are the result, times are context.", ""]
    for path in sorted(folder.glob("*.json")):
        document = read(path)
        picture(document, path.with_suffix(".png"))
        parts.append(section(document))
    target = folder / "README.md"
    temporary = target.with_suffix(".md.part")
    temporary.write_text("\n".join(parts))
    os.replace(temporary, target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the JSON is, and the page goes")
    print(page(parser.parse_args().folder))
