"""Layers that sum over outcomes: exact, or exact in the mean, and what theory promises of them."""

import pytest
import torch
from exact_layers import ALL, EXACT, ONE_OF_16, RANDOM, assert_exact, gradients
from small_problems import BITS, CATEGORIES, build

import stochastic_layers as sl
from stochastic_layers import noise
from stochastic_layers.diagnostics import gradient_statistics
from stochastic_layers.testing import COSTS, PolynomialCost, check_mean, enumerate_outcomes, exact_value


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize(("name", "options"), EXACT, ids=str)
def test_layers_that_see_every_outcome_are_exact_without_variance(name, options, kind):
    layer, params = build(name, options)
    cost_fn = PolynomialCost(kind, layer.out_features)
    leaf = params.clone().requires_grad_()
    sample = layer.sample(leaf)
    assert_exact(layer, params, cost_fn, sample.surrogate(cost_fn(sample.z)), leaf)


@pytest.mark.parametrize(("name", "options"), EXACT[:3], ids=str)
def test_the_gradient_is_the_derivative_of_the_value_by_finite_differences(name, options):
    layer, params = build(name, options)
    cost_fn = PolynomialCost("asymmetric", layer.out_features)

    def loss(p):
        sample = layer.sample(p)
        return sample.surrogate(cost_fn(sample.z))

    assert torch.autograd.gradcheck(loss, params.requires_grad_())


@pytest.mark.parametrize("kind", [k for k in COSTS if k != "constant"])
@pytest.mark.parametrize(("name", "options"), RANDOM, ids=str)
def test_encoder_gradient_is_exact_in_the_mean(name, options, kind):
    layer, params = build(name, options)
    check_mean(layer, params, PolynomialCost(kind, layer.out_features))


@pytest.mark.parametrize("of", ["decoder", "value"])
@pytest.mark.parametrize(("name", "options"), RANDOM, ids=str)
def test_decoder_gradient_and_value_are_exact_in_the_mean(name, options, of):
    layer, params = build(name, options)
    check_mean(layer, params, PolynomialCost("asymmetric", layer.out_features), of=of)


# ---- what theory promises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_constant_cost_gives_no_gradient(name, options):
    layer, params = build(name, options)
    sample = layer.sample(params.requires_grad_())
    (gradient,) = gradients(sample.surrogate(torch.full(sample.z.shape[:2], 3.7, dtype=torch.float64)), params)
    if options.get("baseline") == "none":
        assert gradient.abs().max() > 1e-3  # zero in the mean only, which is why the baseline is the default
    elif name in ("enumeration", "sparsemax_marginalization"):
        assert gradient.abs().max() < 1e-14
    else:
        assert not gradient.any()


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_weights_sum_to_one_and_vanish_at_auxiliary_points(name, options):
    layer, params = build(name, options)
    sample = layer.sample(params)
    assert sample.weights.shape == sample.z.shape[:2] and not sample.weights.requires_grad
    torch.testing.assert_close(sample.weights.sum(0), torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)
    if name in ("local_expectation", "coordinate_flip"):
        groups = sample.weights.unflatten(0, (layer.num_samples, -1))
        assert bool((groups[:, 0] == 1 / layer.num_samples).all()) and not groups[:, 1:].any()
        z = sample.z.unflatten(0, (layer.num_samples, -1))
        changed = (z[:, 1:] != z[:, :1]).sum(
            -1
        )  # every auxiliary point changes one variable: one bit, two of a one-hot
        assert bool((changed == (1 if layer.num_categories is None else 2)).all())
    elif name != "sparsemax_marginalization":  # where points fill up with weight 0, see below
        assert bool((sample.weights > 0).all())


