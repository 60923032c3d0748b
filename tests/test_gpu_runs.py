"""The matrix on CUDA: float16 with its gradient scaler on one device, NCCL on two."""

from pathlib import Path

import pytest
import torch
from processes import torchrun
from scale_matrix import different, not_finite
from scale_runs import NAMES, build, fit, joined_batches, state

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_trains_on_cuda_and_repeats_itself(name, precision):
    runs = []
    for _ in range(2):
        model = build(name)
        start = state(model)
        losses = fit(model, joined_batches(), accelerator="gpu", precision=precision).losses
        runs.append((losses, {k: v.cpu() for k, v in state(model).items()}))
    # the scaler of float16 may skip first steps, so that only the losses need be finite there
    assert not_finite(runs[0][0], start, runs[0][1]) in ("", "the encoder does not train" * (precision == "16-mixed"))
    assert different(runs[0][0], runs[1][0], 1e-3) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_on_cuda_repeats_the_one_left_alone(name, tmp_path):
    whole = fit(build(name), joined_batches(), accelerator="gpu", checkpoints=tmp_path).losses
    resumed = fit(build(name), joined_batches(), accelerator="gpu", resume=tmp_path / "step=2.ckpt").losses
    assert different({k: v for k, v in whole.items() if k >= 2}, resumed, 1e-3) == ""


@pytest.mark.ddp
def test_two_devices_under_nccl_agree_on_everything_but_the_noise(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    worker = Path(__file__).with_name("scale_worker.py")
    status, output = torchrun(worker, tmp_path, timeout=900, ACCELERATOR="gpu")
    assert status == 0, output[-6000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in NAMES:
        for way in first[name]:
            assert different(first[name][way]["state"], second[name][way]["state"]) == "", (name, way)
            assert not (first[name][way]["noise"] == second[name][way]["noise"]).any(), (name, way)
