"""Relaxed layers: maps onto the simplex, relaxed objectives against plain implementations, laws with atoms."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch.distributions import kl_divergence
from two_variables import BITS, CATEGORIES, FAMILIES, PARAMS

import stochastic_layers as sl
from stochastic_layers.families import takes_categories
from stochastic_layers.registry import layer_class
from stochastic_layers.relaxed import perturbed
from stochastic_layers.simplex_maps import entmax15, sparsemax
from stochastic_layers.testing import PolynomialCost, check_law, check_mean, exact_value, measure

SIMPLEX_LAYERS = [("gumbel_softmax", {}), ("entmax_gumbel", {"alpha": 1.5}), ("entmax_gumbel", {"alpha": 2})]
ALL = [
    *[(name, {**more, **family}) for name, more in SIMPLEX_LAYERS for family in (BITS, CATEGORIES)],
    ("hard_concrete", {"latent_dim": 3}),
    ("invertible_gaussian", {"latent_dim": 2, "num_categories": 3}),
    ("poisson", {"latent_dim": 2}),
    ("poisson_straight_through", {"latent_dim": 2, "order": 1}),
    ("poisson_straight_through", {"latent_dim": 2, "order": 3}),
]
double = torch.float64


def project(scores, alpha):
    """alpha-entmax by bisection on its threshold, in numpy; alpha 1 is the softmax."""
    if alpha == 1:
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    x = (alpha - 1) * scores
    low, high = x.max(-1, keepdims=True) - 1, x.max(-1, keepdims=True)
    for _ in range(45):
        middle = (low + high) / 2
        heavy = (np.maximum(x - middle, 0) ** (1 / (alpha - 1))).sum(-1, keepdims=True) > 1
        low, high = np.where(heavy, middle, low), np.where(heavy, high, middle)
    return np.maximum(x - low, 0) ** (1 / (alpha - 1))


def simplex_jacobian(p, alpha):
    """d p / d scores ``[..., C, C]`` in terms of p."""
    s = np.where(p > 0, np.maximum(p, 1e-300) ** (2 - alpha), 0.0)
    return s[..., None] * np.eye(p.shape[-1]) - s[..., None] * s[..., None, :] / s.sum(-1)[..., None, None]


@pytest.mark.parametrize(("function", "alpha"), [(sparsemax, 2), (entmax15, 1.5)])
def test_maps_onto_the_simplex_agree_with_bisection(function, alpha):
    for size in (0.1, 1.0, 10.0):
        scores = size * torch.randn(200, 7, dtype=double)
        p = function(scores)
        torch.testing.assert_close(p.sum(-1), torch.ones(200, dtype=double))
        np.testing.assert_allclose(p, project(scores.numpy(), alpha), atol=1e-12)
    ties = torch.tensor([[1.0, 1.0, 1.0, -9.0], [0.0, 0.0, 0.0, 0.0]], dtype=double)
    np.testing.assert_allclose(function(ties), project(ties.numpy(), alpha), atol=1e-12)


@pytest.mark.parametrize(("function", "alpha"), [(sparsemax, 2), (entmax15, 1.5)])
def test_maps_onto_the_simplex_have_exact_derivatives(function, alpha):
    scores = (2 * torch.randn(3, 2, 5, dtype=double)).requires_grad_()
    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradgradcheck(function, scores)
    jacobians = torch.autograd.functional.jacobian(function, scores[0, 0])
    np.testing.assert_allclose(jacobians, simplex_jacobian(function(scores[0, 0]).detach().numpy(), alpha), atol=1e-12)


@pytest.mark.parametrize("function", [sparsemax, entmax15])
def test_maps_onto_the_simplex_are_accurate_in_single_precision_at_the_extremes(function):
    scores = torch.randn(100, 6)
    for shift in (0.0, 1e4):
        # a shared shift changes nothing; whole numbers are exact in float32 at 1e4
        torch.testing.assert_close(function(scores.round() + shift), function(scores.round()))
    hot = function(1e7 * scores)
    assert bool((hot.sum(-1) == 1).all()) and bool((hot.argmax(-1) == scores.argmax(-1)).all())


def relaxed_gradient(layer, params, cost_fn, alpha, num_draws, rng):
    """Mean and standard error of grad f(z(l, noise)): an independent implementation, in numpy but for f'."""
    tau, bits = float(layer.temperature), layer.num_categories is None
    logits = params.numpy()
    logits = np.stack([logits, 0 * logits], -1) if bits else logits.reshape(len(logits), layer.latent_dim, -1)
    scores = logits + rng.gumbel(size=(num_draws, *logits.shape))
    p = project(scores / tau, alpha)
    z = torch.from_numpy(p[..., 0] if bits else p.reshape(num_draws, len(logits), -1)).requires_grad_()
    slopes = torch.autograd.grad(cost_fn(z).sum(), z)[0].numpy().reshape(*p.shape[:-1], -1)
    if bits:
        slopes = np.concatenate([slopes, 0 * slopes], -1)
    grads = np.einsum("...ij,...j->...i", simplex_jacobian(p, alpha), slopes) / tau
    grads = grads[..., 0] if bits else grads.reshape(num_draws, len(logits), -1)
    return torch.from_numpy(grads.mean(0)), torch.from_numpy(grads.std(0) / math.sqrt(num_draws))


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize(("name", "more"), SIMPLEX_LAYERS)
def test_mean_of_the_gradient_is_that_of_the_relaxed_objective(name, more, options):
    layer = sl.create(name, **more, **options, temperature=0.9).double()
    params = PARAMS[:, : layer.in_features]
    cost_fn = PolynomialCost("cubic", layer.out_features)
    mean, error = relaxed_gradient(layer, params, cost_fn, more.get("alpha", 1), 80_000, np.random.default_rng(1))
    moments = measure(layer, params, cost_fn, num_draws=80_000)
    total = (moments.standard_error.square() + error.square()).sqrt()
    assert 8 * (total * mean).norm() / mean.square().sum() < 0.05  # an error of 5 % would be 8 standard errors
    assert ((moments.mean - mean).abs() / total).max() < 5
    assert moments.relative_bias > 0.05  # the relaxed objective is another function


