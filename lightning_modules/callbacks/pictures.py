"""Pictures of a latent-variable model, as PNG files and in any logger that takes images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.base import LatentVariableModel, data_of
from lightning_modules.callbacks.figures import bit_usage, code_usage, curves, image_grid, latent_units, schedules
from lightning_modules.callbacks.traversals import interpolations, traversal
from lightning_modules.due import ends_a_step, log_interval, step_is_due
from lightning_modules.objectives import ELBO
from lightning_modules.whole_files import make_folder, whole_file

__all__ = ["Pictures", "run_folder"]

EXAMPLES = 128  # validation examples that are kept for the pictures
SCHEDULES = ("temperature", "beta")  # what the keys of scheduled series begin with


class Pictures(Callback):
    """Draws a model at the end of training and, where asked, every so many epochs.

    - ``reconstructions``: validation data above their reconstructions;
    - ``samples``: decoded draws of the prior;
    - ``traversals``: the most active latent units set to each of their values, one unit in a row: quantiles of a
      continuous one, both values of a bit, the categories or codes of a discrete one;
    - ``interpolations``: walks between the codes of two examples;
    - ``latents``: KL of each latent variable, variance of the posterior mean of each unit, number of active units over
      optimizer steps, all on validation data;
    - ``usage``: share of each code or category, or how often each bit is on, over the validation data;
    - ``curves``: ELBO in training and validation, gradient variance and SNR over optimizer steps;
    - ``schedules``: temperature and weight of the KL over optimizer steps, where they change.

    They are PNG files, and go to every logger that has ``log_image`` (W&B) or an experiment with ``add_figure``
    (TensorBoard). Data that are no images of 1 or 3 channels have only the last four. All ranks compute, rank zero
    draws. Drawing has its own random state and leaves the model as it was, so that a run with and without pictures is
    the same, bit for bit.

    Args:
        folder: Where to write; by default :func:`run_folder`.
        num_images: Number of images in a row; samples are a square of the same width.
        every_n_epochs: Also draw after every so many epochs, into ``<folder>/epoch_<number>``; by default only at the
            end.

    Raises:
        ValueError: An option out of range.
    """

    def __init__(self, folder: str | None = None, num_images: int = 10, every_n_epochs: int | None = None) -> None:
        if num_images < 2:
            raise ValueError(f"needed num_images >= 2, got {num_images}.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"needed every_n_epochs >= 1, or None to draw only at the end, got {every_n_epochs}.")
        self.folder = folder
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.files: list[Path] = []  # of the last time
        self._x: Tensor | None = None
        self._units: _Units | None = None
        self._said: set[str] = set()

    def _record(self, trainer: Trainer, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.history.setdefault(key, []).append((trainer.global_step, value))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.folder and trainer.is_global_zero:
            make_folder(Path(self.folder))  # or fail now, not after the training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._x is None and isinstance(pl_module, LatentVariableModel):  # there is no validation
            self._x = data_of(batch)[:EXAMPLES].detach().clone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = ends_a_step(trainer) and step_is_due(trainer, log_interval(trainer))
        if due and isinstance(pl_module, LatentVariableModel):
            keys = ("train/elbo", "train/grad_variance", "train/grad_snr")
            metrics = trainer.callback_metrics
            self._record(trainer, {key: float(metrics[key]) for key in keys if key in metrics})
            self._record(trainer, _scheduled(pl_module))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and isinstance(pl_module, LatentVariableModel):
            self._x = data_of(batch)[:EXAMPLES].detach().clone()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and isinstance(pl_module, LatentVariableModel):
            self._units = _Units.of(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            keys, metrics = ("val/elbo", "val/active_units"), trainer.callback_metrics
            self._record(trainer, {key: float(metrics[key]) for key in keys if key in metrics})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs is not None and epoch % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, f"epoch_{epoch:04d}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, subfolder: str) -> None:
        if not isinstance(pl_module, LatentVariableModel):
            self._say(f"Pictures draws a VAE or a HierarchicalVAE, and nothing of a {type(pl_module).__name__}.")
            return
        figures = self._images(pl_module, trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        figures |= self._charts(pl_module)
        folder = (Path(self.folder) if self.folder else run_folder(trainer)) / subfolder
        self.files = []
        for name, figure in figures.items():
            self.files.append(folder / f"{name}.png")
            _save(figure, self.files[-1])
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(key=name, images=[str(self.files[-1])], step=trainer.global_step)
                elif add_figure := getattr(getattr(logger, "experiment", None), "add_figure", None):
                    add_figure(name, figure, trainer.global_step)

    def _images(self, model: LatentVariableModel[Any], draw: bool) -> dict[str, Figure]:
        """Pictures that are made of images: computed by every rank, drawn where ``draw`` is true."""
        if len(model.data_shape) != 3 or model.data_shape[0] not in (1, 3):
            self._say(
                f"Pictures: examples of shape {model.data_shape} are no images [1 or 3 channels, height, width]; "
                "drawing the curves and what is known of the latents."
            )
            return {}
        n, x = self.num_images, self._x
        figures: dict[str, Figure] = {}
        with _undisturbed(model):
            samples = model.generate(n * n)
            if draw:
                figures["samples"] = image_grid(samples, n)
            if x is None:
                return figures
            x = x.to(model.device)
            shown = x[:n]
            both = torch.cat([shown, model.reconstruct(shown)])
            if draw:
                figures["reconstructions"] = image_grid(both, len(shown), rows=("data", "model"))
            try:
                changed = traversal(model, x, n, n)
            except ValueError as error:
                self._say(f"Pictures draws no traversals: {error}")
            else:
                if draw:
                    _, examples, values = changed.images.shape[:3]
                    rows, heads = [f"z{unit}" for unit in changed.units], changed.values * examples
                    images = changed.images.flatten(0, 2)
                    figures["traversals"] = image_grid(images, examples * values, rows, heads, group=values)
            if len(x) > 1:
                walks = interpolations(model, x[:n], n)
                if draw:
                    figures["interpolations"] = image_grid(walks.flatten(0, 1), n)
        return figures

    def _charts(self, model: LatentVariableModel[Any]) -> dict[str, Figure]:
        """Pictures that are made of numbers."""
        figures: dict[str, Figure] = {}
        if (units := self._units) is not None:
            threshold = model.evaluation("val").active_units.threshold
            active = self.history.get("val/active_units", [])
            figures["latents"] = latent_units(units.variances, threshold, units.kl, active)
            if units.frequencies is not None:
                figures["usage"] = code_usage(units.frequencies, units.perplexity, units.usage)
            elif model.stochastic_layers[0].family.name == "bernoulli":
                figures["usage"] = bit_usage(units.means.flatten())
        series = {k: v for k, v in self.history.items() if k.startswith(SCHEDULES)}
        moving = {k: v for k, v in series.items() if min(v, key=_value)[1] != max(v, key=_value)[1]}
        if moving:
            figures["schedules"] = schedules(moving)
        if any(key.startswith(("train/", "val/")) for key in self.history):
            figures["curves"] = curves(self.history)
        return figures

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            rank_zero_info(sentence)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


@dataclass(frozen=True)
class _Units:
    """What a validation measured of each latent unit, on all ranks together."""

    variances: Tensor
    means: Tensor
    kl: Tensor | None
    frequencies: Tensor | None
    perplexity: float
    usage: float

    @classmethod
    def of(cls, model: LatentVariableModel[Any]) -> _Units:
        """To be called by all ranks."""
        metrics = model.evaluation("val")
        units, kl, codes = metrics.active_units, metrics.kl_per_dimension, metrics.perplexity
        return cls(
            units.variances().cpu(),
            units.means().cpu(),
            None if kl is None else kl.compute().cpu().reshape(-1),  # torchmetrics squeezes a single value
            None if codes is None else codes.frequencies().cpu(),
            0.0 if codes is None else float(codes.compute()),
            0.0 if codes is None else float(codes.usage()),
        )


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run: that of the first logger, where checkpoints go too, else ``default_root_dir``."""
    for logger in trainer.loggers:
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir) / str(logger.name) / version
    return Path(trainer.default_root_dir)


@contextmanager
def _undisturbed(model: LatentVariableModel[Any]) -> Iterator[None]:
    """Evaluation mode with random numbers of its own; afterwards mode and random state are what they were."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _scheduled(model: LatentVariableModel[Any]) -> dict[str, float]:
    """Temperatures, and the weight of the KL, as they are."""
    layers = model.stochastic_layers
    values = {}
    for number, layer in enumerate(layers, 1):
        temperature: Any = getattr(layer, "temperature", None)
        if temperature is not None:
            values["temperature" if len(layers) == 1 else f"temperature of layer {number}"] = float(
                torch.as_tensor(temperature).detach()
            )
    if isinstance(model.objective, ELBO):
        values["beta"] = model.objective.weight(model.global_step)
    return values


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
