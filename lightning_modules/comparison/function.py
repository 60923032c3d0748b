"""Comparisons from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.comparison.result import Comparison

__all__ = ["compare"]

LayerSpec = str | Mapping[str, Any]


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
    # the command line imports the package that this belongs to
    from lightning_modules.comparison.runner import Budget, compare_parsed
    from lightning_modules.comparison.settings import parse

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
