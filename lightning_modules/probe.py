"""The gradient of a model's training loss over redrawn noise: at the params of its layers, and at its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochastic_layers.diagnostics import GradientStatistics, preserved

if TYPE_CHECKING:
    from lightning_modules.base import LatentVariableModel

__all__ = ["probe_params", "probe_weights"]

PROBE_CHUNK = 64  # largest number of redraws in one pass


def probe_params(model: LatentVariableModel[Any], x: Tensor, num_draws: int) -> list[GradientStatistics]:
    """Moments of the gradient of the training loss at each layer's params; disturbs neither noise nor state.

    All noise is redrawn at fixed data and fixed params of the first layer. The loss is that of the objective with all
    its terms: those in closed form add no variance, but belong to the signal that the optimizer follows.

    Args:
        model: The model, in training mode.
        x: Data ``[B, *data_shape]``.
        num_draws: Number of redraws of the noise, at least 2.

    Raises:
        ValueError: Too few redraws, or a model in evaluation mode, which has no estimator.
    """
    passes = []
    with _measuring(model, num_draws), torch.no_grad():
        params = model.encode(x)
        for one in _redrawn(model, x, params, num_draws):
            rows = [g.movedim(d, 0).double() for g, d in one.gradients]  # [draws * B, ...]
            passes.append([g.reshape(one.draws, len(x), *g.shape[1:]) for g in rows])
    return _statistics(passes)


def probe_weights(model: LatentVariableModel[Any], x: Tensor, num_draws: int) -> list[GradientStatistics]:
    """As :func:`probe_params`, at the weights of the network that makes each layer's params: ``[number of weights]``.

    The loss is averaged over the batch, as in training: this is the noise of the gradient that the optimizer gets, less
    that of the choice of data. The decoder runs once for all redraws of a pass; then the gradient of each redraw at the
    params is sent back through the network. A pass holds up to 64 redraws of the batch in memory.

    Args:
        model: The model, in training mode.
        x: Data ``[B, *data_shape]``.
        num_draws: Number of redraws of the noise, at least 2.

    Raises:
        ValueError: See :func:`probe_params`.
    """
    networks, batch = model.inference_networks, len(x)
    passes = []
    with _measuring(model, num_draws), torch.enable_grad():
        params = model.encode(x)
        for one in _redrawn(model, x, params, num_draws, retain_graph=True):
            rows: list[list[Tensor]] = [[] for _ in networks]
            for r in range(one.draws):
                for level, (network, (gradient, dim)) in enumerate(zip(networks, one.gradients, strict=True)):
                    own = gradient.narrow(dim, r * batch, batch) / batch  # this redraw's rows, of the mean loss
                    if level == 0:  # all redraws share the params of the first layer
                        rows[0].append(_pull_back(network, params, own))
                    else:
                        signal = torch.zeros_like(gradient)
                        signal.narrow(dim, r * batch, batch).copy_(own)
                        rows[level].append(_pull_back(network, one.params[level], signal))
            passes.append([torch.stack(gradients) for gradients in rows])
    return _statistics(passes)


def _measuring(model: LatentVariableModel[Any], num_draws: int) -> Any:
    """:func:`preserved` for a model that can be probed."""
    if num_draws < 2:
        raise ValueError(f"needed num_draws >= 2 to measure a variance, got {num_draws}.")
    if not all(layer.training for layer in model.stochastic_layers):
        raise ValueError("needed a model in training mode, got eval(), which has no estimator; call model.train().")
    return preserved(model)


@dataclass(frozen=True)
class _Pass:
    """Several redraws: the params of each layer, and the gradients there with their batch dimension."""

    draws: int
    params: Sequence[Tensor]
    gradients: Sequence[tuple[Tensor, int]]


def _redrawn(
    model: LatentVariableModel[Any], x: Tensor, params: Tensor, num_draws: int, retain_graph: bool = False
) -> Iterator[_Pass]:
    for start in range(0, num_draws, PROBE_CHUNK):
        draws = min(PROBE_CHUNK, num_draws - start)
        with torch.enable_grad():
            leaf = _repeat(params, draws).requires_grad_()
            terms = model.terms(_repeat(x, draws), leaf)
            tensors, dims = zip(*model.probed(terms, leaf), strict=True)
            loss = model.loss(terms).sum()
            gradients = torch.autograd.grad(loss, tensors, retain_graph=retain_graph)
        yield _Pass(draws, tensors, list(zip(gradients, dims, strict=True)))


def _repeat(tensor: Tensor, times: int) -> Tensor:
    """``[B, ...]`` -> ``[times * B, ...]``, a new tensor."""
    return tensor.detach().expand(times, *tensor.shape).flatten(0, 1).clone()


def _pull_back(network: nn.Module, output: Tensor, signal: Tensor) -> Tensor:
    """The gradient at a network's weights, flat, of a gradient at its output."""
    weights = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(output, weights, signal, retain_graph=True, allow_unused=True)
    zipped = zip(weights, found, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zipped]).double()


def _statistics(passes: Sequence[Sequence[Tensor]]) -> list[GradientStatistics]:
    """Moments of each layer's gradients, which come in passes of ``[redraws, ...]``."""
    every = [torch.cat(parts) for parts in zip(*passes, strict=True)]
    return [GradientStatistics(g.mean(0), g.var(0), len(g)) for g in every]