@pytest.mark.parametrize(("name", "more"), SIMPLEX_LAYERS)
def test_bias_shrinks_with_the_temperature_while_the_variance_grows(name, more):
    runs = []
    for temperature in (1.0, 0.25):
        layer = sl.create(name, **more, **CATEGORIES, temperature=temperature).double()
        runs.append(measure(layer, PARAMS, PolynomialCost("cubic", 6), num_draws=100_000))
    assert runs[1].relative_bias < 0.7 * runs[0].relative_bias
    assert runs[1].standard_error.norm() > 1.2 * runs[0].standard_error.norm()


@pytest.mark.parametrize(("name", "more"), SIMPLEX_LAYERS)
def test_a_relaxed_bit_is_the_first_of_two_categories_with_logits_l_and_zero(name, more):
    layer = sl.create(name, **more, **BITS, temperature=0.6).double()
    torch.manual_seed(5)
    z = layer.sample(PARAMS[:, :2]).z
    torch.manual_seed(5)
    scores = perturbed(layer.family, PARAMS[:, :2], 1) / layer.temperature.double()
    pair = torch.stack([scores, torch.zeros_like(scores)], -1)
    function = {1: lambda x: x.softmax(-1), 1.5: entmax15, 2: sparsemax}[more.get("alpha", 1)]
    torch.testing.assert_close(z, function(pair)[..., 0])


@pytest.mark.parametrize("options", FAMILIES)
@pytest.mark.parametrize(("name", "more"), SIMPLEX_LAYERS)
def test_evaluation_draws_follow_the_discrete_law(name, more, options):
    layer = sl.create(name, **more, **options).double().eval()
    check_law(layer, PARAMS[0, : layer.in_features])


@pytest.mark.parametrize("options", FAMILIES)
def test_rounded_relaxed_draws_follow_the_discrete_law(options):
    layer = sl.create("gumbel_softmax", **options, hard=True, temperature=1e3)  # soft draws tie in float32
    check_law(layer, PARAMS[0, : layer.in_features].float())


