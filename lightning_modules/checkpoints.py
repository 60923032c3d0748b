"""Checkpoints that are whole or absent, are read only after their checksums, and keep their predecessor."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

__all__ = ["CorruptCheckpointError", "VerifiedCheckpointIO", "damage", "newest_intact", "refuse_damaged"]

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError)
PARTIAL = ".partial"  # suffix of a file that is being written; one left by a killed process is overwritten by the next
PREVIOUS = ".previous"  # suffix of what a file held before it was last overwritten


class CorruptCheckpointError(ValueError):
    """A checkpoint is damaged; the message names it, the damage, and the newest intact one beside it."""


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes and reads checkpoints of one local file each, as ``torch.save`` makes them.

    Writing: a file beside the target, synced to disk, takes the target's place in one step, so that a process killed at
    any moment, or a full disk, leaves the old checkpoint as it was. What the target held before stays beside it under
    the name ``<target>.previous``. Reading: the CRC-32 that ``torch.save`` stores with every record is compared first
    (torch itself does not), so that a truncated file or a flipped bit is an error and not other weights.

    Paths with a protocol (``s3://...``) are written and read as Lightning does. The command line uses this class by
    default; elsewhere it is a plugin, ``Trainer(plugins=[VerifiedCheckpointIO()])``.

    Args:
        keep_previous: Keep one predecessor of an overwritten file.
    """

    def __init__(self, keep_previous: bool = True) -> None:
        self.keep_previous = keep_previous

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, wholly or not at all.

        Raises:
            OSError: There is no room, or no right to write; the message names the checkpoint that is still there.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        partial = target.with_name(target.name + PARTIAL)
        buffer = io.BytesIO()  # not straight into the file: an error of writing inside torch's writer ends the process
        torch.save(checkpoint, buffer)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if self.keep_previous:
                _keep(target)
            os.replace(partial, target)
            _sync(target.parent)
        except OSError as error:
            _remove(partial)
            intact = newest_intact(target.parent)
            raise OSError(
                error.errno,
                f"needed to write the checkpoint {target} of {buffer.getbuffer().nbytes} bytes, got "
                f"{error.strerror!r}; make room or choose another folder, then resume from "
                f"{intact or 'the start: there is no checkpoint yet'}",
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint whose checksums are right; tensors and plain data only, unless ``weights_only=False``.

        Raises:
            FileNotFoundError: There is no such file.
            CorruptCheckpointError: It is damaged.
        """
        weights_only = weights_only is not False
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        refuse_damaged(path)
        return super().load_checkpoint(path, map_location, weights_only)


def damage(path: str | Path) -> str:
    """What is wrong with a checkpoint file, in words; empty where all its checksums are right.

    Args:
        path: A local file.
    """
    try:
        torch._C.PyTorchFileReader(str(path))  # what torch refuses to open
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
            entries = archive.infolist()
    except (*_ZIP_ERRORS, OSError, NotImplementedError, ValueError, RuntimeError, IndexError) as error:
        return f"the file is cut off or overwritten ({str(error).split('. ')[0]})"
    if record is not None:
        return f"the record {record!r} does not have its checksum"
    if any(entry.external_attr or entry.compress_type for entry in entries):  # torch.save sets neither
        return "the table of its records is damaged"
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        return "there is no record 'data.pkl'"
    return ""


def refuse_damaged(path: str | Path) -> None:
    """Raise where a checkpoint file is damaged; a missing one is for others to find.

    Raises:
        CorruptCheckpointError: It is damaged.
    """
    path = Path(path)
    if path.is_file() and (found := damage(path)):
        intact = newest_intact(path.parent)
        remedy = f"use the newest intact one, {intact}" if intact else "there is no other intact one; start anew"
        raise CorruptCheckpointError(f"needed an intact checkpoint, got {path}, where {found}; {remedy}.")


def newest_intact(folder: str | Path) -> Path | None:
    """The checkpoint last written in a folder whose checksums are right, a kept predecessor included."""
    files = [f for f in Path(folder).glob("*") if f.name.endswith((".ckpt", ".ckpt" + PREVIOUS)) and f.is_file()]
    # where two are of the same moment, the one that was not replaced
    files.sort(key=lambda f: (f.stat().st_mtime_ns, f.suffix != PREVIOUS), reverse=True)
    return next((f for f in files if not damage(f)), None)


def _keep(target: Path) -> None:
    """Give the file a second name, in one step: at every moment ``target`` exists."""
    if target.is_file():
        link = target.with_name(target.name + PREVIOUS + PARTIAL)
        _remove(link)
        try:
            os.link(target, link)
        except OSError:  # a file system without hard links keeps no predecessor
            return
        os.replace(link, target.with_name(target.name + PREVIOUS))


def _remove(path: Path) -> None:
    with suppress(OSError):  # on a file system that has become read-only nothing was written either
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Let the new name itself survive a power cut, where the system can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
