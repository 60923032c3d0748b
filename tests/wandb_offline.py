"""Reads the file of an offline W&B run: a LevelDB-style log of protobuf records (blocks of 32 KiB, 7-byte headers)."""

import json
import struct
import time
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, CHUNK_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(run, seconds=60.0):
    """The records of the finished run in a folder ``offline-run-*``, once a process of W&B has written the last."""
    (path,) = Path(run).glob("*.wandb")
    end = time.monotonic() + seconds
    while True:
        found = list(_parsed(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"no end of the run in {path} after {seconds:g} seconds, {len(found)} records")
        time.sleep(0.1)


def _parsed(data):
    position, parts = FILE_HEADER, []
    while position + CHUNK_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER:  # the rest of a block is padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + CHUNK_HEADER])
        position += CHUNK_HEADER
        if position + length > len(data):  # not written whole yet
            return
        parts.append(data[position : position + length])
        position += length
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def _name(item):
    return "/".join(item.nested_key) if item.nested_key else item.key


def config(run):
    """The configuration as it is at the end of the run."""
    result = {}
    for record in records(run):
        updates = [record.run.config, record.config]
        for update in updates:
            for item in update.update:
                target, *path = item.nested_key or [item.key]
                node = result
                for part in path:
                    node = node.setdefault(target, {})
                    target = part
                node[target] = json.loads(item.value_json)
    return result


def history(run):
    """The logged rows."""
    return [
        {_name(item): json.loads(item.value_json) for item in record.history.item}
        for record in records(run)
        if record.WhichOneof("record_type") == "history"
    ]


def run_record(run):
    """Id, sweep, group and project."""
    return next(record.run for record in records(run) if record.WhichOneof("record_type") == "run")
