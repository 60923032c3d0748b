"""Schedules as callbacks: the temperature of relaxed and straight-through layers as a function of the step."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_modules.due import log_interval, step_is_due
from stochastic_layers import StochasticLayer

__all__ = ["TemperatureSchedule"]

Shape = Literal["exponential", "linear"]


class TemperatureSchedule(Callback):
    r"""Anneals the temperature of every layer that has one, by optimizer step; logged as ``train/temperature``.

    .. math:: \tau(s) = \tau_0 \, (\tau_1 / \tau_0)^{\min(1, s / n)} \quad \text{("exponential")}, \qquad
        \tau(s) = \tau_0 + (\tau_1 - \tau_0) \min(1, s / n) \quad \text{("linear")}

    A low temperature makes a relaxation less biased and its gradient more variable. The temperature is computed from
    the step alone: a resumed run continues exactly, and accumulated batches count as one step. The weight of the KL has
    its own schedule: ``objective={"name": "elbo", "kl_warmup_steps": n}``.

    Args:
        initial: Temperature :math:`\tau_0` at step 0.
        final: Temperature :math:`\tau_1` from step ``steps`` on.
        steps: Number n of optimizer steps.
        shape: ``"exponential"`` or ``"linear"``.

    Raises:
        ValueError: An option out of range; at the start of training, a model without a layer whose temperature can be
            set, one whose temperature is learned, or a temperature that a layer does not take.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Eric Jang, Shixiang Gu, Ben Poole, 2016),
        https://arxiv.org/abs/1611.01144

    Example:
        >>> from lightning_modules import TemperatureSchedule
        >>> schedule = TemperatureSchedule(initial=1.0, final=0.25, steps=100)
        >>> [schedule.temperature(step) for step in (0, 50, 100, 1000)]
        [1.0, 0.5, 0.25, 0.25]
    """

    def __init__(
        self, initial: float = 1.0, final: float = 0.5, steps: int = 1000, shape: Shape = "exponential"
    ) -> None:
        for name, value in (("initial", initial), ("final", final)):
            if not 0 < value < math.inf:
                raise ValueError(f"needed {name} > 0, got {value}.")
        if steps < 1:
            raise ValueError(f"needed steps >= 1, got {steps}.")
        if shape not in get_args(Shape):
            raise ValueError(f"needed shape in {get_args(Shape)}, got {shape!r}.")
        self.initial, self.final, self.steps, self.shape = initial, final, steps, shape

    def temperature(self, step: int) -> float:
        """The temperature at an optimizer step."""
        done = min(1.0, step / self.steps)
        if done == 1.0:
            return self.final
        if self.shape == "linear":
            return self.initial + (self.final - self.initial) * done
        return self.initial * math.exp(math.log(self.final / self.initial) * done)

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose layers do not take these temperatures.

        Raises:
            ValueError: No layer has a temperature, or one learns it, or has it out of range.
        """
        layers = [layer for layer in model.modules() if isinstance(layer, StochasticLayer)]
        if not _tempered(model):
            names = ", ".join(repr(layer.name) for layer in layers) or "no layer at all"
            raise ValueError(
                f"needed a layer with a temperature for TemperatureSchedule, got {names}; use layer='gumbel_softmax', "
                "say, or remove the callback."
            )
        for layer in _tempered(model):
            if isinstance(layer.log_temperature, nn.Parameter):
                raise ValueError(
                    f"needed a temperature that is not trained for TemperatureSchedule, got layer {layer.name!r} with "
                    "learn_temperature=True; choose one of the two."
                )
            before = layer.log_temperature.clone()
            try:
                for value in (self.initial, self.final):
                    layer.temperature = value  # the layer refuses what it cannot take
            finally:
                layer.log_temperature.copy_(before)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        value = self.temperature(trainer.global_step)
        for layer in _tempered(pl_module):
            layer.temperature = value
        if step_is_due(trainer, log_interval(trainer)):
            pl_module.log("train/temperature", value, sync_dist=True)


def _tempered(model: nn.Module) -> list[Any]:
    """The layers with a temperature that can be set."""
    return [m for m in model.modules() if isinstance(m, StochasticLayer) and hasattr(m, "log_temperature")]
