"""Real digits that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from lightning_modules.data.binarize import fixed_permutation
from lightning_modules.data.files import ArrayFile, DataFiles
from lightning_modules.data.images import Binarization, ImageArrays, ImageDataModule

__all__ = ["Digits"]


class Digits(ImageDataModule):
    """1,797 real handwritten digits of 8x8 pixels, shipped with the package: no download, an epoch in milliseconds.

    The data are the test part of the UCI set "Optical Recognition of Handwritten Digits" (CC BY 4.0) as scikit-learn
    ships it; pixels are counts 0..16. A fixed permutation makes the split into training, validation and 360 test
    examples independent of the writers, who follow each other in the file.

    Args:
        batch_size: See :class:`ImageDataModule`.
        eval_batch_size: See :class:`ImageDataModule`.
        binarization: See :class:`ImageDataModule`; grey by default, as 8x8 bits show little of a digit.
        val_size: Number of the 1,437 training examples held out for validation.
        seed: See :class:`ImageDataModule`.

    References:
        Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), https://doi.org/10.24432/C50P49

    Example:
        >>> data = Digits(batch_size=64)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape, data.pixel_mean.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]), torch.Size([1, 8, 8]))
    """

    data_shape = (1, 8, 8)
    num_classes = 10
    levels = 16
    files: ClassVar[DataFiles] = DataFiles(
        folders=("",),
        mirrors=(),
        arrays={
            "images": ArrayFile(
                (1797, 8, 8),
                "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3",
                ("digits.npz",),
                key="images",
            ),
            "labels": ArrayFile(
                (1797,),
                "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0",
                ("digits.npz",),
                key="labels",
            ),
        },
    )

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        binarization: Binarization = "none",
        val_size: int = 180,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, binarization, val_size, seed)

    def load(self) -> ImageArrays:
        """Read the file of the package."""
        arrays = self.files.read(Path(__file__).parent)
        order = fixed_permutation(1797)
        images, labels = arrays["images"][order].unsqueeze(1), arrays["labels"][order].long()
        return ImageArrays(images[:-360], labels[:-360], images[-360:], labels[-360:])
