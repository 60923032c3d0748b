"""Coupled pathwise draws: exact in the mean, and with less variance where that is promised."""

import math

import pytest
import torch
from pathwise_problems import KS_DRAWS, KS_LIMIT, build, ks_distance, params_of
from scipy import stats

import stochastic_layers as sl
from stochastic_layers.diagnostics import gradient_statistics
from stochastic_layers.testing import PolynomialCost, check_mean


@pytest.mark.parametrize("family", sl.Antithetic.families)
def test_antithetic_is_exact_in_the_mean(family):
    layer = build(family, "antithetic")
    params = params_of(layer)
    check_mean(layer, params, PolynomialCost("asymmetric" if family.startswith("gaussian") else "quadratic", 2))
    check_mean(layer, params, PolynomialCost("quadratic", 2), of="decoder")
    check_mean(layer, params, PolynomialCost("quadratic", 2), of="value")


def test_antithetic_about_the_wrong_centre_is_seen():
    class Planted(sl.Antithetic):
        def draw(self, params, context):
            sample = super().draw(params, context)
            half = sample.z[: self.num_samples // 2]
            return self._sample(sample.q, torch.cat([half, -half]))

    layer = Planted(2).double()
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params_of(layer), PolynomialCost("quadratic", 2))


@pytest.mark.parametrize("family", sl.Antithetic.families)
def test_antithetic_pairs_have_no_variance_where_the_cost_is_odd(family):
    layer = build(family, "antithetic", num_samples=4)
    params = params_of(layer)
    theta = torch.tensor([1.5, -0.5], dtype=torch.float64)
    sample = layer.sample(params)
    torch.testing.assert_close(sample.z[2:], 2 * layer.mode(params) - sample.z[:2])  # pair by pair, as documented
    estimate = sample.surrogate(sample.z @ theta)
    torch.testing.assert_close(estimate, layer.mode(params) @ theta)  # the value itself
    statistics = gradient_statistics(layer, params, lambda z: z @ theta)
    assert float(statistics.variance.max()) < 1e-25
    loc = statistics.mean[..., : layer.latent_dim]
    torch.testing.assert_close(loc, theta.expand_as(loc))
    # of a quadratic cost the gradient of the loc is linear in z
    quadratic = gradient_statistics(layer, params, lambda z: (z @ theta) ** 2)
    assert float(quadratic.variance[..., : layer.latent_dim].max()) < 1e-25


def test_antithetic_pairs_gain_nothing_where_the_cost_is_even():
    params = params_of(build("gaussian"))
    loc = params[..., :2]
    pair, single = build("gaussian", "antithetic"), build("gaussian")
    torch.manual_seed(3)
    of_pair = pair.sample(params.requires_grad_())
    torch.manual_seed(3)
    of_single = single.sample(params)
    values = [s.surrogate((s.z - loc.detach()).square().sum(-1)) for s in (of_pair, of_single)]
    torch.testing.assert_close(*values)  # two evaluations are worth exactly one
    independent = build("gaussian", num_samples=2)
    variances = [
        gradient_statistics(
            layer, params, lambda z: (z - loc.detach()).square().sum(-1), num_draws=20_000, chunk_size=20_000
        )
        .variance[..., 2:]
        .sum()
        for layer in (pair, independent)
    ]
    assert float(variances[0] / variances[1]) == pytest.approx(2.0, rel=0.1)


def test_antithetic_refuses_an_odd_number_and_a_skewed_family():
    with pytest.raises(ValueError, match="even num_samples"):
        sl.create("antithetic", latent_dim=2, num_samples=3)
    with pytest.raises(ValueError, match="supports the families"):
        sl.create("antithetic", latent_dim=2, family="gamma")


@pytest.mark.parametrize("num_samples", [3, 4])
@pytest.mark.parametrize("family", sl.QuasiMonteCarlo.families)
def test_quasi_monte_carlo_is_exact_in_the_mean(family, num_samples):
    layer = build(family, "quasi_monte_carlo", num_samples=num_samples)
    params = params_of(layer)
    check_mean(layer, params, PolynomialCost("quadratic", 2))
    check_mean(layer, params, PolynomialCost("quadratic", 2), of="value")


