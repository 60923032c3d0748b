"""The base of the data modules, and one for images of one's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_modules.data.binarize import bernoulli, mix64
from lightning_modules.data.loading import BatchLoader, ImageDataset, ShardedBatches

__all__ = ["Binarization", "ImageArrays", "ImageDataModule", "TensorData"]

Binarization = Literal["dynamic", "static", "none"]

# Fixed draws do not depend on the option `seed`, so that the curves of different runs are comparable.
_FIXED_TRAIN, _FIXED_TEST = mix64(1), mix64(2)
_BLOCK = 1000  # examples that are drawn at a time, to bound the memory for random bits


class ImageArrays(NamedTuple):
    """What a data set consists of: pixels ``[N, C, H, W]`` (uint8 or float32) and labels ``[N]`` (int64)."""

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor


class ImageDataModule(LightningDataModule, ABC):
    """Base of the image data modules; batches are ``(x, y)``: x ``[B, C, H, W]`` float32 in [0, 1], y ``[B]`` int64.

    A subclass states ``data_shape``, ``num_classes`` and ``levels`` and implements :meth:`load`. The data set is held
    in memory and whole batches are indexed out of it, so there is no work for worker processes and no option for them.

    Under several processes ``batch_size`` is that of each; see :class:`ShardedBatches` for who gets which examples.
    A run resumed inside an epoch continues with exactly the batches that were left, binarization included.

    Args:
        batch_size: Training examples in a batch.
        eval_batch_size: Validation and test examples in a batch at most; ``batch_size`` by default.
        binarization: ``"dynamic"``: pixels are probabilities and training pixels are drawn anew in each epoch, while
            validation and test images are one fixed draw; ``"static"``: training images are one fixed draw as well;
            ``"none"``: grey values.
        val_size: Number of training examples held out for validation, the last ones in the file.
        seed: Of the order of the training batches and of dynamic binarization. It is separate from the seed of the
            model, so that repeated runs can share their data or not. Held-out examples and fixed draws are always the
            same.

    Attributes:
        data_shape: Shape ``(C, H, W)`` of an image.
        num_classes: Number of classes, 0 where there are no labels (y is then -1).
        levels: The stored pixel value that stands for one.
        train_set, val_set, test_set: The data sets, after :meth:`setup`.

    Raises:
        ValueError: An option is out of range.
    """

    data_shape: tuple[int, int, int]
    num_classes: int
    levels: int
    train_set: ImageDataset
    val_set: ImageDataset
    test_set: ImageDataset

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        binarization: Binarization = "dynamic",
        val_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if binarization not in get_args(Binarization):
            raise ValueError(f"needed one of {get_args(Binarization)} as binarization, got {binarization!r}.")
        for option, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"needed {option} >= 1, got {value}.")
        if val_size < 0:
            raise ValueError(f"needed val_size >= 0, got {val_size}.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.binarization = binarization
        self.val_size = val_size
        self.seed = seed
        self.save_hyperparameters(ignore=["images", "labels"])

    @abstractmethod
    def load(self) -> ImageArrays:
        """Read the data set; validation examples are the last ones of its training part."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split and binarize; all stages at once, and only once.

        Raises:
            MissingFileError: A file is missing (a ``FileNotFoundError`` and ``ValueError``).
            DataFileError: A file is damaged or is another one (a ``ValueError``).
            ValueError: No training examples are left.
        """
        if hasattr(self, "train_set"):
            return
        arrays = self.load()
        size = len(arrays.train_labels) - self.val_size
        if size < 1:
            raise ValueError(
                f"needed val_size < {len(arrays.train_labels)}, the training examples, got {self.val_size}."
            )
        dynamic = self.binarization == "dynamic"
        self.train_set = ImageDataset(arrays.train_pixels[:size], arrays.train_labels[:size], levels=self.levels)
        self.val_set = ImageDataset(arrays.train_pixels[size:], arrays.train_labels[size:], levels=self.levels)
        self.test_set = ImageDataset(arrays.test_pixels, arrays.test_labels, levels=self.levels)
        if dynamic:
            self.train_set.dynamic, self.train_set.seed = True, self.seed
        elif self.binarization == "static":
            self.train_set = _fixed_draw(self.train_set, _FIXED_TRAIN)
        if self.binarization != "none":
            self.val_set = _fixed_draw(self.val_set, _FIXED_TRAIN, offset=size)
            self.test_set = _fixed_draw(self.test_set, _FIXED_TEST)

    @property
    def pixel_mean(self) -> Tensor:
        """Mean ``[C, H, W]`` of the training images, float32; under dynamic binarization over its draws too.

        Raises:
            RuntimeError: :meth:`setup` was not called.
        """
        if not hasattr(self, "train_set"):
            raise RuntimeError(
                "needed the training set for pixel_mean, got none; call prepare_data() and setup() first."
            )
        images = self.train_set
        total = images.pixels.sum(0, dtype=torch.float64)  # exact for integers
        return (total / (len(images) * images.levels)).float()

    def train_dataloader(self) -> BatchLoader:
        """Batches in an order of (seed, epoch); in the order of the file under ``Trainer(overfit_batches=...)``."""
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader(self.train_set, self.batch_size, shuffle=not overfit)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Batches in the order of the file; no loader for ``val_size`` 0."""
        return self._loader(self.val_set, self.eval_batch_size or self.batch_size) if self.val_size else []

    def test_dataloader(self) -> BatchLoader:
        """Batches in the order of the file."""
        return self._loader(self.test_set, self.eval_batch_size or self.batch_size)

    def predict_dataloader(self) -> BatchLoader:
        """The test batches."""
        return self.test_dataloader()

    def _loader(self, images: ImageDataset, batch_size: int, shuffle: bool = False) -> BatchLoader:
        return BatchLoader(images, ShardedBatches(len(images), batch_size, shuffle=shuffle, seed=self.seed))


