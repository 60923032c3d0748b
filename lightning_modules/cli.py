"""The console script ``stochastic-layers``: fit, test, predict, sweep, compare, report; list, describe, certify."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

import stochastic_layers as sl
from lightning_modules.callbacks import CollapseWarning, Pictures, Report
from lightning_modules.callbacks.codes import LatentCodes
from lightning_modules.callbacks.pictures import run_folder
from lightning_modules.checkpoints import VerifiedCheckpointIO
from lightning_modules.configuration import names_data
from lightning_modules.resuming import check_agreement, check_weights, newest_best, options_of_data, options_of_model
from lightning_modules.sweeps import TrialRecord
from lightning_modules.terminal import sentence, wandb_errors
from lightning_modules.untrusted import read_checkpoint, restrict_imports
from lightning_modules.usage import Parser
from lightning_modules.vae import VAE
from lightning_modules.whole_files import make_folder, whole_file
from stochastic_layers.registry import nearest

__all__ = ["CLI", "main"]

DEFAULT_DATA = {"data": {"class_path": "lightning_modules.data.Digits"}}
RUNS = "runs"  # below default_root_dir
DEFAULTS = {
    "model.likelihood": "auto",
    "model.iwae_samples": {"test": 100},
    "trainer.max_epochs": 200,
    "trainer.log_every_n_steps": 10,
    "trainer.accelerator": "auto",
    "trainer.logger": {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": RUNS, "name": ""},
    },
    "checkpoint.monitor": "val/elbo",
    "checkpoint.mode": "max",
    "checkpoint.filename": "best",
    "checkpoint.enable_version_counter": False,
    "checkpoint.save_last": True,
}
COMMANDS = {
    "fit": "train a model, test its best weights, draw pictures",
    "validate": "bounds on the validation data",
    "test": "bounds on the test data",
    "predict": "latent codes of the test data, in a file",
    "compare": "layers side by side on one's own model and data",
    "report": "a draft report in W&B from the results of a comparison",
    "sweep": "run a W&B sweep file without a network",
    "list": "every layer and its capabilities, or those that have what you need",
    "describe": "one layer: what it needs, formula, options, references",
    "certify": "put layers through the conformance checks",
}
# those that are not Lightning's: where their function is, imported when called
OWN = {
    "compare": ("comparison.command", "main"),
    "report": ("comparison.report", "main"),
    "sweep": ("sweeps.command", "main"),
    "list": ("catalogue", "list_command"),
    "describe": ("catalogue", "describe_command"),
    "certify": ("certify", "main"),
}


REFUSALS = (ValueError, MisconfigurationException, OSError, ModuleNotFoundError)  # what ends in a sentence
TRACEBACK_VARIABLE = "STOCHASTIC_LAYERS_TRACEBACK"
EVALUATIONS = ("validate", "test", "predict")
LIGHTNINGS_CHECKPOINTS = ("best", "last", "hpc", "registry")  # what the Trainer finds by a word


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration into the run's folder, and once into the W&B run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with whole_file(run_folder(trainer) / "config.yaml") as partial:
            self.parser.save(self.config, str(partial), overwrite=True, multifile=self.multifile)
        for callback in trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            if stage == "fit" and folder and "://" not in str(folder):
                make_folder(Path(folder))  # or fail now, not after the first epoch
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                layers = [layer.name for layer in getattr(pl_module, "stochastic_layers", [])]
                config = self.config.as_dict() | {
                    # a string beside the mapping of a layer and its options: what runs are grouped and coloured by
                    "layer_name": ", ".join(layers),
                    "n_params": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
                    "world_size": trainer.world_size,
                }
                known = dict(logger.experiment.config)
                # a sweep has set some of it and locked that: W&B would warn of an ignored update, to the same value
                news = {name: value for name, value in config.items() if name not in known or known[name] != value}
                logger.experiment.config.update(news, allow_val_change=True)


class CLI(LightningCLI):
    """LightningCLI for :class:`VAE` and the data modules; ``fit`` ends with a test of the best weights."""

    def __init__(self, *args: Any, default_data: bool = True, **kwargs: Any) -> None:
        # a default class leaves its options behind when another class is named, where that has options of the same name
        self.defaults = (DEFAULT_DATA if default_data else {}) | DEFAULTS
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.add_argument(
            "--patience",
            type=int | None,
            default=None,
            help="Stop after so many validations without a better val/elbo.",
        )
        parser.link_arguments("data.data_shape", "model.data_shape", apply_on="instantiate")
        parser.set_defaults(self.defaults)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else self.config
        require_groups(config)
        path = config.get("ckpt_path")
        self.checkpoint: dict[str, Any] = {}
        if path and Path(path).is_file():
            self.checkpoint = read_checkpoint(path)  # before anything in it is used
        elif path and (subcommand in EVALUATIONS or path not in LIGHTNINGS_CHECKPOINTS) and ":" not in path:
            raise ValueError(f"needed a checkpoint as ckpt_path, got {path!r}, which is no file.{_suggestion(config)}")
        elif not path and subcommand in EVALUATIONS:
            raise ValueError(
                f"needed the weights to {subcommand} as --ckpt_path=FILE, got none, which would be those of an "
                f"untrained model.{_suggestion(config)}"
            )
        if self.checkpoint and subcommand:
            words = [str(word) for word in (sys.argv[1:] if args is None else args)]
            self.names_data = names_data(words)
            # the class of the data is required, and not stated where it is a default
            words.insert(words.index(subcommand) + 1, f"--data={config.data.class_path}")
            self.asked = parser.parse_args(words, defaults=False)[subcommand]

    def _parse_ckpt_path(self) -> None:
        """The model is the checkpoint's; Lightning would take it in the place of other options without a word."""
        command = self.config.get("subcommand")
        if not command or not self.checkpoint:
            return
        path, asked = self.config[command].ckpt_path, self.asked.get("model") or {}
        given = {"model": options_of_model(path, self.checkpoint["hyper_parameters"], asked, VAE)}
        if not self.names_data and (data := options_of_data(path, self.checkpoint)):
            given["data"] = data | {"init_args": data["init_args"] | dict(self.asked.data.get("init_args") or {})}
        self.config = self.parser.parse_object({command: given}, self.config)
        check_agreement(asked, self.config[command].model)

    def before_instantiate_classes(self) -> None:
        """Resolve ``--model.likelihood auto``: bernoulli for binarized data, else a law over the data's grey levels."""
        config, data = self._get(self.config, "model"), self._get(self.config, "data")
        if config.likelihood == "auto":
            module, _, name = data.class_path.rpartition(".")
            levels: int | None = getattr(getattr(import_module(module), name), "levels", None)
            options = data.get("init_args") or {}  # a class that has no options has none of them
            if options.get("binarization") == "none" and levels is not None:
                config.likelihood = {"name": "discretized_logistic", "num_levels": levels + 1}
            else:
                config.likelihood = "bernoulli"
        trainer = self._get(self.config, "trainer")
        if not isinstance(logger := trainer.logger, Namespace):
            return
        if trainer.default_root_dir and logger.init_args.get("save_dir") == RUNS:
            logger.init_args.save_dir = os.path.join(trainer.default_root_dir, RUNS)
        if logger.class_path.endswith("WandbLogger") and logger.init_args.get("name") == "":
            logger.init_args.name = None  # what the default logger leaves behind; W&B finds a name of its own

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.checkpoint:
            check_weights(self._get(self.config, "ckpt_path"), self.model, self.checkpoint["state_dict"])
            self.checkpoint = {}  # the Trainer reads it again; memory for two is not held
        for part in (self.model, self.datamodule):
            # SaveConfig writes the whole configuration, once; Lightning would add parts of it under other names
            cast(Any, part)._log_hyperparams = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        callbacks = trainer_callbacks(trainer)
        patience = self._get(self.config_init, "patience")
        if patience is not None:
            callbacks.append(EarlyStopping("val/elbo", mode="max", patience=patience))
        if not any(isinstance(callback, CollapseWarning) for callback in callbacks):
            callbacks.append(CollapseWarning())
        callbacks += [Report(), LatentCodes(), *TrialRecord.from_environment()]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger.save_dir is not None:
                Path(logger.save_dir).mkdir(parents=True, exist_ok=True)  # W&B 0.18 goes elsewhere if it is missing
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's stays
            trainer.strategy.checkpoint_io = VerifiedCheckpointIO()
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:  # Lightning's, for Ctrl-C and SIGTERM
            if not self.trainer.interrupted or stop.code == 0:  # an agent's stop is no failure
                raise
            last = getattr(self._get(self.config_init, "checkpoint"), "last_model_path", "")
            if subcommand == "fit" and self.trainer.is_global_zero:
                way = f"to go on: the same command with --ckpt_path={last}" if last else "there is no checkpoint yet"
                print(f"stochastic-layers: interrupted; {way}.", file=sys.stderr)
            sys.exit(143 if isinstance(stop, SIGTERMException) else 130)
        except RuntimeError as error:
            if "Early stopping conditioned on metric" not in str(error):
                raise
            raise ValueError(
                "needed a val/elbo for --patience to wait for, got none; hold out validation data (--data.val_size), "
                "or leave --patience out."
            ) from error

    def after_fit(self) -> None:
        """Test the best weights, once, on the data that neither training nor the choice of weights has seen."""
        if cast(Any, self.trainer).fast_dev_run:
            return
        best = self._get(self.config_init, "checkpoint")  # not the first of the Trainer, which may be another one
        path = getattr(best, "best_model_path", "") or None
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path, verbose=False, weights_only=True)
        pictures = [file for c in trainer_callbacks(self.trainer) if isinstance(c, Pictures) for file in c.files]
        if self.trainer.is_global_zero:
            console = Console(soft_wrap=True)
            for file in pictures:
                console.print(f"picture: {file}")
            if path:
                console.print(f"best weights: {Path(path)}")
            elif last := getattr(best, "last_model_path", ""):
                console.print(f"weights at the end, as no validation chose any: {Path(last)}")