@pytest.mark.parametrize(
    ("name", "soft"), [("gumbel_softmax", True), ("soft_sort", True), ("straight_through_gumbel", False)]
)
def test_only_soft_draws_ask_for_a_cost_of_points_between_the_outcomes(name, soft):
    options = {"latent_dim": 2, "num_categories": 3}
    assert ("relaxable_cost" in sl.create(name, **options).needs) == soft
    if soft:
        assert sl.create(name, **options, hard=True).needs == ("cost_gradient",)


def test_entmax_gumbel_reaches_the_corners():
    params = torch.zeros(2000, 6)
    share = {}
    for alpha in (1.5, 2):
        z = sl.create("entmax_gumbel", **CATEGORIES, alpha=alpha, temperature=0.5)(params)
        share[alpha] = float((z == 0).float().mean())
    assert 0.1 < share[1.5] < share[2]


# ---------------------------------------------------------------------------------------------------------------------
# temperature


@pytest.mark.parametrize("name", ["gumbel_softmax", "entmax_gumbel", "straight_through_gumbel"])
def test_a_learned_temperature_is_trained_and_a_fixed_one_is_checkpointed(name):
    layer = sl.create(name, **CATEGORIES, temperature=0.7, learn_temperature=True).double()
    assert [p.shape for p in layer.parameters()] == [(1,)]
    z = layer(PARAMS.expand(2000, 2, 6))
    (z**2).sum(-1).mean().backward()
    assert abs(float(layer.log_temperature.grad)) > 1e-3
    fixed = sl.create(name, **CATEGORIES)
    fixed.temperature = 0.3
    other = sl.create(name, **CATEGORIES)
    other.load_state_dict(fixed.state_dict())
    assert list(fixed.parameters()) == [] and other.temperature.item() == fixed.temperature.item()
    assert fixed.temperature.item() == pytest.approx(0.3)


def test_gradient_of_a_learned_temperature_is_the_derivative_of_the_relaxed_objective():
    layer = sl.create("gumbel_softmax", **CATEGORIES, temperature=0.7, learn_temperature=True).double()
    cost_fn = PolynomialCost("cubic", 6)
    values = []
    for shift in (-1e-4, 0.0, 1e-4):
        with torch.no_grad():
            layer.log_temperature.fill_(math.log(0.7) + shift)
        torch.manual_seed(2)
        values.append(cost_fn(layer(PARAMS.expand(50, 2, 6))).sum())
        if shift == 0:
            (gradient,) = torch.autograd.grad(values[-1], layer.log_temperature)
    torch.testing.assert_close(gradient.item(), ((values[2] - values[0]) / 2e-4).item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_extreme_logits_and_temperatures_are_finite(name, options, dtype):
    layer = sl.create(name, **options, num_samples=4)
    lowest, highest = (-1e4, 15.0) if layer.family.name == "poisson" else (-1e4, 1e4)
    for size in (1.0, 1e4):
        for temperature in (1e-3, 1.0):
            if "temperature" in options or layer.family.name in ("hard_concrete", "invertible_gaussian"):
                layer = sl.create(name, **{**options, "temperature": temperature}, num_samples=4)
            elif hasattr(layer, "temperature"):
                layer.temperature = temperature
            params = (size * torch.randn(16, layer.in_features)).clamp(lowest, highest)
            if layer.family.name == "invertible_gaussian":
                params[:, 4:].clamp_(-80, 80)
            leaf = params.to(dtype).requires_grad_()
            sample = layer.sample(leaf)
            loss = sample.surrogate(((sample.z.float() / (1 + sample.z.float().abs())) ** 2).sum(-1))
            loss.sum().backward()
            assert bool(torch.isfinite(sample.z).all()) and bool(torch.isfinite(leaf.grad).all())
            assert sample.z.dtype == dtype


TEMPERED = [
    (name, family, option)
    for name in sl.list_layers()
    for option in ("temperature", "sampling_temperature")
    if option in inspect.signature(layer_class(name)).parameters
    for family in sl.describe(name).families
]


@pytest.mark.parametrize(("name", "family", "option"), TEMPERED)
def test_every_temperature_is_finite_or_refused(name, family, option):
    sizes = {"num_categories": 3} if takes_categories(family) else {}
    usable = 0
    for exponent in (-300, -45, -38, -30, -10, -6, -3, 0, 3, 6, 10, 38, 300):
        try:
            layer = sl.create(name, latent_dim=2, family=family, **sizes, **{option: 10.0**exponent})
        except ValueError as error:
            assert "temperature from" in str(error)
            continue
        usable += 1
        for size in (1.0, 10.0 if family in ("poisson", "invertible_gaussian") else 1e4):
            leaf = (size * torch.randn(64, layer.in_features).clamp(-1.6, 1.6)).requires_grad_()
            sample = layer.sample(leaf)
            loss = sample.surrogate((sample.z / (1 + sample.z.abs())).square().sum(-1)).sum()
            trained = [leaf, *layer.parameters()]
            slopes = [t for t in torch.autograd.grad(loss, trained, allow_unused=True) if t is not None]
            for tensor in (sample.z, sample.log_prob, *slopes):
                assert bool(torch.isfinite(tensor).all()), (exponent, size)
    assert usable >= 3


def draw(layer, params):
    sample = layer.sample(params)
    return sample.surrogate((sample.z**2).sum(-1))


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_batches_have_any_shape(name, options):
    layer = sl.create(name, **options, num_samples=3)
    for training in (True, False):
        for batch in [(), (5,), (2, 3), (0,), (4, 0)]:
            leaf = torch.zeros(*batch, layer.in_features, requires_grad=True)
            loss = draw(layer.train(training), leaf)
            assert loss.shape == batch and layer.mode(leaf).shape == (*batch, layer.out_features)
            assert layer.sample(leaf).log_prob.shape == (3, *batch)
            if training:
                assert torch.autograd.grad(loss.sum(), leaf)[0].shape == leaf.shape


@pytest.mark.parametrize(("name", "options"), ALL[1::2], ids=str)
def test_forward_and_surrogate_are_one_graph(name, options):
    layer = sl.create(name, **options, num_samples=3)
    torch.compiler.reset()  # the cases share their code, and with it the limit on recompilations
    leaf = torch.zeros(2, layer.in_features, requires_grad=True)
    torch.compile(lambda params: draw(layer, params), fullgraph=True, backend="eager")(leaf).sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())


