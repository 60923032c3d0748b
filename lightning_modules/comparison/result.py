"""The result of a comparison: one row for each run, as records, CSV or JSON, and its summary over the seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from lightning_modules.whole_files import write_text

__all__ = ["IDENTITY", "METRICS", "Comparison", "Metric", "Summary"]

Kind = Literal["training", "scores"]


@dataclass(frozen=True)
class Metric:
    """One measured column.

    Attributes:
        name: Its name in rows.
        heading: What the table calls it.
        digits: Format of its values.
        better: Which values are better; empty where that is no question.
        meaning: Definition, with the unit.
        log: Whether a plot takes a logarithmic scale where the values differ much.
        drawn: Whether it has a panel of its own.
        error: Name of the column that holds its standard error.
    """

    name: str
    heading: str
    digits: str
    better: Literal["high", "low", ""]
    meaning: str
    log: bool = False
    drawn: bool = True
    error: str = ""


# What every row says of its run, apart from what was measured: name and meaning.
IDENTITY: dict[str, str] = {
    "label": "what the table calls the layer",
    "layer": "registered name",
    "options": "options that the layer was built with",
    "seed": "of weights, noise and order of the data; empty for a score",
    "family": "distribution family of the latent variables",
    "latent_dim": "number of latent variables",
    "num_categories": "number of categories of each; empty where the family has none",
    "evaluations": "points at which the cost is evaluated in one step and example, as counted",
    "status": "`ok` or `failed`",
    "error": "why the run failed; empty where it did not",
    "device": "what it ran on",
    "threads": "number of threads it ran with",
    "reference": "what a score was compared with: `exact` or `average`, a long unbiased one; empty for training",
}
METRICS: dict[Kind, tuple[Metric, ...]] = {
    "training": (
        Metric("elbo", "ELBO", ".2f", "high", "validation ELBO after the budget, nats per example, 32 exact draws"),
        Metric(
            "iwae",
            "IWAE-32",
            ".2f",
            "high",
            "importance-weighted bound of the same draws, nats per example",
            drawn=False,
        ),
        Metric(
            "grad_variance",
            "gradient variance",
            ".3g",
            "low",
            "trace of the covariance of one example's gradient at the layer's params, median over the run",
            log=True,
        ),
        Metric(
            "grad_snr",
            "SNR",
            ".3g",
            "high",
            "norm of the mean gradient over the root of that variance, likewise; empty where there is no variance",
            log=True,
        ),
        Metric("step_ms", "ms per step", ".3g", "low", "time of a training step in ms, median over the run", log=True),
        Metric(
            "variance_time",
            "variance x ms",
            ".3g",
            "low",
            "product of the two: halved by twice the speed as by half the variance",
            log=True,
        ),
        Metric("peak_memory_mib", "peak MiB", ".0f", "low", "memory that training added to model and data, in MiB"),
        Metric("steps", "steps", ".0f", "", "optimizer steps taken"),
        Metric("seconds", "seconds", ".1f", "", "training time, without the measurements in between"),
    ),
    "scores": (
        Metric("mse", "MSE", ".3g", "low", "mean squared error of one gradient: variance plus squared bias", log=True),
        Metric(
            "grad_variance",
            "gradient variance",
            ".3g",
            "low",
            "trace of the covariance of one example's gradient at the layer's params",
            log=True,
        ),
        Metric(
            "bias",
            "bias",
            ".2g",
            "low",
            "norm of one example's bias; its square is estimated without bias, so that 0 is possible",
            error="bias_error",
        ),
        Metric("bias_error", "its standard error", ".1g", "", "standard error of the bias", drawn=False),
        Metric("relative_bias", "relative bias", ".3f", "low", "that bias over the norm of the reference", drawn=False),
        Metric("cosine", "cosine", ".3f", "high", "mean cosine of one gradient with the reference"),
        Metric(
            "grad_snr",
            "SNR",
            ".3g",
            "high",
            "norm of the mean gradient over the root of the variance; empty where there is no variance",
            log=True,
        ),
        Metric(
            "gradient_ms",
            "ms per gradient",
            ".3g",
            "low",
            "time of one gradient of the scored examples at the layer's params, in a batched pass of many",
            log=True,
        ),
        Metric("variance_time", "variance x ms", ".3g", "low", "product of variance and that time", log=True),
    ),
}


@dataclass(frozen=True)
class Summary:
    """One layer over its seeds.

    Attributes:
        row: The row of its first run.
        mean: Mean of each metric over the runs that did not fail.
        spread: Standard deviation over these runs; NaN for a single one.
        runs: Number of runs that did not fail.
        failed: Number of those that did.
        error: Why the first of them failed.
    """

    row: dict[str, Any]
    mean: dict[str, float]
    spread: dict[str, float]
    runs: int
    failed: int
    error: str

    @property
    def label(self) -> str:
        """What the table calls the layer."""
        return str(self.row["label"])


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison, dataframe-like: ``pandas.DataFrame(comparison.rows)`` is a data frame.

    Attributes:
        kind: ``"training"``, or ``"scores"`` on one frozen state.
        title: Model, latent variables, objective, data and budget in a line.
        rows: One record for each run: the keys of :data:`IDENTITY` and those of the metrics of this kind.
        curves: One record for each run and measurement: ``label``, ``seed``, ``step``, ``seconds`` (of training),
            ``elbo``, ``grad_variance``, ``grad_snr``; empty for scores.
        refused: Label -> why a layer was left out.
        settings: What all runs share, as plain data.
    """

    kind: Kind
    title: str
    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]] = field(default_factory=list, repr=False)
    refused: dict[str, str] = field(default_factory=dict, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The measured columns."""
        return METRICS[self.kind]

    @property
    def columns(self) -> list[str]:
        """The keys of the rows, in order."""
        return [*IDENTITY, *(metric.name for metric in self.metrics)]

    def __len__(self) -> int:
        return len(self.rows)

    def summary(self, sort: str | None = None) -> list[Summary]:
        """Each layer over its seeds, the best first and those that failed last.

        Args:
            sort: Metric to sort by; by default the first one.

        Raises:
            ValueError: Unknown metric.
        """
        names = [metric.name for metric in self.metrics]
        by = sorting(self.metrics, sort)
        key, sign = by.name, -1 if by.better == "high" else 1
        grouped: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            grouped.setdefault(row["label"], []).append(row)
        summaries = [_summary(rows, names) for rows in grouped.values()]
        return sorted(summaries, key=lambda s: (not s.runs, sign * s.mean.get(key, sign * math.inf), s.label))

    def to_dicts(self) -> list[dict[str, Any]]:
        """A copy of the rows."""
        return [dict(row) for row in self.rows]

    def to_csv(self, path: str | Path) -> None:
        """Write the rows as CSV; options are JSON."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"options": json.dumps(row["options"])} for row in self.rows)
        write_text(Path(path), text.getvalue())

    def to_json(self, path: str | Path) -> None:
        """Write everything as JSON: the attributes of this object by name."""
        values = {name: getattr(self, name) for name in ("kind", "title", "settings", "refused", "rows", "curves")}
        lines = (f"{json.dumps(name)}: {_json(value)}" for name, value in values.items())
        write_text(Path(path), "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Comparison:
        """Read what :meth:`to_json` wrote."""
        return cls(**json.loads(Path(path).read_text()))

    def __rich__(self) -> RenderableType:
        from lightning_modules.comparison.table import report

        return report(self)


def sorting(metrics: Sequence[Metric], name: str | None) -> Metric:
    """The metric of this name, by default the first.

    Raises:
        ValueError: There is none.
    """
    known = {metric.name: metric for metric in metrics}
    if name is not None and name not in known:
        raise ValueError(f"needed a metric to sort by, got {name!r}; valid ones: {', '.join(known)}.")
    return known[name] if name is not None else metrics[0]


def _json(value: Any) -> str:
    """JSON with one record a line."""
    if not isinstance(value, list):
        return json.dumps(value, allow_nan=False)
    return "[\n" + ",\n".join(json.dumps(record, allow_nan=False) for record in value) + "\n]"


def _summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Summary:
    good = [row for row in rows if row["status"] == "ok"]
    values = {name: [row[name] for row in good if row[name] is not None] for name in names}
    mean = {name: statistics.fmean(v) for name, v in values.items() if v}
    spread = {name: statistics.stdev(v) if len(v) > 1 else math.nan for name, v in values.items() if v}
    errors = [row["error"] for row in rows if row["status"] != "ok"]
    return Summary(rows[0], mean, spread, len(good), len(errors), errors[0] if errors else "")