@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
def test_weights_of_enumeration_are_the_probabilities_of_all_outcomes(options):
    layer, params = build("enumeration", options)
    sample = layer.sample(params)
    assert torch.equal(sample.z[:, 0], enumerate_outcomes(layer))
    torch.testing.assert_close(sample.weights, sample.log_prob.exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_points_are_outcomes_and_as_many_as_stated(name, options):
    layer, params = build(name, options)
    z = layer.sample(params).z
    assert bool(((z == 0) | (z == 1)).all())
    if layer.num_categories is not None:
        assert bool((z.unflatten(-1, (layer.latent_dim, -1)).sum(-1) == 1).all())
    if name != "sparsemax_marginalization":
        names = {"num_samples": layer.num_samples, "num_exact": 3, "num_categories": None, **options}
        assert z.shape[0] == eval(sl.describe(name).evaluations, {"min": min}, names)


def test_local_expectation_has_no_variance_for_a_linear_cost():
    layer, params = build("local_expectation", CATEGORIES)
    leaf = params.expand(50, 2, -1).clone().requires_grad_()
    sample = layer.sample(leaf)
    (gradient,) = gradients(sample.surrogate(PolynomialCost("linear", 6)(sample.z)), leaf)
    torch.testing.assert_close(gradient, gradient[:1].expand_as(gradient), rtol=0, atol=1e-14)


def test_on_one_16_way_categorical_the_built_in_baseline_lowers_the_variance_most():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, generator=generator, dtype=torch.float64)
    values = torch.randn(16, generator=generator, dtype=torch.float64) + 2.0  # not centred: baselines matter

    def total_variance(name, **options):
        layer = sl.create(name, **ONE_OF_16, **options)
        statistics = gradient_statistics(layer, logits, lambda z: z @ values, num_draws=20_000, chunk_size=20_000)
        return statistics.total_variance

    four = total_variance("reinforce", num_samples=4, baseline="leave_one_out")
    summed = total_variance("sum_and_sample", num_exact=3, baseline="none")
    drawn = total_variance("unordered_set", num_samples=3, baseline="none")
    built_in = total_variance("unordered_set", num_samples=3)
    centred = total_variance("sum_and_sample", num_exact=3)
    # .36, .39, .11 of draws on another scale than the .68, .75, .21 known elsewhere; standard errors are about 2 %
    assert summed < drawn and built_in < 0.35 * drawn and centred < 0.35 * summed
    assert total_variance("unordered_set", num_samples=4) < 0.8 * four  # at the same number of evaluations


# ---- numerics, shapes, options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
@pytest.mark.parametrize("scale", [1e4, 200.0])
def test_extreme_logits_stay_finite_and_certain(name, options, scale):
    layer = sl.create(name, **options)
    sign = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.0, -0.3])[: layer.in_features]
    params = torch.stack([scale * sign, -scale * sign]).requires_grad_()
    sample = layer.sample(params)
    cost = (sample.z * torch.arange(1.0, 1 + layer.out_features)).sum(-1) ** 2
    loss = sample.surrogate(cost)
    (gradient,) = gradients(loss, params)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    mode = layer.mode(params)
    certain = (mode * torch.arange(1.0, 1 + layer.out_features)).sum(-1) ** 2
    torch.testing.assert_close(loss, certain)
    assert gradient.abs().max() < 1e-10


def test_a_single_outcome_left_over_keeps_its_tiny_probability():
    layer = sl.create("unordered_set", **ONE_OF_16, num_samples=2)
    logits = torch.full((1, 16), -40.0)
    logits[0, 5] = 0.0
    sample = layer.sample(logits)
    assert sample.z[:, 0, 5].max() == 1
    torch.testing.assert_close(sample.weights.max(0).values, torch.ones(1))
    # the other stands for all that is not the mode: 15 exp(-40)
    torch.testing.assert_close(sample.weights.min(0).values.log(), torch.tensor([15.0]).log() - 40, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("name", "options"), [EXACT[0], EXACT[2], *RANDOM], ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (4,), (2, 3)], ids=str)
def test_any_number_of_batch_dimensions(name, options, batch):
    layer = sl.create(name, **options)
    params = (0.1 * torch.randn(*batch, layer.in_features)).requires_grad_()
    sample = layer.sample(params)
    assert sample.z.shape[1:] == (*batch, layer.out_features)
    loss = sample.surrogate(sample.z.square().sum(-1))
    assert loss.shape == batch and sample.log_prob.shape == sample.z.shape[:-1]
    (gradient,) = gradients(loss, params)
    assert gradient.shape == params.shape and torch.isfinite(gradient).all()


