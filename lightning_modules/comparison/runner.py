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
from lightning_modules.comparison.settings import Parsed, parse, settings_of

__all__ = ["Budget", "compare", "compare_parsed"]

DEFAULT_STEPS = 1000
POINTS = 20
SCORE_DRAWS = 512


def compare(
    layers: Sequence[LayerSpec] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    seeds: int | Sequence[int] = 3,
    evaluations: int | None = None,
    score: bool = False,
    folder: str | Path = "runs/compare",
    workers: int = 1,
) -> Comparison:
    """Train each layer on the same model and data under the same budget, or score all on one frozen state.

    Equal treatment: the same seed gives encoder and decoder the same first weights, the data the same order, and the
    noise the same random numbers; every evaluation draws from the same ones. Every run has a process of its own, so
    that a failure stays with its layer, memory is measured from a fresh start, and finished runs survive whatever ends
    the comparison: called again, it does what is missing. A run is told apart by a hash of all that it depends on.

    Args:
        layers: Names, or mappings ``{"name": ..., **options}``, where ``label`` may be given; by default all that take
            the latent variables and the objective of the configuration.
        config: What ``stochastic-layers fit --config`` takes, as a file or as a mapping: ``model``, ``data``,
            ``trainer``, and ``ckpt_path`` for weights to start from. By default the demonstration's.
        steps: Budget of optimizer steps; 1000 where neither budget is given.
        seconds: Budget of training time, in which measurements do not count.
        seeds: The seeds, or their number.
        evaluations: Largest number of evaluations of the cost in one step and example, by which ``num_samples`` is
            chosen; 4 by default, or those of the configuration's layer where it states ``num_samples``.
        score: Compare gradients on the weights of ``ckpt_path`` or, without one, on those that the configuration's own
            layer has reached after the budget with the first seed; see
            :func:`~lightning_modules.scoring.score_layers`.
        folder: Where results are kept.
        workers: Processes at a time; with more than one, times are those of shared cores.

    Raises:
        ValueError: Unknown layers or options, a bad budget, or no layer that fits.

    Example:
        >>> import lightning_modules
        >>> result = lightning_modules.compare(["reinforce", "disarm"], steps=500, seeds=2)  # doctest: +SKIP
        >>> result.to_csv("comparison.csv")  # doctest: +SKIP
    """
    return compare_parsed(
        parse(config),
        layers,
        budget=Budget.of(steps, seconds),
        seeds=range(seeds) if isinstance(seeds, int) else seeds,
        evaluations=evaluations,
        score=score,
        folder=Path(folder),
        workers=workers,
    )


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
    shared = settings_of(parsed)
    found = candidates(parsed.model, shared, layers, evaluations)
    # a layer that was named and cannot be stays, as one that failed
    refused = {c.label: c.refusal for c in found if c.refusal and layers is None}
    chosen = [c for c in found if c.label not in refused]
    if not chosen:
        raise ValueError(f"needed a layer to compare, got none: {refused}.")

    start = _fingerprint(parsed.config.get("ckpt_path"))
    settings: dict[str, Any] = {"config": shared.config}
    training = {"budget": {budget.unit: budget.value}, "points": POINTS, "start": start}
    title = title_of(parsed)
    if not score:
        settings |= training
        # seed by seed, so that what there is after an interruption compares all layers
        runs = [
            make_run(folder / "runs", "training", candidate, seed, settings) for seed in seeds for candidate in chosen
        ]
        title += f", {budget}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    else:
        if start is None:
            trained = Candidate("the frozen state", shared.layer, shared.layer_options)
            kept = settings | training | {"keep_weights": True}
            run = make_run(folder / "runs", "training", trained, seeds[0], kept)
            run_all([run], 1, console)
            if not run.weights.is_file():
                raise ValueError(f"needed weights to score on, but training {shared.layer!r} failed: {run.error}")
            start = _fingerprint(str(run.weights))
            title += f", frozen after {budget} of {parsed.model.layer.name}"
        else:
            title += f", frozen at {Path(start['path']).name}"
        settings |= {
            "state": [shared.layer, shared.layer_options],
            "start": start,
            "examples": PROBE_EXAMPLES,
            "draws": SCORE_DRAWS,
        }
        runs = [make_run(folder / "runs", "scores", candidate, None, settings) for candidate in chosen]
    run_all([run for run in runs if not run.candidate.refusal], workers, console)
    return gather("scores" if score else "training", title, runs, refused, settings)


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
        measured = ("status", "error", "device", "threads", *(metric.name for metric in METRICS[kind]))
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