def _fixed_draw(images: ImageDataset, stream: int, offset: int = 0) -> ImageDataset:
    """Binarize once; an example's draw depends on its number in the file, not on where the file is split."""
    numbers = torch.arange(offset, offset + len(images))
    blocks = (slice(start, start + _BLOCK) for start in range(0, len(images), _BLOCK))
    drawn = [bernoulli(images.pixels[block], images.levels, stream, numbers[block]) for block in blocks]
    return ImageDataset(torch.cat(drawn) if drawn else images.pixels, images.labels)


class TensorData(ImageDataModule):
    """A data module of one's own images in memory.

    Args:
        images: ``[N, C, H, W]``, floating point in [0, 1] or uint8 in 0..255.
        labels: ``[N]``, integers from 0; none by default (y is then -1).
        test_size: Number of examples, the last ones, that are the test set.
        batch_size: See :class:`ImageDataModule`.
        eval_batch_size: See :class:`ImageDataModule`.
        binarization: See :class:`ImageDataModule`.
        val_size: Number of examples before the test set that are held out for validation.
        seed: See :class:`ImageDataModule`.

    Raises:
        ValueError: Wrong shape, dtype or range.

    Example:
        >>> data = TensorData(torch.rand(100, 1, 5, 5), test_size=20, val_size=10, batch_size=32)
        >>> data.setup()
        >>> [len(x) for x, y in data.train_dataloader()]
        [32, 32, 6]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        test_size: int = 0,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        binarization: Binarization = "dynamic",
        val_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, binarization, val_size, seed)
        self.levels = 255 if images.dtype == torch.uint8 else 1
        good = images.dim() == 4 and len(images) and (images.dtype == torch.uint8 or images.is_floating_point())
        if not good or not bool(((images >= 0) & (images <= self.levels)).all()):
            raise ValueError(
                "needed images [N, C, H, W] as uint8 or as floating point numbers in [0, 1], got "
                f"{images.dtype} {list(images.shape)} with other dimensions or values; rescale them."
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"needed labels [{len(images)}], one for each image, got {list(labels.shape)}.")
        if not 0 <= test_size < len(images):
            raise ValueError(f"needed 0 <= test_size < {len(images)}, the examples, got {test_size}.")
        _, channels, height, width = images.shape
        self.data_shape = (channels, height, width)
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self._images = images if images.dtype == torch.uint8 else images.float()
        self._labels = torch.full((len(images),), -1) if labels is None else labels.long()
        self._train_size = len(images) - test_size

    def load(self) -> ImageArrays:
        """Split off the test set."""
        split = self._train_size
        return ImageArrays(self._images[:split], self._labels[:split], self._images[split:], self._labels[split:])