@pytest.mark.parametrize(("name", "options"), [EXACT[0], EXACT[2], *RANDOM], ids=str)
def test_a_cost_that_has_summed_batch_dimensions_is_refused(name, options):
    layer = sl.create(name, **options)
    sample = layer.sample(torch.zeros(2, 3, layer.in_features))
    with pytest.raises(ValueError, match="batch dimensions cannot be summed"):
        sample.surrogate(sample.z.sum((-1, -2)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("enumeration", {"latent_dim": 20}, r"2 \*\* 20 = 1048576; use 'local_expectation'"),
        ("enumeration", {"latent_dim": 3, "max_outcomes": 7}, r"2 \*\* 3 = 8"),
        (
            "enumeration",
            {**ONE_OF_16, "num_categories": 65_536},
            r"65536 \*\* 1 = 65536; use 'reinforce' \(any size\),",
        ),
        ("enumeration", {"latent_dim": 10**6}, r"2 \*\* 1000000; use"),
        ("enumeration", {"latent_dim": 3, "max_outcomes": 0}, "max_outcomes >= 1"),
        ("enumeration", {"latent_dim": 3, "family": "gaussian"}, "supports the families"),
        ("unordered_set", {"latent_dim": 3, "num_samples": 11}, "num_samples <= 10"),
        ("unordered_set", {"latent_dim": 3, "num_samples": 1}, "num_samples >= 2"),
        ("unordered_set", {"latent_dim": 3, "baseline": "learned"}, "'built_in' or 'none'"),
        ("sum_and_sample", {"latent_dim": 3, "num_exact": 0}, "num_exact >= 1"),
        ("sum_and_sample", {"latent_dim": 3, "baseline": "learned"}, "'exact_part' or 'none'"),
        ("sum_and_sample", {"latent_dim": 17}, r"2 \*\* 17 = 131072"),
        ("sparsemax_marginalization", {"latent_dim": 3}, "num_categories >= 2"),
        ("local_expectation", {"latent_dim": 3, "num_samples": 0}, "num_samples >= 1"),
    ],
    ids=str,
)
def test_bad_options_are_refused_at_construction(name, options, message):
    with pytest.raises(ValueError, match=message):
        sl.create(name, **options)


def test_nested_enumerations_are_exact():
    first, second = sl.create("enumeration", latent_dim=2), sl.create("enumeration", latent_dim=3)
    params, matrix = torch.randn(5, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    cost_fn = PolynomialCost("asymmetric", 3)
    leaf, weight = params.clone().requires_grad_(), matrix.clone().requires_grad_()
    with sl.capture() as samples:
        z = second((first(leaf) - 0.5) @ weight)
    loss = sl.surrogate(cost_fn(z), samples)
    reference, reference_weight = params.clone().requires_grad_(), matrix.clone().requires_grad_()
    exact = exact_value(
        first, reference, lambda h: exact_value(second, (h.expand(-1, 5, -1) - 0.5) @ reference_weight, cost_fn)
    )
    torch.testing.assert_close(loss, exact)
    for got, expected in zip(gradients(loss, leaf, weight), gradients(exact, reference, reference_weight), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("name", "options"), [EXACT[1], EXACT[2], RANDOM[1], RANDOM[4], RANDOM[7], RANDOM[10]])
def test_one_graph_holds_sample_cost_and_surrogate(name, options, monkeypatch):
    monkeypatch.setattr(noise, "fast_integers", noise.traceable_integers)  # so that both draw the same numbers
    layer = sl.create(name, **options)
    weight = torch.arange(1.0, 1 + layer.out_features)

    def step(params):
        sample = layer.sample(params)
        return sample.surrogate((sample.z * weight).sum(-1) ** 2)

    params = torch.linspace(-0.3, 0.3, 2 * layer.in_features).view(2, -1)
    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, graph):
        torch.manual_seed(0)
        leaf = params.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), *gradients(loss, leaf)))
    torch.testing.assert_close(results[0], results[1])
    torch.compiler.reset()
