"""The straight-through family: expected gradients against sums over all outcomes, laws, exact hardness, extremes."""

import itertools
import math

import numpy as np
import pytest
import torch

import stochastic_layers as sl
from stochastic_layers.gumbel_straight_through import GumbelRao, conditional_magnitude, conditional_ratios
from stochastic_layers.straight_through import ReinMax
from stochastic_layers.testing import PolynomialCost, check_law, check_mean, exact_value, measure

BITS = {"latent_dim": 2, "family": "bernoulli"}
CATEGORIES = {"latent_dim": 2, "family": "categorical", "num_categories": 3}
FAMILIES = [pytest.param(BITS, id="bernoulli"), pytest.param(CATEGORIES, id="categorical")]
LAYERS = {
    "straight_through": {},
    "decoupled_straight_through": {"temperature": 0.7, "sampling_temperature": 1.6},
    "reinmax": {"temperature": 1.3},
    "straight_through_gumbel": {"temperature": 0.8},
    "gumbel_rao": {"temperature": 0.8, "num_replicates": 4},
    "gapped_straight_through": {"temperature": 0.8, "gap": 0.9},
}
PARAMS = torch.tensor([[0.7, -0.4, -1.1, 0.3, 0.9, -0.2], [-0.6, 0.8, 0.2, -0.9, 0.4, 1.0]], dtype=torch.float64)


def build(name, options):
    layer = sl.create(name, **options).double()
    return layer, PARAMS[:, : layer.in_features]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def jacobian(p):
    return np.diag(p) - np.outer(p, p)


def gumbel_jacobian(logits, winner, tau, nodes=48):
    """E[J(softmax((l + G) / tau)) / tau | argmax = winner] by quadrature over the noise, in numpy."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    x, w = 0.5 * (x + 1), 0.5 * w
    x, w = x * x * (3 - 2 * x), 6 * x * (1 - x) * w  # more nodes at the ends, where the quantile functions are steep
    total = np.logaddexp.reduce(logits)
    uniforms = np.stack(np.meshgrid(*[x] * len(logits), indexing="ij"), -1).reshape(-1, len(logits))
    weights = np.stack(np.meshgrid(*[w] * len(logits), indexing="ij"), -1).reshape(-1, len(logits)).prod(-1)
    top = total - np.log(-np.log(uniforms[:, winner]))  # the maximum is Gumbel, whichever index attains it
    # an index that loses: P(score < x | score < top) = u with P(score < x) = exp(-exp(l - x))
    scores = logits - np.log(-np.log(uniforms) + np.exp(logits - top[:, None]))
    scores[:, winner] = top
    p = softmax(scores / tau)
    return (np.einsum("n,ni,ij->ij", weights, p, np.eye(len(logits))) - np.einsum("n,ni,nj->ij", weights, p, p)) / tau


def expected_jacobian(layer, logits, winner):
    """Of one variable with at least two categories: E[dz/dl | z = winner] as the layer's formula states it."""
    z = np.eye(len(logits))[winner]
    if layer.name == "straight_through":
        return jacobian(softmax(logits))
    tau = float(layer.temperature)
    if layer.name == "decoupled_straight_through":
        return jacobian(softmax(logits / tau)) / tau
    if layer.name == "reinmax":
        return 2 * jacobian((softmax(logits / tau) + z) / 2) - jacobian(softmax(logits)) / 2
    if layer.name == "gapped_straight_through":
        moved = np.minimum(logits, logits.max() - layer.gap)
        moved[winner] = logits.max()
        return jacobian(softmax(moved / tau)) / tau
    return gumbel_jacobian(logits, winner, tau)


def expected_gradient(layer, params, cost_fn):
    """E[estimator] ``[B, in_features]``: a plain loop over all outcomes of all variables; bits are pairs (l, 0)."""
    bits = layer.num_categories is None
    result = torch.zeros_like(params)
    for row, values in enumerate(params.numpy()):
        logits = [np.array([v, 0.0]) for v in values] if bits else values.reshape(layer.latent_dim, -1)
        law = [softmax(x / getattr(layer, "sampling_temperature", 1.0)) for x in logits]
        sizes = [range(len(x)) for x in logits]
        jacobians = [
            [expected_jacobian(layer, x.copy(), k) for k in size] for x, size in zip(logits, sizes, strict=True)
        ]
        for outcome in itertools.product(*sizes):
            hots = [np.eye(len(x))[k] for x, k in zip(logits, outcome, strict=True)]
            z = torch.tensor(np.array([h[0] for h in hots]) if bits else np.concatenate(hots), requires_grad=True)
            slopes = torch.autograd.grad(cost_fn(z), z)[0].numpy().reshape(layer.latent_dim, -1)
            probability = math.prod(p[k] for p, k in zip(law, outcome, strict=True))
            for i, k in enumerate(outcome):
                slope = np.array([slopes[i, 0], 0.0]) if bits else slopes[i]
                part = probability * jacobians[i][k].T @ slope
                span = slice(i, i + 1) if bits else slice(i * len(part), (i + 1) * len(part))
                result[row, span] += torch.from_numpy(part[:1] if bits else part)
    return result


def assert_mean(layer, params, cost_fn, expected, num_draws=150_000):
    """No coordinate is 5 standard errors off (false alarm 6e-7 each), and an error of 5 % would be 8 of them."""
    moments = measure(layer, params, cost_fn, num_draws=num_draws)
    along = (moments.standard_error * expected).norm() / expected.square().sum()
    assert 8 * along < 0.05, f"{num_draws} draws see an error of 5 % as {0.05 / along:.1f} standard errors only"
    z = (moments.mean - expected).abs() / (moments.standard_error + 1e-9)
    assert z.max() < 5, f"{layer}: {z.max():.1f} standard errors off: {moments.mean} against {expected}"
    return moments


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
    cost_fn = PolynomialCost("cubic", 6)
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_mean(layer, PARAMS, cost_fn, expected_gradient(build("gumbel_rao", LAYERS["gumbel_rao"] | CATEGORIES)[0],
                                                              PARAMS, cost_fn))  # fmt: skip


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
        ("reinmax", {"temperature": 0.9}, "temperature >= 1, got 0.9"),
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
    with pytest.raises(ValueError, match="temperature >= 1"):
        layer.temperature = 0.5
    layer.temperature = 1.25
    other = sl.create("reinmax", latent_dim=2)
    other.load_state_dict(layer.state_dict())
    assert other.temperature.item() == layer.temperature.item() == pytest.approx(1.25)
