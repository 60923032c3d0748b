"""Layers with control variates: unbiased on any batch and in any stack, and the variance that they reach."""

import pytest
import torch
from control_variate_problems import CASES, DISCRETE, MAIN, SMALL, disturb, total_variance, train
from small_problems import BITS, CATEGORIES, build

import stochastic_layers as sl
from stochastic_layers.control_variates import RelativeVariance
from stochastic_layers.testing import PolynomialCost, check_mean, exact_value


@pytest.mark.parametrize("kind", ["quadratic", "asymmetric"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_gradient_of_the_encoder_is_exact_in_the_mean(name, options, kind):
    layer, params = build(name, options)
    check_mean(disturb(layer), params, PolynomialCost(kind, layer.out_features), max_draws=400_000)


@pytest.mark.parametrize(("name", "options"), MAIN, ids=str)
def test_gradient_is_exact_in_the_mean_after_the_control_variates_have_learned(name, options):
    layer, params = build(name, options)
    cost = PolynomialCost("cubic", layer.out_features)
    train(layer, params, cost, steps=150, copies=8)
    check_mean(layer, params, cost, max_draws=400_000)


@pytest.mark.parametrize(("name", "options"), MAIN, ids=str)
def test_gradient_of_the_decoder_and_value_are_exact_in_the_mean(name, options):
    layer, params = build(name, options)
    cost = PolynomialCost("asymmetric", layer.out_features)
    check_mean(disturb(layer), params, cost, of="decoder")
    check_mean(layer, params, cost, of="value")


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_value_of_the_surrogate_is_the_weighted_cost(name, options):
    layer, params = build(name, options)
    sample = layer.sample(params.requires_grad_())
    cost = PolynomialCost("cubic", layer.out_features)(sample.z)
    assert torch.equal(sample.surrogate(cost), (sample.weights.view(-1, 1) * cost).sum(0))


@pytest.mark.parametrize("num_samples", [2, 3, 7])
@pytest.mark.parametrize("name", ["leave_one_out", "double_cv", "rodeo"])
def test_constant_cost_gives_exactly_no_gradient(name, num_samples):
    for constant in (3.0, 0.1, -1e6 / 3):  # means of equal numbers need not equal the number
        layer, params = build(name, {**BITS, "num_samples": num_samples})
        for _ in range(3):
            leaf = params.float().requires_grad_()
            sample = layer.sample(leaf)
            sample.surrogate(constant + 0 * sample.z.sum(-1)).sum().backward()
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_an_outlier_counts_at_most_a_hundredfold():
    objective, ones, none = RelativeVariance(decay=0.9), torch.ones(4, 1), torch.zeros(4)
    for _ in range(100):
        objective(ones, none)
    torch.testing.assert_close(objective(3 * ones, none), torch.full((4,), 9.0))
    torch.testing.assert_close(objective(1000 * ones, none), torch.full((4,), 100.0))


def test_the_squared_norm_of_a_gradient_that_underflows_has_a_finite_slope():
    """At a temperature of 1e-3 all gradients of a batch may be as small; the parameters it trains are float32."""
    slope = RelativeVariance().slope(torch.full((4, 3), 1e-170, dtype=torch.float64), torch.zeros(4))
    assert bool(torch.isfinite(slope.float()).all())


@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
@pytest.mark.parametrize(("name", "own"), [("rebar", {}), ("relax", {"control_variate": "both"})])
def test_a_control_variate_that_takes_all_variance_away_has_own_gradients_of_moderate_size(name, own, options):
    """At a low temperature relaxed and hard cost are the same, to many digits, in most batches of a few examples."""
    largest = 0.0
    for _ in range(100):
        layer = sl.create(name, temperature=0.01, **own, **options)
        sample = layer.sample(torch.randn(2, layer.in_features, requires_grad=True))
        sample.surrogate((sample.z - 0.45).square().sum(-1)).mean().backward()
        largest = max(largest, *(float(p.grad.abs().max()) for p in layer.parameters() if p.grad is not None))
    assert 1.0 < largest < 1e5


@pytest.mark.parametrize(("name", "options"), MAIN, ids=str)
def test_a_black_box_cost_is_unbiased_too(name, options):
    layer, params = build(name, options)
    cost = PolynomialCost("quadratic", layer.out_features)

    class BlackBox(PolynomialCost):
        def forward(self, z):
            return super().forward(z.detach())

    box = BlackBox("quadratic", layer.out_features)
    box.load_state_dict(cost.state_dict())
    check_mean(disturb(layer), params, box, max_draws=400_000)


@pytest.mark.parametrize(("name", "options"), [*MAIN, ("rebar", CATEGORIES), ("double_cv", CATEGORIES)], ids=str)
def test_summed_batch_dimensions_are_one_vector_of_latents(name, options):
    """Two positions whose cost is summed are unbiased, although each control variate serves both."""
    layer, params = build(name, options)
    cost = PolynomialCost("linear", 2 * layer.out_features)
    leaf = params.expand(60_000, 2, -1).clone().requires_grad_()
    sample = disturb(layer).sample(leaf)
    value = cost(sample.z.flatten(-2))  # [S, draws]
    assert sample.surrogate(value).shape == (60_000,)
    (draws,) = torch.autograd.grad(sample.surrogate(value).sum(), leaf)
    exact = _exact_of_two_positions(layer, params, cost)
    error = draws.std(0) / len(draws) ** 0.5
    assert float(error.norm() / exact.norm()) < 0.05
    assert float(((draws.mean(0) - exact) / (error + 1e-12)).abs().max()) < 5


def _exact_of_two_positions(layer, params, cost):
    options = {"latent_dim": 2 * layer.latent_dim, "family": layer.family.name}
    if layer.num_categories is not None:
        options["num_categories"] = layer.num_categories
    leaf = params.clone().requires_grad_()
    value = exact_value(sl.create("reinforce", **options).double(), leaf.flatten().unsqueeze(0), cost)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return gradient


@pytest.mark.parametrize(
    ("name", "options", "batch"),
    [(*case, batch) for case in CASES for batch in ((), (0,), (2, 3), (2, 0))],
    ids=str,
)
def test_any_number_of_batch_dimensions(name, options, batch):
    layer, _ = build(name, options)
    leaf = torch.randn(*batch, layer.in_features, dtype=torch.float64, requires_grad=True)
    cost = PolynomialCost("asymmetric", layer.out_features)
    for _ in range(2):
        sample = layer.sample(leaf)
        loss = sample.surrogate(cost(sample.z))
        assert loss.shape == batch
        loss.sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())
    assert all(bool(torch.isfinite(t).all()) for t in layer.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), DISCRETE, ids=str)
