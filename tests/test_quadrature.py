"""Rules of integration against closed forms, and the certificates of continuous families that are made of them."""

import math

import pytest
import torch

import stochastic_layers as sl
from stochastic_layers.quadrature import gauss_hermite, gauss_legendre, product_rule
from stochastic_layers.testing import PolynomialCost, check_mean, exact_value, measure_all, references
from stochastic_layers.testing.subject import Subject

FAMILIES = [f for f in sl.describe("pathwise").families if f not in ("power_spherical", "dirichlet")]


def test_gauss_rules_are_exact_for_polynomials():
    for count in (3, 6, 40):
        x, w = gauss_hermite(count)
        for degree in range(0, min(2 * count, 12), 2):
            expected = math.prod(range(degree - 1, 0, -2))  # the moments of a standard normal
            assert float((w * x**degree).sum()) == pytest.approx(expected, rel=1e-11)
        x, w = gauss_legendre(count)
        for degree in range(2 * count):
            assert float((w * x**degree).sum()) == pytest.approx(1 / (degree + 1), rel=1e-11)


def test_products_that_would_not_fit_are_refused():
    nodes = torch.arange(10.0)
    assert len(product_rule(nodes, nodes, 3)[0]) == 1000
    with pytest.raises(ValueError, match="needed few free coordinates"):
        product_rule(nodes, nodes, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_and_variance_by_nodes_are_those_of_the_law(family):
    """Values, and the gradients of the mean, which differ from those of draws in how they come about."""
    subject = Subject("pathwise", family=family)
    layer, params = subject.build(), subject.params(2).requires_grad_()
    q = layer.distribution(params)
    nodes = [exact_value(layer, params, lambda z, i=i: z[..., i]) for i in range(2)]
    torch.testing.assert_close(torch.stack(nodes, -1), q.mean, rtol=1e-9, atol=1e-9)
    square = exact_value(layer, params, lambda z: (z - q.mean.detach()).square().sum(-1))
    torch.testing.assert_close(square, q.variance.sum(-1), rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(t.sum(), params, retain_graph=True)[0] for t in (sum(nodes), q.mean))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


LAW_OF = {family: name for name in sl.list_layers() for family in sl.describe(name).families}


@pytest.mark.parametrize(
    "family", sorted({*LAW_OF} - {"bernoulli", "categorical", "subset", "permutation", "quantized"})
)
def test_a_finer_rule_has_more_nodes(family):
    """The difference that it makes is what the certificates take for the error of the coarse one."""
    subject = Subject(LAW_OF[family], family=family)
    layer = subject.build()
    q = layer.distribution(subject.params(1))
    assert len(layer.family.nodes(q, 1)[0]) > len(layer.family.nodes(q)[0])


@pytest.mark.parametrize("family", ["beta", "kumaraswamy", "dirichlet"])
def test_mass_at_the_ends_of_the_interval_is_not_lost(family):
    """A hundredth of it lies where 1 - z is no number any more."""
    subject = Subject("pathwise", family=family)
    layer, params = subject.build(), (subject.params(2) - 3).requires_grad_()
    mean = layer.distribution(params).mean.flatten(1)
    nodes = torch.stack([exact_value(layer, params, lambda z, i=i: z[..., i]) for i in range(mean.shape[1])], -1)
    torch.testing.assert_close(nodes, mean, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(nodes.unbind(-1), mean.unbind(-1), strict=True):
        ours, theirs = (torch.autograd.grad(t.sum(), params, retain_graph=True)[0] for t in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_error_of_the_reference_counts_as_noise():
    """A reference that is wrong by three percent fails; one that says so does not."""
    subject = Subject("pathwise", family="laplace")
    layer, params, cost = subject.build(), subject.params(2), PolynomialCost("quadratic", 2)

    def wrong(layer, params, cost_fn):
        return 1.03 * exact_value(layer, params, cost_fn)

    options = {"num_draws": 400_000, "of": ("value",)}
    silent = references(layer, params, cost, expectation=wrong)
    frank = references(layer, params, cost, expectation=wrong, coarse=exact_value)
    blind = measure_all(layer, params, cost, exact=silent, **options)["value"]
    aware = measure_all(layer, params, cost, exact=frank, **options)["value"]
    assert blind.largest_z > 5 > aware.largest_z
    assert aware.relative_error == pytest.approx(0.03 / 1.03, rel=1e-6) and blind.relative_error == 0


class Shrunk(sl.Pathwise):
    """A mistake of 6 % in the gradient of continuous draws."""

    def draw(self, params, context):
        sample = super().draw(params, context)
        return self._sample(sample.q, sample.z.detach() + 0.94 * (sample.z - sample.z.detach()))


@pytest.mark.parametrize("family", ["laplace", "gamma", "kumaraswamy"])
def test_a_small_bias_of_a_continuous_layer_is_caught(family):
    subject = Subject(Shrunk, family=family)
    layer, params = subject.build(), subject.params(2)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("linear", 2))
