"""Files of data: each format, damaged and hostile ones, where they are looked for, and downloads."""

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

from lightning_modules.data import MNIST, DataFileError, FashionMNIST, MissingFileError
from lightning_modules.data.files import ArrayFile, DataFiles, read_array

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
