"""The mean over all examples, which is exact whatever the batches and ranks, and the check that all metrics share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ExampleMean", "some"]


class ExampleMean(Metric):
    r"""Mean over all examples of a number per example, whatever the sizes of batches and of the ranks' shards.

    .. math:: \frac{1}{N} \sum_{n=1}^N v_n

    The state is one sum and one count in double precision, added over the ranks: a run on several processes gives the
    value of one process on the joined data, up to rounding in double precision.

    Args:
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In ``update``, values that are not ``[B]``; in ``compute``, no example at all.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import ExampleMean
        >>> metric = ExampleMean()
        >>> metric.update(torch.tensor([1.0, 2.0, 3.0]))
        >>> metric.update(torch.tensor([6.0]))
        >>> float(metric.compute())
        3.0
    """

    full_state_update = False
    is_differentiable = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add the values ``[B]`` of a batch."""
        self.add(values)

    def add(self, values: Tensor) -> None:
        """Add values ``[B]`` to the sum."""
        if values.dim() != 1:
            raise ValueError(
                f"needed one value per example, [B], got {list(values.shape)}; do not reduce over a batch."
            )
        # double(): a model moved to half precision takes its metrics along
        self.total = self.total.double() + values.detach().double().sum()
        self.count = self.count.double() + len(values)

    def compute(self) -> Tensor:
        """The mean, a scalar."""
        return self.total / some(self.count)


def some(count: Tensor) -> Tensor:
    """A count of examples that is not zero."""
    if not bool((count > 0).all()):
        raise ValueError("needed at least one example, got none; call update() before compute().")
    return count
