"""The straight-through family: expected gradients against sums over all outcomes, laws, exact hardness, extremes."""

import math

import pytest
import torch
from straight_through_gradients import assert_mean, build, expected_gradient
from two_variables import BITS, CATEGORIES, FAMILIES, PARAMS

import stochastic_layers as sl
from stochastic_layers.straight_through import ReinMax
from stochastic_layers.testing import PolynomialCost, check_law, check_mean, exact_value

LAYERS = {
    "straight_through": {},
    "decoupled_straight_through": {"temperature": 0.7, "sampling_temperature": 1.6},
    "reinmax": {"temperature": 1.3},
    "straight_through_gumbel": {"temperature": 0.8},
    "gumbel_rao": {"temperature": 0.8, "num_replicates": 4},
    "gapped_straight_through": {"temperature": 0.8, "gap": 0.9},
}


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("name", LAYERS)
def test_mean_of_the_gradient_is_the_formula_summed_over_all_outcomes(name, options):
    layer, params = build(name, {**LAYERS[name], **options})
    cost_fn = PolynomialCost("cubic", layer.out_features)
    expected = expected_gradient(layer, params, cost_fn)
    leaf = params.clone().requires_grad_()
    (exact,) = torch.autograd.grad(exact_value(layer, leaf, cost_fn).sum(), leaf)
    bias = (expected - exact).norm() / exact.norm()
    assert bias > 0.05  # these layers are biased on cubic costs, and the test measures by how much
    moments = assert_mean(layer, params, cost_fn, expected)
    assert abs(moments.relative_bias - bias) < 0.02


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("of", ["encoder", "decoder", "value"])
def test_reinmax_at_temperature_one_is_exact_for_quadratic_costs(options, kind, of):
    layer, params = build("reinmax", options)
    check_mean(layer, params, PolynomialCost(kind, layer.out_features), of=of)


def test_reinmax_is_not_exact_for_cubic_costs_nor_at_another_temperature():
    layer, params = build("reinmax", CATEGORIES)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("cubic", 6))
    layer.temperature = 1.5
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("quadratic", 6))


def test_reinmax_without_its_first_order_correction_is_found_out():
    class Halved(ReinMax):
        def draw(self, params, context):
            sample = super().draw(params, context)
            probs = params.unflatten(-1, (2, 3)).softmax(-1).flatten(-2)
            return self._sample(sample.q, sample.z + 0.5 * (probs - probs.detach()))

    layer = Halved(**CATEGORIES).double()
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, PARAMS, PolynomialCost("quadratic", 6))


@pytest.mark.parametrize(
    ("name", "options"),
    [("straight_through", {}), ("decoupled_straight_through", {"temperature": 1.6, "sampling_temperature": 1.6})],
)
@pytest.mark.parametrize("shape", FAMILIES)
def test_first_order_layers_are_exact_in_every_draw_for_linear_costs(name, options, shape):
    layer, params = build(name, {**options, **shape})
    cost_fn = PolynomialCost("linear", layer.out_features)
    leaf = params.clone().requires_grad_()
    sample = layer.sample(leaf)
    (gradient,) = torch.autograd.grad(sample.surrogate(cost_fn(sample.z)).sum(), leaf)
    (exact,) = torch.autograd.grad(exact_value(layer, leaf, cost_fn).sum(), leaf)
    torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=0)  # temperatures are kept in float32


@pytest.mark.parametrize(
    "name", ["straight_through", "decoupled_straight_through", "reinmax", "gapped_straight_through"]
)
def test_a_bit_is_a_variable_of_two_categories_with_logits_l_and_zero(name):
    """Given z these layers have no noise left, so that the gradients can be compared draw by draw."""
    logits = PARAMS[:, :2]
    gradients = {}
    for family in ("bernoulli", "categorical"):
        two = {"num_categories": 2} if family == "categorical" else {}
        layer = sl.create(name, latent_dim=2, family=family, **two, **LAYERS[name]).double()
        leaf = logits.expand(64, 2, 2).clone().requires_grad_()
        params = leaf if family == "bernoulli" else torch.stack([leaf, 0 * leaf], -1).flatten(-2)
        sample = layer.sample(params)
        bits = sample.z[0] if family == "bernoulli" else sample.z[0].view(64, 2, 2, 2)[..., 0]
        (grads,) = torch.autograd.grad((PolynomialCost("cubic", 2)(bits)).sum(), leaf)
        keys = [(i % 2, *row) for i, row in enumerate(bits.detach().flatten(0, 1).long().tolist())]
        gradients[family] = dict(zip(keys, grads.flatten(0, 1), strict=True))
    assert len(gradients["bernoulli"]) == 8 and gradients["bernoulli"].keys() == gradients["categorical"].keys()
    for key, gradient in gradients["bernoulli"].items():
        torch.testing.assert_close(gradient, gradients["categorical"][key])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("name", LAYERS)
def test_draws_follow_the_law(name, options, training):
    layer, params = build(name, {**LAYERS[name], **options})
    check_law(layer.train(training), params[0])


