"""What every benchmark shares: interleaved timing, the record of the environment, results as checked JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "RESULTS",
    "Row",
    "accelerator",
    "arguments",
    "check",
    "clock",
    "compare",
    "environment",
    "interleave",
    "parse",
    "parser",
    "refuse_missing_gpu",
    "summary",
    "write",
]

SCHEMA = 1
# Bytes of a tensor that is made and released first, as in any process that trains a larger model. From then on glibc
# keeps freed memory of that size, and does not return it to the system, from which each page would be fetched anew.
LARGE = 31 * 2**20
# Seconds of one turn of a case. The first call of a turn finds the caches full of what the case before has left, which
# cost a case of 1 ms half as much again: in training a layer is called step after step, not after another library. So a
# turn is long, and its first call is not counted.
TURN = 0.02
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "lightning", "pyro-ppl", "storchastic", "reinmax", "vector-quantize-pytorch", "pythae")


@dataclass(frozen=True)
class Row:
    """One line of a result: the distribution of a quantity, and of its ratio to that of the reference.

    Attributes:
        group: What the rows of a group have in common: the work, and its size.
        name: Who did it.
        unit: Of median and quartiles, such as ``"s"`` or ``"bytes"``.
        median: Over the rounds.
        q1: Lower quartile.
        q3: Upper quartile.
        rounds: Number of measurements.
        reference: Name of the row of the same group that the ratio is to; empty where there is none.
        ratio: Median over rounds of (this / reference in the same round).
        ratio_q1: Lower quartile.
        ratio_q3: Upper quartile.
        x: Size that varies within the group, where one does.
    """

    group: str
    name: str
    unit: str
    median: float
    q1: float
    q3: float
    rounds: int
    reference: str = ""
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    x: float | None = None


def clock(device: str = "cpu") -> float:
    """Seconds: of this process's own work on a CPU, which other jobs disturb less than the wall's; wall on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleave(
    cases: Mapping[str, Callable[[], object]], *, seconds: float, device: str = "cpu", min_rounds: int = 9
) -> dict[str, list[float]]:
    """Time every case by turns, round after round, in an order that alternates.

    A turn repeats its case for 20 ms, after one call that is not counted: the first one finds the caches full of what
    the case before it has left. A case that takes longer than a turn by itself is called once, and counted: what it
    finds in the caches does not matter to it.

    Args:
        cases: Functions of no argument that do the same work.
        seconds: Wall time to spend; at least ``min_rounds`` rounds are done.
        device: Where they work.
        min_rounds: Smallest number of rounds.

    Returns:
        Seconds per call, one list entry per round.
    """
    torch.empty(LARGE, dtype=torch.uint8).fill_(0)
    counts = {name: math.ceil(TURN / _shortest(function, device)) for name, function in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    order, end = list(cases), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < min_rounds:
        for name in order:
            function, count = cases[name], counts[name]
            if count > 1:
                function()
            start = clock(device)
            for _ in range(count):
                function()
            times[name].append((clock(device) - start) / count)
        order.reverse()
    return times


def _shortest(function: Callable[[], object], device: str, calls: int = 4) -> float:
    """Wall time of the shortest of the first calls, which also warm up: allocator, compilation, lazy initialisation."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        clock(device)  # waits for a GPU
        times.append(time.perf_counter() - start)
    return min(times)


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return median, q1, q3


def compare(
    group: str, cases: Mapping[str, Callable[[], object]], *, reference: str, seconds: float, device: str = "cpu"
) -> list[Row]:
    """Time cases that do the same work; their ratios are taken round by round."""
    times = interleave(cases, seconds=seconds, device=device)
    rows = []
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[reference], strict=True)]
        rows.append(Row(group, name, "s", *summary(values), len(values), reference, *summary(ratios)))
        print(
            f"{group:44s} {name:44s} {1e3 * rows[-1].median:9.3f} ms  {rows[-1].ratio:6.3f} x {reference}", flush=True
        )
    return rows


def _command() -> str:
    """What was called, less the folder of the result: a path of this machine, which measures nothing."""
    script, *words = sys.argv
    while "--folder" in words:
        at = words.index("--folder")
        del words[at : at + 2]
    words = [word for word in words if not word.startswith("--folder=")]
    return " ".join(["python -m benchmarks." + Path(script).stem, *words])


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on: versions, commit, machine, threads, and how busy the machine was."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _run("git", "rev-parse", "HEAD") or "unknown",
        "changed": bool(
            _run("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
        ),
        "python": platform.python_version(),
        "versions": versions,
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
    }


def write(
    benchmark: str,
    question: str,
    rows: Sequence[Row],
    *,
    device: str = "cpu",
    unavailable: Mapping[str, str] | None = None,
    findings: Mapping[str, float] | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Check a result and write it as ``folder/benchmark.json``, all of it or nothing.

    Args:
        benchmark: Its name.
        question: What it answers.
        rows: The figures.
        device: Where they were measured.
        unavailable: Peers that could not be measured, and why.
        findings: Numbers derived from the rows, by name, such as fitted exponents.
        folder: Where to.
    """
    document = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "question": question,
        "command": _command(),
        "environment": environment(device),
        "unavailable": dict(unavailable or {}),
        "findings": dict(findings or {}),
        "rows": [asdict(row) for row in rows],
    }
    check(document)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
    return path


