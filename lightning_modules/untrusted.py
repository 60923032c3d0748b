"""Files from strangers: checkpoints are read as plain data, and what a configuration may import can be restricted."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningModule

import stochastic_layers as sl
from lightning_modules.checkpoints import refuse_damaged
from stochastic_layers.registry import layer_class

__all__ = ["WeightsOnly", "imports_are_restricted", "read_checkpoint", "restrict_imports"]

RESTRICT_VARIABLE = "STOCHASTIC_LAYERS_RESTRICT"
TRUSTED = ("lightning.pytorch", "lightning_modules", "stochastic_layers", "torch.optim")
# The only value of Lightning's own entry that may name a function to call when a checkpoint is loaded.
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"

_Model = TypeVar("_Model", bound="WeightsOnly")


def imports_are_restricted() -> bool:
    """Whether the environment asks for it.

    Raises:
        ValueError: The variable STOCHASTIC_LAYERS_RESTRICT is neither 0 nor 1.
    """
    wanted = os.environ.get(RESTRICT_VARIABLE, "0")
    if wanted not in ("0", "1", ""):
        raise ValueError(f"needed {RESTRICT_VARIABLE}=0 or 1, got {wanted!r}.")
    return wanted == "1"


def restrict_imports() -> None:
    """Let configurations name only :data:`TRUSTED` packages and registered layers, if the environment asks for it.

    The variable STOCHASTIC_LAYERS_RESTRICT is read and not an option, so that no configuration can lift the
    restriction. The parser refuses any other path before it imports anything, and refuses what a trusted module
    merely re-exports.

    Raises:
        ValueError: The variable is neither 0 nor 1, or the installed jsonargparse has no such policy.
    """
    if not imports_are_restricted():
        return
    if "import_path_allowlist" not in inspect.signature(set_parsing_settings).parameters:
        raise ValueError(
            f"needed a jsonargparse with import_path_allowlist for {RESTRICT_VARIABLE}=1, got an older one."
        )
    layers = [layer_class(name) for name in sl.list_layers()]  # those of installed packages too
    allowed = [*TRUSTED, *(f"{layer.__module__}.{layer.__qualname__}" for layer in layers)]
    settings: dict[str, Any] = {
        "import_path_denylist": ["*"],
        "import_path_allowlist": allowed,
        "instantiate_subclass_spec_in_any": False,
    }
    set_parsing_settings(**settings)


def read_checkpoint(source: str | Path | IO[bytes]) -> dict[str, Any]:
    """A checkpoint as plain data: tensors, numbers, strings and containers of them; nothing in it is executed.

    Raises:
        ValueError: The file is damaged, holds other objects, is no checkpoint of Lightning, or names code to call.
        OSError: The file cannot be opened.
    """
    if isinstance(source, (str, Path)):
        refuse_damaged(source)
        with Path(source).open("rb") as file:
            return _read(file, str(source))
    return _read(source, "the checkpoint")


def _read(file: IO[bytes], name: str) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive makes the reader raise almost anything
        raise ValueError(
            f"{name}: needed a checkpoint of tensors and plain data, got {type(error).__name__}: {_first_line(error)}; "
            "it is damaged, or holds objects, which are not loaded because loading them runs their code."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{name}: needed a Lightning checkpoint with a state_dict, got {type(content).__name__}.")
    hparams = content.get("hyper_parameters", {})
    if not isinstance(hparams, Mapping):
        raise ValueError(f"{name}: needed hyper_parameters as a mapping, got {type(hparams).__name__}.")
    if hparams.get("_instantiator", INSTANTIATOR) != INSTANTIATOR:
        raise ValueError(f"{name}: needed no code in a checkpoint, got the function {hparams['_instantiator']!r}.")
    class_path = hparams.get("_class_path", __name__ + ".WeightsOnly")
    if not isinstance(class_path, str) or class_path.rpartition(".")[0] not in sys.modules:
        raise ValueError(f"{name}: needed a class that is imported already, got {class_path!r}; import it first.")
    return content


class WeightsOnly(LightningModule):
    """A LightningModule whose checkpoints are loaded as plain data, or not at all."""

    @classmethod
    def load_from_checkpoint(
        cls: type[_Model],
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> _Model:
        """Rebuild a model from a file; see Lightning's method of this name.

        Args:
            checkpoint_path: Path, or an open binary file.
            map_location: As for ``torch.load``.
            hparams_file: YAML file with arguments that the checkpoint does not have.
            strict: Whether the names of the weights must match.
            weights_only: Only ``True``: loading other objects than plain data runs code of whoever wrote the file.
            **kwargs: Arguments of the model, which replace those in the checkpoint.

        Raises:
            ValueError: The file is damaged or of another model, or ``weights_only`` is False.
        """
        if weights_only is False:
            raise ValueError(
                "needed weights_only=True, got False, which would run code of whoever wrote the file; pass objects as "
                "arguments instead."
            )
        read_checkpoint(checkpoint_path)
        if not isinstance(checkpoint_path, (str, Path)):
            checkpoint_path.seek(0)
        try:
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only=True, **kwargs
            )
        except ValueError:
            raise
        except Exception as error:  # what the constructor or the loading of weights says of arguments that do not fit
            raise ValueError(
                f"{checkpoint_path}: needed a checkpoint of {cls.__name__}, got {type(error).__name__}: {error}"
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
