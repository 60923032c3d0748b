"""The MNIST family: found on disk or downloaded, and verified."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightning_modules.data.files import ArrayFile, DataFiles, data_root
from lightning_modules.data.images import Binarization, ImageArrays, ImageDataModule

__all__ = ["MNIST", "BinarizedMNIST", "FashionMNIST", "FileImages"]


def _idx_files(folders: tuple[str, ...], mirrors: tuple[str, ...], digests: dict[str, tuple[str, str]]) -> DataFiles:
    """The four idx files of MNIST's format; digests of the array and of the gz file by name."""
    arrays = {}
    for name, (sha256, gz_sha256) in digests.items():
        size = 60000 if name.startswith("train") else 10000
        shape, kind = ((size, 28, 28), "idx3") if name.endswith("images") else ((size,), "idx1")
        plain = f"{name}-{kind}-ubyte"
        names = (f"{plain}.gz", plain, f"{name}.{kind}-ubyte")
        arrays[name] = ArrayFile(shape, sha256, names, download=names[0], download_sha256=gz_sha256)
    return DataFiles(folders, mirrors, arrays)


class FileImages(ImageDataModule):
    """Base of the data sets that are found below a root folder or downloaded to it.

    Args:
        root: Folder that holds the data; by default the environment variable STOCHASTIC_LAYERS_DATA, else
            ``~/.cache/stochastic_layers``.
        batch_size: See :class:`ImageDataModule`.
        eval_batch_size: See :class:`ImageDataModule`.
        binarization: See :class:`ImageDataModule`.
        val_size: See :class:`ImageDataModule`.
        download: Download missing files in ``prepare_data``, which a Trainer calls in one process of each machine.
        seed: See :class:`ImageDataModule`.
    """

    files: ClassVar[DataFiles]

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        binarization: Binarization = "dynamic",
        val_size: int = 10000,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, binarization, val_size, seed)
        self.root = data_root(root)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, if asked to.

        Raises:
            MissingFileError: No mirror could be reached or gave the right file.
        """
        if self.download:
            self.files.fetch(self.root)

    def load(self) -> ImageArrays:
        """Read the four arrays, verified."""
        arrays = self.files.read(self.root)
        return ImageArrays(
            arrays["train-images"].unsqueeze(1),
            arrays["train-labels"].long(),
            arrays["t10k-images"].unsqueeze(1),
            arrays["t10k-labels"].long(),
        )


class MNIST(FileImages):
    """70,000 handwritten digits of 28x28 pixels: 50,000 to train on, 10,000 to validate, 10,000 to test.

    Looks for the four idx files, gzipped or not, in ``mnist``, ``MNIST/raw`` (torchvision's layout) and ``MNIST`` below
    ``root``, and in ``root`` itself, and verifies their contents. The options are those of :class:`FileImages`.

    References:
        Gradient-based learning applied to document recognition (LeCun, Bottou, Bengio, Haffner, 1998),
        https://doi.org/10.1109/5.726791
    """

    data_shape = (1, 28, 28)
    num_classes = 10
    levels = 255
    files = _idx_files(
        ("MNIST/raw", "mnist", "MNIST", ""),
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images": (
                "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            "train-labels": (
                "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            "t10k-images": (
                "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            "t10k-labels": (
                "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        },
    )


class FashionMNIST(FileImages):
    """70,000 grey images of clothing, 28x28 pixels, in ten classes; sizes and files are those of :class:`MNIST`.

    Looks in ``fashion_mnist``, ``FashionMNIST/raw`` (torchvision's layout) and ``FashionMNIST`` below ``root``, and in
    ``root`` itself. The options are those of :class:`FileImages`.

    References:
        Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms (Xiao, Rasul, Vollgraf, 2017),
        https://github.com/zalandoresearch/fashion-mnist
    """

    data_shape = (1, 28, 28)
    num_classes = 10
    levels = 255
    files = _idx_files(
        ("FashionMNIST/raw", "fashion_mnist", "FashionMNIST", ""),
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        {
            "train-images": (
                "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            "train-labels": (
                "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            "t10k-images": (
                "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            "t10k-labels": (
                "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        },
    )


def _amat_file(split: str, size: int, sha256: str, amat_sha256: str) -> ArrayFile:
    amat = f"binarized_mnist_{split}.amat"
    return ArrayFile((size, 784), sha256, ("binarized_mnist.npz", amat), split, amat, amat_sha256)


class BinarizedMNIST(FileImages):
    """MNIST in the fixed binarization of Larochelle: 50,000 / 10,000 / 10,000 images of zeros and ones, no labels.

    Looks for ``binarized_mnist.npz`` (uint8 arrays ``train``, ``valid``, ``test`` of shape ``[N, 784]``) or the three
    original ``binarized_mnist_*.amat`` text files in ``binarized_mnist`` and ``BinarizedMNIST/raw`` below ``root``, and
    in ``root`` itself. The rows are not in the order of MNIST's files, so that MNIST's labels do not fit: y is -1.

    Args:
        root: See :class:`FileImages`.
        batch_size: See :class:`ImageDataModule`.
        eval_batch_size: See :class:`ImageDataModule`.
        download: See :class:`FileImages`; gets the text files, 110 MB.
        seed: See :class:`ImageDataModule`.

    References:
        The neural autoregressive distribution estimator (Larochelle and Murray, 2011),
        https://proceedings.mlr.press/v15/larochelle11a.html
    """

    data_shape = (1, 28, 28)
    num_classes = 0
    levels = 1
    files = DataFiles(
        folders=("BinarizedMNIST/raw", "binarized_mnist", ""),
        mirrors=("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",),
        arrays={
            "train": _amat_file(
                "train",
                50000,
                "43490d4d6ac9002727af4426d8748609fdb7e4094fa65ad8d681ea60082a7a5a",
                "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
            ),
            "valid": _amat_file(
                "valid",
                10000,
                "069b4f0beb389b776478c3e872b4df71c95ac4be64d7cbe6d32e24ebac8e6d5e",
                "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
            ),
            "test": _amat_file(
                "test",
                10000,
                "ca0294c3b8d984c7a1dc891015a8eea6f37bae59a34e35ea0fc8c47110a8dd86",
                "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
            ),
        },
    )

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, eval_batch_size, "none", 10000, download, seed)

    def load(self) -> ImageArrays:
        """Read the three arrays, verified; the validation part becomes the end of the training part."""
        arrays = self.files.read(self.root)
        train = torch.cat([arrays["train"], arrays["valid"]]).view(-1, 1, 28, 28)
        test = arrays["test"].view(-1, 1, 28, 28)
        return ImageArrays(train, torch.full((len(train),), -1), test, torch.full((len(test),), -1))
