"""What every evidence script shares: options, results with their provenance, and the pictures beside them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "Record", "arguments", "read", "save_figure", "save_state"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evidence"


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have; ``defaults`` override theirs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data sets (default: STOCHASTIC_LAYERS_DATA)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--plot", action="store_true", help="only draw the plots from the results that are there")
    parser.set_defaults(**defaults)
    return parser


class Record:
    """One result file: how it was made, and what came out; written whole each time, so that it is never half a file.

    Args:
        script: Name of the script, without its suffix.
        path: The file.
        options: The options of the run by name; folders are left out.
    """

    def __init__(self, script: str, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self.started, self.started_cpu = time.perf_counter(), time.process_time()
        plain = {k: v for k, v in vars(options).items() if k not in ("data", "out", "plot")}
        self.content: dict[str, Any] = {
            "command": " ".join([f"python -m benchmarks.evidence.{script}", *_words(plain)]),
            "options": plain,
            **_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "threads": torch.get_num_threads(),
        }

    def write(self, **content: Any) -> None:
        """Add to the content and replace the file."""
        self.content.update(content)
        self.content["seconds"] = round(time.perf_counter() - self.started, 1)
        self.content["cpu_seconds"] = round(time.process_time() - self.started_cpu, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)


def read(path: Path) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        ValueError: There is none yet.
    """
    if not path.is_file():
        raise ValueError(f"needed the result {path}, got no such file; run the script without --plot first.")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure without leaving half a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("part-" + path.name)
    figure.savefig(temporary, dpi=100, bbox_inches="tight")
    os.replace(temporary, path)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint without leaving half a file."""
    temporary = path.with_name("part-" + path.name)
    torch.save(state, temporary)
    os.replace(temporary, path)


def _words(options: dict[str, Any]) -> Sequence[str]:
    words: list[str] = []
    for name, value in options.items():
        if value in ([], None):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
            continue
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _commit() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results")
        return {"commit": git("rev-parse", "HEAD"), "changed_files": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed_files": None}
