"""Model and data of a checkpoint on the command line: their options, and whether the configuration asks for others."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import Tensor, nn

from lightning_modules.hyperparameters import is_marked

__all__ = ["check_agreement", "check_weights", "newest_best", "options_of_data", "options_of_model"]

OF_AN_EVALUATION = "iwae_samples"  # how a model is measured, not what it is: may differ from the checkpoint's


def options_of_model(
    path: str | Path, hparams: Mapping[str, Any], asked: Mapping[str, Any], model_class: type
) -> dict[str, Any]:
    """The options that a checkpoint prescribes: all but the objects, which it does not keep, and those of measuring.

    Args:
        path: The file, for messages.
        hparams: What it holds of the model's arguments.
        asked: The options of the model that the command line and its configuration files state.
        model_class: The class that the options are for.

    Raises:
        ValueError: The checkpoint is of another class, an object is nowhere stated, or a class path is in the file.
    """
    options = {name: value for name, value in hparams.items() if not name.startswith("_")}
    if unknown := sorted(options.keys() - signature(model_class).parameters.keys()):
        raise ValueError(
            f"needed a checkpoint of {model_class.__name__}, got {path}, of a model with the option {unknown[0]!r}; "
            "load it in Python with load_from_checkpoint of its own class."
        )
    for name, value in list(options.items()):
        if is_marked(value):
            if asked.get(name) is None:
                raise ValueError(
                    f"needed --model.{name}=..., got {path}, of a model whose {name} was an object, which checkpoints "
                    f"do not keep; {_remedy(Path(path), name)}."
                )
            del options[name]
        elif _names_code(value) or (name == "optimizer" and value is not None):
            raise ValueError(f"{path}: needed no class path in a checkpoint, got {name} = {value!r}.")
        elif name == OF_AN_EVALUATION and asked.get(name) is not None:
            del options[name]
    return options


def options_of_data(path: str | Path, checkpoint: Mapping[str, Any], needed: bool = True) -> dict[str, Any]:
    """The data module that ``fit`` wrote into a checkpoint, as a configuration; empty where there is none.

    Args:
        path: The file, for messages.
        checkpoint: What it holds.
        needed: Whether nothing else says which data to take.

    Raises:
        ValueError: The class is needed and of a module that is not imported already: no file has one imported.
    """
    init_args = dict(checkpoint.get("datamodule_hyper_parameters") or {})
    init_args.pop("_instantiator", None)
    class_path = init_args.pop("_class_path", None)
    if class_path is None:
        return {}
    if str(class_path).rpartition(".")[0] not in sys.modules:
        if not needed:
            return {}
        raise ValueError(
            f"needed --data=..., got none and {path}, whose data were {class_path!r}; if you know what that imports, "
            f"add --data={class_path} and its options."
        )
    return {"class_path": class_path, "init_args": init_args}


def check_agreement(asked: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Refuse what a checkpoint would override without a word.

    Args:
        asked: The options of the model that the command line and its configuration files state.
        got: Those that hold.

    Raises:
        ValueError: One differs.
    """
    for name, value in asked.items():
        if not _within(value, got.get(name)) and (name, value) != ("likelihood", "auto"):
            raise ValueError(
                f"needed the options of the checkpoint's model, got model.{name} = {_plain(value)!r}, where it has "
                f"{_plain(got.get(name))!r}; leave the option out, or train a new model without --ckpt_path."
            )


def check_weights(path: str | Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of other parts or sizes than the model's.

    Raises:
        ValueError: They differ; the message names the first ones.
    """
    wanted, found = ({name: list(value.shape) for name, value in w.items()} for w in (model.state_dict(), weights))
    differ = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"needed a checkpoint of the model's parts and sizes, got {path}, in which {name} is "
            f"{found.get(name, 'missing')} and not {wanted.get(name, 'missing')}"
            f"{f', and {len(differ) - 1} others differ' if differ[1:] else ''}; give the data (--data) and the options "
            "of the model that it was trained with."
        )


def newest_best(folder: str | Path) -> Path | None:
    """The best weights of the last run below a folder of runs."""
    files: Iterable[Path] = Path(folder).glob("*/checkpoints/best.ckpt")
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


def _remedy(path: Path, name: str) -> str:
    config = path.parent.parent / "config.yaml"
    if config.is_file():
        return f"add --config {config}, the run's own configuration"
    return f"state it, or load the file in Python: VAE.load_from_checkpoint(path, {name}=...)"


def _within(asked: Any, got: Any) -> bool:
    """Whether all that was asked for is there; mappings may hold more."""
    if isinstance(asked, (Mapping, Namespace)) and isinstance(got, (Mapping, Namespace)):
        return all(_within(value, got.get(name)) for name, value in dict(asked.items()).items())
    return bool(asked == got)


def _names_code(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_names_code, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_names_code, value))


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value
