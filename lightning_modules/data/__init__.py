"""LightningDataModules of small binary and grey images."""

from lightning_modules.data.digits import Digits
from lightning_modules.data.files import DataFileError, MissingFileError
from lightning_modules.data.images import Binarization, ImageArrays, ImageDataModule, TensorData
from lightning_modules.data.loading import BatchLoader, ImageDataset, ShardedBatches
from lightning_modules.data.mnist import MNIST, BinarizedMNIST, FashionMNIST

__all__ = [
    "MNIST",
    "BatchLoader",
    "Binarization",
    "BinarizedMNIST",
    "DataFileError",
    "Digits",
    "FashionMNIST",
    "ImageArrays",
    "ImageDataModule",
    "ImageDataset",
    "MissingFileError",
    "ShardedBatches",
    "TensorData",
]
