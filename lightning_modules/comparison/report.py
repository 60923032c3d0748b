"""The command ``stochastic-layers report``: a draft report in W&B from the results of a comparison."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_modules.comparison.charts import charts
from lightning_modules.comparison.plots import picture_names
from lightning_modules.comparison.publish import Published
from lightning_modules.comparison.result import Comparison, sorting
from lightning_modules.comparison.table import markdown_table

__all__ = ["draft", "main", "make_reports", "reports_package", "save"]

MAX_TITLE = 128  # of a report, in characters
COLUMNS = 24  # of a grid of panels
METHOD = {
    "training": (
        "Each layer was trained on the same model and data under the same budget. The same seed gives the networks the "
        "same first weights, the data the same order and the noise the same random numbers. Bounds are those of "
        "validation data on exact draws. The gradient variance of a layer is measured at weights that this layer has "
        "reached."
    ),
    "scores": (
        "The gradients of all layers were compared at the same, frozen weights, on the same validation examples, with "
        "redrawn noise. One gradient with little variance and some bias may be better than one without bias; over many "
        "steps the variance averages out and the bias stays."
    ),
}


def reports_package() -> Any:
    """The module that makes reports, of a package that is not installed by default.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise ValueError(
            f"needed the package wandb-workspaces for a W&B report ({error}); install it with "
            "`pip install 'stochastic-layers[report]'`."
        ) from None


def draft(comparison: Comparison, run: str, sort: str | None = None) -> Any:
    """The report of a comparison that is logged as a W&B run: what was compared, the table, charts, pictures, how.

    Args:
        comparison: Its results.
        run: ``[ENTITY/]PROJECT/ID`` of the run.
        sort: Metric that the table is sorted by.

    Returns:
        A ``wandb_workspaces.reports.v2.Report``, on which nothing is saved yet.

    Raises:
        ValueError: ``run`` is not such a path, or the package is not installed.
    """
    wr = reports_package()
    *entity, project, run_id = _parts(run)
    place = {"entity": entity[0]} if entity else {}
    runs = wr.Runset(**place, project=project, name="the comparison", filters=f"Metric('ID') in ['{run_id}']")

    def grid(*panels: Any) -> Any:
        return wr.PanelGrid(runsets=[runs], panels=list(panels), hide_run_sets=True)

    panels = [
        wr.CustomChart(
            query={"summaryTable": {"tableKey": chart.table_key}},
            chart_name=chart.preset,
            chart_fields=chart.fields,
            chart_strings=chart.strings,
            layout=wr.Layout(x=12 * (number % 2), y=8 * (number // 2), w=12, h=8),
        )
        for number, chart in enumerate(charts(comparison, sort))
    ]
    pictures = [
        wr.MediaBrowser(
            title=name,
            media_keys=[f"compare/{name}"],
            num_columns=1,
            layout=wr.Layout(y=14 * number, w=COLUMNS, h=14),
        )
        for number, name in enumerate(picture_names(comparison))
    ]
    meanings = "\n".join(f"* **{metric.heading}**: {metric.meaning}" for metric in comparison.metrics)
    blocks = [
        wr.MarkdownBlock(f"{comparison.title}.\n\n{METHOD[comparison.kind]}"),
        wr.H2("Result"),
        wr.MarkdownBlock(markdown_table(comparison, sort)),
        wr.H2("What the columns mean", collapsed_blocks=[wr.MarkdownBlock(meanings)]),
    ]
    if panels:
        blocks += [wr.H2("Charts"), grid(*panels)]
    if pictures:
        blocks += [wr.H2("Pictures"), grid(*pictures)]
    every = wr.WeavePanelSummaryTable(table_name="compare/runs", layout=wr.Layout(w=COLUMNS, h=14))
    blocks += [wr.H2("Every run"), wr.P("To filter or group by layer: the column `label`."), grid(every)]
    if command := comparison.settings.get("command"):
        blocks += [wr.H2("How to reproduce"), wr.MarkdownBlock(f"```\n{command}\n```")]
    title = f"Layers compared: {comparison.title}"
    if len(title) > MAX_TITLE:
        title = f"{title[: MAX_TITLE - 3]}..."
    return wr.Report(**place, project=project, title=title, blocks=blocks, width="fixed")


def save(comparison: Comparison, run: str, sort: str | None = None) -> str:
    """Save the report as a draft, beside the run that it shows, and return its address.

    Raises:
        ValueError: The package is not installed, or the server does not know the run.
    """
    import wandb

    report = draft(comparison, run, sort)
    try:
        wandb.Api().run("/".join(_parts(run)))
    except (wandb.errors.CommError, ValueError) as error:
        raise ValueError(
            f"needed a run that the W&B server knows, got {run!r} ({error}); upload an offline run first, with "
            "`wandb sync`."
        ) from None
    report.save(draft=True)
    return str(report.url)


def make_reports(comparison: Comparison, published: Sequence[Published], results: Path, sort: str | None) -> bool:
    """Save a report for each W&B run, or say how to do so later; return whether none has failed."""
    good = True
    for run in published:
        later = shlex.join(["stochastic-layers", "report", str(results), run.path, *(("--sort", sort) if sort else ())])
        if run.offline:
            print(
                "a report is kept by the W&B server, and this run is offline. To make it later: "
                f"{shlex.join(['wandb', 'sync', str(run.folder)])} && {later}"
            )
            continue
        try:
            print(f"report: {save(comparison, run.path, sort)}")
        except Exception as error:  # whatever the server says: the results of hours are there, and the rest can go on
            good = False
            print(
                f"stochastic-layers: the report was not made: {type(error).__name__}: {error}\nThe results are in "
                f"{results}. To try again: {later}",
                file=sys.stderr,
            )
    return good


def main(rest: Sequence[str]) -> int:
    """Run ``stochastic-layers report`` and return its exit status."""
    parser = argparse.ArgumentParser(prog="stochastic-layers report", description=__doc__, allow_abbrev=False)
    parser.add_argument("results", type=Path, help="what `stochastic-layers compare` wrote: training.json, scores.json")
    parser.add_argument("run", help="the W&B run that it logged: [ENTITY/]PROJECT/ID")
    parser.add_argument("--sort", help="metric that the table is sorted by")
    options = parser.parse_args(list(rest))
    try:
        comparison = Comparison.from_json(options.results)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"needed the results of a comparison, FOLDER/training.json or FOLDER/scores.json, got {options.results} "
            f"({error})."
        ) from None
    sorting(comparison.metrics, options.sort)
    print(f"report: {save(comparison, options.run, options.sort)}")
    return 0


def _parts(run: str) -> list[str]:
    parts = run.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"needed [ENTITY/]PROJECT/ID of a W&B run, got {run!r}; the address of its page has it.")
    return parts
