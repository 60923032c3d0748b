"""The shipped sweep files with trials of one step, and what W&B must know of such a trial."""

import json

import yaml

from lightning_modules.sweeps import Plan
from lightning_modules.sweeps.plan import find_file


def one_step(file, folder, *extra):
    """A shipped file whose trials take one step, written to a folder and read from there."""
    config = Plan.load(find_file(file)).config
    position = config["command"].index("${args}")
    words = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.accelerator=cpu", *extra]
    config["command"][position:position] = words
    path = folder / file
    path.write_text(yaml.safe_dump(config))
    return Plan.load(path)


def check_config(config, parameters, config_file):
    """The configuration of a W&B run is that of ``config.yaml``, once, beside what the sweep has set."""
    config = {name: value for name, value in config.items() if name != "_wandb"}
    own = {name: config.pop(name) if "." in name else config[name] for name in parameters}
    assert own == parameters  # W&B's record of what the sweep has set, under the dotted names of the file
    name = config.pop("layer_name")
    assert config.pop("n_params") > 1000 and config.pop("world_size") >= 1
    written = yaml.safe_load(config_file.read_text())
    assert {key: without_null(config[key]) for key in written} == {key: without_null(written[key]) for key in written}
    assert {key for key in config if config[key] is not None} <= set(written)  # once: nothing beside it
    layer = written["model"]["layer"]
    assert name == (layer if isinstance(layer, str) else layer["name"])
    assert "None" not in json.dumps(config)


def without_null(value):
    """``config.yaml`` leaves out what is null."""
    return {k: without_null(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value
