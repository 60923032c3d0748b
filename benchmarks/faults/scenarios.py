"""The faults: each lets one happen to a running or finished job, and says what a clear error of it must name."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job import INTERVAL, STEPS, Plan
from processes import Ended, Job

__all__ = ["SCENARIOS", "Bench", "Scenario"]


@dataclass
class Bench:
    """Where one fault is tried.

    Attributes:
        folder: Of the checkpoints.
        notes: Of everything else; each job has a folder of its own in it.
        layer: The layer that is trained.
        ranks: Number of processes.
        seconds: How long an undisturbed job takes.
        rng: Decides when, where and which bit.
    """

    folder: Path
    notes: Path
    layer: str
    ranks: int
    seconds: float
    rng: random.Random

    def job(self, name: str, plan: Plan | None = None, inside: int = 0) -> Job:
        """Start a job whose notes are kept under ``name``."""
        return Job(self.folder, self.notes / name, self.layer, self.ranks, plan or Plan(), inside)

    def moment(self) -> float:
        """A random moment of a job, in seconds after its start."""
        return self.rng.uniform(0.0, 1.1 * self.seconds)


@dataclass(frozen=True)
class Scenario:
    """A fault.

    Attributes:
        title: What happens.
        happen: Lets it happen; returns how the job ended.
        error: What the error of the job must name, where the job ends with one; any of these words.
        ranks: Numbers of processes it is tried with.
        possible: Says why it cannot be tried here; empty where it can.
    """

    title: str
    happen: Callable[[Bench], Ended]
    error: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (1,)
    possible: Callable[[], str] = lambda: ""


def killed(bench: Bench) -> Ended:
    """SIGKILL to every rank at a random moment."""
    job = bench.job("fault")
    time.sleep(bench.moment())
    for rank in range(bench.ranks):
        job.signal(signal.SIGKILL, rank)
    return job.wait()


def killed_while_saving(bench: Bench) -> Ended:
    """SIGKILL between two of the system calls that write a checkpoint."""
    return bench.job("fault", Plan(kill_at_call=bench.rng.randint(1, 40))).wait()


def rank_lost(bench: Bench) -> Ended:
    """SIGKILL to one rank of two; the other is left to find out."""
    job = bench.job("fault")
    time.sleep(bench.moment())
    job.signal(signal.SIGKILL, bench.rng.randrange(2))
    return job.wait()


def terminated(bench: Bench) -> Ended:
    """SIGTERM to every rank, and SIGKILL to what is left 20 seconds later, as a scheduler sends them."""
    job = bench.job("fault")
    time.sleep(bench.moment())
    for rank in range(bench.ranks):
        job.signal(signal.SIGTERM, rank)
    return job.wait(patience=20.0)


def nan_in_a_batch(bench: Bench) -> Ended:
    """One NaN in one pixel, on one rank."""
    plan = Plan(nan_at=bench.rng.randint(1, STEPS))
    return bench.job("fault", plan, inside=bench.rng.randrange(bench.ranks)).wait()


def _damaged(bench: Bench, damage: Callable[[bytearray], bytearray]) -> Ended:
    first = bench.job("before", Plan(kill_at_call=None))
    _wait_for_checkpoint(bench, first)
    for rank in range(bench.ranks):
        first.signal(signal.SIGKILL, rank)
    first.wait()
    last = bench.folder / "last.ckpt"
    last.write_bytes(damage(bytearray(last.read_bytes())))
    return bench.job("fault").wait()


def _wait_for_checkpoint(bench: Bench, job: Job) -> None:
    """Until the job has overwritten its last checkpoint at least once, so that there is something to lose."""
    end = time.monotonic() + 60
    steps = bench.rng.randint(2 * INTERVAL + 1, STEPS)
    while time.monotonic() < end and f"step {steps}" not in job.journal():
        time.sleep(0.01)


def truncated(bench: Bench) -> Ended:
    """The last checkpoint is cut off at a random byte."""
    return _damaged(bench, lambda data: data[: bench.rng.randrange(len(data))])


def bit_flipped(bench: Bench) -> Ended:
    """A random bit of the last checkpoint is flipped."""

    def flip(data: bytearray) -> bytearray:
        data[bench.rng.randrange(len(data))] ^= 1 << bench.rng.randrange(8)
        return data

    return _damaged(bench, flip)


def disk_full(bench: Bench) -> Ended:
    """The file system of the checkpoints, of 4 MB, is filled at a random moment."""
    _mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(bench.folder))
    try:
        job = bench.job("fault")
        time.sleep(bench.moment())
        filler = bench.folder / "filler"
        try:
            with open(filler, "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        except OSError:
            pass
        ended = job.wait()
        filler.unlink()
        _save_aside(bench)
    finally:
        _unmount(bench)
    return ended


def read_only(bench: Bench) -> Ended:
    """The folder of the checkpoints becomes read-only at a random moment (a bind mount: root ignores modes)."""
    _mount("--bind", str(bench.folder), str(bench.folder))
    try:
        job = bench.job("fault")
        time.sleep(bench.moment())
        for _ in range(200):  # busy as long as a file in it is being written
            if (
                subprocess.run(["mount", "-o", "remount,bind,ro", str(bench.folder)], capture_output=True).returncode
                == 0
            ):
                break
            time.sleep(0.005)
        return job.wait()
    finally:
        _unmount(bench)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def _unmount(bench: Bench) -> None:
    subprocess.run(["umount", "-l", str(bench.folder)], check=True, capture_output=True)
    aside = bench.notes / "aside"
    if aside.exists():
        shutil.copytree(aside, bench.folder, dirs_exist_ok=True)


def _save_aside(bench: Bench) -> None:
    """What is in a file system that is about to be taken away."""
    shutil.copytree(bench.folder, bench.notes / "aside")


def _may_mount() -> str:
    return "" if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") else "needs the right to mount"


def wandb_unreachable(bench: Bench) -> Ended:
    """No W&B server answers: the run starts online."""
    variables = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "5",
        "WANDB_SILENT": "true",
    }
    return bench.job("fault", Plan(wandb="unreachable", environment=variables)).wait()


def wandb_dies(bench: Bench) -> Ended:
    """W&B's own process, which writes an offline run, is killed at a random moment."""
    job = bench.job("fault", Plan(wandb="offline", environment={"WANDB_SILENT": "true"}))
    end = time.monotonic() + 60
    while time.monotonic() < end and not job.journal():
        time.sleep(0.02)
    time.sleep(bench.rng.uniform(0.0, bench.seconds))
    for pid in _descendants(job.pids[0]):
        if "wandb-core" in _command(pid):
            os.kill(pid, signal.SIGKILL)
    return job.wait()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in _descendants(child)]


