"""Runs in processes of their own, a few at a time: what one of them does, or dies of, stays with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_modules.comparison.plan import Run
from lightning_modules.whole_files import write_text

__all__ = ["run_all"]


def run_all(runs: Sequence[Run], workers: int, console: Console | None = None) -> None:
    """Do the runs that have no result yet, ``workers`` at a time; each writes its result file when it is done.

    Whatever ends this function early (an exception, Ctrl-C, the death of the process) also ends the processes; results
    that were written stay.

    Args:
        runs: The runs, in the order in which they are started.
        workers: Number of processes at a time. They share the cores, so that only with one the times are comparable.
        console: Where to show the progress; nowhere by default.
    """
    missing = [run for run in runs if (run.result() or {}).get("status") != "ok"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _Processes() as processes, Progress(*columns, console=console, disable=console is None) as progress:
        total = progress.add_task("runs", total=len(runs), completed=len(runs) - len(missing))
        with ThreadPoolExecutor(workers) as threads:
            pending: set[Future[None]] = {threads.submit(_run, run, workers, processes, progress) for run in missing}
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        progress.advance(total)
            except BaseException:
                for future in pending:
                    future.cancel()
                processes.kill()
                raise


class _Processes:
    """The processes that are alive, to be killed together."""

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen[str]] = set()
        self.killed = False
        self._lock = threading.Lock()

    @contextmanager
    def started(self, program: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
        with self._lock:
            if self.killed:
                raise RuntimeError("the comparison was ended.")
            process = subprocess.Popen(program, text=True, **options)
            self._alive.add(process)
        try:
            with suppress(BrokenPipeError), process:  # if it died at once, that shows when it is written to
                yield process
        finally:
            with self._lock:
                self._alive.discard(process)

    def kill(self) -> None:
        with self._lock:
            self.killed = True
            for process in self._alive:
                process.kill()

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def _run(run: Run, workers: int, processes: _Processes, progress: Progress) -> None:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.unlink(missing_ok=True)  # a failure that is tried again
    label = run.candidate.label if run.seed is None else f"{run.candidate.label}, seed {run.seed}"
    with _task(progress, label) as show, tempfile.TemporaryFile("w+") as errors:
        with processes.started(
            [sys.executable, "-m", "lightning_modules.comparison.run", str(run.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(workers),
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(run.spec) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                show(json.loads(line))
            process.wait()  # with its standard input open, whose end would end it
        if run.result() is None and not processes.killed:
            errors.seek(0)
            record = {"status": "failed", "error": _death(process.returncode, errors.read()), "spec": run.spec}
            write_text(run.path, json.dumps(record, indent=1) + "\n")


@contextmanager
def _task(progress: Progress, label: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    task = progress.add_task(label, total=100)

    def show(message: dict[str, Any]) -> None:
        elbo = message["elbo"]
        description = None if elbo is None else f"{label}: ELBO {elbo:.2f}"
        progress.update(task, completed=round(100 * min(1.0, message["fraction"])), description=description)

    try:
        yield show
    finally:
        progress.remove_task(task)


def _environment(workers: int) -> dict[str, str]:
    """That of this process, and an equal share of the cores unless the number of threads is set."""
    share = max(1, (os.cpu_count() or 1) // workers)
    return {"OMP_NUM_THREADS": str(share)} | os.environ


def _death(status: int, errors: str) -> str:
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    if status < 0:
        name = signal.Signals(-status).name
        return f"the process was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}. {last}".strip()
    return f"the process ended with status {status}. {last}".strip()
