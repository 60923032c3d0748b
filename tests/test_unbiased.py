"""Every layer that calls itself unbiased, against the exact gradient; every biased one, with its bias measured."""

import pytest
import torch
from small_problems import build

from stochastic_layers.testing import COSTS, PolynomialCost, check_mean

CASES = [
    ("gaussian", {"latent_dim": 2}),
    ("reinforce", {"latent_dim": 3, "baseline": "none"}),
    ("reinforce", {"latent_dim": 3, "num_samples": 4, "baseline": "leave_one_out"}),
    ("reinforce", {"latent_dim": 3, "num_samples": 2, "baseline": "moving_average"}),
    ("reinforce", {"latent_dim": 3, "num_samples": 2, "baseline": "learned"}),
    (
        "reinforce",
        {"latent_dim": 2, "num_categories": 3, "family": "categorical", "num_samples": 2, "baseline": "leave_one_out"},
    ),
    ("reinforce", {"latent_dim": 2, "family": "gaussian", "num_samples": 4, "baseline": "leave_one_out"}),
]


@pytest.mark.parametrize("kind", [k for k in COSTS if k != "constant"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradient_of_the_encoder_is_exact_in_the_mean(name, options, kind):
    layer, params = build(name, options)
    check_mean(layer, params, PolynomialCost(kind, layer.out_features))


@pytest.mark.parametrize("of", ["decoder", "value"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradient_of_the_decoder_and_the_reported_value_are_exact_in_the_mean(name, options, of):
    layer, params = build(name, options)
    check_mean(layer, params, PolynomialCost("asymmetric", layer.out_features), of=of)


@pytest.mark.parametrize("family", ["bernoulli", "categorical", "gaussian"])
def test_constant_cost_gives_leave_one_out_no_gradient(family):
    options = {"num_categories": 3} if family == "categorical" else {}
    layer, params = build(
        "reinforce", {"latent_dim": 2, "family": family, "num_samples": 3, **options, "baseline": "leave_one_out"}
    )
    for constant in (3.0, 0.1, -1e6 / 3):  # means of equal numbers need not equal the number
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        sample.surrogate(torch.full(sample.z.shape[:-1], constant, dtype=torch.float64)).sum().backward()
        assert not leaf.grad.any()


@pytest.mark.parametrize("family", ["bernoulli", "categorical", "gaussian"])
@pytest.mark.parametrize("num_samples", [2, 5])
def test_leave_one_out_is_vargrad_draw_by_draw(family, num_samples):
    """VarGrad: the gradient of half the empirical variance of log q - log p, the draws held fixed."""
    options = {"num_categories": 3} if family == "categorical" else {}
    layer, params = build("leave_one_out", {"latent_dim": 2, "family": family, "num_samples": num_samples, **options})
    leaf = params.clone().requires_grad_()
    sample = layer.sample(leaf)
    log_joint = -PolynomialCost("cubic", layer.out_features)(sample.z.detach()).detach()
    (ours,) = torch.autograd.grad(sample.surrogate((sample.log_prob - log_joint).detach()).sum(), leaf)
    log_prob = layer.family.log_prob(layer.distribution(leaf), sample.z.detach())
    (vargrad,) = torch.autograd.grad(0.5 * (log_prob - log_joint).var(0).sum(), leaf)
    torch.testing.assert_close(ours, vargrad, rtol=1e-10, atol=1e-12)
    assert ours.any()
