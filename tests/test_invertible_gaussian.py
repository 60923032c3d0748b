"""The invertible Gaussian law: the density of draws by their noise, and by z."""

import pytest
import torch

import stochastic_layers as sl


def drawn(scale, dtype):
    layer = sl.create("invertible_gaussian", latent_dim=2, num_categories=4, num_samples=3)
    torch.manual_seed(0)
    params = (scale * (2 * torch.rand(50, layer.in_features) - 1)).to(dtype).requires_grad_()
    return layer, params, layer.sample(params)


def test_log_q_of_a_draw_and_its_derivative_are_those_of_the_density_at_z():
    layer, params, sample = drawn(1.0, torch.float64)
    of_z = layer.family.log_prob(sample.q, sample.z)
    torch.testing.assert_close(sample.log_prob, of_z)
    found, expected = (torch.autograd.grad(t.sum(), params, retain_graph=True)[0] for t in (sample.log_prob, of_z))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [10.0, 30.0, 79.0])
def test_log_q_of_draws_that_round_to_corners_has_a_finite_derivative(scale):
    _, params, sample = drawn(scale, torch.float32)
    assert bool((sample.z == 0).any())
    assert bool(torch.isfinite(sample.log_prob).all())
    assert bool(torch.isfinite(torch.autograd.grad(sample.log_prob.sum(), params)[0]).all())
