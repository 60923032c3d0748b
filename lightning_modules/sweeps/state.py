"""The trials of a sweep on disk: a state file that is replaced as a whole, so that an interruption loses nothing."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.whole_files import write_text

__all__ = ["SweepState", "Trial", "new_id"]

VERSION = 1
DONE = ("finished", "stopped")


@dataclass
class Trial:
    """One run of a sweep.

    Attributes:
        id: Its id, that of its W&B run too.
        parameters: The values of the sweep's parameters.
        state: ``pending``, ``running``, ``finished``, ``stopped`` (early, by the sweep) or ``failed``.
        seconds: How long it ran.
        error: Why it failed.
    """

    id: str
    parameters: dict[str, Any]
    state: str = "pending"
    seconds: float = 0.0
    error: str = ""


@dataclass
class SweepState:
    """A sweep in a folder.

    Attributes:
        folder: Holds ``sweep.json``, and for each trial its record, what it printed and its parameters.
        id: The sweep's id.
        config: The content of the sweep file.
        trials: In the order in which they were proposed.
    """

    folder: Path
    id: str
    config: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, config: dict[str, Any]) -> SweepState:
        """Begin a sweep in a folder, or take up the one that is there.

        Trials that were running or have failed are begun again, under a new id; those that are done stay as they are.

        Raises:
            ValueError: The folder holds another sweep, or its state cannot be read.
        """
        path = folder / "sweep.json"
        if not path.exists():
            return cls(folder, new_id(), config)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            trials = [Trial(**trial) for trial in content["trials"]]
            state = cls(folder, str(content["id"]), content["config"], trials)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: needed the state of a sweep, got {type(error).__name__}: {error}; move the folder away or "
                "choose another one by --folder."
            ) from error
        if content.get("version") != VERSION or state.config != json.loads(json.dumps(config)):
            raise ValueError(
                f"{folder}: needed the sweep that was begun here, got a sweep file with other content; restore the "
                "file or choose another folder by --folder."
            )
        for trial in state.trials:
            if trial.state not in DONE:
                trial.id, trial.state, trial.error = new_id(), "pending", ""
        return state

    def save(self) -> None:
        """Write ``sweep.json``."""
        content = {
            "version": VERSION,
            "id": self.id,
            "config": self.config,
            "trials": [asdict(trial) for trial in self.trials],
        }
        write_text(self.folder / "sweep.json", json.dumps(content, indent=1))

    def record(self, trial: Trial) -> Path:
        """What the trial writes; see :class:`~lightning_modules.sweeps.record.TrialRecord`."""
        return self.folder / "trials" / f"{trial.id}.jsonl"

    def log(self, trial: Trial) -> Path:
        """What the trial prints."""
        return self.folder / "trials" / f"{trial.id}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from running this sweep; the system lets go of the lock with the process.

        Raises:
            ValueError: Another process runs it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{self.folder}: needed a sweep that no other process runs, got one; wait for it or end it."
                ) from None
            yield


def new_id() -> str:
    """A random id of eight lower-case letters and digits, as W&B's are."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
