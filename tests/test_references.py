"""Reference gradients: exact by enumeration, or long averages with their error."""

import pytest
import torch
from diagnosed_layers import discrete_problem, problem

import stochastic_layers as sl
from stochastic_layers.diagnostics import gradient_reference, gradient_statistics
from stochastic_layers.testing import exact_value


def test_an_exact_reference_does_not_depend_on_how_outcomes_are_cut(monkeypatch):
    layer, params, cost_fn, exact = discrete_problem("reinforce")
    for max_bytes in (1, 5000, 2**28):
        found = gradient_reference(layer, params, lambda s: cost_fn(s.z), kind="exact", max_bytes=max_bytes)
        torch.testing.assert_close(found.gradient, exact, rtol=1e-12, atol=1e-12)


def test_the_largest_number_of_outcomes_is_still_enumerated():
    layer, params, cost_fn, _ = discrete_problem("reinforce")
    for limit, kind in ((8, "exact"), (7, "average")):
        found = gradient_reference(layer, params, lambda s: cost_fn(s.z), max_outcomes=limit, num_draws=2)
        assert found.kind == kind


def test_an_exact_reference_does_not_drown_in_a_large_constant():
    layer, params, cost_fn, exact = discrete_problem("reinforce")
    single = params.float()
    found = gradient_reference(layer, single, lambda s: cost_fn(s.z.double()) + 1e8, kind="exact")
    torch.testing.assert_close(found.gradient, exact, rtol=1e-4, atol=1e-4)


def test_a_cost_that_sums_batch_dimensions_is_enumerated_jointly():
    layer, params = sl.create("reinforce", latent_dim=2), torch.tensor([[[0.3, -0.5], [1.0, 0.2]]]).double()

    def cost_fn(z):  # [S, R, 1, 2, 2] -> [S, R, 1], of both positions together
        return (z.sum((-1, -2)) - 1.5) ** 3

    found = gradient_statistics(layer, params, cost_fn, num_draws=20_000)
    assert found.reference.kind == "exact"
    joint = sl.create("enumeration", latent_dim=4)
    leaf = params.reshape(1, 4).clone().requires_grad_()
    sample = joint.sample(leaf)
    (exact,) = torch.autograd.grad(sample.surrogate((sample.z.sum(-1) - 1.5) ** 3).sum(), leaf)
    torch.testing.assert_close(found.reference.gradient, exact.view(1, 2, 2), rtol=1e-10, atol=1e-12)
    assert bool((found.bias.abs() < 5 * found.bias_standard_error).all())


@pytest.mark.parametrize("name", ["gaussian", "poisson", "hard_concrete", "reinforce"])
def test_long_averages_are_unbiased_and_know_their_error(name):
    layer, params, cost_fn = problem(name)
    leaf = params.clone().requires_grad_()
    (exact,) = torch.autograd.grad(exact_value(layer, leaf, cost_fn).sum(), leaf)
    found = gradient_reference(layer, params, lambda s: cost_fn(s.z), kind="average", num_draws=4000)
    assert found.kind == "average"
    assert bool(((found.gradient - exact).abs() < 5 * found.variance.sqrt()).all())
    assert float(found.variance.sum().sqrt()) < 0.25 * float(exact.norm())


def test_an_average_has_other_noise_than_what_is_measured():
    layer, params, cost_fn, _ = discrete_problem("reinforce")
    layer = sl.create("leave_one_out", latent_dim=3, num_samples=4).double()  # the very estimator of the average
    found = gradient_statistics(layer, params, cost_fn, num_draws=64, reference="average", reference_draws=64)
    assert float((found.bias / found.bias_standard_error).abs().max()) > 0.5


def test_an_average_of_a_black_box_uses_the_score_function():
    layer = sl.create("leave_one_out", latent_dim=1, family="gaussian")
    params = torch.tensor([[0.3, 0.0]], dtype=torch.float64)
    found = gradient_statistics(layer, params, lambda z: (z.detach() > 0).double().squeeze(-1), num_draws=4000)
    density = torch.exp(torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(0.3)))  # d P(z > 0) / d loc
    error = float(found.reference.variance[0, 0]) ** 0.5
    assert float(found.reference.gradient[0, 0]) == pytest.approx(float(density), abs=5 * error) and error < 0.1
    assert bool((found.bias.abs() < 5 * found.bias_standard_error).all())


def test_large_spaces_are_averaged_and_points_have_no_reference():
    layer = sl.create("disarm", latent_dim=200)
    found = gradient_statistics(layer, torch.zeros(2, 200), lambda z: z.sum(-1), num_draws=4, reference_draws=8)
    assert found.reference.kind == "average"
    with pytest.raises(ValueError, match="2 \\*\\* 200; use reference='average'"):
        gradient_statistics(layer, torch.zeros(2, 200), lambda z: z.sum(-1), num_draws=4, reference="exact")
    quantizer = sl.create("fsq", latent_dim=2)
    params = torch.zeros(2, quantizer.in_features)
    found = gradient_statistics(quantizer, params, lambda z: z.sum(-1), num_draws=4)
    assert found.reference is None
    with pytest.raises(ValueError, match="needed a reference"):
        _ = found.mse
    with pytest.raises(ValueError, match="point mass"):
        gradient_statistics(quantizer, params, lambda z: z.sum(-1), num_draws=4, reference="average")


def test_a_given_reference_is_taken_as_exact():
    layer, params, cost_fn, exact = discrete_problem("straight_through")
    found = gradient_statistics(layer, params, cost_fn, num_draws=50, reference=exact + 1)
    torch.testing.assert_close(found.bias, found.mean - exact - 1)
    assert found.reference.kind == "given"
    with pytest.raises(ValueError, match="the shape of params"):
        gradient_statistics(layer, params, cost_fn, reference=exact[:1])