def _suggestion(config: Namespace) -> str:
    """The best weights of the newest run in the logger's folder, if there are any."""
    logger = config.trainer.get("logger")
    options = logger.get("init_args", {}) if isinstance(logger, Namespace) else {}
    found = newest_best(options.get("save_dir") or ".")
    return f" The newest best weights here are {found}." if found else " `stochastic-layers fit` makes one."


def require_groups(config: Namespace) -> None:
    """Refuse what the parser lets through: no options where options belong, and null where a value is needed.

    Raises:
        ValueError: Such a value.
    """
    for name in ("model", "data", "trainer", "checkpoint", "pictures"):
        if not isinstance(config.get(name), Namespace):
            raise ValueError(
                f"needed options under {name!r}, got {config.get(name)!r}; leave the key out for the defaults."
            )
    for name, option in signature(VAE).parameters.items():
        if option.default is not None and config.model.get(name, option.default) is None:
            raise ValueError(f"needed a value of 'model.{name}', got null; leave the key out for {option.default!r}.")


def trainer_callbacks(trainer: Trainer) -> list[Any]:
    """The callbacks of a Trainer, an attribute that Lightning does not declare."""
    callbacks: list[Any] = cast(Any, trainer).callbacks
    return callbacks


def overview() -> str:
    """Every command in a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {text}" for command, text in COMMANDS.items()]
    return "\n".join(
        ["usage: stochastic-layers COMMAND [OPTIONS]", "", *lines, "", "COMMAND --help says what its options are."]
    )


def main(args: list[str] | None = None) -> None:
    """Entry point of ``stochastic-layers``; ``args`` default to the command line."""
    words = sys.argv[1:] if args is None else args
    if not words:
        sys.exit(overview())
    command, rest = words[0], words[1:]
    try:
        if command in ("-h", "--help"):
            print(overview())
        elif command == "--version":
            print(sl.__version__)
        elif not command.startswith("-") and command not in COMMANDS:
            raise ValueError(f"needed a command, got {command!r}; {nearest(command, COMMANDS)}")
        elif command in OWN:
            module, function = OWN[command]
            status: int | None = getattr(import_module(f"lightning_modules.{module}"), function)(rest)
            if status is not None:
                sys.exit(status)
        else:
            restrict_imports()
            # of Lightning's own way to ask torch, which its user cannot change
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            CLI(
                VAE,
                LightningDataModule,
                default_data=not names_data(words),
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs={"prog": "stochastic-layers"},
                args=args,
            )
    except KeyboardInterrupt:
        print("stochastic-layers: interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough: `stochastic-layers list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it closes it
        sys.exit(1)
    except Exception as error:
        told = isinstance(error, (*REFUSALS, *wandb_errors()))
        if not told or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("0", ""):
            raise
        sys.exit(f"stochastic-layers: {sentence(error)}")


if __name__ == "__main__":
    main()
