"""Comparisons and sweeps that are interrupted: no finished run may be lost, and the same command must do the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verdict import Verdict

__all__ = ["INTERRUPTIONS", "Interruption", "interrupted", "undisturbed_runs"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
LAYERS = ("reinforce", "straight_through")
PATIENCE = 120.0  # seconds
SMALL = ["--data.binarization=dynamic", "--trainer.accelerator=cpu"]
SWEEP = f"""
program: stochastic-layers
method: grid
metric: {{name: val/elbo, goal: maximize}}
parameters:
  model.layer: {{values: [{", ".join(LAYERS)}]}}
command: ["${{env}}", "${{program}}", fit, --trainer.logger=WandbLogger, --trainer.logger.save_dir=runs,
  --trainer.max_epochs=1, --trainer.limit_train_batches=4, "--model.iwae_samples={{}}",
  --trainer.enable_progress_bar=false, {", ".join(SMALL)}, "${{args}}"]
"""

Results = dict[str, Any]  # of finished runs, by name


@dataclass(frozen=True)
class Interruption:
    """A command of several runs.

    Attributes:
        title: What happens.
        words: The command.
        finished: The results of the runs that are finished, in the folder of the command.
        figures: What of the results must be that of an undisturbed command.
        possible: Says why it cannot be tried here; empty where it can.
    """

    title: str
    words: tuple[str, ...]
    finished: Callable[[Path], Results]
    figures: Callable[[Results], Any]
    possible: Callable[[], str] = lambda: ""


def _compared(folder: Path) -> Results:
    files = (folder / "runs" / "compare" / "runs").glob("*.json")
    results = {file.name: json.loads(file.read_text()) for file in files}
    return {name: result for name, result in results.items() if not result["error"]}


def _elbos(results: Results) -> list[tuple[str, float]]:
    return sorted((result["spec"]["layer"], result["elbo"]) for result in results.values())


def _swept(folder: Path) -> Results:
    file = folder / "runs" / "sweeps" / "sweep" / "sweep.json"
    trials = json.loads(file.read_text())["trials"] if file.exists() else []
    return {trial["id"]: trial for trial in trials if trial["state"] == "finished"}


def _layers(results: Results) -> list[str]:
    return sorted(str(trial["parameters"]) for trial in results.values())


INTERRUPTIONS = {
    "compare_interrupted": Interruption(
        "an interrupted comparison",
        ("compare", f"--layers={','.join(LAYERS)}", "--steps=20", "--seeds=1", *SMALL),
        _compared,
        _elbos,
    ),
    "sweep_interrupted": Interruption(
        "an interrupted sweep",
        ("sweep", "sweep.yaml"),
        _swept,
        _layers,
        lambda: "" if importlib.util.find_spec("sweeps") else "needs the package sweeps",
    ),
}


def _start(of: Interruption, folder: Path) -> subprocess.Popen[str]:
    (folder / "sweep.yaml").write_text(SWEEP)
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_modules.cli", *of.words],
        cwd=folder,
        env=os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def undisturbed_runs(of: Interruption) -> tuple[Any, float]:
    """The figures of a command that nothing happens to, and how long it takes."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        process = _start(of, Path(name))
        errors, _ = process.communicate(timeout=10 * PATIENCE)
        if process.returncode != 0:
            raise RuntimeError(f"the undisturbed command {of.words} ended with {process.returncode}: {errors[-500:]}")
        return of.figures(of.finished(Path(name))), time.monotonic() - begun


def interrupted(fault: str, seed: int, reference: Any, seconds: float) -> Verdict:
    """Send a random signal at a random moment, give the same command again, and judge."""
    of, rng, begun = INTERRUPTIONS[fault], random.Random(seed), time.monotonic()
    number = rng.choice(SIGNALS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = _start(of, folder)
        time.sleep(rng.uniform(0.1, 1.05) * seconds)
        process.send_signal(number)
        try:
            errors, _ = process.communicate(timeout=PATIENCE)
            first = {0: "finished", -number: "signal"}.get(process.returncode, "error")
        except subprocess.TimeoutExpired:
            process.kill()
            errors, first = "", "hang"
        before = of.finished(folder)
        lines = [line for line in errors.splitlines() if line.strip()]
        verdict = Verdict(fault, LAYERS[0], 1, seed, first, len(before), message=lines[-1][:300] if lines else "")
        if first == "hang":
            verdict.problem = "the command did not end by itself"
        elif first == "error" and "interrupt" not in errors.lower():
            verdict.problem = f"status {process.returncode}, and no word of an interruption"
        else:
            _judge(of, folder, before, reference, verdict)
    verdict.seconds = round(time.monotonic() - begun, 2)
    return verdict


def _judge(of: Interruption, folder: Path, before: Results, reference: Any, verdict: Verdict) -> None:
    if verdict.first != "finished":
        again = _start(of, folder)
        errors, _ = again.communicate(timeout=10 * PATIENCE)
        if again.returncode != 0:
            verdict.problem = f"the same command ended with {again.returncode}: {errors[-300:]}"
            return
        verdict.resumed = len(before)
    after = of.finished(folder)
    verdict.lost = sum(after.get(run) != result for run, result in before.items())
    if verdict.lost:
        verdict.problem = f"{verdict.lost} finished runs were lost"
    elif of.figures(after) != reference:
        verdict.problem = f"the results are {of.figures(after)}, and those of an undisturbed command {reference}"
