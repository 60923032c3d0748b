"""What the processes of a run must agree on: the mean over a joined batch, the number of batches."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

__all__ = ["check_equal_batches", "check_strategy", "mean_over_ranks"]

SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def mean_over_ranks(values: Tensor) -> Tensor:
    r"""A loss whose gradient, averaged over the ranks, is that of the mean over the joined batch.

    Data-parallel training averages the gradients of the ranks, each counting the same. Of W ranks with :math:`n_r` rows
    each this returns :math:`W \sum_i v_i / \sum_r n_r`, which is the plain mean where all :math:`n_r` are equal.

    Args:
        values: One value per row ``[n_r]``.

    Example:
        >>> mean_over_ranks(torch.tensor([1.0, 3.0]))  # one process
        tensor(2.)
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values.mean()
    rows = torch.full((), float(len(values)), device=values.device)
    dist.all_reduce(rows)
    return values.sum() * (dist.get_world_size() / rows)


def check_equal_batches(num_batches: int | float, device: torch.device) -> None:
    """Refuse ranks with different numbers of training batches, which would wait for each other for ever.

    Args:
        num_batches: Of this rank in an epoch; infinite where it is not known.
        device: Where the ranks talk.

    Raises:
        ValueError: The numbers differ; on all ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    mine = torch.tensor([-1 if num_batches == float("inf") else int(num_batches)], device=device)
    every = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    counts = [int(count) for count in every]
    if len(set(counts)) > 1:
        raise ValueError(
            f"needed the same number of training batches on every rank, got {counts} of ranks 0 to {len(counts) - 1}: "
            "the others would wait for ever for a rank that has none left. Drop the surplus, or set "
            f"limit_train_batches={min(counts)}."
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that split the model itself.

    Args:
        strategy: Of the Trainer.

    Raises:
        ValueError: The parameters would be sharded.
    """
    if isinstance(strategy, SHARDED):
        raise ValueError(
            f"needed a strategy that gives every rank the whole model, got {type(strategy).__name__}: it averages the "
            "gradients of the modules that it shards, and would leave a layer's own parameters and its running "
            "statistics to each rank. Use strategy='ddp'; activation checkpointing of the networks saves memory."
        )
