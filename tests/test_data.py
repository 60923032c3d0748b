"""The data modules: exact sharding, exact resuming, verified files."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from lightning_modules.data import (
    MNIST,
    BatchLoader,
    BinarizedMNIST,
    DataFileError,
    Digits,
    FashionMNIST,
    ImageDataModule,
    ImageDataset,
    MissingFileError,
    ShardedBatches,
    TensorData,
)
from lightning_modules.data.binarize import bernoulli, fixed_permutation, mix64
from lightning_modules.data.files import ArrayFile, DataFiles, read_array

# --- Bernoulli draws


def test_each_pixel_is_on_with_its_probability() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    size = 40_000
    drawn = bernoulli(levels.repeat(size, 1), 255, mix64(3), torch.arange(size)).double().mean(0)
    p = levels.double() / 255
    error = (p * (1 - p) / size).sqrt()
    assert (5 * error[128:] < 0.05 * p[128:]).all()  # enough draws to see a 5 % bias of each probability above a half
    assert ((drawn - p).abs() <= 5 * error).all()  # with equality at 0 and 255: those never change


def test_float_pixels_are_drawn_like_integer_ones() -> None:
    pixels = torch.randint(0, 256, (500, 1, 9, 9), dtype=torch.uint8)  # an odd number of pixels
    one, other = (bernoulli(x, k, 7, torch.arange(500)) for x, k in ((pixels, 255), (pixels.float() / 255, 1)))
    assert (one != other).float().mean() < 1e-3  # thresholds are rounded differently in the 24th bit
    assert one.float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("shift", ["pixel", "example", "epoch", "half"])
def test_draws_of_neighbours_are_independent(shift: str) -> None:
    half = torch.full((2000, 100), 128, dtype=torch.uint8)
    x = bernoulli(half, 256, mix64(0, 0), torch.arange(2000)).double() - 0.5
    y = bernoulli(half, 256, mix64(0, 1), torch.arange(2000)).double() - 0.5
    pairs = {
        "pixel": (x[:, 1:], x[:, :-1]),
        "example": (x[1:], x[:-1]),
        "epoch": (x, y),
        "half": (x[:, :50], x[:, 50:]),
    }
    a, b = pairs[shift]
    z = 4 * (a * b).sum() / a.numel() ** 0.5  # a*b is +-1/4; a correlation of 5 % would give z > 20
    assert 0.05 * a.numel() ** 0.5 > 15
    assert z.abs() < 5


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    pixels = torch.randint(0, 256, (50, 1, 4, 5), dtype=torch.uint8)
    whole = bernoulli(pixels, 255, 11, torch.arange(50))
    some = torch.tensor([41, 3, 17])
    assert torch.equal(bernoulli(pixels[some], 255, 11, some), whole[some])


def test_mix64_depends_on_each_word_and_their_order() -> None:
    words = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**63, 0), (-1,), (0, 0, 0)]
    assert len({mix64(*w) for w in words}) == len(words)
    assert mix64(1234567) == 6457827717110365317  # the published first number of SplitMix64 seeded with this
    assert fixed_permutation(1797).sort().values.equal(torch.arange(1797))


# --- sharding

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


# --- loading


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


# --- data modules


def test_digits_have_the_promised_shapes_and_disjoint_parts() -> None:
    data = Digits(batch_size=64, binarization="none")
    assert (data.data_shape, data.num_classes) == ((1, 8, 8), 10)  # before setup
    data.setup()
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((64, 1, 8, 8), torch.float32, (64,), torch.int64)
    parts = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert torch.cat([part.labels for part in parts]).bincount().tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    images = torch.cat([part.pixels for part in parts]).flatten(1)
    assert (len(np.unique(images, axis=0)), int(images.max())) == (1797, 16)  # no image is in two parts
    assert torch.allclose(data.pixel_mean, data.train_set[:][0].mean(0))
    assert x.max() == 1 and len(set(x.flatten().tolist())) == 17


def test_dynamic_training_images_change_with_epoch_and_seed_and_held_out_ones_do_not() -> None:
    def make(seed: int) -> Digits:
        data = Digits(seed=seed, binarization="dynamic")
        data.setup()
        return data

    one, other = make(0), make(1)
    indices = torch.arange(len(one.train_set))
    draws = [d.train_set.batch(indices, epoch)[0] for d in (one, other) for epoch in (0, 1)]
    assert all(set(x.flatten().tolist()) == {0.0, 1.0} for x in draws)
    grey = one.train_set.pixels.float() / 16
    p = (2 * grey * (1 - grey)).mean()  # two independent draws of a pixel differ with this probability
    for i, x in enumerate(draws):
        for u in draws[:i]:
            assert (x != u).float().mean() == pytest.approx(float(p), rel=0.05)
    for name in ("val_set", "test_set"):
        first, second = getattr(one, name), getattr(other, name)
        assert torch.equal(first.batch(torch.arange(9), 0)[0], second.batch(torch.arange(9), 5)[0])
        assert set(first[:][0].flatten().tolist()) == {0.0, 1.0}


def test_static_images_never_change_and_share_the_draw_of_dynamic_validation() -> None:
    static, dynamic = Digits(binarization="static", seed=1), Digits(val_size=300, binarization="dynamic")
    static.setup()
    dynamic.setup()
    indices = torch.arange(len(static.train_set))
    x = static.train_set.batch(indices, 0)[0]
    assert torch.equal(x, static.train_set.batch(indices, 1)[0]) and set(x.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(dynamic.val_set.pixels[-180:], static.val_set.pixels)  # the split does not matter
    assert torch.equal(static.pixel_mean, x.mean(0))


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    data = Digits()
    data.setup()
    list(data.train_dataloader())
    list(data.test_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_no_validation_set_means_no_loader() -> None:
    data = Digits(val_size=0)
    data.setup()
    assert data.val_dataloader() == [] and len(data.train_set) == 1437


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size >= 1, got 0"),
        ({"val_size": -1}, "val_size >= 0, got -1"),
        ({"binarization": "soft"}, "binarization, got 'soft'"),
    ],
)
def test_bad_options_fail_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**options)


def test_holding_out_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match="val_size < 1437"):
        Digits(val_size=1437).setup()
    with pytest.raises(RuntimeError, match="call prepare_data"):
        _ = Digits().pixel_mean


def test_own_tensors_make_a_data_module() -> None:
    images = torch.rand(50, 2, 3, 4)
    data = TensorData(images, torch.arange(50) % 3, test_size=10, val_size=5, binarization="none")
    data.setup()
    assert (data.data_shape, data.num_classes) == ((2, 3, 4), 3)
    assert torch.equal(torch.cat([d[:][0] for d in (data.train_set, data.val_set, data.test_set)]), images)
    unlabelled = TensorData((images * 255).to(torch.uint8))
    unlabelled.setup()
    x, y = unlabelled.train_set[0]
    assert (x.shape, int(y), unlabelled.num_classes) == ((2, 3, 4), -1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(5, 4, 4),), r"needed images \[N, C, H, W\]"),
        ((torch.randn(5, 1, 4, 4),), "rescale"),
        ((torch.full((5, 1, 4, 4), float("nan")),), "rescale"),
        ((torch.zeros(5, 1, 4, 4, dtype=torch.int64),), "uint8 or as floating point"),
        ((torch.rand(5, 1, 4, 4), torch.zeros(4)), r"needed labels \[5\]"),
        ((torch.rand(5, 1, 4, 4), None, 5), "test_size < 5"),
    ],
)
def test_bad_tensors_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorData(*arguments)


def test_the_command_line_builds_a_data_module_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    cli = LightningCLI(
        Recorder, ImageDataModule, subclass_mode_data=True, run=False,
        save_config_callback=None, seed_everything_default=False,
        trainer_defaults={"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        args=["--data", "Digits", "--data.batch_size", "64", "--data.binarization", "static"],
    )  # fmt: skip
    assert isinstance(cli.datamodule, Digits)
    assert (cli.datamodule.batch_size, cli.datamodule.binarization) == (64, "static")


# --- files

SHAPE = (7, 3, 2)
ARRAY = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
BITS = ARRAY % 2


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def amat(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return (
        "".join(" ".join(map(str, row)) + " \n" for row in array.reshape(len(array), -1)).replace(" \n", "\n").encode()
    )


FILES: dict[str, tuple[bytes, np.ndarray[Any, np.dtype[np.uint8]]]] = {
    "a-idx3-ubyte": (idx(ARRAY), ARRAY),
    "a-idx3-ubyte.gz": (gzip.compress(idx(ARRAY)), ARRAY),
    "a.npz": (npz(a=ARRAY, b=ARRAY[:2]), ARRAY),
    "fortran.npz": (npz(a=np.asfortranarray(ARRAY)), ARRAY),
    "a.amat": (amat(BITS), BITS),
}


def spec(name: str) -> ArrayFile:
    return ArrayFile(SHAPE, digest(FILES[name][1].tobytes()), (name,), key="a")


@pytest.mark.parametrize("name", FILES)
def test_each_format_is_read_exactly(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name][0])
    array = read_array(tmp_path / name, spec(name))
    assert array.dtype == torch.uint8 and np.array_equal(array.numpy(), FILES[name][1])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(FILES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=4),
    length=st.floats(0, 1),
    tail=st.binary(max_size=3),
)
def test_a_damaged_file_is_either_read_exactly_or_named_in_the_error(
    scratch: Path, name: str, flips: list[tuple[float, int]], length: float, tail: bytes
) -> None:
    good, array = FILES[name]
    data = bytearray(good)
    for place, bit in flips:
        data[int(place * len(data))] ^= 1 << bit
    (scratch / name).write_bytes(bytes(data[: round(length * len(data))]) + tail)
    try:
        read = read_array(scratch / name, spec(name))
    except DataFileError as error:
        assert str(scratch / name) in str(error) and "needed" in str(error) and "got" in str(error)
    else:
        assert np.array_equal(read.numpy(), array)


def huge_npz() -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (2**50, 4), "fortran_order": False, "descr": "|u1"})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", header.getvalue())
    return file.getvalue()


BAD_FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "magic": (
        "a-idx3-ubyte",
        lambda: idx(ARRAY.reshape(7, 6)),
        "magic 0x00000803 and sizes .7, 3, 2., got the header 00000802",
    ),
    "sizes": ("a-idx3-ubyte.gz", lambda: gzip.compress(idx(ARRAY[:5])), "got the header 0000080300000005"),
    "huge idx": ("a-idx3-ubyte", lambda: struct.pack(">4I", 0x0803, *[2**32 - 1] * 3), "got the header"),
    "short": ("a-idx3-ubyte", lambda: idx(ARRAY)[:-1], "needed 42 bytes of data, got 41"),
    "long": ("a-idx3-ubyte.gz", lambda: gzip.compress(idx(ARRAY) + b"x"), "needed 42 bytes of data, got more"),
    "bomb": (
        "a-idx3-ubyte.gz",
        lambda: gzip.compress(idx(ARRAY) + bytes(2 * 10**7)),
        "needed 42 bytes of data, got more",
    ),
    "truncated gzip": ("a-idx3-ubyte.gz", lambda: gzip.compress(idx(ARRAY))[:-9], "EOFError"),
    "no gzip": ("a-idx3-ubyte.gz", lambda: idx(ARRAY), "BadGzipFile"),
    "empty": ("a-idx3-ubyte.gz", lambda: b"", "got the header ;"),
    "other data": ("a-idx3-ubyte", lambda: idx(np.flip(ARRAY)), "needed data with SHA-256"),
    "keys": ("a.npz", lambda: npz(b=ARRAY), r"needed the key 'a' .* got the keys \['b'\]"),
    "dtype": ("a.npz", lambda: npz(a=ARRAY.astype(np.float32)), r"got float32 \[7, 3, 2\]"),
    "shape": ("a.npz", lambda: npz(a=ARRAY[:3]), r"needed a as uint8 \[7, 3, 2\], got uint8 \[3, 3, 2\]"),
    "pickle": ("a.npz", lambda: npz(a=np.full(SHAPE, None)), "got object"),
    "huge npz": ("a.npz", huge_npz, "got uint8 .1125899906842624, 4."),
    "no zip": ("a.npz", lambda: b"PK nothing", "BadZipFile"),
    "text": ("a.amat", lambda: amat(BITS)[:-4], "needed 84 bytes of text, got 80"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_wrong_file_is_named_with_what_was_needed_and_costs_no_memory(case: str, tmp_path: Path) -> None:
    name, make, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(DataFileError, match=message) as caught:
            read_array(tmp_path / name, spec(name))
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert str(tmp_path / name) in str(caught.value)


IMAGES = {name: np.full((20, 28, 28), i, np.uint8) for i, name in enumerate(("train-images", "t10k-images"))}
LABELS = {name: (np.arange(20) % 10).astype(np.uint8) for name in ("train-labels", "t10k-labels")}


def tiny_files(mirrors: tuple[str, ...] = ()) -> tuple[DataFiles, dict[str, bytes]]:
    """MNIST with 20 images, and the contents of its files."""
    arrays, contents = {}, {}
    for name, array in (IMAGES | LABELS).items():
        names = MNIST.files.arrays[name].names
        contents[names[0]] = gzip.compress(idx(array), mtime=0)
        arrays[name] = ArrayFile(
            array.shape, digest(array.tobytes()), names, download=names[0], download_sha256=digest(contents[names[0]])
        )
    return DataFiles(MNIST.files.folders, mirrors, arrays), contents


@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw", "MNIST", ""])
@pytest.mark.parametrize("form", [0, 1, 2], ids=["gz", "plain", "dotted"])
def test_files_are_found_in_each_layout(
    folder: str, form: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, contents = tiny_files()
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for array in files.arrays.values():
        data = contents[array.names[0]]
        (tmp_path / folder / array.names[form]).write_bytes(data if form == 0 else gzip.decompress(data))
    monkeypatch.setattr(MNIST, "files", files)
    monkeypatch.setenv("STOCHASTIC_LAYERS_DATA", str(tmp_path))
    found = MNIST(val_size=5, binarization="none")
    found.prepare_data()
    found.setup()
    assert torch.equal(found.train_set.labels, torch.arange(15) % 10)
    assert torch.equal(found.test_set[:][0], torch.full((20, 1, 28, 28), 1 / 255))


def test_missing_files_are_named_with_the_places_and_the_remedy(tmp_path: Path) -> None:
    data = FashionMNIST(root=str(tmp_path))
    data.prepare_data()
    with pytest.raises(MissingFileError) as caught:
        data.setup()
    for part in (
        "train-images-idx3-ubyte.gz",
        str(tmp_path / "FashionMNIST/raw"),
        "STOCHASTIC_LAYERS_DATA",
        "download=True",
    ):
        assert part in str(caught.value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    folder = tmp_path / "served"
    (folder / "good").mkdir(parents=True)
    (folder / "bad").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", folder
        httpd.shutdown()
        thread.join()


def test_a_download_skips_bad_mirrors_and_is_verified(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = server
    files, contents = tiny_files((f"{url}absent/", f"{url}bad/", f"{url}good/"))
    for name, data in contents.items():
        (folder / "good" / name).write_bytes(data)
        (folder / "bad" / name).write_bytes(data[:-1])
    monkeypatch.setattr(MNIST, "files", files)
    data_module = MNIST(root=str(tmp_path / "root"), val_size=5, download=True)
    data_module.prepare_data()
    data_module.setup()
    assert len(data_module.train_set) == 15
    raw = tmp_path / "root/MNIST/raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(contents)  # and nothing temporary
    (folder / "good").rename(folder / "gone")
    data_module.prepare_data()  # nothing is missing


def test_a_failed_download_tells_why_and_leaves_nothing(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = server
    files, contents = tiny_files((f"{url}absent/", f"{url}bad/", "http://127.0.0.1:9/"))
    for name in contents:
        (folder / "bad" / name).write_bytes(b"<html>not found</html>")
    monkeypatch.setattr(MNIST, "files", files)
    with pytest.raises(MissingFileError, match=r"(?s)Tried .*HTTP Error 404.*needed SHA-256 .*Connection refused"):
        MNIST(root=str(tmp_path / "root"), download=True).prepare_data()
    assert list((tmp_path / "root/MNIST/raw").iterdir()) == []


# --- the real files


@pytest.mark.parametrize(
    ("make", "mean"),
    [
        (partial(MNIST, binarization="none"), 0.130660),
        (partial(FashionMNIST, binarization="none"), 0.286041),
        (BinarizedMNIST, 0.130660),  # a draw of MNIST; its standard error is 3e-5
    ],
    ids=["mnist", "fashion", "binarized"],
)
def test_the_real_files_are_read(make: Callable[..., ImageDataModule], mean: float, data_root: Path) -> None:
    data = make(root=str(data_root))
    data.setup()
    parts = [data.train_set, data.val_set, data.test_set]
    assert [tuple(part.pixels.shape) for part in parts] == [(n, 1, 28, 28) for n in (50000, 10000, 10000)]
    total = sum(int(part.pixels.sum()) for part in parts[:2])
    assert total / (60000 * 784 * data.levels) == pytest.approx(mean, abs=5e-5)
    labels = torch.cat([part.labels for part in parts])
    assert sorted(set(labels.tolist())) == (list(range(10)) if data.num_classes else [-1])
