"""Two processes under plain DDP: different noise, equal weights and statistics, no unused parameters, no hang."""

import pytest
import torch
from processes import launch

import stochastic_layers as sl

pytestmark = pytest.mark.ddp

NAMES = [*sl.list_layers(), *(f"reinforce:{b}" for b in ("none", "moving_average", "learned", "leave_one_out"))]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch("ddp_worker.py", folder, *NAMES)
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