# ---------------------------------------------------------------------------------------------------------------------
# hard concrete


@pytest.mark.parametrize("of", ["encoder", "decoder", "value"])
@pytest.mark.parametrize("kind", ["linear", "cubic", "asymmetric"])
def test_hard_concrete_is_unbiased_for_its_own_law(kind, of):
    layer = sl.create("hard_concrete", latent_dim=2, temperature=0.8, stretch=(-0.2, 1.3)).double()
    check_mean(layer, PARAMS[:, :2], PolynomialCost(kind, 2), of=of)


@pytest.mark.parametrize("training", [True, False])
def test_hard_concrete_draws_follow_their_mixed_law(training):
    layer = sl.create("hard_concrete", latent_dim=1).double().train(training)
    logits = torch.tensor([0.6], dtype=double)
    z = layer.sample(logits.expand(200_000, 1)).z.flatten().detach()
    law = layer.distribution(logits).base_dist
    zero, one = law.log_prob(torch.zeros(1, dtype=double)).exp(), law.log_prob(torch.ones(1, dtype=double)).exp()
    for value, p in ((0.0, zero), (1.0, one)):
        error = (p * (1 - p) / len(z)).sqrt()
        assert ((z == value).double().mean() - p).abs() / error < 5 and error < 0.01 * p
    grid = torch.linspace(0, 1, 20_001, dtype=double)
    density = law.log_prob(grid[1:] - 0.5 / 20_000).exp() / 20_000  # midpoint rule
    assert float(density.sum() + zero + one) == pytest.approx(1, abs=1e-5)
    for edge in (0.2, 0.5, 0.9):
        p = zero + density[: round(20_000 * edge)].sum()
        assert ((z <= edge).double().mean() - p).abs() / (p * (1 - p) / len(z)).sqrt() < 5


