"""A sweep file: what `wandb sweep` reads, checked; which parameters come next, and the command line of a trial."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_modules.sweeps.record import read_record
from lightning_modules.sweeps.state import SweepState, Trial

__all__ = ["Plan", "find_file", "shipped_files"]

PROGRAM = "stochastic-layers"
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
NEEDS_SWEEPS = (
    "needed the package 'sweeps', W&B's own search, got none; install it with the extra: "
    'pip install "stochastic-layers[sweeps]" (docs/sweeps.md says how to keep NumPy 2).'
)
# what W&B calls the states of a run
RUN_STATES = {"pending": "pending", "running": "running", "finished": "finished", "stopped": "finished"}


def shipped_files() -> list[str]:
    """Names of the sweep files that come with the package."""
    return sorted(item.name for item in files("lightning_modules.sweeps").iterdir() if item.name.endswith(".yaml"))


def find_file(name: str) -> Path:
    """The sweep file at a path, or the shipped one of that name.

    Raises:
        ValueError: There is neither.
    """
    path = Path(name)
    shipped = Path(str(files("lightning_modules.sweeps"))) / path.with_suffix(".yaml").name
    if path.is_file():
        return path
    if path.name == name and shipped.is_file():
        return shipped
    raise ValueError(f"needed the path of a sweep file or one of {shipped_files()}, got {name!r}.")


@dataclass(frozen=True)
class Plan:
    """A checked sweep file.

    Attributes:
        path: Of the file.
        config: Its content.
    """

    path: Path
    config: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read and check a sweep file.

        Raises:
            ValueError: It is no YAML, violates W&B's schema, or asks for what only W&B's servers can do.
        """
        try:
            # by way of JSON, in which the state of the sweep is kept
            config = json.loads(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path}: needed a YAML file of plain data, got {type(error).__name__}: {error}"
            ) from error
        if not isinstance(config, dict):
            raise ValueError(f"{path}: needed a mapping of W&B's sweep keys, got {type(config).__name__}.")
        problems = _schema_problems(config) or _own_problems(config)
        if problems:
            raise ValueError(f"{path}: needed a sweep that W&B accepts, got: " + "; ".join(problems))
        return cls(path, config)

    @property
    def metric(self) -> str:
        """The key that is optimised."""
        return str(self.config["metric"]["name"])

    @property
    def maximizes(self) -> bool:
        """Whether larger is better; W&B's default is that it is not."""
        return bool(self.config["metric"].get("goal") == "maximize")

    @property
    def name(self) -> str:
        """Name of the sweep: that in the file, or that of the file."""
        return str(self.config.get("name") or self.path.stem)

    def propose(self, state: SweepState, seed: int) -> dict[str, Any] | None:
        """The parameters of the next trial by W&B's search, ``None`` at the end of a grid.

        Args:
            state: All trials so far.
            seed: Of random choices; together with the number of trials it determines them.

        Raises:
            ValueError: The search refuses the file.
        """
        with _seeded(seed, len(state.trials)), _quiet():
            run = _sweeps().next_run(self.config, [self._run(t, state) for t in state.trials])
        return None if run is None else {name: _plain(entry["value"]) for name, entry in run.config.items()}

    def to_stop(self, state: SweepState) -> set[str]:
        """Ids of the running trials that the early termination of the file ends."""
        if "early_terminate" not in self.config:
            return set()
        with _quiet():
            stopped = _sweeps().stop_runs(self.config, [self._run(t, state) for t in state.trials])
        return {run.name for run in stopped}

    def _run(self, trial: Trial, state: SweepState) -> Any:
        return _sweeps().SweepRun(
            name=trial.id,
            state=RUN_STATES.get(trial.state, "failed"),
            config={name: {"value": value} for name, value in trial.parameters.items()},
            history=read_record(state.record(trial)).history,
        )

    def command(self, parameters: Mapping[str, Any]) -> list[str]:
        """The command line of a trial: what `wandb agent` would run, by this interpreter.

        Raises:
            ValueError: A macro of W&B's that has no meaning here.
        """
        program = str(self.config.get("program", ""))
        own = [sys.executable, "-m", "lightning_modules.cli"]
        macros = {
            "${env}": [],
            "${interpreter}": [sys.executable],
            "${program}": own if program == PROGRAM else [program],
            "${args}": [f"--{name}={value}" for name, value in parameters.items()],
            "${args_no_equals}": [word for name, value in parameters.items() for word in (f"--{name}", str(value))],
        }
        words: list[str] = []
        for word in map(str, self.config.get("command", DEFAULT_COMMAND)):
            word = ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[1]), word)
            if word.startswith("${") and word.endswith("}") and word not in macros:
                raise ValueError(f"{self.path}: needed one of {list(macros)} in command, got {word!r}.")
            words += own if word == PROGRAM and not words else macros.get(word, [word])
        return words


def _sweeps() -> Any:
    """The package ``sweeps``, imported when it is needed: it is an extra."""
    try:
        with _quiet():
            return import_module("sweeps")
    except ImportError as error:
        raise ValueError(f"{NEEDS_SWEEPS} ({error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the package and its dependencies warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _seeded(seed: int, number: int) -> Iterator[None]:
    """The global generators that W&B's search draws from, seeded, and left as they were."""
    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(f"{seed}/{number}")
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's: the command line shows ``0.5``, not ``np.float64(0.5)``."""
    return json.loads(json.dumps(value, default=lambda number: number.item()))


def _schema_problems(config: dict[str, Any]) -> list[str]:
    sweeps = _sweeps()
    try:
        with _quiet():
            return list(sweeps.schema_violations_from_proposed_config(config))
    except Exception as error:  # the schema library raises its own kinds
        return [f"{type(error).__name__}: {error}"]


def _own_problems(config: dict[str, Any]) -> list[str]:
    """What W&B accepts, but not here, or not for long: its search turns random, silently, without a metric."""
    problems = []
    if not config.get("metric", {}).get("name"):
        problems.append("no metric; name a logged key, such as metric: {name: val/elbo, goal: maximize}")
    if config["method"] not in ("grid", "random", "bayes"):
        problems.append(f"the method {config['method']!r}; use grid, random or bayes")
    nulls = [name for name, spec in config["parameters"].items() if _holds_null(spec)]
    if nulls:  # W&B makes the word None of it
        problems.append(f"null in {nulls}, which no command line can say; write 'null' in quotes, or leave the key out")
    if "program" not in config:
        problems.append(f"no program; use program: {PROGRAM}")
    elif config["program"] == PROGRAM and "command" not in config:
        problems.append(f"no command; start from that of a shipped file, {shipped_files()}")
    words = [word for word in config.get("command", []) if isinstance(word, dict)]
    if words:  # YAML reads `- --option={'a': 1}` so
        problems.append(f"the mapping {words[0]} in command; put the word in double quotes")
    if not _has_arguments(config.get("command", DEFAULT_COMMAND)):
        problems.append("a command without ${args}, so that no trial would see its parameters")
    return problems


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None


def _has_arguments(command: Sequence[Any]) -> bool:
    return any(str(word).startswith("${args") for word in command)
