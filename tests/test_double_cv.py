"""Double control variates: the optimal coefficient, the published toy, and mistakes that the proofs must see."""

import pytest
import torch
from control_variate_problems import total_variance, train
from small_problems import BITS, CATEGORIES, build

from stochastic_layers import double_cv
from stochastic_layers.double_cv import OptimalCoefficients
from stochastic_layers.testing import PolynomialCost, check_mean, measure


class Toy(torch.nn.Module):
    """The cost (1/D) sum (b - t)^2 of Titsias and Shi with t = .499, at logits 0."""

    features = 200

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(self.features, dtype=torch.float64))

    def forward(self, z):
        return (z - 0.499).square().mean(-1) + 0.0 * (z * self.theta).sum(-1)


def per_coordinate(layer, num_draws=4000):
    """Mean variance of one coordinate of the gradient on the toy."""
    params = torch.zeros(num_draws, Toy.features, dtype=torch.float64, requires_grad=True)
    sample = layer.sample(params)
    (gradient,) = torch.autograd.grad(sample.surrogate(Toy()(sample.z)).sum(), params)
    return float(gradient.var(0).mean()), gradient.mean(0)


def test_variance_on_the_published_toy():
    """D = 200, two draws. Leave-one-out: c^2 (D + 1/2) / 16 = 1.25e-9 with c = 2e-3 / D; published 1.3e-9."""
    leave_one_out, _ = per_coordinate(build("leave_one_out", {"latent_dim": 200})[0])
    closed_form = (2e-3 / 200) ** 2 * 200 / 16
    print(f"leave-one-out {leave_one_out:.3g}, closed form {closed_form:.3g}")
    assert leave_one_out == pytest.approx(closed_form, rel=0.05)
    assert leave_one_out == pytest.approx(1.3e-9, rel=0.1)
    optimal = (2e-3 / 200) ** 2 * 199 / 32  # with the mean cost as baseline: .63e-9 as published
    assert optimal == pytest.approx(0.63e-9, rel=0.02)

    # (b - t)^2 is linear in a bit but its slope is not that line's, so that Double CV begins at the same 1.3e-9, too
    layer, _ = build("double_cv", {"latent_dim": 200})
    train(layer, torch.zeros(1, 200, dtype=torch.float64), Toy(), steps=300, copies=4)
    double, _ = per_coordinate(layer)
    print(f"double_cv {double:.3g}")
    assert double == pytest.approx(1.3e-9, rel=0.1)


@pytest.mark.parametrize("options", [BITS, {**CATEGORIES, "num_samples": 3}], ids=str)
def test_linear_cost_has_next_to_no_variance_in_the_end(options):
    """The best coefficient, -1, removes all of it; the running one is off by its own error."""
    layer, params = build("double_cv", options, batch=1)
    cost = PolynomialCost("linear", layer.out_features)
    start = total_variance(layer, params, cost, num_draws=2000)
    train(layer, params, cost, steps=600)
    assert total_variance(layer, params, cost, num_draws=2000) < 1e-2 * start


def test_coefficient_is_the_best_of_a_grid():
    layer, params = build("double_cv", {**BITS, "decay": 0.99}, batch=1)
    cost = PolynomialCost("cubic", 3)
    train(layer, params, cost, steps=600, copies=100)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    square, cross = layer.coefficients.value.tolist()
    best = -cross / square
    variances = {}
    for shift in (-0.3, 0.0, 0.3):
        layer.load_state_dict(state)
        with torch.no_grad():  # a running covariance that gives this coefficient
            layer.coefficients.total[1] = -(best + shift) * square
        torch.manual_seed(0)
        variances[shift] = total_variance(layer, params, cost)
    print(f"coefficient {best:.3f}", variances)
    assert -1 < best < 0
    assert min(variances, key=variances.get) == 0.0


def test_coefficient_starts_at_zero_and_never_explodes():
    """Random, heavy-tailed moments of both signs, zero control variates among them."""
    coefficients = OptimalCoefficients(2).double()
    assert torch.equal(coefficients(), torch.zeros(2).double())
    for step in range(200):
        gradient = torch.randn(4, 3, dtype=torch.float64).pow(5) * 10.0 ** (step % 9 - 4)
        controls = torch.randn(2, 4, 3, dtype=torch.float64).pow(3) * (step % 3)
        coefficients.observe(gradient, controls)
        value = coefficients()
        assert bool(torch.isfinite(value).all())
        assert float(value.abs().max()) <= 2.0


def test_two_coefficients_are_those_of_least_squares():
    coefficients = OptimalCoefficients(2, decay=0.9).double()
    mixing = torch.tensor([[1.0, 0.0], [0.6, 0.4]], dtype=torch.float64)
    for _ in range(400):
        controls = torch.einsum("ij,jbd->ibd", mixing, torch.randn(2, 64, 3, dtype=torch.float64))
        gradient = 0.7 * controls[0] - 1.2 * controls[1] + 0.1 * torch.randn(64, 3, dtype=torch.float64)
        coefficients.observe(gradient, controls)
    assert torch.allclose(coefficients(), torch.tensor([-0.7, 1.2], dtype=torch.float64), atol=0.02)


def test_coefficients_come_from_before_the_step():
    """The first gradient is that of leave-one-out to the bit, whatever the first costs are."""
    found = []
    for name in ("double_cv", "leave_one_out"):
        torch.manual_seed(0)
        layer, params = build(name, BITS)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        sample.surrogate(PolynomialCost("cubic", 3)(sample.z)).sum().backward()
        found.append(leaf.grad)
    assert torch.allclose(*found, rtol=1e-12)


def test_a_slope_that_contains_the_own_draw_is_caught(monkeypatch):
    """The mean slope of all draws, instead of the others, is biased."""
    layer, params = build("double_cv", {**BITS, "decay": 0.5})
    cost = PolynomialCost("quadratic", 3)
    train(layer, params, cost, steps=50)
    right = double_cv.cost_gradient

    def wrong(cost, points):
        slope = right(cost, points)
        return slope.mean(0, keepdim=True).expand_as(slope).clone()

    monkeypatch.setattr(double_cv, "cost_gradient", wrong)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, cost)


def test_a_missing_correction_is_caught(monkeypatch):
    layer, params = build("double_cv", {**BITS, "decay": 0.5})
    cost = PolynomialCost("quadratic", 3)
    train(layer, params, cost, steps=50)
    monkeypatch.setattr(double_cv, "covariance_product", lambda family, params, mean, v: torch.zeros_like(v))
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, cost)


def test_a_sum_over_draws_in_place_of_the_mean_is_caught(monkeypatch):
    layer, params = build("double_cv", BITS)
    monkeypatch.setattr(double_cv, "from_others", lambda value: value - value.mean(0))  # shrinks by 1/S
    cost = PolynomialCost("linear", 3)
    moments = measure(layer, params, cost, num_draws=20_000)
    assert moments.projection[0] == pytest.approx(0.5, abs=5 * moments.projection[1])
    assert moments.projection[1] < 0.02
