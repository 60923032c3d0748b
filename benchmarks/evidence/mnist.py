"""MNIST in memory, and batches of it that are binarized anew each time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_modules.data import MNIST

__all__ = ["batches", "pixels"]


def pixels(root: str | None, count: int = 50000) -> tuple[Tensor, Tensor]:
    """Grey values in [0, 1] of the first ``count`` training images and of the test images ``[N, 784]``."""
    arrays = MNIST(root=root).load()
    return arrays.train_pixels[:count].flatten(1) / 255, arrays.test_pixels.flatten(1) / 255


def batches(images: Tensor, batch_size: int, seed: int, *, binarize: bool = True) -> Iterator[Tensor]:
    """Endless batches ``[batch_size, 784]`` in a new order each epoch, each pixel drawn anew as Bernoulli(grey).

    They depend on the seed alone, so that all estimators see the same data.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    while True:
        for index in torch.randperm(len(images), generator=generator, device=images.device).split(batch_size):
            if len(index) == batch_size:
                x = images[index]
                yield torch.bernoulli(x, generator=generator) if binarize else x
