"""Runs the trials of a sweep: proposes, starts, watches, stops early, and survives interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from lightning_modules.sweeps.plan import Plan
from lightning_modules.sweeps.record import SWEEP_VARIABLE, TRIAL_VARIABLE, read_record, stop_file
from lightning_modules.sweeps.state import SweepState, Trial, new_id
from stochastic_layers.registry import nearest

__all__ = ["Runner", "share", "trial_environment"]

POLL = 0.2  # seconds between two looks at the trials
GRACE = 15.0  # seconds that an interrupted trial has to close its files
INITIAL_FAILURES = 3  # a sweep whose first trials all fail ends, since the next ones would too


@dataclass
class _Process:
    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    start: float
    record_size: int = -1


class Runner:
    """Runs a sweep to its end.

    Args:
        plan: The sweep file.
        state: Its trials; see :meth:`SweepState.open`.
        count: Number of trials in all, those of earlier calls included; ``None`` for all of a grid.
        workers: Number of trials at a time.
        seed: Of the search.
        sweep_id: Id of the sweep on W&B's server to which the runs will be uploaded, if there is one.
        watch: Called with every trial whose state changed or that has written new metrics.

    Raises:
        ValueError: A number is out of range, or ``count`` is missing where the search has no end.
    """

    def __init__(
        self,
        plan: Plan,
        state: SweepState,
        *,
        count: int | None = None,
        workers: int = 1,
        seed: int = 0,
        sweep_id: str | None = None,
        watch: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        count = plan.config.get("run_cap") if count is None else count
        if count is None and plan.config["method"] != "grid":
            raise ValueError(f"needed a number of trials for a {plan.config['method']} sweep, got none; pass --count.")
        if (count is not None and count < 1) or workers < 1:
            raise ValueError(f"needed count >= 1 and workers >= 1, got {count} and {workers}.")
        self.plan = plan
        self.state = state
        self.count = count
        self.workers = workers
        self.seed = seed
        self.sweep_id = sweep_id
        self.watch = watch
        self._running: list[_Process] = []
        self._exhausted = False

    def run(self) -> None:
        """Run until ``count`` trials are done or the grid is exhausted.

        Raises:
            ValueError: The metric is not among the logged keys, or the first trials all failed.
            KeyboardInterrupt: As it came; the trials were ended, and another call goes on.
        """
        with self.state.locked():
            self.state.save()
            try:
                while self._fill() or self._running:
                    time.sleep(POLL)
                    self._collect()
                    self._stop_early()
            finally:
                self._end_all()

    def _fill(self) -> bool:
        """Start trials while there is room; whether more may come."""
        while len(self._running) < self.workers:
            trial = next((t for t in self.state.trials if t.state == "pending"), None) or self._propose()
            if trial is None:
                return False
            self._start(trial)
        return True

    def _propose(self) -> Trial | None:
        if self._exhausted or (self.count is not None and len(self.state.trials) >= self.count):
            return None
        parameters = self.plan.propose(self.state, self.seed)
        if parameters is None:
            self._exhausted = True
            return None
        trial = Trial(new_id(), parameters)
        self.state.trials.append(trial)
        return trial

    def _start(self, trial: Trial) -> None:
        slot = next(i for i in range(self.workers) if all(p.slot != i for p in self._running))
        folder = self.state.record(trial).parent
        folder.mkdir(parents=True, exist_ok=True)
        environment = trial_environment(self.plan, self.state, trial, self.sweep_id) | share(slot, self.workers)
        with self.state.log(trial).open("wb") as log:
            try:
                process = subprocess.Popen(
                    self.plan.command(trial.parameters),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which ends its trials one by one
                )
            except OSError as error:
                raise ValueError(
                    f"needed a program to run, got {error}; see program and command in the file."
                ) from error
        trial.state = "running"
        self._running.append(_Process(trial, process, slot, time.monotonic()))
        self.state.save()
        self.watch(trial)

    def _collect(self) -> None:
        for running in list(self._running):
            code = running.process.poll()
            if code is not None:
                self._running.remove(running)
                self._finish(running, code)

    def _finish(self, running: _Process, code: int) -> None:
        trial = running.trial
        trial.seconds = time.monotonic() - running.start
        if code == 0:
            trial.state = "stopped" if stop_file(self.state.record(trial)).exists() else "finished"
        else:
            trial.state, trial.error = "failed", _last_line(self.state.log(trial)) or f"exit status {code}"
        self.state.save()
        self.watch(trial)
        if code == 0:
            self._check_metric(trial)
        failed = [t.state == "failed" for t in self.state.trials if t.state not in ("pending", "running")]
        if len(failed) >= INITIAL_FAILURES and all(failed):
            raise ValueError(
                f"needed trials that run, got {len(failed)} failures in a row, the last one with {trial.error!r}; read "
                f"{self.state.log(trial)}, correct the file or the machine, and give the command again."
            )

    def _check_metric(self, trial: Trial) -> None:
        """A metric that is not logged would turn W&B's search into a random one without a word."""
        history = read_record(self.state.record(trial)).history
        logged = sorted({name for line in history for name in line})
        if not logged:
            raise ValueError(
                f"needed metrics of trial {trial.id}, got none; run `stochastic-layers fit` with validation data, or "
                "give the Trainer of your program callbacks=TrialRecord.from_environment()."
            )
        if self.plan.metric not in logged:
            raise ValueError(
                f"needed a logged key as the metric, got {self.plan.metric!r}; {nearest(self.plan.metric, logged)} "
                f"Correct {self.plan.path} and choose a new --folder."
            )

    def _stop_early(self) -> None:
        news = []
        for running in self._running:
            path = self.state.record(running.trial)
            size = path.stat().st_size if path.exists() else -1
            if size != running.record_size:
                running.record_size = size
                news.append(running.trial)
        for trial in news:
            self.watch(trial)
        if news:
            for identity in self.plan.to_stop(self.state):
                stop_file(self.state.folder / "trials" / f"{identity}.jsonl").touch()

    def _end_all(self) -> None:
        """End what still runs; only after an error or an interruption there is any."""
        for running in self._running:
            with suppress(ProcessLookupError):
                running.process.terminate()
        deadline = time.monotonic() + GRACE
        for running in self._running:
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.0, deadline - time.monotonic()))
            if hasattr(os, "killpg"):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(running.process.pid, signal.SIGKILL)  # other ranks too
            running.process.kill()
            running.process.wait()


