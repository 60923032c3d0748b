"""Pictures of a VAE as PNG files: reconstructions, prior samples, and the curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.base import LatentVariableModel, data_of, log_interval

__all__ = ["Pictures", "run_folder"]


class Pictures(Callback):
    """Writes ``reconstructions.png``, ``samples.png`` and ``curves.png`` at the end of training, on rank zero.

    The reconstructions show validation data above their reconstructions, the samples are decoded draws of the prior,
    and the curves are the ELBO in training and validation, gradient variance and SNR over optimizer steps. Drawing
    happens with its own random state, so that a run with and without pictures is the same. Image loggers get the
    pictures too.

    Args:
        folder: Where to write; by default :func:`run_folder`.
        num_images: Number of images in a row of reconstructions; samples are a square of the same width.
    """

    def __init__(self, folder: str | None = None, num_images: int = 10) -> None:
        self.folder = folder
        self.num_images = num_images
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.files: list[Path] = []

    def _record(self, trainer: Trainer, keys: tuple[str, ...]) -> None:
        for key in keys:
            if key in trainer.callback_metrics:
                self.history.setdefault(key, []).append((trainer.global_step, float(trainer.callback_metrics[key])))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % log_interval(trainer) == 0:
            self._record(trainer, ("train/elbo", "train/grad_variance", "train/grad_snr"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._record(trainer, ("val/elbo",))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, LatentVariableModel):
            return
        folder = Path(self.folder) if self.folder else run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        training = pl_module.training
        pl_module.eval()
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            figures = {"samples": image_grid(pl_module.generate(self.num_images**2), self.num_images)}
            loader = trainer.val_dataloaders or trainer.train_dataloader
            if loader is not None:
                x = data_of(next(iter(loader)))[: self.num_images].to(pl_module.device)
                figures["reconstructions"] = image_grid(torch.cat([x, pl_module.reconstruct(x)]), len(x))
        pl_module.train(training)
        if self.history:
            figures["curves"] = curves(self.history)
        for name, figure in figures.items():
            self.files.append(folder / f"{name}.png")
            figure.savefig(self.files[-1], dpi=120)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(key=name, images=[str(self.files[-1])])

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run: that of the first logger, where checkpoints go too, else ``default_root_dir``."""
    for logger in trainer.loggers:
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir) / str(logger.name) / version
    return Path(trainer.default_root_dir)


def image_grid(images: Tensor, columns: int) -> Figure:
    """A figure of images ``[N, C, H, W]`` in [0, 1], row by row."""
    images = images.detach().float().cpu().clamp(0, 1)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.ones(rows, columns, c, h + 1, w + 1)
    canvas.view(-1, c, h + 1, w + 1)[:n, :, :h, :w] = images
    picture = canvas.permute(0, 3, 1, 4, 2).reshape(rows * (h + 1), columns * (w + 1), c)
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows * h / w), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture.squeeze(-1).numpy() if c == 1 else picture.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    return figure


def curves(history: dict[str, list[tuple[int, float]]]) -> Figure:
    """ELBO, gradient variance and SNR over optimizer steps."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = [
        ("ELBO (nats per example)", ("train/elbo", "val/elbo"), "linear"),
        ("gradient variance", ("train/grad_variance",), "log"),
        ("gradient signal-to-noise ratio", ("train/grad_snr",), "linear"),
    ]
    for axes, (title, keys, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for key in keys:
            if key in history:
                steps, values = zip(*history[key], strict=True)
                axes.plot(steps, values, label=key, linewidth=1.2)
        axes.set(title=title, xlabel="optimizer step")
        if any(value > 0 for key in keys for _, value in history.get(key, [])):  # an exact layer has no variance
            axes.set_yscale(scale)
        if len(keys) > 1:
            axes.legend(frameon=False)
    return figure