_PEER = ("peer", "Connection", "connection", "Gloo", "gloo", "store", "Store", "socket")
SCENARIOS = {
    "kill": Scenario("kill -9 at a random moment", killed, ranks=(1, 1, 2)),
    "kill_saving": Scenario("kill -9 while a checkpoint is written", killed_while_saving),
    "rank_lost": Scenario("one rank of two is lost", rank_lost, _PEER, ranks=(2,)),
    "sigterm": Scenario("SIGTERM, as a scheduler sends it", terminated, ("SIGTERM", *_PEER), ranks=(1, 1, 2)),
    "nan": Scenario("NaN in a batch", nan_in_a_batch, ("NaN", *_PEER), ranks=(1, 1, 2)),
    "truncated": Scenario("a truncated checkpoint", truncated, ("needed an intact checkpoint",)),
    "bit_flipped": Scenario("a checkpoint with a flipped bit", bit_flipped, ("needed an intact checkpoint",)),
    "disk_full": Scenario(
        "disk full while a checkpoint is written", disk_full, ("No space left",), possible=_may_mount
    ),
    "read_only": Scenario("a folder that becomes read-only", read_only, ("Read-only",), possible=_may_mount),
    "wandb_unreachable": Scenario("W&B unreachable", wandb_unreachable, ("wandb", "W&B", "127.0.0.1")),
    "wandb_dies": Scenario("W&B's process dies mid-run", wandb_dies, ("wandb", "W&B", "service", "Connection")),
}
