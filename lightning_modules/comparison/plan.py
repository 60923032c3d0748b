"""Which runs a comparison consists of: layers with options of equal evaluations, times seeds, each under a key."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import stochastic_layers as sl
from lightning_modules.build import build_layer
from lightning_modules.comparison.settings import Settings
from lightning_modules.vae import VAE
from stochastic_layers import StochasticLayer
from stochastic_layers.registry import layer_class

__all__ = ["Candidate", "Run", "candidates", "run_key"]

SCHEMA = 1  # of the result files; a change makes older runs stale
DEFAULT_EVALUATIONS = 4
MAX_DEFAULT_EVALUATIONS = 64  # a layer that needs more is compared only where it is named
LATENT = ("latent_dim", "family", "num_categories")

LayerSpec = str | Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One layer of a comparison.

    Attributes:
        label: What tables and plots call it: the name, and the options that were asked for.
        name: The registered name.
        options: All options that it is built with.
        evaluations: Points at which the cost is evaluated in one step and example, as counted.
        refusal: Why it cannot be built for this model; empty where it can.
    """

    label: str
    name: str
    options: dict[str, Any]
    evaluations: int | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Run:
    """One run of a comparison, and where its result is kept.

    Attributes:
        candidate: The layer.
        seed: Of the weights, the noise and the order of the data.
        spec: All that the result depends on, as plain data.
        path: The file of the result; its name holds a hash of ``spec``.
    """

    candidate: Candidate
    seed: int | None
    spec: dict[str, Any] = field(repr=False)
    path: Path

    @property
    def weights(self) -> Path:
        """Where the trained model is kept, if the specification asks for it."""
        return self.path.with_suffix(".ckpt")

    @property
    def error(self) -> str:
        """Why it failed, if it did."""
        return str((self.result() or {}).get("error"))

    def result(self) -> dict[str, Any] | None:
        """The result that was kept, if there is one of exactly this run."""
        try:
            record: dict[str, Any] = json.loads(self.path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if self.spec.get("keep_weights") and record.get("status") == "ok" and not self.weights.is_file():
            return None
        return record if record.get("spec") == json.loads(canonical(self.spec)) else None


def canonical(spec: Mapping[str, Any]) -> str:
    """Plain data as one string, whatever the order of the keys."""
    return json.dumps(spec, sort_keys=True)


def run_key(spec: Mapping[str, Any]) -> str:
    """A hash of all that a result depends on."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()[:12]


def make_run(folder: Path, kind: str, candidate: Candidate, seed: int | None, spec: Mapping[str, Any]) -> Run:
    """The run of a candidate; ``spec`` is completed by the layer, the seed and the versions of what computes."""
    versions = {name: version(name) for name in ("stochastic-layers", "torch", "lightning")}
    full = dict(spec) | {
        "schema": SCHEMA,
        "kind": kind,
        "layer": candidate.name,
        "layer_options": candidate.options,
        "seed": seed,
        "versions": versions,
    }
    module = layer_class(candidate.name).__module__
    if not module.startswith("stochastic_layers."):
        full["module"] = module  # of a layer of one's own, which registers itself as it is imported
    what = "score" if seed is None else f"seed{seed}"
    return Run(candidate, seed, full, folder / f"{candidate.name}-{what}-{run_key(full)}.json")


def candidates(
    model: VAE,
    settings: Settings,
    layers: Sequence[LayerSpec] | None = None,
    evaluations: int | None = None,
) -> list[Candidate]:
    """The layers to compare, all with the latent variables of ``model``.

    Args:
        model: Tells the latent variables and the objective.
        settings: Of the configuration, whose own layer keeps its options.
        layers: Names, or mappings ``{"name": ..., **options}``, where ``label`` may be given; by default every
            registered layer that takes the latent variables and the objective.
        evaluations: Largest number of evaluations of the cost in one step and example; a layer that cannot do with so
            few takes as few as it can. By default those of the configuration's layer where it states ``num_samples``,
            else 4. An option ``num_samples`` of a layer goes before it.

    Raises:
        ValueError: Unknown names, two layers of the same label, ``evaluations`` < 1.
    """
    own = settings.layer_options
    if evaluations is None:
        evaluations = _evaluations(model.layer) if "num_samples" in own else DEFAULT_EVALUATIONS
    if evaluations is None or evaluations < 1:
        raise ValueError(f"needed evaluations >= 1, got {evaluations}.")
    family = own.get("family", model.layer.family.spec)
    latent = {"latent_dim": model.layer.latent_dim, "family": family}
    if model.layer.num_categories is not None:
        latent["num_categories"] = model.layer.num_categories
    chosen: list[Candidate] = []
    specs: Sequence[LayerSpec] = sl.list_layers(family=model.layer.family.name) if layers is None else layers
    for spec in specs:
        given = {"name": spec} if isinstance(spec, str) else dict(spec)
        name, label = str(given.pop("name", None)), given.pop("label", None)
        known = inspect.signature(layer_class(name)).parameters
        options = {key: value for key, value in latent.items() if key in known}
        if name == settings.layer:
            options |= {key: value for key, value in own.items() if key not in LATENT}
        options |= given
        described = ", ".join(f"{k}={v}" for k, v in given.items())
        candidate = _sized(label or (f"{name} ({described})" if described else name), name, options, evaluations, model)
        if layers is None and not candidate.refusal and (candidate.evaluations or 0) > MAX_DEFAULT_EVALUATIONS:
            refusal = f"it needs {candidate.evaluations} evaluations a step; name it to include it."
            candidate = Candidate(candidate.label, name, candidate.options, candidate.evaluations, refusal)
        chosen.append(candidate)
    labels = [c.label for c in chosen]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"needed layers of different labels, got {twice} twice; give one an option `label`.")
    return chosen


def _sized(label: str, name: str, options: dict[str, Any], evaluations: int, model: VAE) -> Candidate:
    """A candidate with the ``num_samples`` that comes closest to the evaluations from below."""
    if layer_class(name).__module__ == "__main__":
        refusal = f"needed a layer of a module, got {name!r} of the script itself, which no other process can import."
        return Candidate(label, name, options, refusal=refusal)
    free = "num_samples" not in options and "num_samples" in inspect.signature(layer_class(name)).parameters
    refusal, found = "", []
    for num_samples in range(max(evaluations, DEFAULT_EVALUATIONS), 0, -1) if free else [None]:
        tried = options if num_samples is None else options | {"num_samples": num_samples}
        try:
            layer = build_layer(name, tried)
            model.objective.check(layer)
        except ValueError as error:
            refusal = refusal or str(error)
            continue
        found.append(Candidate(label, name, tried, _evaluations(layer)))
    if not found:
        return Candidate(label, name, options, refusal=refusal)
    fitting = [c for c in found if c.evaluations is None or c.evaluations <= evaluations]
    return max(fitting, key=lambda c: c.evaluations or 0) if fitting else min(found, key=lambda c: c.evaluations or 0)


def _evaluations(layer: StochasticLayer) -> int | None:
    """The points of one step, counted; ``None`` where the layer needs more than params to be asked."""
    with torch.random.fork_rng(), torch.enable_grad():
        try:
            return int(layer.sample(torch.zeros(1, layer.in_features, requires_grad=True)).z.shape[0])
        except ValueError:
            return None
