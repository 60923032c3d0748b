"""The monitor on two processes: the numbers of one process on the joined batch, and no trace in the weights."""

import sys
from pathlib import Path

import processes
import pytest
import torch

pytestmark = pytest.mark.ddp

WORKER = Path(__file__).with_name("ddp_gradients.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, and of both ranks of two."""
    folder = tmp_path_factory.mktemp("gradients")
    status, output = processes.run([sys.executable, str(WORKER), str(folder)], timeout=600)
    assert status == 0, output[-6000:]
    processes.launch(WORKER.name, folder)
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
