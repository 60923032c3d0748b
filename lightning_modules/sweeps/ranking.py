"""The ranking of a sweep: configurations, best first, each averaged over its seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lightning_modules.sweeps.plan import Plan
from lightning_modules.sweeps.record import Record, read_record
from lightning_modules.sweeps.state import SweepState, Trial
from lightning_modules.whole_files import write_text

__all__ = ["Row", "best", "number", "rank", "ranking_table", "short", "write_ranking"]

SEED = "seed_everything"


@dataclass(frozen=True)
class Row:
    """One configuration of a sweep.

    Attributes:
        rank: From 1; 0 where no trial has a value.
        parameters: Those of the sweep, without the seed.
        value: Mean over the trials (seeds) of each one's best value of the metric.
        deviation: Standard deviation over the trials; NaN for a single one.
        test: Mean of the metric's counterpart ``test/...`` at the best weights; NaN where no trial was tested.
        trials: Ids.
        states: The trials' states.
        errors: Why trials failed.
    """

    rank: int
    parameters: dict[str, Any]
    value: float
    deviation: float
    test: float
    trials: list[str]
    states: list[str]
    errors: list[str]


def best(plan: Plan, record: Record) -> float | None:
    """A trial's best value of the metric, as W&B's search and a checkpoint of the best weights see it."""
    values = [value for value in record.values(plan.metric) if math.isfinite(value)]
    return (max if plan.maximizes else min)(values) if values else None


def rank(plan: Plan, state: SweepState) -> list[Row]:
    """The configurations, best first; those without a value last."""
    groups: dict[str, list[Trial]] = {}
    for trial in state.trials:
        groups.setdefault(json.dumps(_without_seed(trial), sort_keys=True), []).append(trial)
    rows = [_row(plan, state, trials) for trials in groups.values()]
    sign = -1.0 if plan.maximizes else 1.0
    rows.sort(key=lambda row: math.inf if math.isnan(row.value) else sign * row.value)
    return [Row(**{**asdict(row), "rank": 0 if math.isnan(row.value) else i}) for i, row in enumerate(rows, 1)]


def _without_seed(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.parameters.items() if name != SEED}


def _row(plan: Plan, state: SweepState, trials: Sequence[Trial]) -> Row:
    records = [read_record(state.record(trial)) for trial in trials if trial.state in ("finished", "stopped")]
    values = [value for record in records if (value := best(plan, record)) is not None]
    counterpart = "test/" + plan.metric.partition("/")[2]
    tested = [value for record in records if (value := record.last(counterpart)) is not None]
    return Row(
        rank=0,
        parameters=_without_seed(trials[0]),
        value=_or_nan(statistics.fmean, values, 1),
        deviation=_or_nan(statistics.stdev, values, 2),
        test=_or_nan(statistics.fmean, tested, 1),
        trials=[trial.id for trial in trials],
        states=[trial.state for trial in trials],
        errors=sorted({trial.error for trial in trials if trial.error}),
    )


def _or_nan(statistic: Callable[[list[float]], float], values: list[float], needed: int) -> float:
    return statistic(values) if len(values) >= needed else math.nan


def short(value: Any) -> str:
    """A parameter's value for people: ``reinforce(num_samples=4)`` for a mapping with a name."""
    if isinstance(value, dict) and "name" in value:
        options = ", ".join(f"{name}={short(v)}" for name, v in value.items() if name != "name")
        return f"{value['name']}({options})" if options else str(value["name"])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def number(value: float) -> str:
    """A metric for people: of a bound in nats the hundredths count, of a small number four digits do."""
    return "-" if math.isnan(value) else f"{value:.2f}" if 10 <= abs(value) < 1e6 else f"{value:.4g}"


def ranking_table(plan: Plan, rows: Sequence[Row]) -> Table:
    """The ranking for the terminal."""
    names = sorted({name for row in rows for name in row.parameters})
    tested = any(not math.isnan(row.test) for row in rows)
    table = Table(title=f"sweep {plan.name}: {'highest' if plan.maximizes else 'lowest'} {plan.metric} first")
    for column in ("#", *names, plan.metric, *(["test, best weights"] if tested else []), "trials"):
        table.add_column(column, justify="left" if column in (*names, "trials") else "right", overflow="fold")
    for row in rows:
        value = number(row.value)
        if not math.isnan(row.deviation):
            value += f" ± {row.deviation:.2g}"
        test = [number(row.test)] if tested else []
        states = ", ".join(f"{row.states.count(s)} {s}" for s in dict.fromkeys(row.states))
        parameters = [short(row.parameters.get(name, "")) for name in names]
        table.add_row(str(row.rank or "-"), *parameters, value, *test, states)
    return table


def write_ranking(plan: Plan, state: SweepState, rows: Sequence[Row]) -> None:
    """Write ``ranking.json`` and ``ranking.csv`` into the sweep's folder."""
    finite = [
        {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in asdict(row).items()} for row in rows
    ]
    content = {"sweep": plan.name, "id": state.id, "metric": plan.config["metric"], "ranking": finite}
    write_text(state.folder / "ranking.json", json.dumps(content, indent=1))
    names = sorted({name for row in rows for name in row.parameters})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rank", *names, plan.metric, "standard deviation", "test", "trials", "states"])
    for row, plain in zip(rows, finite, strict=True):
        parameters = [short(row.parameters.get(name, "")) for name in names]
        numbers = ["" if plain[key] is None else plain[key] for key in ("value", "deviation", "test")]
        writer.writerow([row.rank or "", *parameters, *numbers, " ".join(row.trials), " ".join(row.states)])
    write_text(state.folder / "ranking.csv", text.getvalue())
