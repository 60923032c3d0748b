"""The result of a comparison in W&B: the table, the curves and the pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_modules.comparison.result import Comparison

__all__ = ["publish"]


def publish(comparison: Comparison, pictures: Sequence[Path], loggers: Sequence[Logger]) -> None:
    """Send rows, curves and pictures to every W&B logger; others take no tables."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        columns = comparison.columns
        rows = [row | {"options": json.dumps(row["options"])} for row in comparison.rows]
        logger.log_table("compare/runs", columns=columns, data=[[row[c] for c in columns] for row in rows])
        if comparison.curves:
            keys = list(comparison.curves[0])
            logger.log_table("compare/curves", columns=keys, data=[[p[k] for k in keys] for p in comparison.curves])
        for picture in pictures:
            logger.log_image(f"compare/{picture.stem}", [str(picture)])
        for summary in comparison.summary():
            # one value for each layer, for a bar chart or a panel of a report
            values = {f"compare/{name}/{summary.label}": value for name, value in summary.mean.items()}
            logger.log_metrics(values)
        logger.experiment.config.update(
            {"title": comparison.title, "compare": comparison.settings}, allow_val_change=True
        )
        logger.experiment.finish()