def test_extreme_logits_and_temperatures_stay_finite(name, options, dtype):
    options = {**options, "temperature": 1e-3} if name in ("rebar", "relax") else options
    layer = sl.create(name, **options).to(dtype)
    cost = PolynomialCost("asymmetric", layer.out_features)
    signs = torch.tensor([1.0, -1.0] * layer.in_features)[: layer.in_features]
    for scale in (1e4, 1.0, 0.0):
        leaf = (scale * signs).to(dtype).expand(4, -1).clone().requires_grad_()
        sample = layer.sample(leaf)
        layer.zero_grad()
        sample.surrogate(cost(sample.z).to(dtype)).mean().backward()
        assert bool(torch.isfinite(leaf.grad).all())
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in layer.parameters())


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_nothing_moves_while_gradients_are_off_or_in_evaluation(name, options):
    layer, params = build(name, options)
    cost = PolynomialCost("cubic", layer.out_features)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        sample = layer.sample(params)
        sample.surrogate(cost(sample.z))
    sample = layer.eval().sample(params)
    sample.surrogate(cost(sample.z))
    assert sample.z.shape[0] == layer.num_samples
    if layer.family.discrete:
        assert bool(((sample.z == 0) | (sample.z == 1)).all())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_control_variates_order_the_variance_on_a_cubic():
    """Four bits, a cubic cost, after 200 steps of tuning; each inequality stands out of the error of the figures."""
    figures = {}
    for name, options in {
        "reinforce": {"baseline": "none"},
        "leave_one_out": {"num_samples": 4},
        "muprop": {},
        "rebar": {},
        "relax": SMALL,
        "double_cv": {"decay": 0.95},
        "double_cv 4": {"num_samples": 4, "decay": 0.95},
        "rodeo": {"decay": 0.95, **SMALL},
        "rodeo 4": {"num_samples": 4, "decay": 0.95, **SMALL},
    }.items():
        layer, params = build(name.split()[0], {"latent_dim": 4, **options}, batch=1)
        cost = PolynomialCost("cubic", 4)
        figures[name] = total_variance(train(layer, params, cost, steps=200, copies=16), params, cost)
    layer, params = build("leave_one_out", {"latent_dim": 4}, batch=1)
    figures["leave_one_out 2"] = total_variance(layer, params, cost)
    print({name: round(value, 1) for name, value in figures.items()})
    for worse, better in [
        ("reinforce", "muprop"),
        ("reinforce", "rebar"),
        ("reinforce", "relax"),
        ("leave_one_out 2", "double_cv"),
        ("double_cv", "rodeo"),
        ("leave_one_out", "double_cv 4"),
        ("double_cv 4", "rodeo 4"),
    ]:
        assert figures[better] < 0.9 * figures[worse], (better, worse, figures)


