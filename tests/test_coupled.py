"""Layers with coupled draws: exact in the mean, exact draws one by one, and known mistakes are caught."""

import pytest
import torch
from coupled_problems import (
    CASES,
    CATEGORICAL,
    FALSE_ALARM,
    OPTIONS,
    PROVEN,
    chi_square_p,
    gradients,
    variance_and_error,
)
from small_problems import build

import stochastic_layers as sl
from stochastic_layers import arms as copulas
from stochastic_layers import coupled_categorical
from stochastic_layers.binary_codes import decode_sticks, ordered_sticks, stick_logits
from stochastic_layers.testing import COSTS, PolynomialCost, check_mean


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [(*case, kind) for case in PROVEN for kind in COSTS] + [(*case, "asymmetric") for case in OPTIONS],
    ids=str,
)
def test_encoder_decoder_and_value_are_exact_in_the_mean(name, options, kind):
    layer, params = build(name, options)
    for of in ("encoder", "decoder", "value"):
        check_mean(layer, params, PolynomialCost(kind, layer.out_features), of=of)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_constant_cost_gives_exactly_no_gradient(name, options):
    layer, params = build(name, options)
    for constant in (3.0, 0.1, -1e6 / 3):  # means of equal numbers need not equal the number
        grads = gradients(layer, params, lambda z, c=constant: torch.full(z.shape[:-1], c, dtype=z.dtype), 100)
        assert (grads == 0).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_every_point_is_an_exact_draw_and_counts_alike(name, options):
    layer = sl.create(name, **options)
    _, params = build(name, options)
    num_draws = 60_000
    sample = layer.sample(params[0].float().expand(num_draws, -1))
    assert sample.equally_weighted and torch.equal(sample.weights, torch.full_like(sample.weights, 1 / len(sample.z)))
    categories = options.get("num_categories")
    for z in sample.z:  # a point alone has independent repetitions, so that its counts are multinomial
        counts = z.double().sum(0)
        if categories is None:
            p = torch.sigmoid(params[0])
            statistic, degrees = ((counts - num_draws * p) ** 2 / (num_draws * p * (1 - p))).sum(), layer.latent_dim
        else:
            p = params[0].view(-1, categories).softmax(-1)
            statistic = ((counts.view_as(p) - num_draws * p) ** 2 / (num_draws * p)).sum()
            degrees = layer.latent_dim * (categories - 1)
        assert chi_square_p(float(statistic), degrees) > FALSE_ALARM


class SignFlipped(sl.DisARM):
    """Has the sign of its gradient wrong."""

    def code(self, params):
        logits, decode = super().code(params)
        return 2 * logits.detach() - logits, decode


class Unsorted(sl.DisARM):
    """Forgets to bring the sorted categories back into place."""

    def code(self, params):
        return ordered_sticks(self.family.unflatten(params), self.order)[0], decode_sticks


class Shortened(sl.DisARM):
    """Credits no bit beyond the one where either point stopped."""

    def code(self, params):
        logits, decode = super().code(params)

        def both(bits):
            z, reached = decode(bits)
            return z, reached * bits

        return logits, both


def test_a_flipped_sign_is_caught():
    _, params = build("disarm", {"latent_dim": 3})
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(SignFlipped(3), params, PolynomialCost("linear", 3))


@pytest.mark.parametrize("of", ["encoder", "decoder", "value"])
def test_categories_left_in_sorted_order_are_caught(of):
    _, params = build("disarm", {**CATEGORICAL, "num_categories": 3})
    layer = Unsorted(2, family="categorical", num_categories=3)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("quadratic", 6), of=of)


def test_bits_without_their_credit_are_caught():
    _, params = build("disarm", {**CATEGORICAL, "num_categories": 4})
    layer = Shortened(2, family="categorical", num_categories=4)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("linear", 8))


@pytest.mark.parametrize("name", ["arms", "carms"])
def test_coupled_draws_taken_for_independent_ones_are_caught(name, monkeypatch):
    options = {"latent_dim": 2, "num_samples": 3} | ({"num_categories": 4} if name == "carms" else {})
    monkeypatch.setattr(copulas, "independence_ratio", lambda logits, num_samples: torch.ones_like(logits))
    monkeypatch.setattr(coupled_categorical, "pair_ratios", lambda logits, num_samples: torch.ones_like(logits))
    layer, params = build(name, options)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("linear", layer.out_features))


def test_with_two_categories_carms_is_arms_and_sticks_are_bits():
    logits = torch.randn(100, 1, dtype=torch.float64)
    for num_samples in (2, 5):
        torch.testing.assert_close(
            coupled_categorical.pair_ratios(logits, num_samples), copulas.independence_ratio(logits, num_samples)
        )
    cost = PolynomialCost("cubic", 3)
    carms = sl.create("carms", latent_dim=3, num_categories=2, num_samples=3)
    bits = torch.randn(3, dtype=torch.float64)
    params = torch.stack([torch.zeros_like(bits), bits], -1).flatten()
    two = gradients(carms, params, lambda z: cost(z[..., 1::2]), 100_000)
    one = gradients(sl.create("arms", latent_dim=3, num_samples=3), bits, cost, 100_000)
    torch.testing.assert_close(two[:, 0::2], -two[:, 1::2])
    (a, a_error), (b, b_error) = variance_and_error(two[:, 1::2]), variance_and_error(one)
    assert abs(a - b) < 5 * (a_error**2 + b_error**2) ** 0.5 < 0.1 * a


