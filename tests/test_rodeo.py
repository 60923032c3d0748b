"""RODEO: the Stein identity by enumeration, the formula against its definition, and the variance it reaches."""

import itertools

import pytest
import torch
from control_variate_problems import total_variance, train
from small_problems import BITS, build
from test_double_cv import Toy, per_coordinate

from stochastic_layers import rodeo
from stochastic_layers.testing import PolynomialCost, check_mean

SMALL = {"hidden_features": 8}


def learned(options, kind="cubic", steps=100):
    layer, params = build("rodeo", {**BITS, **SMALL, **options}, batch=1)
    with torch.no_grad():
        for parameter in layer.network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    cost = PolynomialCost(kind, 3)
    return train(layer, params, cost, steps=steps, copies=8), params, cost


@pytest.mark.parametrize("num_samples", [2, 3])
def test_control_variates_have_mean_zero_over_the_own_draw(num_samples):
    """Given the other draws, by enumeration of all outcomes of one draw: the Stein identity, exact."""
    layer, params, cost = learned({"num_samples": num_samples})
    center = params[0].sigmoid()
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)  # [8, 3]
    others = torch.bernoulli(center.expand(num_samples - 1, 3))
    bits = torch.cat([outcomes.unsqueeze(0), others.unsqueeze(1).expand(-1, 8, -1)]).requires_grad_()  # [S, 8, 3]
    value = cost(bits)
    (slope,) = torch.autograd.grad(value.sum(), bits)
    first, second = layer._stein(bits.detach(), center, value.detach(), slope)
    probability = (outcomes * center + (1 - outcomes) * (1 - center)).prod(-1)  # [8]
    assert float(first[0].detach().abs().max()) > 1e-3
    assert abs(float((probability * first[0]).sum().detach())) < 1e-12
    assert float((probability.unsqueeze(-1) * second[0]).sum(0).abs().max().detach()) < 1e-12


def test_stein_terms_are_those_of_the_definition():
    """Against a loop over bits that builds every neighbour."""
    layer, params, cost = learned({"num_samples": 3})
    center = params[0].sigmoid()
    bits = torch.bernoulli(center.expand(3, 5, 3)).requires_grad_()
    value = cost(bits)
    (slope,) = torch.autograd.grad(value.sum(), bits)
    bits, value = bits.detach(), value.detach()
    first, second = layer._stein(bits, center, value, slope)

    def surrogates(k, y):
        linear = [(slope[j] * (y - bits[j])).sum(-1) for j in range(3) if j != k]
        levels = [value[j] for j in range(3) if j != k]
        return layer._surrogate(torch.stack(linear), torch.stack(levels)).mean(1).movedim(0, -1)

    for k in range(3):
        here = surrogates(k, bits[k])
        scalar, vector = 0.0, 0.0
        for i in range(3):
            near = bits[k].clone()
            near[:, i] = 1 - near[:, i]
            probability = torch.where(near[:, i] > 0, center[i], 1 - center[i])
            there = surrogates(k, near)
            scalar = scalar + probability * (there[:, 0] - here[:, 0])
            change = there[:, 1:] * (near - center) - here[:, 1:] * (bits[k] - center)
            vector = vector + probability.unsqueeze(-1) * change
        assert torch.allclose(first[k], scalar)
        assert torch.allclose(second[k], vector)


def test_gradient_is_the_formula_written_out(monkeypatch):
    """Leave-one-out and both control variates at given coefficients, draw by draw, bit by bit."""
    alpha, beta, mean, deviation = 0.7, -0.4, 1.3, 2.1
    layer, params = build("rodeo", {**BITS, **SMALL, "num_samples": 3}, batch=1)
    with torch.no_grad():
        for parameter in layer.network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    monkeypatch.setattr(layer.coefficients, "forward", lambda: torch.tensor([alpha, beta]).double())
    monkeypatch.setattr(rodeo.CostMoments, "mean", torch.tensor([mean]).double())
    monkeypatch.setattr(rodeo.CostMoments, "std", torch.tensor([deviation]).double())
    leaf, center = params.clone().requires_grad_(), params[0].sigmoid()
    sample = layer.sample(leaf)
    value = PolynomialCost("cubic", 3)(sample.z)
    (slope,) = torch.autograd.grad(value.sum(), sample.z, retain_graph=True)
    (found,) = torch.autograd.grad(sample.surrogate(value).sum(), leaf)
    z, f, slope = sample.z[:, 0].detach(), value[:, 0].detach(), slope[:, 0]

    def surrogates(k, y):
        others = [j for j in range(3) if j != k]
        linear = torch.stack([slope[j] @ (y - z[j]) for j in others])
        return deviation * layer._surrogate(linear / deviation, (f[others] - mean) / deviation).mean(1).detach()

    def stein(k):
        scalar, vector = 0.0, 0.0
        for i in range(3):
            near = z[k].clone()
            near[i] = 1 - near[i]
            flip = center[i] if near[i] > 0 else 1 - center[i]
            there, here = surrogates(k, near), surrogates(k, z[k])
            scalar = scalar + flip * (there[0] - here[0])
            vector = vector + flip * (there[1] * (near - center) - here[1] * (z[k] - center))
        return scalar, vector

    expected = 0.0
    for k in range(3):
        baseline = sum(f[j] + alpha * stein(j)[0] for j in range(3) if j != k) / 2
        expected = expected + ((f[k] - baseline) * (z[k] - center) + beta * stein(k)[1]) / 3
    torch.testing.assert_close(found[0], expected)


