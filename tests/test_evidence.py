"""Every evidence script runs, at a size of seconds, and its result says how it was made."""

import json
import math

import pytest
import torch

from benchmarks.evidence import (
    binary_vae,
    categorical_gradient,
    categorical_vae,
    iwae,
    million_steps,
    monte_carlo_integrals,
    one_bit_toy,
    polynomial_toy,
    quadratic_toy,
    temperature,
)
from benchmarks.evidence.record import RESULTS


def result(folder, name):
    content = json.loads((folder / name).read_text())
    assert content["command"].startswith("python -m ")
    assert content["versions"]["torch"] == torch.__version__
    assert "commit" in content and content["threads"] == 1
    assert "data" not in content["options"]
    return content


@pytest.fixture
def images(monkeypatch):
    """Noise instead of MNIST, for scripts that are only to run."""
    train, test = torch.rand(300, 784), torch.rand(20, 784)
    for module in (binary_vae, iwae, categorical_gradient, categorical_vae, million_steps, temperature):
        monkeypatch.setattr(module, "pixels", lambda root, count=50000: (train, test))


def test_binary_vae_runs_and_goes_on_where_it_stopped(images, tmp_path):
    words = ["--estimator", "double_cv", "--out", str(tmp_path)]
    binary_vae.main([*words, "--steps", "3"])
    binary_vae.main([*words, "--steps", "5"])
    content = result(tmp_path, "binary_vae/double_cv-seed0.json")
    assert [p["step"] for p in content["curve"]] == [1, 3, 5]
    assert content["resumed_at"] == [3] and content["complete"]
    assert content["curve"][-1]["elbo"] > content["curve"][0]["elbo"]
    assert (tmp_path / "binary_vae" / "curves.png").stat().st_size > 1000


def test_temperature_is_scanned_on_a_trained_model_and_can_be_held(images, tmp_path, monkeypatch):
    monkeypatch.setattr(temperature, "TEMPERATURES", (0.1, 5.0))
    words = ["--estimator", "rebar", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="--estimator rebar"):
        temperature.main(words)
    binary_vae.main([*words, "--steps", "2"])
    temperature.main([*words, "--draws", "5"])
    found = result(tmp_path, "temperature.json")["scans"]["rebar"]
    assert found["step"] == 2 and 0.49 < found["learned"] < 0.51
    assert [p["temperature"] for p in found["points"]] == [0.1, 5.0]
    assert all(p[key] > p[f"{key}_error"] > 0 for p in found["points"] for key in ("params", "weights"))
    assert (tmp_path / "temperature.png").stat().st_size > 1000
    binary_vae.main([*words, "--steps", "3", "--temperature", "0.14"])
    held = result(tmp_path, "binary_vae/rebar-temperature0.14-seed0.json")["curve"]
    assert {round(math.exp(p["log_temperature"]), 6) for p in held} == {0.14}
    assert list(binary_vae.curves(tmp_path)) == ["rebar"] and len(binary_vae.curves(tmp_path)["rebar"]) == 1
    with pytest.raises(SystemExit):
        binary_vae.main(["--estimator", "disarm", "--temperature", "0.14"])


def test_running_variance_is_that_of_independent_gradients():
    parameter = torch.nn.Parameter(torch.zeros(4000))
    moments = binary_vae.Moments([parameter], decay=0.9)
    for _ in range(200):
        parameter.grad = 3.0 + 2.0 * torch.randn(4000)
        moments.update()
    # the weights are 0.1 * 0.9^i, so that the mean itself keeps (1 - 0.9) / (1 + 0.9) of the variance 4
    assert math.isclose(moments.variance(), 4 * (1 - 0.1 / 1.9), rel_tol=0.03)


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_iwae_runs(images, tmp_path, gradient):
    words = ["--gradient", gradient, "--num-samples", "2", "--steps", "2", "--test-samples", "3"]
    iwae.main([*words, "--out", str(tmp_path)])
    assert math.isfinite(result(tmp_path, f"iwae/{gradient}-k2-seed0.json")["curve"][-1]["log_likelihood"])


def test_iwae_follows_the_published_schedule():
    epoch = iwae.TRAIN // iwae.BATCH
    rates = [iwae.schedule(step) for step in (0, epoch - 1, epoch, 4 * epoch - 1, 4 * epoch, 13 * epoch)]
    assert rates == pytest.approx([1e-3, 1e-3, 7.2e-4, 7.2e-4, 5.2e-4, 3.7e-4])


