"""Processes of a campaign: forked from one that has imported everything, watched, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from job import Plan, main

__all__ = ["Ended", "Job"]

TIMEOUT = 120.0  # seconds after which a job counts as hanging
GRACE = 15.0  # seconds that the other ranks have to find out that one is gone; torchrun gives them none


@dataclass
class Ended:
    """How a job ended.

    Attributes:
        statuses: Of each rank: 0, 1 for an exception, minus the signal that killed it, or ``"hang"``.
        errors: The exceptions, ``Type: message``.
        start: The step at which it (re)started, -1 where it did not come so far.
        reached: The last step that it made.
        seconds: How long it took.
        launcher: Whether a rank had to be ended: another one was gone, or SIGTERM did not do.
    """

    statuses: list[int | str]
    errors: list[str]
    start: int
    reached: int
    seconds: float
    launcher: bool

    @property
    def finished(self) -> bool:
        """Whether every rank came to the end."""
        return all(status == 0 for status in self.statuses)


class Job:
    """One training job of one or two ranks.

    Args:
        folder: Of the checkpoints.
        notes: A new folder for what the job writes down.
        layer: The layer.
        ranks: Number of processes.
        plan: What happens inside.
        inside: The ranks that ``plan`` is for; the others have its ``resume`` only.
    """

    def __init__(self, folder: Path, notes: Path, layer: str, ranks: int, plan: Plan, inside: int = 0) -> None:
        notes.mkdir(parents=True)
        self.notes, self.ranks, self.begun = notes, ranks, time.monotonic()
        port = _free_port()
        self.pids = []
        for rank in range(ranks):
            own = plan if rank == inside else Plan(resume=plan.resume)
            if ranks > 1:
                own = replace(own, environment=own.environment | _elastic(rank, ranks, port))
            self.pids.append(_fork(folder, notes, layer, own, rank))

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one rank; a rank that has ended gets none."""
        os.kill(self.pids[rank], number)  # not reaped yet, so that the number is still its own

    def journal(self) -> list[str]:
        """What rank 0 has written down."""
        path = self.notes / "journal0"
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, patience: float = TIMEOUT) -> Ended:
        """Wait for all ranks, as a launcher does: where one has failed, the others are ended after a while.

        Args:
            patience: Seconds after which all are ended, as a scheduler does some time after SIGTERM.
        """
        statuses: dict[int, int | str] = {}
        begun = failed = time.monotonic()
        launcher = False
        while len(statuses) < self.ranks:
            for rank, pid in enumerate(self.pids):
                if rank not in statuses:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        statuses[rank] = os.waitstatus_to_exitcode(status)
                        failed = time.monotonic()
            hanging = time.monotonic() > begun + TIMEOUT
            if (
                hanging
                or time.monotonic() > begun + patience
                or (any(statuses.values()) and time.monotonic() > failed + GRACE)
            ):
                for rank, pid in enumerate(self.pids):
                    if rank not in statuses:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                        statuses[rank] = "hang" if hanging else -signal.SIGKILL
                        launcher = not hanging
            time.sleep(0.01)
        steps = [int(line.split()[1]) for line in self.journal() if line.startswith("step")]
        starts = [int(line.split()[1]) for line in self.journal() if line.startswith("start")]
        errors = [file.read_text() for file in sorted(self.notes.glob("error*"))]
        start = starts[0] if starts else -1
        return Ended(
            [statuses[rank] for rank in range(self.ranks)],
            errors,
            start,
            steps[-1] if steps else max(start, 0),
            time.monotonic() - self.begun,
            launcher,
        )


def _fork(folder: Path, notes: Path, layer: str, plan: Plan, rank: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        log = os.open(notes / f"log{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = main(folder, notes, layer, plan)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _elastic(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_RUN_ID": "faults",
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