def test_quasi_monte_carlo_without_a_shift_is_seen():
    class Planted(sl.QuasiMonteCarlo):
        def draw(self, params, context):
            u = (
                (self.points.double() / 2**30)
                .clamp(1e-4, 1 - 1e-4)[:, None, None, :]
                .expand(-1, *params.shape[:-1], -1)
            )
            q = self.law(params)
            return self._sample(q, q.base_dist.icdf(u))

    layer = Planted(2, num_samples=4).double()
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params_of(layer), PolynomialCost("quadratic", 2))


def test_quasi_monte_carlo_stratifies_every_axis():
    layer = build("gaussian", "quasi_monte_carlo", latent_dim=7, num_samples=16)
    params = params_of(layer, batch=(50,))
    u = layer.distribution(params).base_dist.cdf(layer.sample(params).z)  # [16, 50, 7]
    cells = (u * 16).long().sort(0).values
    assert bool((cells == torch.arange(16).view(-1, 1, 1)).all())


def test_quasi_monte_carlo_reaches_far_into_the_tails_in_float32(monkeypatch):
    layer = build("gaussian", "quasi_monte_carlo", num_samples=2).float()
    monkeypatch.setattr(torch, "randint", lambda high, shape, device: torch.full(shape, high - 1))  # the last cell
    z = layer.sample(torch.zeros(3, 4)).z[0]
    assert bool(torch.isfinite(z).all()) and float(z.min()) > 6
    inside = build("kumaraswamy", "quasi_monte_carlo", num_samples=2).float().sample(torch.zeros(3, 4))
    assert float(inside.z[0].min()) > 1 - 1e-6 and bool(torch.isfinite(inside.log_prob).all())


def test_quasi_monte_carlo_draws_each_follow_the_law_and_examples_are_independent():
    layer = build("gaussian", "quasi_monte_carlo", num_samples=2)
    z = layer.sample(torch.zeros(KS_DRAWS, 4, dtype=torch.float64)).z
    for values in (z[0, :, 0], z[1, :, 0], z[0, :, 1]):
        assert ks_distance(values, stats.norm().cdf) < KS_LIMIT
    neighbours = (z[0, 1:] * z[0, :-1]).mean(0) * math.sqrt(KS_DRAWS)
    assert float(neighbours.abs().max()) < 5


def test_quasi_monte_carlo_has_a_lower_variance_than_independent_draws():
    params = params_of(build("gaussian"))
    cost = PolynomialCost("quadratic", 2)
    totals = [
        gradient_statistics(
            build("gaussian", name, num_samples=16), params, cost, num_draws=4000, chunk_size=4000
        ).total_variance
        for name in ("quasi_monte_carlo", "pathwise")
    ]
    assert totals[0] < totals[1] / 5  # about 1 / 8 here, and 0.4 for a steep cubic


def test_quasi_monte_carlo_refuses_more_dimensions_than_the_sequence_has():
    with pytest.raises(ValueError, match="latent_dim <= 21201"):
        sl.create("quasi_monte_carlo", latent_dim=30_000)


@pytest.mark.parametrize("name", ["antithetic", "quasi_monte_carlo"])
def test_coupled_pathwise_layers_compile_and_take_any_batch(name):
    torch._dynamo.reset()
    layer = build("gaussian", name)

    def loss(params):
        sample = layer.sample(params)
        return sample.surrogate(sample.z.square().sum(-1)).sum()

    for batch in [(), (0,), (2, 3)]:
        params = params_of(layer, batch=batch).requires_grad_()
        loss(params).backward()
        assert bool(torch.isfinite(params.grad).all())
    params = params_of(layer).requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(params).backward()
    assert bool((params.grad != 0).all())
    sample = layer.eval().sample(params)
    assert not sample.z.requires_grad and sample.z.shape[0] == layer.num_samples
