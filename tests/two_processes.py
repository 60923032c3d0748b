"""Starts a worker script on two processes; a hang ends in a failure, not in a suite that never ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def launch(worker, folder, *names, timeout=900):
    """Run ``tests/<worker> folder *names`` under torchrun with two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = Path(__file__).with_name(worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent.parent)}
    process = subprocess.Popen(
        [*command, f"--master-port={port}", str(script), str(folder), *names],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a hanging collective does not react to SIGTERM
        output, _ = process.communicate()
        pytest.fail(f"two-process run hung:\n{output[-4000:]}")
    assert process.returncode == 0, output[-6000:]
