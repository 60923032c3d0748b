"""Two processes under plain DDP: different noise, equal weights and statistics, no unused parameters, no hang."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stochastic_layers as sl

pytestmark = pytest.mark.ddp

NAMES = [*sl.list_layers(), *(f"reinforce:{b}" for b in ("none", "moving_average", "learned", "leave_one_out"))]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    worker = Path(__file__).with_name("ddp_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parent.parent)}
    process = subprocess.Popen(
        [*command, f"--master-port={port}", str(worker), str(folder), *NAMES],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a hanging collective does not react to SIGTERM
        output, _ = process.communicate()
        pytest.fail(f"two-process run hung:\n{output[-4000:]}")
    assert process.returncode == 0, output[-6000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_on_everything_but_the_noise(ranks, name):
    first, second = (r[name] for r in ranks)
    assert torch.isfinite(first["parameters"]).all()
    assert torch.equal(first["parameters"], second["parameters"])
    for a, b in zip(first["buffers"], second["buffers"], strict=True):
        assert torch.equal(a, b)
    assert not (first["noise"] == second["noise"]).any()
    assert first["metrics"] == second["metrics"]
    assert {"train/elbo", "train/grad_variance", "val/elbo"} <= set(first["metrics"])