def check(document: Mapping[str, Any]) -> None:
    """Refuse a document that is not a result.

    Raises:
        ValueError: With the first thing that is wrong.
    """
    kinds: dict[str, type] = {"schema": int, "benchmark": str, "question": str, "command": str, "environment": dict}
    kinds |= {"unavailable": dict, "findings": dict, "rows": list}
    for key, kind in kinds.items():
        if not isinstance(document.get(key), kind):
            raise ValueError(f"needed {key!r} of type {kind.__name__}, got {document.get(key)!r}.")
    if document["schema"] != SCHEMA:
        raise ValueError(f"needed schema {SCHEMA}, got {document['schema']}; run the benchmark again.")
    for key in ("time", "commit", "changed", "python", "versions", "processor", "device", "threads", "load"):
        if key not in document["environment"]:
            raise ValueError(f"needed {key!r} in the environment, got {sorted(document['environment'])}.")
    if not document["rows"]:
        raise ValueError("needed at least one row, got none.")
    names = {(row.get("group"), row.get("name"), row.get("x")) for row in document["rows"]}
    for fields in document["rows"]:
        row = Row(**fields)
        if not 0 <= row.q1 <= row.median <= row.q3 < float("inf") or row.rounds < 1:
            raise ValueError(f"needed 0 <= q1 <= median <= q3 and rounds >= 1, got {row}.")
        if row.reference and (row.group, row.reference, row.x) not in names:
            raise ValueError(f"needed the reference {row.reference!r} among the rows of {row.group!r}, got {row}.")
        if (row.ratio is None) != (not row.reference):
            raise ValueError(f"needed a ratio exactly where there is a reference, got {row}.")
    if len(names) != len(document["rows"]):
        raise ValueError("needed rows that differ in group, name or x, got the same twice.")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--threads", type=int, default=1, help="torch's threads")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    result.add_argument("--folder", type=Path, default=RESULTS, help="where the JSON goes")
    return result


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; torch is seeded, and set to one thread unless more are asked for."""
    found = options.parse_args()
    refuse_missing_gpu(options, found.device)
    torch.set_num_threads(found.threads)
    torch.manual_seed(0)
    return found


def refuse_missing_gpu(options: argparse.ArgumentParser, device: str) -> None:
    """End the program with one sentence where it is to run on a GPU that torch does not see."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        options.error(
            f"needed a GPU for --device {device}, got torch.cuda.is_available() = False; pass --device cpu, or install "
            "a driver and a build of torch for CUDA."
        )


def arguments(description: str, *, seconds: float) -> argparse.Namespace:
    """The options of a benchmark that measures for some seconds."""
    options = parser(description)
    options.add_argument("--seconds", type=float, default=seconds, help="wall time for each group")
    return parse(options)


def accelerator(device: str) -> str:
    """What a Lightning Trainer calls the device."""
    return "gpu" if device == "cuda" else "cpu"
