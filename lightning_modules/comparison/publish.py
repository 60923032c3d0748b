"""The result of a comparison in W&B: the table, the curves, charts and the pictures, as one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_modules.comparison.charts import charts
from lightning_modules.comparison.result import Comparison

__all__ = ["Published", "publish"]


@dataclass(frozen=True)
class Published:
    """The W&B run that a comparison was logged as.

    Attributes:
        path: ``ENTITY/PROJECT/ID``; without the entity where no server was asked for it.
        offline: Whether it is only on this machine.
        folder: Its files, for ``wandb sync``.
    """

    path: str
    offline: bool
    folder: Path


def publish(
    comparison: Comparison, pictures: Sequence[Path], loggers: Sequence[Logger], sort: str | None = None
) -> list[Published]:
    """Send rows, curves, charts and pictures to every W&B logger; others take no tables.

    Returns:
        The W&B runs.
    """
    import wandb

    published = []
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        run = logger.experiment
        columns = comparison.columns
        rows = [row | {"options": json.dumps(row["options"])} for row in comparison.rows]
        logger.log_table("compare/runs", columns=columns, data=[[row[c] for c in columns] for row in rows])
        if comparison.curves:
            keys = list(comparison.curves[0])
            logger.log_table("compare/curves", columns=keys, data=[[p[k] for k in keys] for p in comparison.curves])
        for chart in charts(comparison, sort):
            # a definition that every server has, over a table of ours: it becomes a panel without anybody's click
            table = wandb.Table(columns=[*chart.columns], data=chart.rows)
            run.log({chart.key: wandb.plot_table(chart.preset, table, chart.fields, chart.strings)})
        for picture in pictures:
            logger.log_image(f"compare/{picture.stem}", [str(picture)])
        for summary in comparison.summary(sort):
            # one value for each layer, for panels of one's own and comparisons with other runs
            values = {f"compare/{name}/{summary.label}": value for name, value in summary.mean.items()}
            logger.log_metrics(values)
        run.config.update({"title": comparison.title, "compare": comparison.settings}, allow_val_change=True)
        path = "/".join(part for part in (run.entity, run.project, run.id) if part)
        published.append(Published(path, bool(run.offline), Path(run.dir).parent))
        run.finish()
    return published
