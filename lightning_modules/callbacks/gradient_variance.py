"""Gradient variance during training: of the estimator, at the params and at the weights, and over the steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.base import LatentVariableModel, data_of
from lightning_modules.data.binarize import mix64
from lightning_modules.due import log_interval, step_is_due
from lightning_modules.gradient_moments import GradientMoments
from lightning_modules.probe import PROBE_CHUNK, probe_params, probe_weights
from lightning_modules.scoring import Layers, layer_statistics
from lightning_modules.vae import VAE
from stochastic_layers.diagnostics import GradientStatistics, preserved
from stochastic_layers.preserved import seed_generators

__all__ = ["GradientVarianceMonitor"]

MOST = torch.finfo(torch.float32).eps ** -2  # a variance that is a smaller part of the squared mean is rounding


class GradientVarianceMonitor(Callback):
    """Logs how noisy the gradient is. ``VAE`` and ``HierarchicalVAE`` have one by default; add your own to change it.

    Three measurements, which are never the same number:

    - ``train/grad_variance`` and ``train/grad_snr``: the estimator's total variance and signal-to-noise ratio at the
      layer's params, per example, at fixed data and params; only the noise is redrawn. Always logged. Of several layers
      it is the sum, and ``train/grad_variance/<l>`` is that of layer l.
    - ``train/weight_grad_variance`` and ``train/weight_grad_snr`` (``weights=True``): the same at the weights of the
      networks that make the layers' params, of the loss averaged over the whole batch: the estimator's part of the
      noise in the optimizer's gradient. The variance is the sum over the weights.
    - ``train/moving_grad_variance`` and ``train/moving_grad_snr`` (``decay=0.999``): exponential moving moments of the
      gradient that the optimizer gets, over the steps of training, averaged over those weights: the number that papers
      plot. It holds the noise of the data as well (:class:`~lightning_modules.GradientMoments`).

    With a ``basket`` other estimators are scored on the same state and data, under ``train/grad_variance/<name>`` and
    ``train/grad_snr/<name>``; the model goes on with its own.

    Where all redraws give the same gradient up to rounding (enumeration, quantizers) the ratio is that of float32
    rounding, 8.4e6: an infinite one is kept as a word by W&B, and drawn by no chart.

    Nothing is disturbed: weights, noise, baselines and codebooks are the same, bit for bit, with and without a monitor.
    Its own noise depends on (seed, rank, step) only. Measurements run outside DDP and ``torch.compile``, under the
    Trainer's precision, at the first batch of an accumulated step; the moments see the gradient accumulated, averaged
    over the ranks, unscaled, and before clipping. On several ranks, sums are added over the ranks before they are
    divided: the values are those of one process on the joined batch, and the same on every rank.

    Args:
        every_n_steps: Optimizer steps between two measurements; by default the Trainer's ``log_every_n_steps``, and 0
            for never. A value stands in the log until the next one.
        num_draws: Redraws of the noise, at least 2. At the weights they are one pass over the whole batch.
        num_examples: Number of examples at whose params the gradient is measured, over all ranks.
        weights: Whether to measure at the weights.
        decay: Decay of the moving moments; ``None`` leaves them out. They are kept in checkpoints.
        basket: Other layers, as :func:`~lightning_modules.score_layers` takes them.

    Raises:
        ValueError: An option out of range, or, as training starts, a model or a basket that cannot be measured.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        num_draws: int = 8,
        num_examples: int = 16,
        weights: bool = False,
        decay: float | None = None,
        basket: Layers | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 0:
            raise ValueError(f"needed every_n_steps >= 0, got {every_n_steps}; 0 is never.")
        if num_draws < 2:
            raise ValueError(f"needed num_draws >= 2 to measure a variance, got {num_draws}.")
        if num_examples < 1:
            raise ValueError(f"needed num_examples >= 1, got {num_examples}.")
        if decay is not None:
            GradientMoments(decay)  # refuses what is out of range
        self.every_n_steps = every_n_steps
        self.num_draws = num_draws
        self.num_examples = num_examples
        self.weights = weights
        self.decay = decay
        self.basket = basket
        self.moments: list[GradientMoments] = []

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[decay={self.decay}]"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = _checked(pl_module)
        if self.basket is not None:
            x = torch.zeros(2, *model.data_shape, device=model.device)
            _, refused = layer_statistics(cast(VAE, model), x, self.basket, num_draws=2, reference=None)
            if refused:
                reasons = "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())
                raise ValueError(f"needed a basket of layers that fit the model, got {reasons}")
        if self.decay is not None:
            count = len(model.inference_networks)
            if len(self.moments) != count:
                self.moments = [GradientMoments(self.decay, sync_on_compute=False) for _ in range(count)]
            for moments in self.moments:
                moments.to(model.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._is_due(trainer) or batch_idx % trainer.accumulate_grad_batches:
            return
        model, x = _checked(pl_module), data_of(batch)
        if not all(layer.training for layer in model.stochastic_layers):
            return  # behind an encoder that is frozen a layer in evaluation mode is in order, and has no estimator
        model.check_data(x)  # at every step this comes before the check of the model itself
        with self._own_noise(trainer, model), trainer.precision_plugin.train_step_context():
            few = x[: -(-self.num_examples // trainer.world_size)]
            values = _summary("grad", [_at_params(trainer, s) for s in probe_params(model, few, self.num_draws)])
            if self.basket is not None:
                values |= self._scored(trainer, cast(VAE, model), few)
            if self.weights:
                parts = [_at_weights(trainer, s, len(x)) for s in probe_weights(model, x, self.num_draws)]
                values |= _summary("weight_grad", parts)
        self._log(model, values, len(x))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.decay is None:
            return
        model = _checked(pl_module)
        scale = _scale(trainer, optimizer)
        for moments, network in zip(self.moments, model.inference_networks, strict=True):
            gradients = [_gradient(p, scale) for p in network.parameters() if p.requires_grad]
            if scale is None or all(bool(g.isfinite().all()) for g in gradients):  # a step that is skipped
                moments.update(gradients)
        if self._is_due(trainer) and all(float(m.weight_squares) < 1 for m in self.moments):  # two steps, at least
            found = [m.compute() for m in self.moments]
            sizes = [float(m.mean.numel()) for m in self.moments]
            means = [(float(f["variance"]), float(f["squared_mean"])) for f in found]
            parts = [(noise * n, signal * n) for (noise, signal), n in zip(means, sizes, strict=True)]
            self._log(model, _summary("moving_grad", parts, sizes), 1)

    def _is_due(self, trainer: Trainer) -> bool:
        every = log_interval(trainer) if self.every_n_steps is None else self.every_n_steps
        return step_is_due(trainer, every)

    @contextmanager
    def _own_noise(self, trainer: Trainer, model: LightningModule) -> Iterator[None]:
        seed = mix64(int(os.environ.get("PL_GLOBAL_SEED", 0)), trainer.global_rank, trainer.global_step)
        with preserved(model, devices=[model.device]):
            seed_generators(seed, model.device)
            yield

    def _scored(self, trainer: Trainer, model: VAE, x: Tensor) -> dict[str, float]:
        # a fixed number of passes: baselines that reduce over the ranks wait for each other in every one
        found, _ = layer_statistics(
            model, x, self.basket, num_draws=self.num_draws, reference=None, chunk_size=PROBE_CHUNK
        )
        values: dict[str, float] = {}
        for name, (_, statistics) in found.items():
            one = _summary("grad", [_at_params(trainer, statistics)])
            values |= {f"{key}/{name}": value for key, value in one.items()}
        return values

    def _log(self, model: LightningModule, values: Mapping[str, float], batch_size: int) -> None:
        # the values are the same on every rank already
        named = {f"train/{key}": value for key, value in values.items()}
        model.log_dict(named, on_step=True, on_epoch=False, batch_size=batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": [m.state_dict() for m in self.moments]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.decay is not None:
            self.moments = [GradientMoments(self.decay, sync_on_compute=False) for _ in state_dict["moments"]]
            for moments, state in zip(self.moments, state_dict["moments"], strict=True):
                moments.load_state_dict(state)


def _checked(module: LightningModule) -> LatentVariableModel[Any]:
    if not isinstance(module, LatentVariableModel):
        raise ValueError(
            f"needed a VAE or HierarchicalVAE to monitor, got {type(module).__name__}; for a module of your own use "
            "stochastic_layers.diagnostics.gradient_statistics on its layers."
        )
    return module


def _reduced(trainer: Trainer, values: Tensor) -> Tensor:
    """The sum over the ranks."""
    return cast(Tensor, trainer.strategy.reduce(values, reduce_op="sum"))


def _at_params(trainer: Trainer, statistics: GradientStatistics) -> tuple[float, float]:
    """Variance and squared norm of the expected gradient, per example of all ranks."""
    noise = statistics.variance.sum()
    signal = statistics.mean.square().sum() - noise / statistics.num_draws
    noise, signal, examples = _reduced(trainer, torch.stack([noise, signal, noise.new_tensor(len(statistics.mean))]))
    return float(noise / examples), float(signal / examples)


def _at_weights(trainer: Trainer, statistics: GradientStatistics, batch_size: int) -> tuple[float, float]:
    """Variance and squared norm of the expected gradient of the mean loss over the batches of all ranks."""
    share = batch_size / _reduced(trainer, statistics.mean.new_tensor(batch_size))
    mean, variance = _reduced(trainer, torch.stack([share * statistics.mean, share.square() * statistics.variance]))
    noise = variance.sum()
    return float(noise), float(mean.square().sum() - noise / statistics.num_draws)


def _summary(key: str, parts: Sequence[tuple[float, float]], sizes: Sequence[float] | None = None) -> dict[str, float]:
    """``<key>_variance`` and ``<key>_snr`` of (variance, squared norm) of each layer: their sum, and each if several.

    With ``sizes`` the variances are means over that many coordinates.
    """
    total, sizes = (1.0, [1.0] * len(parts)) if sizes is None else (sum(sizes), sizes)
    values = _pair(key, "", sum(n for n, _ in parts), sum(s for _, s in parts), total)
    if len(parts) > 1:
        for level, ((noise, signal), size) in enumerate(zip(parts, sizes, strict=True), 1):
            values |= _pair(key, f"/{level}", noise, signal, size)
    return values


def _pair(key: str, suffix: str, noise: float, signal: float, size: float) -> dict[str, float]:
    """A variance, and a ratio that is finite: loggers make no number of the infinity of a noiseless gradient."""
    signal = max(signal, 0.0)
    ratio = 0.0 if signal == 0 else MOST if noise * MOST <= signal else signal / noise
    return {f"{key}_variance{suffix}": noise / size, f"{key}_snr{suffix}": float(ratio**0.5)}


def _scale(trainer: Trainer, optimizer: Optimizer) -> float | None:
    """The factor by which the gradients are still scaled in float16, ``None`` without a scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    return float(scaler.get_scale()) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0


def _gradient(parameter: nn.Parameter, scale: float | None) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient if scale is None else gradient / scale
