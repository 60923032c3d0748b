"""The gradient of one loss over and over, with redrawn noise, in batched passes of bounded memory; and its moments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from stochastic_layers.layer import Sample
from stochastic_layers.preserved import restored_buffers

__all__ = ["MAX_BYTES", "CostOfSample", "Draw", "Moments", "redraw"]

MAX_BYTES = 2**28  # 256 MiB for z and for what autograd saves, in one pass
FIRST_PASS = 8  # redraws of the pass that is measured
GROUPS = 16  # independent groups of redraws, whose spread gives the error of a norm

CostOfSample = Callable[[Sample], Tensor]
Draw = Callable[[Tensor, "Tensor | None"], Sample]


@dataclass(frozen=True)
class Moments:
    """What is kept of R gradients.

    Attributes:
        mean: Mean ``[*batch, in_features]``, in float64.
        variance: Unbiased variance of each coordinate.
        groups: Means of up to 16 groups of redraws ``[G, *batch, in_features]``.
        num_draws: Number R of redraws.
        cosine: Mean cosine with the reference, if there was one.
        evaluations: Points at which the cost was evaluated, for each redraw and example.
        seconds: Wall time of one redraw; the first pass, which warms up, is left out where there are others.
        precision: Relative spacing of the numbers in which the gradients were computed.
    """

    mean: Tensor
    variance: Tensor
    groups: Tensor
    num_draws: int
    cosine: float | None
    evaluations: int
    seconds: float
    precision: float


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass inside a ``with`` block, parameters apart."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage once."""
        base = tensor if tensor._base is None else tensor._base
        if not (base.is_leaf and base.requires_grad):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        """The bytes so far."""
        return sum(self._storages.values())

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, value, traceback)


def redraw(
    draw: Draw,
    params: Tensor,
    cost_of: CostOfSample,
    *,
    num_draws: int,
    chunk_size: int | None,
    max_bytes: int,
    context: Tensor | None,
    known: Tensor | None,
    reference: Tensor | None,
    modules: tuple[nn.Module, ...],
) -> Moments:
    """Redraw a sample at fixed params and keep the moments of the gradient of its surrogate.

    The redraws of a pass run as one batch: params are repeated along a new leading dimension. Without ``chunk_size``
    the first pass takes up to 8 redraws and counts the bytes of z and of all that autograd saves; the later ones take
    as many redraws as fit into ``max_bytes`` at that price.

    Args:
        draw: Function of params ``[R, *batch, in_features]`` and context that returns a sample.
        params: ``[*batch, in_features]``; treated as a constant.
        cost_of: Maps the sample to the cost ``[S, R, *leading batch]``.
        num_draws: Number R of redraws.
        chunk_size: Largest number of redraws in one pass.
        max_bytes: Memory of one pass, where ``chunk_size`` is None.
        context: Context ``[*batch, F]`` for a learned baseline.
        known: Gradient of further terms in closed form, added to every redraw.
        reference: Gradient with which the cosine is taken.
        modules: Modules whose buffers every pass finds as they are now.
    """
    size = min(FIRST_PASS, num_draws) if chunk_size is None else chunk_size
    zero = torch.zeros(params.shape, dtype=torch.float64, device=params.device)
    count, mean, squares, cosines, evaluations = 0, zero, zero, zero.sum(), 0
    groups = zero.expand(min(GROUPS, num_draws), *zero.shape).clone()
    times: list[tuple[float, int]] = []
    offset = None if known is None else known.detach().double()
    while count < num_draws:
        draws = min(size, num_draws - count)
        start = _now(params)
        leaf = params.detach().expand(draws, *params.shape).clone().requires_grad_()
        with restored_buffers(*modules), SavedBytes() as saved:
            sample = draw(leaf, None if context is None else context.expand(draws, *context.shape))
            loss = sample.surrogate(cost_of(sample)).sum()
            saved.add(sample.z)
            # none where a layer that differentiates the cost is given one that does not depend on z through autograd
            found = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
        times.append((_now(params) - start, draws))
        if chunk_size is None and count == 0:
            size = max(1, int(max_bytes / (saved.total / draws)))
        gradient = torch.zeros_like(leaf, dtype=torch.float64) if found is None else found.double()
        gradient = gradient if offset is None else gradient + offset
        if reference is not None:
            norms = gradient.flatten(1).norm(dim=1) * reference.norm()
            cosines = cosines + ((gradient.flatten(1) @ reference.flatten()) / norms.clamp_min(1e-300)).sum()
        # Chan's update of mean and sum of squares by a whole pass
        pass_mean = gradient.mean(0)
        delta, total = pass_mean - mean, count + draws
        squares = squares + (gradient - pass_mean).square().sum(0) + delta.square() * (count * draws / total)
        mean = mean + delta * (draws / total)
        groups.index_add_(0, torch.arange(count, total, device=params.device) % len(groups), gradient)
        count, evaluations = total, max(evaluations, sample.z.shape[0])
    sizes = torch.arange(count, device=params.device).remainder(len(groups)).bincount(minlength=len(groups))
    timed = times[1:] or times
    return Moments(
        mean=mean,
        variance=squares / max(count - 1, 1),
        groups=groups / sizes.view(-1, *[1] * params.dim()),
        num_draws=count,
        cosine=None if reference is None else float(cosines) / count,
        evaluations=evaluations,
        seconds=sum(seconds for seconds, _ in timed) / sum(draws for _, draws in timed),
        precision=torch.finfo(params.dtype).eps,
    )


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
