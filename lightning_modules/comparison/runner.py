"""The comparison itself: plan the runs, do those that are missing, gather the results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_modules.comparison.plan import Candidate, LayerSpec, Run, candidates, make_run
from lightning_modules.comparison.pool import run_all
from lightning_modules.comparison.result import METRICS, Comparison, Kind
from lightning_modules.comparison.settings import Parsed, parse, plain_config
from lightning_modules.vae import VAE

__all__ = ["compare", "compare_parsed"]

DEFAULT_STEPS = 1000
POINTS = 20


def compare(
    layers: Sequence[LayerSpec] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    seeds: int | Sequence[int] = 3,
    evaluations: int | None = None,
    folder: str | Path = "runs/compare",
    workers: int = 1,
) -> Comparison:
    """Train each layer on the same model and data under the same budget, and measure.

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
        steps=steps,
        seconds=seconds,
        seeds=range(seeds) if isinstance(seeds, int) else seeds,
        evaluations=evaluations,
        folder=Path(folder),
        workers=workers,
    )


def compare_parsed(
    parsed: Parsed,
    layers: Sequence[LayerSpec] | None,
    *,
    steps: int | None,
    seconds: float | None,
    seeds: Sequence[int],
    evaluations: int | None,
    folder: Path,
    workers: int,
    console: Console | None = None,
) -> Comparison:
    """:func:`compare` with settings that are parsed, and a console for the progress."""
    budget = _budget(steps, seconds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"needed one seed or more, all different, got {list(seeds)}.")
    if workers < 1:
        raise ValueError(f"needed workers >= 1, got {workers}.")
    settings = {
        "config": plain_config(parsed),
        "budget": budget,
        "points": POINTS,
        "start": _fingerprint(parsed.config.get("ckpt_path")),
    }
    chosen, refused = _chosen(parsed, layers, evaluations)
    # seed by seed, so that what there is after an interruption compares all layers
    runs = [make_run(folder / "runs", candidate, seed, settings) for seed in seeds for candidate in chosen]
    run_all([run for run in runs if not run.candidate.refusal], workers, console)
    return gather("training", _title(parsed, budget, len(seeds)), runs, parsed.model, settings, refused)


def _budget(steps: int | None, seconds: float | None) -> dict[str, float]:
    if steps is not None and seconds is not None:
        raise ValueError("needed one budget, got steps and seconds; give one of them.")
    name, value = ("seconds", seconds) if seconds is not None else ("steps", DEFAULT_STEPS if steps is None else steps)
    if not value > 0:
        raise ValueError(f"needed {name} > 0, got {value}.")
    return {name: value}


def _fingerprint(checkpoint: str | None) -> dict[str, str] | None:
    """Path and hash of a checkpoint: another file of the same name is another start."""
    if checkpoint is None:
        return None
    return {"path": checkpoint, "sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()}


def _chosen(
    parsed: Parsed, layers: Sequence[LayerSpec] | None, evaluations: int | None
) -> tuple[list[Candidate], dict[str, str]]:
    """The layers to compare, and those of the default choice that cannot be; a layer that was named stays, to fail."""
    found = candidates(parsed.model, dict(parsed.config["model"]), layers, evaluations)
    refused = {c.label: c.refusal for c in found if c.refusal and layers is None}
    chosen = [c for c in found if c.label not in refused]
    if not chosen:
        raise ValueError(f"needed a layer to compare, got none: {refused}.")
    return chosen, refused


def gather(
    kind: Kind, title: str, runs: Sequence[Run], model: VAE, settings: dict[str, Any], refused: dict[str, str]
) -> Comparison:
    """The results of all runs as one table."""
    rows, curves = [], []
    for run in runs:
        candidate = run.candidate
        record = run.result() or {"status": "failed", "error": candidate.refusal or "the run left no result."}
        rows.append(
            {
                "label": candidate.label,
                "layer": candidate.name,
                "options": candidate.options,
                "seed": run.seed,
                "family": candidate.options.get("family", model.layer.family.name),
                "latent_dim": candidate.options.get("latent_dim"),
                "num_categories": candidate.options.get("num_categories"),
                "evaluations": candidate.evaluations,
                **{key: record.get(key) for key in ("status", "error", "device", "threads")},
                **{metric.name: record.get(metric.name) for metric in METRICS[kind]},
            }
        )
        curve = record.get("curve", {})
        for values in zip(*curve.values(), strict=True):
            point = dict(zip(curve, values, strict=True))
            curves.append({"label": candidate.label, "seed": run.seed, **point})
    return Comparison(kind, title, rows, curves, refused, settings)


def _title(parsed: Parsed, budget: Mapping[str, float], seeds: int) -> str:
    (name, value), layer = next(iter(budget.items())), parsed.model.layer
    latent = f"{layer.latent_dim} {layer.family.name} latents"
    if layer.num_categories is not None:
        latent += f" of {layer.num_categories} categories"
    data = str(parsed.config["data"]["class_path"]).rpartition(".")[2]
    objective = parsed.model.objective.name
    objective = "ELBO" if objective == "elbo" else objective
    budgeted = f"{value:g} {name}" if value != 1 else f"1 {name.rstrip('s')}"
    return f"{data}, {latent}, objective {objective}, {budgeted}, {seeds} seed{'s' * (seeds > 1)}"
