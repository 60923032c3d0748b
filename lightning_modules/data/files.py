"""Find, download, verify and parse data files (idx, npz, amat); a bad file gives an error that names it."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

__all__ = ["ArrayFile", "DataFileError", "DataFiles", "MissingFileError", "data_root", "read_array"]

ROOT_VARIABLE = "STOCHASTIC_LAYERS_DATA"
TIMEOUT = 30.0  # seconds without an answer until the next mirror is tried


class DataFileError(ValueError):
    """A data file is damaged, or is not the file that its name says."""


class MissingFileError(FileNotFoundError, ValueError):
    """A data file is not there, or could not be downloaded."""


@dataclass(frozen=True)
class ArrayFile:
    """A uint8 array of a data set and the files that may hold it.

    Attributes:
        shape: Of the array.
        sha256: Of the array's bytes, whatever file they come from; empty to skip this check.
        names: File names in the order in which they are looked for. The suffix tells the format: ``.npz``, ``.amat``
            (text of zeros and ones), else idx, ``.gz`` or not.
        key: Name of the array in an npz file.
        download: Name of the file to download.
        download_sha256: Of that file.
    """

    shape: tuple[int, ...]
    sha256: str
    names: tuple[str, ...]
    key: str = ""
    download: str = ""
    download_sha256: str = ""


@dataclass(frozen=True)
class DataFiles:
    """The files of a data set.

    Attributes:
        folders: Below the root, in the order in which they are searched; the first one receives downloads.
        mirrors: URLs of folders that hold the files to download.
        arrays: The arrays by name.
    """

    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    arrays: dict[str, ArrayFile]

    def find(self, root: Path, name: str) -> Path | None:
        """The first existing file that may hold the array, ``None`` where there is none."""
        paths = (root / folder / file for folder in self.folders for file in self.arrays[name].names)
        return next((path for path in paths if path.is_file()), None)

    def read(self, root: Path) -> dict[str, Tensor]:
        """All arrays, verified.

        Raises:
            MissingFileError: A file is missing.
            DataFileError: A file is damaged or is another one.
        """
        arrays = {}
        for name, array in self.arrays.items():
            path = self.find(root, name)
            if path is None:
                raise MissingFileError(self._missing(root, array))
            arrays[name] = read_array(path, array)
        return arrays

    def fetch(self, root: Path) -> None:
        """Download what is missing, each file verified before it gets its name.

        Raises:
            MissingFileError: No mirror gave the right file; the message has the reason for each.
        """
        for name, array in self.arrays.items():
            if self.find(root, name) is None:
                reasons = []
                for mirror in self.mirrors:
                    reason = _download(mirror + array.download, root / self.folders[0] / array.download, array)
                    if not reason:
                        break
                    reasons.append(f"{mirror + array.download}: {reason}")
                else:
                    raise MissingFileError(self._missing(root, array) + "\nTried " + "\n".join(reasons))

    def _missing(self, root: Path, array: ArrayFile) -> str:
        folders = ", ".join(str(root / folder) for folder in self.folders)
        return (
            f"needed {' or '.join(array.names)}, got none of them in {folders}; put the file there, name its folder by "
            f"root (--data.root=FOLDER) or the environment variable {ROOT_VARIABLE}, or pass download=True "
            "(--data.download=true) and call prepare_data() (a Trainer does)."
        )


def data_root(root: str | None) -> Path:
    """``root``, else the environment variable STOCHASTIC_LAYERS_DATA, else ``~/.cache/stochastic_layers``."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or "~/.cache/stochastic_layers").expanduser()


def read_array(path: Path, array: ArrayFile) -> Tensor:
    """Read and verify one array.

    Raises:
        DataFileError: The file cannot be read, or does not hold the array.
    """
    try:
        if path.suffix == ".npz":
            data = _read_npz(path, array)
        elif path.suffix == ".amat":
            data = _read_amat(path, array)
        else:
            data = _read_idx(path, array)
        needed = math.prod(array.shape)
        if len(data) != needed:
            raise DataFileError(f"{needed} bytes of data, got {'more' if len(data) > needed else len(data)}")
        digest = hashlib.sha256(data).hexdigest()
        if array.sha256 and digest != array.sha256:
            raise DataFileError(f"data with SHA-256 {array.sha256}, got {digest}")
    except DataFileError as error:
        raise DataFileError(f"{path}: needed {error}; {_REMEDY}") from None
    # a damaged archive makes zipfile raise almost anything, down to NotImplementedError for an unknown compression
    except Exception as error:
        kind = f"a readable file with the uint8 array {array.key} {list(array.shape)}"
        raise DataFileError(f"{path}: needed {kind}, got {type(error).__name__}: {error}; {_REMEDY}") from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(array.shape)


_REMEDY = "delete the file and get it again."


# The readers ask for one byte more than the array has: they stop there whatever a header declares, see a file that is
# too long, and reach the end of a good one, where gzip and zip compare their CRC-32.


def _read_idx(path: Path, array: ArrayFile) -> bytes:
    words = 1 + len(array.shape)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        header = file.read(4 * words)
        magic = 0x0800 + len(array.shape)  # two zero bytes, the code of uint8, the number of dimensions
        if header != struct.pack(f">{words}I", magic, *array.shape):
            raise DataFileError(
                f"an idx file with magic {magic:#010x} and sizes {list(array.shape)}, got the header {header.hex()}"
            )
        return file.read(math.prod(array.shape) + 1)


def _read_npz(path: Path, array: ArrayFile) -> bytes:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if array.key not in names:
            raise DataFileError(f"the key {array.key!r} with a uint8 array {list(array.shape)}, got the keys {names}")
        with archive.open(f"{array.key}.npy") as file:
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
            shape, fortran_order, dtype = read_header(file)
            if shape != array.shape or dtype != np.uint8:
                raise DataFileError(f"{array.key} as uint8 {list(array.shape)}, got {dtype} {list(shape)}")
            data = file.read(math.prod(array.shape) + 1)
    if fortran_order and len(data) == math.prod(shape):
        data = np.frombuffer(data, np.uint8).reshape(shape, order="F").tobytes()
    return data


def _read_amat(path: Path, array: ArrayFile) -> bytes:
    """Lines of digits 0 and 1, separated by one space."""
    needed = 2 * math.prod(array.shape)
    with path.open("rb") as file:
        text = file.read(needed + 1)
    if len(text) != needed:
        raise DataFileError(f"{needed} bytes of text, got {'more' if len(text) > needed else len(text)}")
    digits = np.frombuffer(text, np.uint8)[::2]
    return bytes(digits - np.uint8(ord("0")))


def _download(url: str, path: Path, array: ArrayFile) -> str:
    """Download to a temporary name, verify, rename; returns the reason of a failure, empty for success."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as source, temporary.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
        if digest.hexdigest() != array.download_sha256:
            return f"needed SHA-256 {array.download_sha256}, got {digest.hexdigest()}"
        temporary.replace(path)
    except (OSError, HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        temporary.unlink(missing_ok=True)
    return ""
