"""The configuration that all runs share: parsed and built as ``stochastic-layers fit`` does it, but not run."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from lightning_modules.build import layer_spec
from lightning_modules.cli import CLI
from lightning_modules.configuration import given, names_data, read
from lightning_modules.hyperparameters import is_marked
from lightning_modules.resuming import options_of_data, options_of_model
from lightning_modules.untrusted import read_checkpoint
from lightning_modules.usage import Parser
from lightning_modules.vae import VAE

__all__ = ["Parsed", "Settings", "loggers", "parse", "settings_of"]

# What concerns the length and the files of a single run; a comparison has its own.
OF_ONE_RUN = ("checkpoint", "pictures", "patience", "ckpt_path", "config", "seed_everything")
TRAINER_OF_ONE_RUN = (
    *("logger", "default_root_dir", "fast_dev_run"),
    *("max_epochs", "max_steps", "min_epochs", "min_steps", "max_time"),
)


class Parsed(CLI):
    """``fit`` up to the point where the Trainer would start: ``config``, ``model``, ``datamodule`` and ``trainer``."""

    def __init__(self, args: Any, trainer_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.trainer_options = dict(trainer_options or {})
        with warnings.catch_warnings():
            # the arguments of `compare` are those of the command line, less its own
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().__init__(
                VAE,
                LightningDataModule,
                run=False,
                args=args,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,
                parser_class=Parser,
                parser_kwargs={"prog": "stochastic-layers compare"},
                **kwargs,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Start every run from the weights of this checkpoint."
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer without the callbacks of ``fit``, which write checkpoints and pictures."""
        with _quiet():
            return Trainer(**{**self.config_init["trainer"], **self.trainer_options, **kwargs})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines on the devices that it found."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def parse(config: str | Path | Mapping[str, Any] | None = None, args: Sequence[str] = ()) -> Parsed:
    """The shared settings out of a configuration, as a file or as data, and words of the command line.

    A checkpoint named by ``--ckpt_path`` stands for the options of its model and, where ``fit`` wrote it, its data;
    ``config`` and ``args`` go before it. Neither the random state nor the seed of the process is touched.

    Raises:
        ValueError: Something in ``config`` is not plain data, or an option is wrong.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        words = list(args)
        if config is not None:
            file = config if isinstance(config, (str, Path)) else _written(config, Path(folder) / "config.yaml")
            words = ["--config", str(file), *words]
        # a seed is given to each run; without this, the parent would be seeded too
        words += ["--seed_everything=false"]
        checkpoint = _checkpoint_path(words)
        if checkpoint is not None:
            options = _options_of(checkpoint, words)
            words = ["--config", str(_written(options, Path(folder) / "checkpoint.yaml")), *words]
        return Parsed(words, {"logger": False, "enable_checkpointing": False}, default_data=not names_data(words))


def _checkpoint_path(words: Sequence[str]) -> Path | None:
    """The checkpoint that the command line, or a configuration file that it names, starts from."""
    found = None
    for option, value in given(words, "--config", "--ckpt_path"):
        found = value if option == "--ckpt_path" else read(value).get("ckpt_path") or found
    if found is not None and not Path(found).is_file():
        raise ValueError(f"needed a checkpoint as ckpt_path, got {str(found)!r}, which is no file.")
    return None if found is None else Path(found)


def _options_of(checkpoint: Path, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of model and data in a checkpoint, in the form of a configuration."""
    state = read_checkpoint(checkpoint)
    hparams = state["hyper_parameters"]
    # objects, which a checkpoint does not keep, are left to the words, which are parsed later
    stated = any(word.startswith(("--model.", "--config")) for word in words)
    objects = {name: "" for name, value in hparams.items() if stated and is_marked(value)}
    given = options_of_model(checkpoint, hparams, objects, VAE)
    options: dict[str, Any] = {"model": {k: v for k, v in given.items() if k != "data_shape" and v is not None}}
    if data := options_of_data(checkpoint, state, needed=not names_data(words)):
        options["data"] = data
    return options


def _written(config: Mapping[str, Any], path: Path) -> Path:
    try:
        path.write_text(yaml.safe_dump(dict(config)))
    except yaml.representer.RepresenterError as error:
        raise ValueError(
            f"needed a configuration of names, numbers, lists and mappings, got an object: {error.args[-1]!r}; each "
            "run has a process of its own, so name classes by 'class_path' and 'init_args'."
        ) from None
    return path


@dataclass(frozen=True)
class Settings:
    """What all runs share, as plain data.

    Attributes:
        config: Everything but the layer, the budget, and the files of one run.
        layer: The configuration's own layer.
        layer_options: Its options.
    """

    config: dict[str, Any]
    layer: Any
    layer_options: dict[str, Any]


def settings_of(parsed: Parsed) -> Settings:
    """The shared settings.

    Raises:
        ValueError: A run would take several devices.
    """
    config: dict[str, Any] = yaml.safe_load(parsed.parser.dump(parsed.config, skip_none=False))
    config = {key: value for key, value in config.items() if key not in OF_ONE_RUN}
    trainer = config["trainer"] = {k: v for k, v in config["trainer"].items() if k not in TRAINER_OF_ONE_RUN}
    if trainer["devices"] == "auto":
        trainer["devices"] = 1
    elif parsed.trainer.num_devices * parsed.trainer.num_nodes != 1:
        raise ValueError("needed one device for each run, got several; set --trainer.devices=1, or use --workers.")
    model = config["model"]
    model.pop("data_shape", None)
    layer, options = model.pop("layer"), model.pop("layer_options") or {}
    if isinstance(layer, str) or "name" in layer:
        layer, options = layer_spec(layer, options)
    return Settings(config, layer, options)


def loggers(parsed: Parsed) -> list[Logger]:
    """The loggers of the configuration, which no single run uses."""
    given = parsed.config_init["trainer"]["logger"]
    found = given if isinstance(given, list) else [given]
    return [logger for logger in found if isinstance(logger, Logger)]