def test_the_network_sees_costs_in_units_of_the_past_ones():
    layer, params = build("rodeo", {**BITS, **SMALL}, batch=4)
    sample = layer.sample(params.requires_grad_())
    cost = PolynomialCost("cubic", 3)(sample.z)
    sample.surrogate(cost).sum().backward()
    torch.testing.assert_close(layer.moments.mean[0], cost.detach().mean(), check_dtype=False)


def test_surrogates_start_as_the_taylor_expansion():
    layer, _ = build("rodeo", {**BITS, **SMALL})
    linear, level = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(layer._surrogate(linear, level), (linear + level).expand(2, 5))


def test_variance_on_the_published_toy():
    """D = 200, two draws: leave-one-out's 1.25e-9 at the start, as published, and never above it."""
    layer, _ = build("rodeo", {"latent_dim": 200, **SMALL, "decay": 0.95})
    start, _ = per_coordinate(layer, 2000)
    assert start == pytest.approx(1.25e-9, rel=0.06)
    train(layer, torch.zeros(1, 200, dtype=torch.float64), Toy(), steps=200, copies=4)
    end, _ = per_coordinate(layer, 2000)
    print(f"rodeo {start:.3g} -> {end:.3g}")
    assert end < 1.06 * 1.25e-9


def test_the_network_lowers_the_variance_further():
    """At coefficients that have settled, against the plain Taylor surrogate of a network that is kept at zero."""
    figures = {}
    for trained in (False, True):
        layer, params = build("rodeo", {**BITS, "hidden_features": 32}, batch=1)
        layer.network.requires_grad_(trained)
        cost = PolynomialCost("cubic", 3)
        if trained:
            train(layer, params, cost, steps=500, copies=32, learning_rate=2e-2)
        else:
            for _ in range(300):
                leaf = params.expand(32, 1, 3).clone().requires_grad_()
                sample = layer.sample(leaf)
                sample.surrogate(cost(sample.z)).mean().backward()
        figures[trained] = total_variance(layer, params, cost)
    print(figures)
    assert figures[True] < 0.9 * figures[False]


def test_the_network_alone_is_the_papers_surrogate_and_learns():
    layer, params = build("rodeo", {**BITS, "hidden_features": 32, "taylor": False}, batch=1)
    linear, level = torch.randn(2, 5, dtype=torch.float64)
    inputs = torch.stack([linear, level], -1)  # before the first step, mean 0 and deviation 1
    torch.testing.assert_close(layer._surrogate(linear, level), layer.network(inputs).movedim(-1, 0))
    cost = PolynomialCost("cubic", 3)
    start = total_variance(layer, params, cost)
    train(layer, params, cost, steps=500, copies=32, learning_rate=2e-2)
    end = total_variance(layer, params, cost)
    print(f"the network alone {start:.3g} -> {end:.3g}")
    assert end < 0.7 * start


def test_the_wrong_flip_probability_is_caught(monkeypatch):
    """Without the Gibbs probability, A h does not have mean zero."""
    layer, params, cost = learned({}, kind="quadratic")
    right = rodeo.Rodeo._stein
    monkeypatch.setattr(rodeo.Rodeo, "_stein", lambda self, b, c, f, s: right(self, b, torch.full_like(c, 0.5), f, s))
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, cost)


def test_a_surrogate_that_contains_the_own_draw_is_caught(monkeypatch):
    layer, params, cost = learned({}, kind="quadratic")
    right = rodeo.Rodeo._stein

    def wrong(self, bits, center, cost, slope):
        swapped = right(self, bits, center, cost.flip(0), slope.flip(0))
        return swapped  # with two draws: each sees its own cost and slope

    monkeypatch.setattr(rodeo.Rodeo, "_stein", wrong)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, cost)
