"""One run of a comparison in a process of its own: ``python -m lightning_modules.comparison.run RESULT < SPEC``.

The first line of standard input is the specification; the end of standard input ends the process, so that no run
outlives the one that waits for it. Standard output carries the progress, one JSON object a line.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_modules.callbacks import TemperatureSchedule
from lightning_modules.comparison.measure import Measurement, held_out
from lightning_modules.comparison.settings import Parsed
from lightning_modules.data.binarize import mix64
from lightning_modules.scoring import score_layers
from lightning_modules.untrusted import read_checkpoint
from lightning_modules.vae import VAE
from lightning_modules.whole_files import write_text
from stochastic_layers.preserved import seed_generators

__all__ = ["execute"]

Report = Callable[[float, float | None], None]
# What replaces the options of a single run of `fit`.
TRAINER: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "log_every_n_steps": sys.maxsize,  # the model's own probe and log would be timed
    "max_epochs": -1,
}


def _silent(fraction: float, elbo: float | None) -> None:
    """No progress."""


def execute(spec: Mapping[str, Any], report: Report = _silent, weights: Path | None = None) -> dict[str, Any]:
    """The result of one run: ``status``, ``error``, the measured values, and ``spec``.

    Args:
        spec: What :func:`~lightning_modules.comparison.plan.make_run` wrote down.
        report: Called with the fraction that is done, and the ELBO where it was measured.
        weights: Where to keep the trained model, for scores; not at all by default.
    """
    try:
        values = score(spec) if spec["kind"] == "scores" else train(spec, report, weights)
        record = {"status": "ok", "error": None, **values}
    except Exception as error:  # a layer that fails is a result, and must not take the others with it
        record = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    finite: dict[str, Any] = _finite(record)
    return finite | {"spec": dict(spec)}


def train(spec: Mapping[str, Any], report: Report, weights: Path | None) -> dict[str, Any]:
    """Train one layer under the budget."""
    parsed = built(spec, spec["layer"], spec["layer_options"])
    model = parsed.model
    if spec["start"] is not None:
        load_weights(model, spec["start"]["path"])
    budget = spec["budget"]
    measurement = Measurement(budget.get("steps"), budget.get("seconds"), spec["points"], report)
    own = parsed.config_init["trainer"]["callbacks"] or []
    callbacks = [c for c in (own if isinstance(own, list) else [own]) if _takes(model, c)] + [measurement]
    trainer = parsed.instantiate_trainer(callbacks=callbacks, max_steps=budget.get("steps", -1), **TRAINER)
    trainer.fit(model, datamodule=parsed.datamodule)
    result = measurement.result(model)
    if weights is not None:
        trainer.save_checkpoint(weights, weights_only=True)
    return result | {"curve": measurement.curve} | machine(model.device)


def _takes(model: VAE, callback: Any) -> bool:
    """Whether a callback of the configuration is for this layer too; a schedule is for those with its temperatures."""
    if isinstance(callback, TemperatureSchedule):
        try:
            callback.check(model)
        except ValueError:
            return False
    return True


def score(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The gradient of one layer on the frozen weights of a model, against the same reference as that of all others."""
    parsed = built(spec, *spec["state"])
    model, data = parsed.model, parsed.datamodule
    load_weights(model, spec["start"]["path"], layer=True)
    data.prepare_data()
    data.setup()
    x = next(iter(held_out(data.val_dataloader())))[: spec["examples"]]
    model.to(parsed.trainer.strategy.root_device).train()
    seed_generators(
        mix64(spec["seed"] or 0), model.device
    )  # the reference, where it is an average, is the same in every process
    scores = score_layers(model, x, {"it": {"name": spec["layer"], **spec["layer_options"]}}, num_draws=spec["draws"])
    if not scores.rows:
        raise ValueError(scores.refused["it"])
    (found,) = scores.rows
    return {
        "mse": found.mse,
        "grad_variance": found.variance,
        "bias": found.bias,
        "bias_error": found.bias_standard_error,
        "relative_bias": found.relative_bias,
        "cosine": found.cosine,
        "grad_snr": found.snr,
        "gradient_ms": 1e3 * found.seconds,
        "variance_time": 1e3 * found.variance_time,
        "reference": found.reference,
    } | machine(model.device)


def built(spec: Mapping[str, Any], layer: str, options: Mapping[str, Any] | None) -> Parsed:
    """Model, data and Trainer of a specification, with this layer."""
    if "module" in spec:
        import_module(spec["module"])
    config: dict[str, Any] = json.loads(json.dumps(spec["config"]))
    config["seed_everything"] = spec["seed"] or 0
    config["model"] |= {"layer": layer, "layer_options": options}
    init = config["data"].setdefault("init_args", {})
    if "seed" in init:
        init["seed"] = (init["seed"] or 0) + (spec["seed"] or 0)
    return Parsed(config, TRAINER, default_data=False)


def load_weights(model: VAE, path: str, layer: bool = False) -> None:
    """Take the weights of a checkpoint; those of the layer only if asked to, as they may be those of another one.

    Raises:
        ValueError: The checkpoint is of a model of other parts or sizes.
    """
    state = read_checkpoint(path)["state_dict"]
    wanted, found = (
        {key: value for key, value in weights.items() if layer or not key.startswith("layer.")}
        for weights in (model.state_dict(), state)
    )
    shapes = [{key: tuple(value.shape) for key, value in weights.items()} for weights in (wanted, found)]
    if shapes[0] != shapes[1]:
        differ = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        raise ValueError(f"needed a checkpoint of the same parts and sizes, got one that differs in {differ}.")
    model.load_state_dict(found, strict=False)


def machine(device: torch.device) -> dict[str, Any]:
    """What a run ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads()}


def _finite(value: Any) -> Any:
    """JSON has no infinities: an exact layer's signal-to-noise ratio is none."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Run the specification on standard input and write the result to the file named on the command line."""
    spec = json.loads(sys.stdin.readline())
    path = Path(sys.argv.pop(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no progress

    def report(fraction: float, elbo: float | None) -> None:
        print(json.dumps({"fraction": fraction, "elbo": elbo}), file=progress)

    weights = path.with_suffix(".ckpt") if spec.get("keep_weights") else None
    write_text(path, json.dumps(execute(spec, report, weights), indent=1, allow_nan=False) + "\n")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
