"""From one cost to the loss of all the layers inside a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stochastic_layers.layer import Sample

__all__ = ["surrogate"]


def surrogate(cost: Tensor, samples: Sequence[Sample]) -> Tensor:
    r"""The loss of a model with several stochastic layers, from one cost.

    Two arrangements are understood, and their combinations. *Nested*: a later layer was computed from an earlier one's
    draws, so its batch shape begins with the earlier one's S. *Parallel*: layers were drawn side by side from the same
    batch, draw k of one together with draw k of the others (or one draw of one with every draw of another). Nested
    layers are reduced from the deepest outwards: the surrogate of layer l is the cost of layer l - 1, so that each
    layer is credited with the expected cost of what it caused, :math:`E[f \mid z_1 \dots z_l]`.

    Args:
        cost: One value per draw of every layer and per example, ``[S_L, ..., S_1, *leading batch]``, where the S of
            layers that draw one point is left out (as ``layer(params)`` leaves it out).
        samples: The samples in the order in which they were drawn, as :func:`capture` lists them.

    Returns:
        ``[*leading batch]``; its value is the estimate of the expected cost. Average it yourself.

    Raises:
        ValueError: No samples, or a cost that does not fit them.
    """
    if not samples:
        raise ValueError(
            "needed at least one sample, got none; call the model inside `with sl.capture() as samples:`, in the same "
            "thread."
        )
    remaining = list(samples)
    while remaining:
        sample = remaining.pop(_deepest(cost, remaining))
        if _size(sample) == 1:
            cost = sample.surrogate(cost.unsqueeze(0))
            continue
        parallel = [s for s in remaining if _beside(sample, s, cost)]
        if parallel and not all(s.equally_weighted for s in (sample, *parallel)):
            raise ValueError(
                "needed equally weighted draws from layers that are drawn side by side with several points each, got a "
                "layer with auxiliary or enumerated points; compute one layer from the other's draws instead (nested)."
            )
        loss = sample.surrogate(cost)
        for other in parallel:
            # its credit alone: the gradient through the cost itself is in the loss already
            extra = other.surrogate(cost) - cost.mean(0)
            loss = loss + (extra - extra.detach())
            remaining.remove(other)
        cost = loss
    return cost


def _size(sample: Sample) -> int:
    return sample.z.shape[0]


def _batch(sample: Sample) -> list[int]:
    return list(sample.q.batch_shape)


def _fits(sample: Sample, cost: Tensor) -> bool:
    """Whether the cost begins with the draws and the batch of the sample; a single draw has no dimension in it."""
    shape = list(cost.shape)
    points = [_size(sample)] if _size(sample) > 1 else []
    return shape == [*points, *_batch(sample)][: len(shape)]


def _beside(sample: Sample, other: Sample, cost: Tensor) -> bool:
    """Whether draw k of one belongs to draw k of the other, rather than the sample being drawn from the other's."""
    if _size(other) != _size(sample) or not _fits(other, cost):
        return False
    outer = [_size(other), *_batch(other)]
    n = min(len(outer), len(_batch(sample)))
    return _batch(other) == _batch(sample) or n < 2 or _batch(sample)[:n] != outer[:n]


def _deepest(cost: Tensor, samples: Sequence[Sample]) -> int:
    """Index of the sample to reduce next: a single draw that fits, else the several that are the cost's outermost."""
    found: list[tuple[bool, int]] = []
    for index, sample in enumerate(samples):
        # a single draw beside a parallel layer of several waits until that layer's S is reduced
        waits = _size(sample) == 1 and any(_size(s) > 1 and _batch(s) == _batch(sample) for s in samples)
        if _fits(sample, cost) and not waits:
            found.append((_size(sample) == 1, index))
    if found:
        return max(found)[1]  # the last one, as it may have been computed from those before it
    raise ValueError(
        f"needed a cost whose shape begins with the draws and batch of the captured layers, got {list(cost.shape)} for "
        f"layers of (draws, batch) {[(_size(s), tuple(_batch(s))) for s in samples]}; keep one value per draw and "
        "example, without a dimension for layers that draw one point."
    )
