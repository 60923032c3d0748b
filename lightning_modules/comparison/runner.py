"""The comparison itself: plan the runs, do those that are missing, gather the results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_modules.comparison.measure import PROBE_EXAMPLES
from lightning_modules.comparison.plan import Candidate, LayerSpec, Run, candidates, make_run
from lightning_modules.comparison.pool import run_all
from lightning_modules.comparison.result import METRICS, Comparison, Kind
from lightning_modules.comparison.settings import Parsed, Settings, settings_of
from lightning_modules.whole_files import make_folder

__all__ = ["Budget", "compare_parsed"]

DEFAULT_STEPS = 1000
POINTS = 20
MIN_SCORE_DRAWS, SCORE_DRAWS, SCORE_EVALUATIONS = 8, 512, 2048


@dataclass(frozen=True)
class Budget:
    """How long each layer is trained.

    Attributes:
        unit: ``"steps"`` or ``"seconds"``.
        value: How many.
    """

    unit: str
    value: float

    @classmethod
    def of(cls, steps: int | None, seconds: float | None) -> Budget:
        """The one that is given, by default :data:`DEFAULT_STEPS`.

        Raises:
            ValueError: Both are given, or one that is not positive.
        """
        if steps is not None and seconds is not None:
            raise ValueError("needed one budget, got steps and seconds; give one of them.")
        unit, value = ("steps", DEFAULT_STEPS if steps is None else steps) if seconds is None else ("seconds", seconds)
        if not value > 0:
            raise ValueError(f"needed {unit} > 0, got {value}.")
        return cls(unit, value)

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"


def compare_parsed(
    parsed: Parsed,
    layers: Sequence[LayerSpec] | None,
    *,
    budget: Budget,
    seeds: Sequence[int],
    evaluations: int | None,
    score: bool,
    folder: Path,
    workers: int,
    console: Console | None = None,
) -> Comparison:
    """:func:`compare` with settings that are parsed, and a console for the progress."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"needed one seed or more, all different, got {list(seeds)}.")
    if workers < 1:
        raise ValueError(f"needed workers >= 1, got {workers}.")
    if score and parsed.model.objective.name != "elbo":
        raise ValueError(
            f"needed the objective 'elbo' for scores, got {parsed.model.objective.name!r}; leave out --score."
        )
    shared = settings_of(parsed)
    found = candidates(parsed.model, shared, layers, evaluations)
    # a layer that was named and cannot be stays, as one that failed
    refused = {c.label: c.refusal for c in found if c.refusal and layers is None}
    chosen = [c for c in found if c.label not in refused]
    if not chosen:
        raise ValueError(f"needed a layer to compare, got none: {refused}.")

    make_folder(folder / "runs")  # or fail now, not after the first run
    folder, own = folder / "runs", parsed.model.layer
    start = _fingerprint(parsed.config.get("ckpt_path"))
    title = title_of(parsed)
    settings: dict[str, Any] = {"config": shared.config}
    training = settings | {"budget": {budget.unit: budget.value}, "points": POINTS, "start": start}
    if not score:
        settings = training
        # seed by seed, so that what there is after an interruption compares all layers
        runs = [make_run(folder, "training", layer, seed, settings) for seed in seeds for layer in chosen]
        title += f", {budget}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    else:
        frozen = start or _trained(shared, training, seeds[0], folder, console)
        title += f", frozen at {Path(start['path']).name}" if start else f", frozen after {budget} of {own.name}"
        settings |= {"state": [shared.layer, shared.layer_options], "start": frozen, "examples": PROBE_EXAMPLES}
        runs = [make_run(folder, "scores", layer, None, settings | {"draws": _draws(layer)}) for layer in chosen]
    run_all([run for run in runs if not run.candidate.refusal], workers, console)
    return gather("scores" if score else "training", title, runs, refused, settings)


def _trained(
    shared: Settings, training: Mapping[str, Any], seed: int, folder: Path, console: Console | None
) -> dict[str, str] | None:
    """The weights that the configuration's own layer reaches."""
    own = Candidate("the frozen state", str(shared.layer), shared.layer_options)
    run = make_run(folder, "training", own, seed, dict(training) | {"keep_weights": True})
    run_all([run], 1, console)
    if not run.weights.is_file():
        raise ValueError(f"needed weights to score on, but the training of {shared.layer!r} failed: {run.error}")
    return _fingerprint(str(run.weights))


def _draws(layer: Candidate) -> int:
    """Redraws of the noise: fewer for a layer that enumerates, which has little or no noise and takes long."""
    return max(MIN_SCORE_DRAWS, min(SCORE_DRAWS, SCORE_EVALUATIONS // (layer.evaluations or 1)))


def _fingerprint(checkpoint: str | None) -> dict[str, str] | None:
    """Path and hash of a checkpoint: another file of the same name is another start."""
    if checkpoint is None:
        return None
    return {"path": checkpoint, "sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()}


def gather(
    kind: Kind, title: str, runs: Sequence[Run], refused: dict[str, str], settings: dict[str, Any]
) -> Comparison:
    """The results of all runs as one table."""
    rows, curves = [], []
    for run in runs:
        candidate = run.candidate
        record = run.result() or {"status": "failed", "error": candidate.refusal or "the run left no result."}
        identity = {
            "label": candidate.label,
            "layer": candidate.name,
            "options": candidate.options,
            "seed": run.seed,
            **{key: candidate.options.get(key) for key in ("family", "latent_dim", "num_categories")},
            "evaluations": candidate.evaluations,
        }
        measured = ("status", "error", "device", "threads", "reference", *(metric.name for metric in METRICS[kind]))
        rows.append(identity | {key: record.get(key) for key in measured})
        curve = record.get("curve", {})
        for values in zip(*curve.values(), strict=True):
            curves.append({"label": candidate.label, "seed": run.seed, **dict(zip(curve, values, strict=True))})
    return Comparison(kind, title, rows, curves, refused, settings)


def title_of(parsed: Parsed) -> str:
    """Data, latent variables and objective: what makes bounds comparable."""
    layer = parsed.model.layer
    latent = f"{layer.latent_dim} {layer.family.name} latents"
    if layer.num_categories is not None:
        latent += f" of {layer.num_categories} categories"
    data = str(parsed.config["data"]["class_path"]).rpartition(".")[2]
    objective = parsed.model.objective.name
    return f"{data}, {latent}, objective {'ELBO' if objective == 'elbo' else objective}"
