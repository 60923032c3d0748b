"""Layers that average over the noise of one draw (Gumbel-Rao, ReinMax-Rao, ReinMax-CV), and that noise itself."""

import itertools
import math

import pytest
import torch
from straight_through_gradients import assert_mean, build, expected_gradient
from two_variables import BITS, CATEGORIES, FAMILIES, PARAMS

import stochastic_layers as sl
from stochastic_layers.gumbel_straight_through import GumbelRao, conditional_magnitude, conditional_ratios
from stochastic_layers.testing import PolynomialCost, measure


@pytest.mark.parametrize("replicates", [2, 7])  # less and more than the number of categories take different routes
def test_mean_of_gumbel_rao_does_not_depend_on_the_number_of_replicates(replicates):
    layer, params = build("gumbel_rao", {**CATEGORIES, "temperature": 0.6, "num_replicates": replicates})
    cost_fn = PolynomialCost("asymmetric", layer.out_features)
    assert_mean(layer, params, cost_fn, expected_gradient(layer, params, cost_fn))


@pytest.mark.parametrize("options", FAMILIES)
def test_gumbel_rao_has_the_mean_of_straight_through_gumbel(options):
    """One against the other, without the formula that both are compared with above."""

    def mean(name):
        tempered = {} if name == "straight_through" else {"temperature": 0.6}
        layer, params = build(name, {**options, **tempered})
        return measure(layer, params, PolynomialCost("cubic", layer.out_features), num_draws=150_000)

    plain, rao, other = mean("straight_through_gumbel"), mean("gumbel_rao"), mean("straight_through")
    error = (plain.standard_error.square() + rao.standard_error.square()).sqrt()
    assert float(error.norm() / plain.mean.norm()) < 0.05 / 8  # a difference of 5 % would be seen
    assert float(((plain.mean - rao.mean).abs() / error).max()) < 5
    assert float(((plain.mean - other.mean).abs() / error).max()) > 50  # as that of another layer is


@pytest.mark.parametrize("options", FAMILIES)
def test_gumbel_rao_has_less_variance_than_straight_through_gumbel_and_less_with_more_replicates(options):
    def total_variance(name, **more):
        layer, params = build(name, {**options, "temperature": 0.5, **more})
        moments = measure(layer, params, PolynomialCost("cubic", layer.out_features), num_draws=20_000)
        return float(moments.standard_error.square().sum())

    plain, few, many = (
        total_variance("straight_through_gumbel"),
        total_variance("gumbel_rao", num_replicates=2),
        total_variance("gumbel_rao", num_replicates=32),
    )
    assert many < 0.9 * few and few < 0.9 * plain
    one = total_variance("gumbel_rao", num_replicates=1)
    assert abs(one / plain - 1) < 0.15  # one replicate is straight-through Gumbel itself


def test_gumbel_rao_that_differentiates_its_conditional_noise_is_found_out():
    class Leaky(GumbelRao):
        def draw(self, params, context):
            q = self.law(params)
            hard = self.family.sample(q, self.num_samples)
            log_probs = params.unflatten(-1, (2, 3)).log_softmax(-1)
            index = hard.unflatten(-1, (2, 3)).argmax(-1, keepdim=True)
            noise = torch.empty(*log_probs.shape, dtype=params.dtype).exponential_().log_().unsqueeze(0)
            top = noise.gather(-1, index)
            scores = -torch.logaddexp(noise - log_probs, top).scatter(-1, index, top)
            soft = (scores / self.temperature).softmax(-1).flatten(-2)
            return self._sample(q, hard + (soft - soft.detach()))

    layer = Leaky(**CATEGORIES, temperature=0.8, num_replicates=1).double()
    right, _ = build("gumbel_rao", {**CATEGORIES, "temperature": 0.8, "num_replicates": 4})
    cost_fn = PolynomialCost("cubic", 6)
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_mean(layer, PARAMS, cost_fn, expected_gradient(right, PARAMS, cost_fn))


def plain_reinmax(params, cost_fn, temperature, categories, draws, eta=None):
    """The gradient of each draw of ReinMax-Rao, or ReinMax-CV, with noise that rejection conditions on the draw."""
    logits = params.reshape(*params.shape[:-1], -1, categories).expand(draws, *params.shape[:-1], -1, categories)
    if categories == 1:  # a bit is a choice between its logit and 0
        logits = torch.cat([logits, torch.zeros_like(logits)], -1)
    probs = logits.softmax(-1)
    noise = -torch.empty_like(logits).exponential_().log()
    z = torch.zeros_like(logits).scatter_(-1, (logits + noise).argmax(-1, keepdim=True), 1.0)
    leaf = (z[..., :1] if categories == 1 else z).flatten(-2).clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost_fn(leaf).sum(), leaf)
    slope = slope.reshape(*logits.shape[:-1], categories)
    if categories == 1:
        slope = torch.cat([slope, torch.zeros_like(slope)], -1)

    def product(point):
        return point * (slope - (point * slope).sum(-1, keepdim=True))

    middle = ((probs + z) / 2).log()
    scores, open_ = middle.clone(), torch.ones_like(middle[..., :1], dtype=torch.bool)
    while bool(open_.any()):
        drawn = middle - torch.empty_like(middle).exponential_().log()
        hit = open_ & ((drawn.argmax(-1, keepdim=True)) == z.argmax(-1, keepdim=True))
        scores, open_ = torch.where(hit, drawn, scores), open_ & ~hit
    smooth = product((scores / temperature).softmax(-1)) / temperature
    if eta is None:
        gradient = 2 * smooth - 0.5 * product(probs)
    else:
        noisy = product(((middle + noise) / temperature).softmax(-1)) / temperature
        gradient = 2 * product((probs + z) / 2) - 0.5 * product(probs) + eta * (smooth - noisy)
    return (gradient[..., :1] if categories == 1 else gradient).flatten(-2)


