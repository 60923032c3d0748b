"""Whole batches out of memory: sharded over ranks, reproducible from (seed, epoch), resumable inside an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lightning_modules.data.binarize import bernoulli, mix64

__all__ = ["BatchLoader", "ImageDataset", "ShardedBatches"]


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory, one tensor each; indexing by a tensor gives a whole batch.

    Args:
        pixels: ``[N, C, H, W]``, uint8 in ``0..levels`` or float32 in [0, 1].
        labels: ``[N]``, int64.
        levels: The pixel value that stands for one.
        dynamic: Take pixels as probabilities and draw them anew in each epoch.
        seed: Of these draws.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, levels: int = 1, dynamic: bool = False, seed: int = 0
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.levels = levels
        self.dynamic = dynamic
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The batch ``(x, y)`` of the examples ``indices`` ``[B]``: x ``[B, C, H, W]`` float32, y ``[B]`` int64."""
        pixels = self.pixels.index_select(0, indices)  # half the time of [indices]
        if self.dynamic:
            pixels = bernoulli(pixels, self.levels, mix64(self.seed, epoch), indices)
            return pixels.float(), self.labels[indices]
        return pixels.float() / self.levels, self.labels[indices]

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """Examples as they are in epoch 0; an integer gives a single one, without the batch dimension."""
        indices = torch.arange(len(self))[index]
        if indices.dim():
            return self.batch(indices, epoch=0)
        x, y = self.batch(indices[None], epoch=0)
        return x[0], y[0]


class ShardedBatches(Sampler[Tensor]):
    """Yields the indices ``[B]`` of one rank's batches; batch b of all ranks is batch b of one process, dealt out.

    With ``shuffle`` (training) the order is a function of (seed, epoch). Every rank gets the same number of batches of
    the same sizes: the last ``num_examples % world_size`` examples of the order sit out the epoch, others in the next.
    The last batch may be smaller.

    Without it (evaluation) every example is seen exactly once over all ranks, and yet every rank gets the same number
    of non-empty batches, since ranks that differ in the number of forward passes would wait for each other for ever.
    For this the batches are of nearly equal size instead of full ones and a rest. (Only with ``batch_size=1`` and a
    remainder of examples does this need batches of two.)

    Args:
        num_examples: Size of the data set.
        batch_size: Examples in a batch of one rank.
        shuffle: See above.
        seed: Of the order.
        rank: Of this process; of ``torch.distributed`` by default, 0 where that is not initialised.
        world_size: Number of processes; likewise, 1.

    Raises:
        ValueError: ``batch_size`` < 1, or fewer examples than processes.

    Example:
        >>> [batch.tolist() for batch in ShardedBatches(5, batch_size=2, shuffle=False, rank=1, world_size=2)]
        [[1], [4]]
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = world_size if world_size is not None else dist.get_world_size() if distributed else 1
        self.rank = rank if rank is not None else dist.get_rank() if distributed else 0
        if batch_size < 1:
            raise ValueError(f"needed batch_size >= 1, got {batch_size}.")
        if num_examples < self.world_size:
            raise ValueError(
                f"needed at least one example for each of {self.world_size} processes, got {num_examples}; hold out a "
                "larger set or run fewer processes."
            )
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def global_batch_size(self) -> int:
        """Examples in a batch of all ranks together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        each = self.num_examples // self.world_size
        if self.shuffle:
            return -(-each // self.batch_size)
        return min(-(-self.num_examples // self.global_batch_size), each)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the trainer calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        batches: Iterable[Tensor]
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix64(self.seed, self.epoch))
            order = torch.randperm(self.num_examples, generator=generator)
            used, step = self.num_examples - self.num_examples % self.world_size, self.global_batch_size
            batches = (order[start : min(start + step, used)] for start in range(0, used, step))
        else:
            batches = torch.arange(self.num_examples).tensor_split(len(self))
        for batch in batches:
            yield batch[self.rank :: self.world_size]


class BatchLoader:
    """Iterates over batches ``(x, y)``, and continues inside an epoch after a restart.

    Not a ``torch.utils.data.DataLoader``: there is nothing to collate and no work worth a worker process, and a trainer
    would replace the sampler of one (for distributed runs, ``overfit_batches`` and prediction) and ask for workers.
    Lightning takes any iterable, sets the epoch of its ``sampler``, and keeps its state in checkpoints.

    Args:
        images: The data set.
        sampler: Which examples form a batch.
    """

    batch_sampler = None  # Lightning reads it where there is a `sampler`

    # called `images` because Lightning rebuilds what has a `dataset` as a DataLoader under `overfit_batches`
    def __init__(self, images: ImageDataset, sampler: ShardedBatches) -> None:
        self.images = images
        self.sampler = sampler
        self._position = (0, 0)  # epoch, batches handed out in it
        self._resume: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # a generator: this runs at the first next(), when the trainer has set the epoch
        epoch, start = self.sampler.epoch, 0
        state, self._resume = self._resume, {}
        if state and state["epoch"] == epoch:  # otherwise the checkpoint is of the end of an epoch
            start = state["batches"]
            if start and state["global_batch_size"] != self.sampler.global_batch_size:
                raise ValueError(
                    f"needed batch_size * world_size = {state['global_batch_size']} to continue inside an epoch, got "
                    f"{self.sampler.global_batch_size}; restore it, or resume from a checkpoint of the end of an epoch."
                )
        for number, indices in enumerate(islice(self.sampler, start, None), start):
            self._position = (epoch, number + 1)
            yield self.images.batch(indices, epoch)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches were handed out."""
        epoch, batches = self._position
        return {"epoch": epoch, "batches": batches, "global_batch_size": self.sampler.global_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that were handed out when the state was taken, once that epoch is set."""
        self._resume = dict(state_dict)
        self._position = (state_dict["epoch"], state_dict["batches"])  # for a checkpoint before the first batch