def test_the_test_of_the_law_sees_a_wrong_one():
    layer, params = build("decoupled_straight_through", {**BITS, "sampling_temperature": 1.1})
    layer.law = lambda p: layer.family.distribution(p)  # the draws' temperature forgotten in q
    layer.distribution = lambda p: sl.create("straight_through", **BITS).distribution(p / 1.1)
    with pytest.raises(AssertionError, match="do not follow q"):
        check_law(layer, 2 * params[0], num_draws=200_000)


def test_sampling_temperature_changes_the_law_everywhere():
    layer, params = build("decoupled_straight_through", {**CATEGORIES, "sampling_temperature": 1.6})
    expected = (params / 1.6).view(2, 2, 3).log_softmax(-1).flatten(-2)
    for mode in (True, False):
        sample = layer.train(mode).sample(params)
        torch.testing.assert_close(sample.log_prob, (sample.z * expected).sum(-1))
    prior = layer.family.standard().expand((2,))
    kl = torch.distributions.kl_divergence(layer.distribution(params), prior)
    torch.testing.assert_close(kl, (expected.exp() * (expected + math.log(3))).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("name", LAYERS)
def test_values_are_exactly_hard_and_gradients_finite_at_the_extremes(name, options, dtype):
    layer = sl.create(name, **LAYERS[name], **options, num_samples=8)
    for size in (1.0, 1e4):
        for temperature in (1e-3, 1.0, 1e3):
            if hasattr(layer, "temperature") and temperature >= layer.lowest_temperature:
                layer.temperature = temperature
            leaf = (size * torch.randn(16, layer.in_features)).to(dtype).requires_grad_()
            sample = layer.sample(leaf)
            assert sample.z.dtype == dtype and bool(((sample.z == 0) | (sample.z == 1)).all())
            if options is CATEGORIES:
                assert bool((sample.z.view(8, 16, 2, 3).sum(-1) == 1).all())
            sample.surrogate(
                (sample.z.float() ** 3 * torch.arange(1.0, 1 + layer.out_features)).sum(-1)
            ).sum().backward()
            assert bool(torch.isfinite(leaf.grad).all()) and bool(torch.isfinite(sample.log_prob).all())


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_constant_cost_gives_no_gradient(name, options):
    layer, params = build(name, {**LAYERS[name], **options})
    leaf = params.clone().requires_grad_()
    sample = layer.sample(leaf)
    sample.surrogate(3.0 + 0 * sample.z.sum(-1)).sum().backward()
    assert bool((leaf.grad == 0).all())


def step(layer, params):
    sample = layer.sample(params)
    loss = sample.surrogate((sample.z**2).sum(-1))
    return loss, *torch.autograd.grad(loss.sum(), params)


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize("name", LAYERS)
def test_batches_have_any_shape(name, options):
    layer = sl.create(name, **LAYERS[name], **options, num_samples=3)
    for batch in [(), (5,), (2, 3), (0,), (4, 0)]:
        leaf = torch.zeros(*batch, layer.in_features, requires_grad=True)
        loss, gradient = step(layer, leaf)
        assert loss.shape == batch and gradient.shape == leaf.shape


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_surrogate_are_one_graph(name):
    layer = sl.create(name, **LAYERS[name], **CATEGORIES, num_samples=3)

    torch.compiler.reset()  # the cases share their code, and with it the limit on recompilations

    @torch.compile(fullgraph=True, backend="eager")
    def loss(params):
        sample = layer.sample(params)
        return sample.surrogate((sample.z**2).sum(-1))

    leaf = torch.zeros(2, layer.in_features, requires_grad=True)
    loss(leaf).sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())


def test_straight_through_gumbel_is_the_hard_gumbel_softmax():
    one = sl.create("straight_through_gumbel", latent_dim=2, num_categories=3, temperature=0.5)
    other = sl.create("gumbel_softmax", latent_dim=2, num_categories=3, temperature=0.5, hard=True)
    leaf = torch.randn(4, 6, requires_grad=True)
    results = []
    for layer in (one, other):
        torch.manual_seed(3)
        z = layer(leaf)
        results.append((z, *torch.autograd.grad((z * torch.arange(6)).sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reinmax", {"temperature": 0.9}, "temperature from 1 to 1e\\+06, got 0.9"),
        ("gumbel_rao", {"temperature": 0}, "temperature > 0, got 0"),
        ("gumbel_rao", {"num_replicates": 0}, "num_replicates >= 1, got 0"),
        ("gapped_straight_through", {"gap": -1}, "gap >= 0, got -1"),
        ("decoupled_straight_through", {"sampling_temperature": 0.0}, "sampling_temperature > 0"),
        ("decoupled_straight_through", {"temperature": math.inf}, "temperature > 0, got inf"),
        ("straight_through_gumbel", {"family": "gaussian"}, "supports the families"),
    ],
)
def test_bad_options_are_refused_at_construction(name, options, message):
    with pytest.raises(ValueError, match=message):
        sl.create(name, **{"latent_dim": 2, "family": "bernoulli", **options})


def test_temperature_of_reinmax_cannot_be_assigned_below_one():
    layer = sl.create("reinmax", latent_dim=2)
    with pytest.raises(ValueError, match="temperature from 1 to"):
        layer.temperature = 0.5
    layer.temperature = 1.25
    other = sl.create("reinmax", latent_dim=2)
    other.load_state_dict(layer.state_dict())
    assert other.temperature.item() == layer.temperature.item() == pytest.approx(1.25)
