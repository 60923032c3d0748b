"""The command ``stochastic-layers sweep``: run a W&B sweep file on this machine, without a network."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lightning_modules.sweeps.plan import Plan, find_file, shipped_files
from lightning_modules.sweeps.ranking import best, number, rank, ranking_table, short, write_ranking
from lightning_modules.sweeps.record import Record, read_record
from lightning_modules.sweeps.runner import Runner
from lightning_modules.sweeps.state import SweepState, Trial
from lightning_modules.terminal import InParts, interruptible
from lightning_modules.whole_files import write_text

__all__ = ["main"]


class Watch:
    """Shows the trials of a sweep: a bar for all, a line for each one that runs, and a line as each one ends."""

    def __init__(self, plan: Plan, state: SweepState, total: int | None, progress: Progress) -> None:
        self.plan = plan
        self.state = state
        self.progress = progress
        self.all = progress.add_task(f"sweep {plan.name}", total=total, completed=_done(state))
        self.lines: dict[str, TaskID] = {}

    def __call__(self, trial: Trial) -> None:
        record = read_record(self.state.record(trial))
        text = f"{trial.id}  {_parameters(trial)}  {_values(self.plan, record)}"
        if trial.state == "running":
            if trial.id not in self.lines:
                self.lines[trial.id] = self.progress.add_task(text, total=None)
            self.progress.update(self.lines[trial.id], description=text)
            return
        if trial.id in self.lines:
            self.progress.remove_task(self.lines.pop(trial.id))
        self.progress.update(self.all, completed=_done(self.state))
        why = f": {trial.error}" if trial.error else ""
        self.progress.console.print(
            f"{trial.state:8} {text}, {trial.seconds:.0f} s{why}", markup=False, highlight=False, soft_wrap=True
        )


def _done(state: SweepState) -> int:
    return sum(trial.state not in ("pending", "running") for trial in state.trials)


def _parameters(trial: Trial) -> str:
    return " ".join(f"{name}={short(value)}" for name, value in trial.parameters.items())


def _values(plan: Plan, record: Record) -> str:
    value, validations = best(plan, record), len(record.values(plan.metric))
    shown = number(math.nan if value is None else value)
    return f"{plan.metric} {shown} after {validations} validation{'s' * (validations != 1)}"


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stochastic-layers sweep", description=__doc__)
    parser.add_argument("file", help=f"path of a W&B sweep file, or one of {', '.join(shipped_files())}")
    parser.add_argument("--count", type=int, help="trials in all, those of earlier calls included (default: the grid)")
    parser.add_argument("--workers", type=int, default=1, help="trials at a time (default 1)")
    parser.add_argument("--folder", type=Path, help="where the sweep is kept (default: runs/sweeps/NAME)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default 0)")
    parser.add_argument("--sweep-id", help="id that `wandb sweep FILE` printed, to upload the runs into that sweep")
    parser.add_argument(
        "--print", action="store_true", help="print the file, to copy it or to hand it to `wandb sweep`"
    )
    return parser.parse_args(words)


def main(rest: list[str]) -> int:
    """Run the command with the words after ``sweep``; returns the exit status, 1 if a trial failed, 130 if interrupted.

    Raises:
        ValueError: A bad file, folder or number; see :class:`Plan`, :class:`SweepState` and :class:`Runner`.
    """
    options = _parse(rest)
    path = find_file(options.file)
    if options.print:
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    plan = Plan.load(path)
    state = SweepState.open(options.folder or Path("runs", "sweeps", plan.name), plan.config)
    console = Console()
    runner = Runner(
        plan, state, count=options.count, workers=options.workers, seed=options.seed, sweep_id=options.sweep_id
    )
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn())
    interrupted = False
    try:
        with (
            interruptible(),
            Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
        ):
            runner.watch = Watch(plan, state, runner.count, progress)
            runner.run()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        rows = rank(plan, state)
        write_ranking(plan, state, rows)
    console.print(InParts(ranking_table(plan, rows)))
    _say_where(console, state)
    if interrupted:
        console.print("interrupted: the same command goes on where it stopped")
        return 130
    return int(any(trial.state == "failed" for trial in state.trials))


def _say_where(console: Console, state: SweepState) -> None:
    console.print(f"ranking: {state.folder / 'ranking.csv'}, {state.folder / 'ranking.json'}", soft_wrap=True)
    done = [trial for trial in state.trials if trial.state in ("finished", "stopped")]
    runs = [run for trial in done for run in read_record(state.record(trial)).runs]
    if runs:
        write_text(state.folder / "runs.txt", "\n".join(runs) + "\n")
        console.print(f"to upload: xargs wandb sync < {state.folder / 'runs.txt'}", soft_wrap=True, markup=False)
