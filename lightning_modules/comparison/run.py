"""One run of a comparison in a process of its own: ``python -m lightning_modules.comparison.run RESULT < SPEC``.

The first line of standard input is the specification; the end of standard input ends the process, so that no run
outlives the one that waits for it. Standard output carries the progress, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_modules.comparison.measure import Measurement
from lightning_modules.comparison.result import write_text
from lightning_modules.comparison.settings import Parsed
from lightning_modules.vae import VAE

__all__ = ["execute"]

Report = Callable[[float, float | None], None]


def execute(spec: Mapping[str, Any], report: Report = lambda fraction, elbo: None) -> dict[str, Any]:
    """The result of one run: ``status``, ``error``, the measured values, the curve, and ``spec``."""
    record: dict[str, Any] = {"status": "ok", "error": None, "spec": dict(spec)}
    try:
        record |= train(spec, report)
    except Exception as error:  # a layer that fails is a result, and must not take the others with it
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return record


def train(spec: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train one layer under the budget."""
    parsed = built(spec)
    model = parsed.model
    if spec["start"] is not None:
        load_weights(model, spec["start"]["path"])
    budget = spec["budget"]
    measurement = Measurement(budget.get("steps"), budget.get("seconds"), spec["points"], report)
    trainer = parsed.instantiate_trainer(callbacks=[*(parsed.config_init["trainer"]["callbacks"] or []), measurement])
    trainer.fit(model, datamodule=parsed.datamodule)
    result = measurement.summary(model)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return result | {"curve": measurement.curve, "device": device, "threads": torch.get_num_threads()}


def built(spec: Mapping[str, Any]) -> Parsed:
    """Model and data of a specification."""
    config: dict[str, Any] = json.loads(json.dumps(spec["config"]))
    config["seed_everything"] = spec["seed"] or 0
    config["model"] |= {"layer": spec["layer"], "layer_options": spec["layer_options"]}
    init = config["data"].setdefault("init_args", {})
    if "seed" in init:
        init["seed"] = (init["seed"] or 0) + (spec["seed"] or 0)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": sys.maxsize,  # the model's own probe and log would be timed
        "max_epochs": -1,
        "max_steps": spec.get("budget", {}).get("steps") or -1,
    }
    return Parsed(config, quiet, default_data=False)


def load_weights(model: VAE, path: str) -> None:
    """Take the weights of a checkpoint, those of the layer excepted, which belong to another one.

    Raises:
        ValueError: The checkpoint is of a model of other parts or sizes.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith("layer.")}
    found = {key: value for key, value in state.items() if not key.startswith("layer.")}
    shapes = [{key: tuple(value.shape) for key, value in weights.items()} for weights in (wanted, found)]
    if shapes[0] != shapes[1]:
        differ = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        raise ValueError(f"needed a checkpoint of the same encoder, decoder and prior, got one that differs in {differ}.")
    model.load_state_dict(found, strict=False)


def main() -> None:
    """Run the specification on standard input and write the result to the file named on the command line."""
    spec = json.loads(sys.stdin.readline())
    path = Path(sys.argv.pop(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no progress

    def report(fraction: float, elbo: float | None) -> None:
        print(json.dumps({"fraction": fraction, "elbo": elbo}), file=progress)

    write_text(path, json.dumps(execute(spec, report), indent=1) + "\n")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
