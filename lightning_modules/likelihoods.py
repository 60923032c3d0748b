"""Likelihoods p(x | z): how the decoder's output becomes a law of the data, with log-probabilities in nats."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.nn import functional as F

__all__ = ["BernoulliLikelihood", "CategoricalLikelihood", "DiscretizedLogistic", "GaussianLikelihood", "Likelihood"]

MIN_SCALE = 1e-4  # of a Gaussian: below it the density of data in [0, 1] has no meaning in float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor in which log-probabilities of data may be summed; double precision stays as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Likelihood(nn.Module, ABC):
    """A law of data ``[*batch, C, ...]``, given decoder outputs ``[*batch, outputs_per_value * C, ...]``.

    Attributes:
        outputs_per_value: Number P of decoder outputs for each value of the data.
        event_dims: Number of dimensions of one example, C included; a model sets it to that of its data.
        binary: Whether only data in {0, 1} makes the ELBO a bound.
        unit_interval: Whether data are levels of [0, 1], to which they are rounded.
    """

    name: ClassVar[str]
    outputs_per_value: int = 1
    event_dims: int = 3
    binary: ClassVar[bool] = False
    unit_interval: ClassVar[bool] = False

    @abstractmethod
    def distribution(self, output: Tensor) -> Distribution:
        """The law of every value of the data, ``[*batch, C, ...]``."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) ``[*batch]`` in nats, summed over the values of an example.

        Args:
            output: Decoder outputs ``[*batch, outputs_per_value * C, ...]``.
            x: Data, which broadcasts to ``[*batch, C, ...]``; its own dimensions, less the first, are the event.
        """
        event = x.dim() - 1
        return self.value_log_prob(output, x).flatten(-event).sum(-1)

    def value_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log p of every value, ``[*batch, C, ...]``."""
        log_prob: Tensor = self.distribution(output).log_prob(x)
        return log_prob

    def mean(self, output: Tensor) -> Tensor:
        """The mean of the data ``[*batch, C, ...]``, in the data's range: what a picture shows."""
        return self.distribution(output).mean

    def split(self, output: Tensor) -> Tensor:
        """``[*batch, P * C, ...]`` -> ``[P, *batch, C, ...]`` with P outputs per value."""
        lead, (channels, *rest) = output.shape[: -self.event_dims], output.shape[-self.event_dims :]
        parts = output.reshape(*lead, self.outputs_per_value, channels // self.outputs_per_value, *rest)
        return parts.movedim(len(lead), 0)


class BernoulliLikelihood(Likelihood):
    """Independent bits; the decoder gives logits. Data must be 0 or 1 for the ELBO to be a bound."""

    name = "bernoulli"
    binary = True

    def distribution(self, output: Tensor) -> Distribution:
        return Bernoulli(logits=output, validate_args=False)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        # the sum changes its sign and not every value: with its gradient, three passes fewer than by the distribution
        loss = F.binary_cross_entropy_with_logits(output, x.expand_as(output), reduction="none")
        return -loss.flatten(1 - x.dim()).sum(-1)


class GaussianLikelihood(Likelihood):
    """Independent normals around the decoder's output, with one learned scale.

    Args:
        initial_scale: The scale at the start; no scale is taken to be less than 1e-4.

    Raises:
        ValueError: ``initial_scale`` is infinite, or less than 1e-4.
    """

    name = "gaussian"

    def __init__(self, initial_scale: float = 0.3) -> None:
        super().__init__()
        if not MIN_SCALE <= initial_scale < math.inf:
            raise ValueError(f"needed a finite initial_scale >= {MIN_SCALE:g}, got {initial_scale}.")
        self.log_scale = nn.Parameter(torch.tensor([initial_scale]).log())

    def distribution(self, output: Tensor) -> Distribution:
        return Normal(output, at_least_float32(self.log_scale).exp().clamp_min(MIN_SCALE), validate_args=False)


class CategoricalLikelihood(Likelihood):
    """A categorical law of each value over ``num_levels`` equidistant levels of [0, 1].

    Args:
        num_levels: Number of levels; 256 for 8-bit images.

    Raises:
        ValueError: Fewer than two levels.
    """

    name = "categorical"
    unit_interval = True

    def __init__(self, num_levels: int = 256) -> None:
        super().__init__()
        if num_levels < 2:
            raise ValueError(f"needed num_levels >= 2, got {num_levels}.")
        self.num_levels = self.outputs_per_value = num_levels

    def distribution(self, output: Tensor) -> Distribution:
        return Categorical(logits=self.split(output).movedim(0, -1), validate_args=False)

    def value_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        return super().value_log_prob(output, (x * (self.num_levels - 1)).round())

    def mean(self, output: Tensor) -> Tensor:
        levels = torch.linspace(0, 1, self.num_levels, device=output.device, dtype=output.dtype)
        probs = self.split(output).softmax(0)
        return (probs.movedim(0, -1) * levels).sum(-1)


class DiscretizedLogistic(Likelihood):
    """A logistic law integrated over bins of width 1 / (num_levels - 1) around each level.

    The decoder gives a loc and a log-scale per value; the outermost bins reach to infinity: the masses sum to 1.

    Args:
        num_levels: Number of levels; 256 for 8-bit images.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Diederik P. Kingma, Tim Salimans, Rafal
        Jozefowicz, Xi Chen, Ilya Sutskever, Max Welling, 2016), https://arxiv.org/abs/1606.04934
    """

    name = "discretized_logistic"
    unit_interval = True
    outputs_per_value = 2

    def __init__(self, num_levels: int = 256) -> None:
        super().__init__()
        if num_levels < 2:
            raise ValueError(f"needed num_levels >= 2, got {num_levels}.")
        self.num_levels = num_levels

    def _loc_and_log_scale(self, output: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.split(output)
        return loc.sigmoid(), log_scale.clamp(-7.0, 5.0) - 2.0  # scales from e^-9 to e^3 of the data's range

    def distribution(self, output: Tensor) -> Distribution:
        """The categorical law over the levels."""
        levels = torch.linspace(0, 1, self.num_levels, device=output.device, dtype=output.dtype)
        loc, log_scale = self._loc_and_log_scale(output)
        log_mass = self._log_mass(loc.unsqueeze(-1), log_scale.unsqueeze(-1), levels)
        return Categorical(logits=log_mass, validate_args=False)

    def value_log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        x = (x * (self.num_levels - 1)).round() / (self.num_levels - 1)  # in bfloat16 data are beside their levels
        return self._log_mass(*self._loc_and_log_scale(output), x)

    def _log_mass(self, loc: Tensor, log_scale: Tensor, x: Tensor) -> Tensor:
        half = 0.5 / (self.num_levels - 1)
        precision = (-log_scale).exp()
        upper, lower = (x + half - loc) * precision, (x - half - loc) * precision
        # log(sigmoid(u) - sigmoid(l)) = log sigmoid(u) + log sigmoid(-l) + log(1 - e^(l - u)), without cancellation:
        # u - l is known, while a difference of u and l has the rounding of both
        inner = F.logsigmoid(upper) + F.logsigmoid(-lower) + (-torch.expm1(-2 * half * precision)).log()
        first, last = F.logsigmoid(upper), F.logsigmoid(-lower)
        return torch.where(x <= half, first, torch.where(x >= 1 - half, last, inner))

    def mean(self, output: Tensor) -> Tensor:
        """Mean of the logistic variable with what is outside [0, 1] moved to the ends: before it is put into bins."""
        loc, log_scale = self._loc_and_log_scale(output)
        scale = log_scale.exp()
        return scale * (F.softplus(loc / scale) - F.softplus((loc - 1) / scale))