def test_penalty_of_hard_concrete_is_the_formula_of_the_paper_and_differentiable():
    layer = sl.create("hard_concrete", latent_dim=3)
    logits = torch.tensor([[-1e4, 0.3, 1e4]], requires_grad=True)
    penalty = layer.nonzero_probability(logits)
    expected = torch.sigmoid(logits - 2 / 3 * math.log(0.1 / 1.1))
    torch.testing.assert_close(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty.sum(), logits)
    torch.testing.assert_close(gradient, expected * (1 - expected))
    torch.testing.assert_close(layer.mode(logits), (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# invertible Gaussian


@pytest.mark.parametrize("of", ["encoder", "value"])
@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_invertible_gaussian_is_unbiased_for_its_own_law(kind, of):
    layer = sl.create("invertible_gaussian", latent_dim=1, num_categories=3, temperature=0.8).double()
    check_mean(layer, PARAMS[:, :4], PolynomialCost(kind, 3), of=of)


def test_density_of_the_invertible_gaussian_integrates_to_one():
    layer = sl.create("invertible_gaussian", latent_dim=1, num_categories=3, temperature=0.7).double()
    q = layer.distribution(PARAMS[0, :4])
    steps = (torch.arange(600, dtype=double) + 0.5) / 600
    first, second = torch.meshgrid(steps, steps, indexing="ij")
    first, second = first**3 * (10 - 15 * first + 6 * first**2), second**3 * (10 - 15 * second + 6 * second**2)
    jump = [30 * (s * (1 - s)) ** 2 for s in torch.meshgrid(steps, steps, indexing="ij")]
    z = torch.stack([first, (1 - first) * second, (1 - first) * (1 - second)], -1)  # the simplex, without its edges
    weights = jump[0] * jump[1] * (1 - first) / 600**2
    density = layer.family.log_prob(q, z.flatten(0, 1)).exp().view(600, 600)
    assert float((weights * density).sum()) == pytest.approx(1, abs=1e-4)


def test_kl_of_the_invertible_gaussian_is_the_mean_of_the_log_ratio():
    layer = sl.create("invertible_gaussian", latent_dim=2, num_categories=3).double()
    q = layer.distribution(torch.cat([PARAMS[0, :4], 0.3 * PARAMS[1, :4]]))
    prior = layer.family.standard()
    prior = prior.expand(q.batch_shape)
    z = q.sample((100_000,))
    ratio = q.log_prob(z) - prior.log_prob(z)
    assert (ratio.mean() - kl_divergence(q, prior)).abs() / (ratio.std() / math.sqrt(100_000)) < 5
    other = sl.create("invertible_gaussian", latent_dim=2, num_categories=3, temperature=0.9)
    with pytest.raises(NotImplementedError, match=r"two laws of one temperature, got 0\.5 and 0\.9"):
        kl_divergence(q, other.family.standard())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gumbel_softmax", {"num_categories": 3, "temperature": 0}, "temperature > 0, got 0"),
        ("gumbel_softmax", {"num_categories": 3, "temperature": math.nan}, "temperature > 0, got nan"),
        ("entmax_gumbel", {"num_categories": 3, "alpha": 1}, "alpha 1.5 .* or 2 .*gumbel_softmax"),
        ("hard_concrete", {"temperature": -1}, "temperature > 0"),
        ("hard_concrete", {"stretch": (0.0, 1.1)}, "low < 0 and high > 1"),
        ("invertible_gaussian", {"num_categories": 3, "temperature": 0}, "temperature > 0"),
        ("invertible_gaussian", {}, "num_categories >= 2"),
        ("poisson", {"temperature": 1.5}, "temperature from 1e-06 to 1, got 1.5"),
        ("poisson", {"max_arrivals": 0}, "max_arrivals >= 1"),
        ("poisson_straight_through", {"order": 4}, "order 1, 2 or 3, got 4"),
    ],
)
def test_bad_options_are_refused_at_construction(name, options, message):
    with pytest.raises(ValueError, match=message):
        sl.create(name, latent_dim=2, **options)


def test_log_variances_whose_exponentials_are_out_of_range_are_refused():
    layer = sl.create("invertible_gaussian", latent_dim=1, num_categories=2)
    for log_variance in (100.0, -100.0):
        with pytest.raises(ValueError, match="log-variances between -80 and 80"):
            layer(torch.tensor([0.0, log_variance]))
    assert bool(torch.isfinite(layer(torch.tensor([100.0, 0.0]))).all())
    assert exact_value(layer, torch.zeros(1, 2, dtype=double), lambda z: z[..., 0]).item() == pytest.approx(0.5)
