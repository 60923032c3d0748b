"""The data modules: what they promise, what they refuse, and the real files where there are any."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lightning_modules import VAE
from lightning_modules.data import MNIST, BinarizedMNIST, Digits, FashionMNIST, ImageDataModule, TensorData


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
        VAE, ImageDataModule, subclass_mode_data=True, run=False,
        save_config_callback=None, seed_everything_default=False,
        trainer_defaults={"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        args=["--data", "Digits", "--data.batch_size", "64", "--data.binarization", "static"],
    )  # fmt: skip
    assert isinstance(cli.datamodule, Digits)
    assert (cli.datamodule.batch_size, cli.datamodule.binarization) == (64, "static")


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
