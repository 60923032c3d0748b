"""Sharding, drawing and resuming: what each rank sees in each epoch, on any number of processes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_modules.data import BatchLoader, Digits, ImageDataset, ShardedBatches

sizes = st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5)).filter(lambda t: t[0] >= t[2])


def shards(n: int, b: int, world: int, shuffle: bool, epoch: int = 0) -> list[list[Tensor]]:
    samplers = [ShardedBatches(n, b, shuffle=shuffle, rank=r, world_size=world) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert [len(s) for s in samplers] == [len(x) for x in batches]
    return batches


@settings(deadline=None, max_examples=200)
@given(sizes)
def test_evaluation_sees_each_example_once_in_equally_many_batches_on_all_ranks(size: tuple[int, int, int]) -> None:
    n, b, world = size
    ranks = shards(n, b, world, shuffle=False)
    assert sorted(torch.cat([i for rank in ranks for i in rank]).tolist()) == list(range(n))
    assert len({len(rank) for rank in ranks}) == 1
    assert all(1 <= len(i) <= max(b, 2) for rank in ranks for i in rank)


@settings(deadline=None, max_examples=200)
@given(sizes, st.integers(0, 5))
def test_training_gives_all_ranks_equal_batches_without_duplicates(size: tuple[int, int, int], epoch: int) -> None:
    n, b, world = size
    ranks = shards(n, b, world, shuffle=True, epoch=epoch)
    seen = torch.cat([i for rank in ranks for i in rank]).tolist()
    assert len(seen) == len(set(seen)) == n - n % world
    assert len({tuple(map(len, rank)) for rank in ranks}) == 1
    assert all(len(i) == b for rank in ranks for i in rank[:-1])


@settings(deadline=None, max_examples=200)
@given(sizes, st.booleans())
def test_a_batch_of_all_ranks_is_the_batch_of_one_process(size: tuple[int, int, int], shuffle: bool) -> None:
    n, b, world = size
    if b == 1 and not shuffle:
        n -= n % world  # the documented exception
    elif shuffle:
        n -= n % world  # otherwise one process sees the rest of the division too
    ranks, whole = shards(n, b, world, shuffle), shards(n, b * world, 1, shuffle)[0]
    joined = [torch.cat(batch).sort().values.tolist() for batch in zip(*ranks, strict=True)]
    assert joined == [batch.sort().values.tolist() for batch in whole]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ShardedBatches(100, 7, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return torch.cat(list(sampler)).tolist()

    assert order(0, 1) == order(0, 1)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_more_processes_than_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="each of 4 processes, got 3"):
        ShardedBatches(3, 2, shuffle=False, rank=0, world_size=4)
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        ShardedBatches(3, 0, shuffle=False)


def dynamic_set(n: int = 90) -> ImageDataset:
    pixels = torch.randint(0, 256, (n, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(pixels, torch.arange(n), levels=255, dynamic=True)


def batches_of(loader: BatchLoader, epoch: int) -> list[tuple[Tensor, Tensor]]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def equal(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


def test_two_ranks_together_draw_what_one_process_draws() -> None:
    data = dynamic_set()
    one = batches_of(BatchLoader(data, ShardedBatches(90, 20, shuffle=True)), 3)
    two = [batches_of(BatchLoader(data, ShardedBatches(90, 10, shuffle=True, rank=r, world_size=2)), 3) for r in (0, 1)]
    for (x, y), (x0, y0), (x1, y1) in zip(one, *two, strict=True):
        assert torch.equal(x[0::2], x0) and torch.equal(x[1::2], x1)
        assert torch.equal(y[0::2], y0) and torch.equal(y[1::2], y1)


@pytest.mark.parametrize("seen", [0, 1, 4])
def test_a_restored_loader_gives_the_rest_of_its_epoch_and_then_whole_epochs(seen: int) -> None:
    def make() -> BatchLoader:
        return BatchLoader(dynamic_set(), ShardedBatches(90, 20, shuffle=True))

    left_alone, killed, restored = make(), make(), make()
    whole = batches_of(left_alone, 2)
    killed.sampler.set_epoch(2)
    iterator = iter(killed)
    for _ in range(seen):
        next(iterator)
    restored.load_state_dict(killed.state_dict())
    assert restored.state_dict() == killed.state_dict()  # also when killed again before its first batch
    assert equal(batches_of(restored, 2), whole[seen:])
    assert equal(batches_of(restored, 3), batches_of(left_alone, 3))
    assert equal(batches_of(restored, 2), whole)


def test_a_loader_of_another_global_batch_size_refuses_to_continue_inside_an_epoch() -> None:
    loader = BatchLoader(dynamic_set(), ShardedBatches(90, 20, shuffle=True))
    next(iter(loader))
    other = BatchLoader(dynamic_set(), ShardedBatches(90, 30, shuffle=True))
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"batch_size \* world_size = 20 .* got 30"):
        next(iter(other))
    other.load_state_dict(loader.state_dict())
    assert len(batches_of(other, 1)) == 3  # at the start of another epoch it does not matter


class Recorder(LightningModule):
    """Writes down the batches it is trained and validated on, and uses the global generator meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, int, str]] = []
        self.labels: list[list[int]] = []
        self.validated: list[str] = []

    def digest(self, batch: tuple[Tensor, Tensor]) -> str:
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in batch)).hexdigest()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        torch.rand(3)
        self.seen.append((self.current_epoch, index, self.digest(batch)))
        self.labels.append(batch[1].tolist())
        return (self.scale * batch[0]).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        torch.rand(5)
        self.validated.append(self.digest(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path | None, resume: Path | None = None, **options: Any) -> Recorder:
    """Train; keeps a checkpoint of each step in the folder, if there is one."""
    callbacks: list[Callback] = []
    if folder:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1))
    silent: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=callbacks, enable_checkpointing=bool(folder), **silent, **options
    )
    module = Recorder()
    trainer.fit(module, datamodule=Digits(batch_size=300, eval_batch_size=100), ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed runs save nothing
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3},
        {"max_steps": 13},
        {"max_epochs": 3, "limit_train_batches": 4},
        {"max_epochs": 3, "val_check_interval": 2},
    ],
    ids=["epochs", "steps", "limited", "val_inside"],
)
def test_a_run_resumed_at_any_step_sees_the_batches_of_a_run_left_alone(
    options: dict[str, Any], tmp_path: Path
) -> None:
    left_alone = fit(tmp_path, **options)  # 5 batches (4 where limited) an epoch
    assert len({digest for *_, digest in left_alone.seen}) == len(left_alone.seen) >= 12
    for step in range(1, len(left_alone.seen)):
        resumed = fit(None, tmp_path / f"step={step}.ckpt", **options)
        assert resumed.seen == left_alone.seen[step:], step
        assert set(resumed.validated) <= set(left_alone.validated)


def test_validation_batches_are_the_same_in_each_epoch() -> None:
    module = fit(None, max_epochs=2, num_sanity_val_steps=0)
    assert len(module.validated) == 4  # 180 examples by 100, twice
    assert module.validated[:2] == module.validated[2:]
    assert len(set(module.validated)) == 2


def test_overfitting_sees_the_same_examples_in_each_epoch() -> None:
    with pytest.warns(UserWarning, match="requested to overfit"):
        module = fit(None, max_epochs=2, overfit_batches=2)
    assert module.labels[:2] == module.labels[2:] and module.labels[0] != module.labels[1]