@pytest.mark.parametrize("num_samples", [2, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratios_stay_finite_and_bounded_for_certain_bits(num_samples, dtype):
    logits = torch.tensor([-1e4, -200.0, -60.0, -1e-3, 0.0, 1e-3, 60.0, 1e4], dtype=dtype)
    ratio = copulas.independence_ratio(logits, num_samples)
    assert ((ratio >= 0.5 - 1e-6) & (ratio <= 1)).all()
    torch.testing.assert_close(ratio[[0, 1, 2, -2, -1]], torch.ones(5, dtype=dtype))
    sticks = stick_logits(torch.stack([logits, logits + 1.0, logits + 1.5], -1).sort(-1).values)
    ratios = coupled_categorical.pair_ratios(sticks, num_samples)
    assert ((ratios >= 0.5 - 1e-6) & (ratios < 2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_huge_logits_give_finite_gradients_and_certain_draws(name, options, dtype):
    layer = sl.create(name, **options)
    signs = torch.tensor([1.0, -1.0]).repeat(layer.in_features)[: layer.in_features]
    for scale in (1e4, -1e4):
        params = (scale * signs).to(dtype).expand(50, -1).clone().requires_grad_()
        sample = layer.sample(params)
        sample.surrogate(PolynomialCost("cubic", layer.out_features)(sample.z)).sum().backward()
        assert torch.isfinite(params.grad).all()
        if "num_categories" not in options:
            assert torch.equal(sample.z, (params > 0).to(dtype).expand_as(sample.z))
            assert (params.grad == 0).all()
        else:
            chosen = (sample.z * params).sum(-1)
            assert (chosen == layer.latent_dim * abs(scale)).all()


@pytest.mark.parametrize("shape", [(), (0,), (4,), (3, 2), (2, 0, 3)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_any_batch_shape_and_costs_that_sum_event_dimensions(name, options, shape):
    layer = sl.create(name, **options)
    params = torch.randn(*shape, layer.in_features, dtype=torch.float64, requires_grad=True)
    sample = layer.sample(params)
    points = eval(sl.describe(name).evaluations, {"__builtins__": {}}, {"num_samples": layer.num_samples, **options})
    assert sample.z.shape == (points, *shape, layer.out_features) and sample.z.dtype == torch.float64
    assert sample.log_prob.shape == (points, *shape)
    cost = PolynomialCost("cubic", layer.out_features)(sample.z)
    loss = sample.surrogate(cost)
    torch.testing.assert_close(loss, cost.mean(0))
    (grad,) = torch.autograd.grad(loss.sum(), params, retain_graph=True)
    assert grad.shape == params.shape
    if len(shape) > 1:  # summed: every position is credited with the cost of its example
        total = cost.flatten(2).sum(-1)
        (summed,) = torch.autograd.grad(sample.surrogate(total).sum(), params, retain_graph=True)
        spread = total.view(*total.shape, *[1] * (len(shape) - 1)).expand_as(cost)
        (expected,) = torch.autograd.grad(sample.surrogate(spread).sum(), params)
        torch.testing.assert_close(summed, expected)


@pytest.mark.parametrize(("name", "options"), [PROVEN[k] for k in (1, 3, 4, 5, 7, 8)], ids=str)
def test_compiles_into_one_graph(name, options):
    layer = sl.create(name, **options)
    cost_fn = PolynomialCost("cubic", layer.out_features).float()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(params):
        sample = layer.sample(params)
        return sample.surrogate(cost_fn(sample.z)).mean()

    params = torch.randn(8, layer.in_features, requires_grad=True)
    loss(params).backward()
    assert torch.isfinite(params.grad).all() and params.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("disarm", {"num_samples": 3}, "needed an even num_samples"),
        ("arm", {"num_samples": 1}, "needed an even num_samples"),
        ("arms", {"num_samples": 1}, "needed num_samples >= 2"),
        ("carms", {"num_samples": 1, "num_categories": 3}, "needed num_samples >= 2"),
        ("disarm", {"order": "random"}, "needed order 'ascending'"),
        ("disarm_tree", {}, "needed num_categories >= 2"),
        ("arsm", {"num_categories": 1}, "needed num_categories >= 2"),
        ("arsm", {"num_categories": 65536}, "needed at most 268435456 numbers .*use 'carms'"),
        ("local_expectation", {"family": "categorical", "num_categories": 65536}, "use 'coordinate_flip' or"),
        ("measure_valued", {"num_samples": 2**25}, "needed at most 268435456 numbers .*use 'pathwise'"),
        ("arms", {"family": "categorical"}, "supports the families"),
        ("arms", {"copula": "clayton"}, "needed copula 'dirichlet' or 'gaussian', got 'clayton'"),
    ],
)
def test_bad_options_are_refused_at_construction(name, options, message):
    with pytest.raises(ValueError, match=message):
        sl.create(name, latent_dim=2, **options)


def test_disarm_of_two_hundred_bits_needs_no_more_than_its_size():
    layer = sl.create("disarm", latent_dim=200)
    params = torch.randn(5, 200, requires_grad=True)
    sample = layer.sample(params)
    loss = sample.surrogate((sample.z - 0.499).square().mean(-1))
    loss.mean().backward()
    assert loss.shape == (5,) and params.grad.abs().sum() > 0
    assert layer.eval()(params).shape == (2, 5, 200)