def test_variance_of_the_quadratic_toy_is_that_by_hand(tmp_path):
    quadratic_toy.main(["--seeds", "0", "--steps", "1", "--every", "1", "--draws", "4000", "--out", str(tmp_path)])
    content = result(tmp_path, "quadratic_toy.json")
    for name, variance in content["closed_form"].items():
        measured = content["curves"][name][0][0]["variance"]
        assert math.isclose(measured, variance, rel_tol=0.1), name  # 4000 draws of a square: 5 % and less


def test_integrals_agree_with_the_layers(tmp_path):
    torch.manual_seed(0)
    cost, _ = monte_carlo_integrals.COSTS["cos(k x)"]
    exact = monte_carlo_integrals.integrals(cost, 2.0)
    for estimator in ("score_function", "pathwise", "measure_valued"):
        layer = monte_carlo_integrals._layer(estimator, 0.0)
        for by, (mean, mean_error, variance, error) in monte_carlo_integrals.measured(layer, cost, 2.0, 20000).items():
            assert abs(variance - exact[estimator][by]) < 5 * error, (estimator, by)
            assert abs(mean - exact["gradient"][by]) < 5 * mean_error, (estimator, by)


def test_toys_run(tmp_path):
    one_bit_toy.main(["--shorten", "1000", "--repeats", "3", "--seeds", "0", "--out", str(tmp_path)])
    assert set(result(tmp_path, "one_bit_toy.json")["curves"]["0.499"]) == set(one_bit_toy.ESTIMATORS)


def test_polynomial_toy_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(polynomial_toy, "EPOCH", 3)
    polynomial_toy.main(["--epochs", "1", "--out", str(tmp_path)])
    start, end = result(tmp_path, "polynomial_toy.json")["curves"]["2.0"]["exact"][0]
    assert end < start


def test_gradients_are_compared_with_the_exact_one(images, tmp_path):
    layers = ["enumeration", "straight_through", "leave_one_out"]
    words = ["--layers", *layers, "--steps", "2", "--warm-up", "1", "--examples", "1", "--draws", "4"]
    categorical_gradient.main([*words, "--out", str(tmp_path)])
    rows = {row["layer"]: row for row in result(tmp_path, "categorical_gradient.json")["rows"]}
    assert list(rows) == layers and rows["enumeration"]["relative_bias"] < 1e-3
    assert rows["straight_through"]["relative_deviation"] > 0


def test_categorical_vae_runs_and_its_weights_are_compared(images, tmp_path):
    words = ["--estimator", "reinmax", "unordered_set", "--epochs", "2", "--out", str(tmp_path)]
    categorical_vae.main(words)
    for name in ("reinmax", "unordered_set"):
        content = result(tmp_path, f"categorical_vae/{name}-seed0.json")
        first, second = content["curve"]
        assert content["complete"] and second["training"] < first["training"] and math.isfinite(second["test"])
    assert (tmp_path / "categorical_vae" / "curves.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        categorical_gradient.main(["--trained", "--seed", "1", "--out", str(tmp_path)])
    words = ["--layers", "straight_through", "--trained", "--examples", "1", "--draws", "3"]
    categorical_gradient.main([*words, "--out", str(tmp_path)])
    content = result(tmp_path, "categorical_gradient_trained.json")
    assert [row["layer"] for row in content["rows"]] == ["straight_through"] and "negative_elbo" not in content


@pytest.mark.parametrize("estimator", ["disarm", "rodeo"])
def test_a_million_steps_start(images, tmp_path, estimator):
    words = ["--estimator", estimator, "--seeds", "2", "--steps", "2", "--every", "1"]
    million_steps.main([*words, "--device", "cpu", "--no-compile", "--out", str(tmp_path)])
    curve = result(tmp_path, f"million_steps/{estimator}.json")["curve"]
    first, second = curve[-1]["objective"]
    assert math.isfinite(first) and first != second


def test_stacked_models_are_the_single_model_seed_by_seed():
    torch.manual_seed(0)
    stacked = million_steps.StackedVAE("disarm", 2)
    x, z, logits = torch.rand(2, 3, 784).round(), torch.rand(4, 2, 3, 200).round(), torch.randn(2, 3, 200)
    cost = stacked.cost(z, x, logits)
    for seed in range(2):
        single = binary_vae.Model("disarm").decoder
        for own, other in zip(single[::2], stacked.decoder[::2], strict=True):
            own.weight.data.copy_(other.weight[seed].T)
            own.bias.data.copy_(other.bias[seed, 0])
        expected = binary_vae.negative_elbo(single, x[seed], z[:, seed], logits[seed])
        torch.testing.assert_close(cost[:, seed], expected)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: str(p.relative_to(RESULTS)))
def test_published_results_come_from_a_commit(path):
    content = json.loads(path.read_text())
    assert len(content["commit"]) == 40 and content["seconds"] > 0
