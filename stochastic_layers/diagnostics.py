"""Diagnostics: mean, variance and signal-to-noise ratio of a layer's gradient, measured without disturbing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stochastic_layers.layer import StochasticLayer

__all__ = ["GradientStatistics", "gradient_statistics", "preserved"]


@contextmanager
def preserved(*modules: nn.Module, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """On leaving, restore the random state and every buffer of the modules: baselines, codebooks, statistics.

    Args:
        *modules: Modules whose buffers are restored.
        devices: Devices whose random state is restored besides the CPU's and those of the modules' own tensors; a layer
            without parameters does not know on which device it draws.
    """
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    cuda = {d.index for d in (*devices, *(t.device for t in tensors)) if d.type == "cuda" and d.index is not None}
    with torch.random.fork_rng(devices=sorted(cuda)), _restored_buffers(*modules):
        yield


@contextmanager
def _restored_buffers(*modules: nn.Module) -> Iterator[None]:
    owners = [owner for module in modules for owner in module.modules()]
    saved = [(m, name, b, b.detach().clone()) for m in owners for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, value in saved:
                if not torch.equal(buffer, value):  # an untouched buffer may be part of somebody's graph: do not write
                    buffer.copy_(value)
                if getattr(owner, name) is not buffer:
                    setattr(owner, name, buffer)


@dataclass(frozen=True)
class GradientStatistics:
    """Moments of the estimator of d E[cost] / d params at fixed params and data, over redrawn noise.

    Attributes:
        mean: Mean of the gradient ``[*batch, in_features]``.
        variance: Unbiased variance of each coordinate ``[*batch, in_features]``.
        num_draws: Number R of redraws.
    """

    mean: Tensor
    variance: Tensor
    num_draws: int

    @property
    def total_variance(self) -> float:
        """Trace of the covariance of one example's gradient, averaged over the first batch dimension."""
        return float(self.variance.sum() / self._examples)

    @property
    def squared_norm(self) -> float:
        """Unbiased estimate of the squared norm of one example's expected gradient, averaged likewise; at least 0."""
        estimate = self.mean.square().sum() - self.variance.sum() / self.num_draws
        return max(float(estimate / self._examples), 0.0)

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio: norm of the expected gradient over the root of the total variance."""
        variance = self.total_variance
        if variance == 0.0:
            return float("inf") if self.squared_norm > 0 else 0.0
        return float((self.squared_norm / variance) ** 0.5)

    @property
    def _examples(self) -> int:
        return self.mean.shape[0] if self.mean.dim() > 1 else 1


def gradient_statistics(
    layer: StochasticLayer,
    params: Tensor,
    cost_fn: Callable[[Tensor], Tensor],
    *,
    num_draws: int = 64,
    chunk_size: int = 64,
    context: Tensor | None = None,
) -> GradientStatistics:
    """Redraw the noise of a layer at fixed params and measure its gradient estimator.

    The redraws of a chunk run as one batch: params are repeated along a new leading dimension. Random state, buffers
    and gradients are left as they were, so that a run with and without the measurement is the same. Every chunk starts
    from the layer's state as it is now: a moving average does not learn from the redraws.

    Args:
        layer: The layer, in training mode.
        params: ``[*batch, in_features]``; treated as a constant.
        cost_fn: Maps z ``[S, R, *batch, out_features]`` to the cost ``[S, R, *leading batch]``.
        num_draws: Number R of redraws, at least 2.
        chunk_size: Largest number of redraws in one pass; lower it to save memory.
        context: Context ``[*batch, F]`` for a learned baseline.

    Raises:
        ValueError: ``num_draws < 2``, ``chunk_size < 1``, or the layer is in evaluation mode.
    """
    if num_draws < 2:
        raise ValueError(f"needed num_draws >= 2 to measure a variance, got {num_draws}.")
    if chunk_size < 1:
        raise ValueError(f"needed chunk_size >= 1, got {chunk_size}.")
    if not layer.training:
        raise ValueError(
            "needed a layer in training mode, got one in eval(), which has no estimator; call layer.train()."
        )
    count, mean, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    mean, squares = mean.to(params.device), squares.to(params.device)
    with preserved(layer, devices=[params.device]), torch.enable_grad():
        while count < num_draws:
            draws = min(chunk_size, num_draws - count)
            leaf = params.detach().expand(draws, *params.shape).clone().requires_grad_()
            with _restored_buffers(layer):
                sample = layer.sample(leaf, None if context is None else context.expand(draws, *context.shape))
                (gradient,) = torch.autograd.grad(sample.surrogate(cost_fn(sample.z)).sum(), leaf)
            gradient = gradient.double()
            # Chan's update of mean and sum of squares by a whole chunk
            chunk_mean = gradient.mean(0)
            delta, total = chunk_mean - mean, count + draws
            squares = squares + (gradient - chunk_mean).square().sum(0) + delta.square() * (count * draws / total)
            mean = mean + delta * (draws / total)
            count = total
    return GradientStatistics(mean=mean, variance=squares / (count - 1), num_draws=count)