def test_descriptions_say_what_is_evaluated():
    evaluations = {n: sl.describe(n).evaluations for n in ("nvil", "muprop", "rebar", "relax", "double_cv", "rodeo")}
    assert evaluations == {
        "nvil": "num_samples",
        "muprop": "num_samples + 1",
        "rebar": "3 * num_samples",
        "relax": "num_samples",
        "double_cv": "num_samples",
        "rodeo": "num_samples",
    }
    for name, formula in evaluations.items():
        for num_samples in (2, 3):
            layer, params = build(name, {**BITS, "num_samples": num_samples})
            assert layer.sample(params).z.shape[0] == eval(formula, {"num_samples": num_samples})
    assert "nvil" not in sl.list_layers(unbiased=True)


@pytest.mark.parametrize("name", ["leave_one_out", "double_cv", "rodeo"])
def test_a_single_draw_is_refused(name):
    with pytest.raises(ValueError, match="num_samples >= 2"):
        sl.create(name, latent_dim=3, num_samples=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nvil", {"decay": 1.0}),
        ("double_cv", {"decay": -0.1}),
        ("rodeo", {"family": "categorical"}),
        ("rebar", {"temperature": 0.0}),
        ("relax", {"temperature": -1.0}),
        ("relax", {"family": "gaussian"}),
        ("relax", {"hidden_features": 0}),
        ("relax", {"context_features": -1}),
        ("rodeo", {"hidden_features": -1}),
        ("muprop", {"family": "gaussian"}),
    ],
    ids=str,
)
def test_bad_options_are_refused(name, options):
    with pytest.raises(ValueError, match=r"needed|supports"):
        sl.create(name, latent_dim=3, **options)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("rebar", "rebar"), ("muprop", "double_cv"), ("double_cv", "relax"), ("rodeo", "muprop"), ("relax", "rodeo")],
)
def test_stacked_layers_are_unbiased(outer, inner):
    """Bits that set the logits of further bits; the slope of the inner surrogate is an estimate, and that is enough."""
    first, params = build(outer, {"latent_dim": 2, **(SMALL if outer in ("relax", "rodeo") else {})}, batch=1)
    second, _ = build(inner, {"latent_dim": 2, **(SMALL if inner in ("relax", "rodeo") else {})})
    weight = torch.tensor([[1.2, -0.7], [0.4, 0.9]], dtype=torch.float64)
    cost = PolynomialCost("quadratic", 4)

    def joint_cost(upper, lower):
        return cost(torch.cat([upper.expand(*lower.shape[:-1], 2), lower], -1))

    leaf, matrix = params.clone().requires_grad_(), weight.clone().requires_grad_()
    value = exact_value(first, leaf, lambda z: exact_value(second, z @ matrix, lambda y: joint_cost(z, y)))
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), (leaf, matrix))])

    draws, total, squares = 30_000, 0.0, 0.0
    for _ in range(3):  # the second and third pass have coefficients
        leaf = params.expand(draws, -1).clone().requires_grad_()
        matrices = weight.expand(draws, 2, 2).clone().requires_grad_()
        with sl.capture() as samples:
            upper = first(leaf)
            lower = second(torch.einsum("...bi,bij->...bj", upper, matrices))
        loss = sl.surrogate(joint_cost(upper, lower), samples)
        found = torch.cat([g.flatten(1) for g in torch.autograd.grad(loss.sum(), (leaf, matrices))], -1)
        total, squares = total + found.sum(0), squares + found.square().sum(0)
    mean = total / (3 * draws)
    error = ((squares / (3 * draws) - mean.square()) / (3 * draws)).sqrt()
    assert float(error.norm() / exact.norm()) < 0.05
    assert float(((mean - exact) / error).abs().max()) < 5