def trial_environment(plan: Plan, state: SweepState, trial: Trial, sweep_id: str | None) -> dict[str, str]:
    """The environment of a trial: that of `wandb agent`, offline, and where to write its record.

    The sweep's parameters are handed to W&B in a file, as an agent does, so that an uploaded run knows them. The id of
    a sweep is only given where the server knows it, since it refuses runs of an unknown one; else the runs are a group.
    """
    parameters = state.folder / "trials" / f"{trial.id}.parameters.yaml"
    parameters.write_text(
        yaml.safe_dump({"wandb_version": 1} | {name: {"value": v} for name, v in trial.parameters.items()})
    )
    own = {
        "WANDB_MODE": "offline",
        "WANDB_RUN_ID": trial.id,
        "WANDB_SWEEP_PARAM_PATH": str(parameters.absolute()),
        TRIAL_VARIABLE: str(state.record(trial).absolute()),
        SWEEP_VARIABLE: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
    }
    own |= {"WANDB_SWEEP_ID": sweep_id} if sweep_id else {"WANDB_RUN_GROUP": f"{plan.name}-{state.id}"}
    for key, variable in (("project", "WANDB_PROJECT"), ("entity", "WANDB_ENTITY")):
        if plan.config.get(key):
            own[variable] = str(plan.config[key])
    inherited = {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_SWEEP_ID", "WANDB_RUN_GROUP")}
    return inherited | own


def share(slot: int, workers: int) -> dict[str, str]:
    """The share of processor threads and GPUs of one of several workers; what the user has set stays."""
    if workers == 1:
        return {}
    threads = (
        {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    )
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    return threads | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot::workers])} if len(gpus) >= workers else {})


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