@pytest.mark.parametrize(("name", "eta"), [("reinmax_rao", None), ("reinmax_cv", 0.8)])
@pytest.mark.parametrize(("options", "categories"), [(BITS, 1), (CATEGORIES, 3)])
def test_means_of_smoothed_reinmax_are_those_of_their_formulas(options, categories, name, eta):
    own = {} if eta is None else {"eta": eta}
    layer, params = build(name, {**options, "temperature": 0.7, "num_replicates": 3, **own})
    cost_fn = PolynomialCost("cubic", layer.out_features)
    ours = measure(layer, params, cost_fn, num_draws=50_000)
    plain = plain_reinmax(params, cost_fn, 0.7, categories, 50_000, eta)
    error = (ours.standard_error.square() + plain.var(0) / 50_000).sqrt()
    assert error.max() < 0.05 * plain.mean(0).abs().max()
    assert ((ours.mean - plain.mean(0)) / error).abs().max() < 5


@pytest.mark.parametrize("options", FAMILIES)
def test_reinmax_cv_without_its_control_variate_is_reinmax(options):
    def gradient(name, **more):
        layer, params = build(name, {**options, **more})
        leaf = params.clone().requires_grad_()
        torch.manual_seed(3)  # both draw z first, and so the same z
        sample = layer.sample(leaf)
        cost = PolynomialCost("cubic", layer.out_features)(sample.z)
        return torch.autograd.grad(sample.surrogate(cost).sum(), leaf)[0]

    torch.testing.assert_close(gradient("reinmax_cv", eta=0.0), gradient("reinmax"))
    assert not torch.allclose(gradient("reinmax_cv", eta=0.5), gradient("reinmax"))


@pytest.mark.parametrize("options", FAMILIES)
def test_smoothed_reinmax_is_biased_on_quadratics(options):
    def bias(name):
        layer, params = build(name, options)
        return measure(layer, params, PolynomialCost("quadratic", layer.out_features), num_draws=20_000).relative_bias

    assert bias("reinmax") < 0.05 < 0.1 < bias("reinmax_rao")
    assert bias("reinmax") + 0.03 < bias("reinmax_cv")


def kolmogorov_p(values, cdf):
    """Kolmogorov's asymptotic p-value that values have this cumulative distribution function."""
    values = values.sort().values
    n = len(values)
    grid = torch.arange(n + 1, dtype=values.dtype) / n
    distance = float(torch.maximum(grid[1:] - cdf(values), cdf(values) - grid[:-1]).max()) * math.sqrt(n)
    return 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 20))


def test_conditional_gumbels_have_their_argmax_where_told_and_differ_by_logistics_on_average():
    logits = PARAMS[0, :4].log_softmax(-1)
    layer = sl.create("reinmax", latent_dim=1, family="categorical", num_categories=4)
    hots = layer.family.sample(layer.distribution(logits), 100_000).mT
    scores = conditional_ratios(logits.exp().view(4, 1), hots, 1)[:, 0].log()  # less their maximum
    assert bool((scores.argmax(0) == hots.argmax(0)).all()) and float(scores.max()) == 0
    for i, j in itertools.combinations(range(4), 2):
        difference, loc = scores[i] - scores[j], logits[i] - logits[j]
        assert kolmogorov_p(difference, lambda x, loc=loc: torch.sigmoid(x - loc)) > 1e-6
    shifted = scores[0] - scores[1] + 0.1  # the power of the test
    assert kolmogorov_p(shifted, lambda x: torch.sigmoid(x - (logits[0] - logits[1]))) < 1e-6


def test_conditional_logistics_have_their_sign_where_told_and_are_logistic_on_average():
    logits = torch.full((100_000,), -0.8, dtype=torch.float64)
    sign = 2 * torch.bernoulli(logits.sigmoid()) - 1
    magnitude = conditional_magnitude((-sign * logits).sigmoid(), 1)[0]
    assert float(magnitude.min()) > 0
    assert kolmogorov_p(sign * magnitude, lambda x: torch.sigmoid(x + 0.8)) > 1e-6
    assert kolmogorov_p(sign * magnitude + 0.05, lambda x: torch.sigmoid(x + 0.8)) < 1e-6
