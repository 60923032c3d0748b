"""The monitor on two processes: the numbers of one process on the joined batch, and no trace in the weights."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.ddp

WORKER = Path(__file__).with_name("ddp_gradients.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}


def start(command):
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a hanging collective does not react to SIGTERM
        output, _ = process.communicate()
        pytest.fail(f"run hung:\n{output[-4000:]}")
    assert process.returncode == 0, output[-6000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, and of both ranks of two."""
    folder = tmp_path_factory.mktemp("gradients")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start([sys.executable, str(WORKER), str(folder)])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    start([*torchrun, f"--master-port={port}", str(WORKER), str(folder)])
    names = ("world1-rank0", "world2-rank0", "world2-rank1")
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in names]


def test_a_monitor_leaves_no_trace_on_two_processes(runs):
    for run in runs:
        assert torch.equal(run["watched"]["weights"], run["never"]["weights"])


@pytest.mark.parametrize("name", ["exact", "accumulated", "watched"])
def test_ranks_log_the_same_values(runs, name):
    _, first, second = (run[name]["metrics"] for run in runs)
    assert first == second and "train/moving_grad_variance" in first


@pytest.mark.parametrize("name", ["exact", "accumulated"])
def test_moving_moments_are_those_of_one_process(runs, name):
    one, two, _ = (run[name] for run in runs)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=1e-6)  # a layer without noise
    torch.testing.assert_close(two["moments"][0], one["moments"][0], rtol=1e-4, atol=1e-5)
    for key in ("train/moving_grad_variance", "train/moving_grad_snr"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-3)


def test_variance_at_params_and_weights_is_that_of_one_process(runs):
    one, two, _ = (run["noisy"]["metrics"] for run in runs)
    for key in ("grad_variance", "grad_snr", "weight_grad_variance", "weight_grad_snr"):
        # other noise on each side, 400 redraws: errors of 5 to 10 %; the variance at the weights of one rank is twice
        assert two[f"train/{key}"] == pytest.approx(one[f"train/{key}"], rel=0.3), key
    assert one["train/grad_variance/reinforce"] > 10 * one["train/grad_variance"]  # without a baseline, in the basket
