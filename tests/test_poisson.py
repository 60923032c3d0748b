"""Counts, relaxed and straight-through: means and gradients in closed form, the law, its limits."""

import math

import pytest
import torch
from torch.distributions import kl_divergence
from two_variables import PARAMS

import stochastic_layers as sl
from stochastic_layers.testing import PolynomialCost, check_mean, measure

double = torch.float64


@pytest.mark.parametrize("max_arrivals", [1, 16])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_relaxed_counts_have_the_mean_of_the_law_and_an_exact_gradient_for_linear_costs(temperature, max_arrivals):
    layer = sl.create("poisson", latent_dim=2, temperature=temperature, max_arrivals=max_arrivals).double()
    for of in ("encoder", "value"):
        check_mean(layer, 1.5 * PARAMS[:, :2], PolynomialCost("linear", 2), of=of)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_bias_of_relaxed_counts_on_a_square_is_that_of_their_variance(temperature):
    """Var z = lambda (1 - 9 tau / 35), so that d E[z^2] / d log lambda is off by lambda * 9 tau / 35."""
    layer = sl.create("poisson", latent_dim=2, temperature=temperature).double()
    params = PARAMS[:, :2]
    rate = params.exp()

    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.ones(1, dtype=double))

        def forward(self, z):
            return (z**2).sum(-1)

    expected = 2 * rate**2 + rate * (1 - 9 / 35 * temperature)
    moments = measure(layer, params, Square(), num_draws=100_000)
    assert ((moments.mean - expected).abs() / moments.standard_error).max() < 5
    torch.testing.assert_close(moments.exact, 2 * rate**2 + rate)
    assert 8 * moments.standard_error.max() < 0.05 * expected.max()
    z = layer.sample(params.expand(100_000, 2, 2)).z[0].detach()
    torch.testing.assert_close(z.var(0), rate * (1 - 9 / 35 * temperature), rtol=0.04, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_straight_through_counts_are_exact_up_to_their_order_and_no_further(order):
    """E[w(z) f'(z)] against d E[f] / d log lambda for monomials, both as sums over counts; then the layer itself."""
    layer = sl.create("poisson_straight_through", latent_dim=1, order=order).double()
    rate = 1.7
    counts = torch.arange(80, dtype=double)
    probs = (counts * math.log(rate) - rate - torch.lgamma(counts + 1)).exp()
    log_rate = torch.full((80, 1), math.log(rate), dtype=double, requires_grad=True)
    weight = {
        1: rate + 0 * counts,
        2: (counts + rate) / 2,
        3: (5 * rate + 8 * counts + counts * (1 - counts) / rate) / 12,
    }
    for degree in (1, 2, 3, 4):
        estimate = float((probs * weight[order] * degree * counts ** (degree - 1)).sum())
        truth = float((probs * rate * ((counts + 1) ** degree - counts**degree)).sum())
        assert (abs(estimate / truth - 1) < 1e-12) == (degree <= order)
    z = layer(log_rate)
    (slope,) = torch.autograd.grad(z.sum(), log_rate)
    torch.testing.assert_close(slope.squeeze(-1), weight[order][z.detach().long().squeeze(-1)])


@pytest.mark.parametrize(("order", "kind"), [(1, "linear"), (2, "quadratic"), (3, "cubic")])
def test_straight_through_counts_are_unbiased_up_to_their_order(order, kind):
    layer = sl.create("poisson_straight_through", latent_dim=2, order=order).double()
    check_mean(layer, PARAMS[:, :2], PolynomialCost(kind, 2))
    if order < 3:
        with pytest.raises(AssertionError, match="standard errors off"):
            check_mean(layer, PARAMS[:, :2], PolynomialCost("cubic", 2))


@pytest.mark.parametrize(("name", "training"), [("poisson", False), ("poisson_straight_through", True)])
def test_counts_follow_the_poisson_law(name, training):
    layer = sl.create(name, latent_dim=1).train(training)
    z = layer.sample(torch.full((100_000, 1), math.log(2.5))).z.flatten().detach()
    counts = torch.arange(12.0, dtype=double)
    probs = (counts * math.log(2.5) - 2.5 - torch.lgamma(counts + 1)).exp()
    observed = torch.stack([(z == k).double().sum() for k in range(12)])
    expected = probs * len(z)
    statistic = ((observed - expected)[:10] ** 2 / expected[:10]).sum()
    # 10 of the cells, whose counts are 25 and more; false alarm below 1e-6
    assert torch.special.gammaincc(torch.tensor(5.0, dtype=double), statistic / 2) > 1e-6
    assert bool((z == z.round()).all())


def test_poisson_family_has_torch_s_law_and_kl_and_refuses_rates_that_float32_cannot_count():
    layer = sl.create("poisson", latent_dim=2)
    q, prior = layer.distribution(torch.tensor([[0.3, -200.0]])), layer.family.standard().expand((1,))
    rate = torch.tensor([0.3]).exp()
    torch.testing.assert_close(kl_divergence(q, prior), rate * 0.3 - rate + 1 + 1)
    assert layer.family.log_prob(q, torch.tensor([[[2.0, 0.0]]])).item() == pytest.approx(
        0.6 - rate.item() - math.log(2)
    )
    assert layer.mode(torch.tensor([1.0, -1.0])).tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="needed log-rates up to 16"):
        layer(torch.tensor([17.0, 0.0]))


def test_fast_counts_stay_exact_in_the_mean():
    layer = sl.create("poisson", latent_dim=1, max_arrivals=4)
    leaf = torch.full((20_000, 1), 9.0, requires_grad=True)
    z = layer(leaf)
    z.sum().backward()
    rate = math.exp(9.0)
    assert abs(z.detach().double().mean() / rate - 1) < 5 / math.sqrt(rate * 20_000)
    slopes = leaf.grad.double() / rate
    assert abs(slopes.mean() - 1) < 5 * slopes.std() / math.sqrt(20_000) and slopes.std() < 1
