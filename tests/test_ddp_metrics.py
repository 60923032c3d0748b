"""Two processes with ordinary data loaders, whose sampler pads: metrics are those of one process; rank zero draws."""

import pytest
import torch
from ddp_metrics_worker import LAYERS, classify, evaluate
from processes import launch

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp_metrics")
    launch("ddp_metrics_worker.py", folder, timeout=300)
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.filterwarnings("ignore:posterior collapse:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_measure_what_one_does_although_the_sampler_pads(ranks, name, tmp_path):
    first, second = (r[name] for r in ranks)
    alone = evaluate(name, tmp_path, devices=1)
    assert first["metrics"] == second["metrics"]
    assert set(first["metrics"]) == set(alone["metrics"])
    for key, value in alone["metrics"].items():
        if name != "gaussian" or key in ("val/kl", "val/active_units"):
            assert first["metrics"][key] == pytest.approx(value, rel=1e-6), key
    for key, value in alone["vectors"].items():
        torch.testing.assert_close(first["vectors"][key], value, rtol=1e-5, atol=1e-8)  # the sums are of float32 terms
        assert torch.equal(first["vectors"][key], second["vectors"][key])
    assert second["files"] == [] and set(first["files"]) == set(alone["files"]) != set()


def test_two_processes_classify_what_one_does_although_the_sampler_pads(ranks):
    alone = classify(devices=1)
    for measured in (r["classifier"] for r in ranks):
        assert set(measured) == set(alone)
        for key, value in alone.items():
            assert measured[key] == pytest.approx(value, rel=1e-6), key
