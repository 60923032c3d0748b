"""Coupled layers: each draw exact, each pair as dependent as its formula says, each gradient unbiased."""

import itertools
import math

import pytest
import torch
from scipy import special, stats

import stochastic_layers as sl
from stochastic_layers import arms as copulas
from stochastic_layers import coupled, coupled_categorical
from stochastic_layers.binary_codes import decode_sticks, decode_tree, ordered_sticks, stick_logits, tree_logits
from stochastic_layers.testing import COSTS, PolynomialCost, check_mean, measure

CATEGORICAL = {"latent_dim": 2, "family": "categorical"}
PROVEN = [
    ("arm", {"latent_dim": 3}),
    ("disarm", {"latent_dim": 3}),
    ("arms", {"latent_dim": 3, "num_samples": 2}),
    ("arms", {"latent_dim": 2, "num_samples": 5}),
    ("arms", {"latent_dim": 2, "num_samples": 4, "copula": "gaussian"}),
    ("disarm", {**CATEGORICAL, "num_categories": 4}),
    ("disarm_tree", {**CATEGORICAL, "num_categories": 3}),
    ("carms", {**CATEGORICAL, "num_categories": 3, "num_samples": 2}),
    ("carms", {**CATEGORICAL, "num_categories": 4, "num_samples": 3}),
    ("arsm", {**CATEGORICAL, "num_categories": 3}),
]
OPTIONS = [
    ("disarm", {"latent_dim": 2, "num_samples": 6}),
    ("disarm", {**CATEGORICAL, "num_categories": 3, "order": "given", "num_samples": 4}),
    ("disarm", {**CATEGORICAL, "num_categories": 3, "order": "descending"}),
    ("disarm_tree", {**CATEGORICAL, "num_categories": 4}),
    ("arsm", {**CATEGORICAL, "num_categories": 3, "num_samples": 2}),
]
CASES = PROVEN + OPTIONS
BITS = torch.tensor([-2.5, -0.4, 0.0, 0.7, 1.5])
FALSE_ALARM = 1e-6  # of each chi-square test


def build(name, options):
    layer = sl.create(name, **options).double()
    generator = torch.Generator().manual_seed(1)
    params = 0.8 * torch.randn(2, layer.in_features, generator=generator, dtype=torch.float64) - 0.2
    return layer, params


def chi_square_p(statistic, degrees):
    """Probability of a larger chi-square statistic."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def gradients(layer, params, cost_fn, num_draws):
    """Gradients of ``num_draws`` independent repetitions: ``[num_draws, *params.shape]``."""
    leaf = params.expand(num_draws, *params.shape).clone().requires_grad_()
    sample = layer.sample(leaf)
    return torch.autograd.grad(sample.surrogate(cost_fn(sample.z)).sum(), leaf)[0]


def variance_and_error(draws):
    """Total variance over the coordinates of draws ``[N, ...]``, and its standard error."""
    squares = (draws - draws.mean(0)).flatten(1).square().sum(-1)
    return float(squares.mean()), float(squares.std() / squares.shape[0] ** 0.5)


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


@pytest.mark.parametrize("latent_dim", [2])
@pytest.mark.parametrize("name", ["arm", "disarm", "arms"])
def test_latents_of_one_point_are_independent(name, latent_dim):
    layer = sl.create(name, latent_dim=latent_dim)
    logits = torch.tensor([0.5, -0.7])
    z = layer.sample(logits.expand(200_000, 2)).z[0].double()
    p = torch.sigmoid(logits.double())
    both = (z[:, 0] * z[:, 1]).mean()
    expected = p[0] * p[1]
    assert abs(both - expected) < 5 * (expected * (1 - expected) / 200_000) ** 0.5


@pytest.mark.parametrize(("name", "num_samples"), [("arm", 2), ("disarm", 2), ("arms", 2), ("arms", 3), ("arms", 6)])
def test_pairs_are_antithetic_with_the_joint_law_of_the_formula(name, num_samples):
    num_draws = 400_000
    z = sl.create(name, latent_dim=5, num_samples=num_samples).sample(BITS.expand(num_draws, 5)).z.double()
    p = torch.sigmoid(BITS.double())

    def copula(p):
        power = num_samples - 1
        return (2 * p ** (1 / power) - 1).clamp_min(0) ** power

    both_one = torch.where(p <= 0.5, copula(p), 2 * p - 1 + copula(1 - p))
    error = (both_one * (1 - both_one) / num_draws).sqrt() + 1e-12
    for i, j in itertools.combinations(range(num_samples), 2):
        assert (((z[i] * z[j]).mean(0) - both_one).abs() < 5 * error).all()
    ratio = copulas.independence_ratio(BITS.double(), num_samples)
    torch.testing.assert_close(ratio, p * (1 - p) / (p - both_one))
    assert (both_one < p * p).all()  # negatively correlated
    assert (error < 0.1 * (p * p - both_one)).all()  # which the frequencies above can see


@pytest.mark.parametrize("num_samples", [2, 3, 4, 10, 100])
def test_ratio_of_the_gaussian_copula_is_that_of_the_bivariate_normal_law(num_samples):
    """Against scipy's Owen function, and, where it is accurate, against its bivariate normal distribution function."""
    logits = torch.tensor([0.0, 0.3, -2.0, 4.0, -7.0, 12.0, 30.0, -33.0, 60.0, 200.0], dtype=torch.float64)
    ratio = copulas.gaussian_independence_ratio(logits, num_samples)
    p = torch.sigmoid(-logits.abs()).numpy()
    h = stats.norm.ppf(p)
    slope = math.inf if num_samples == 2 else math.sqrt(num_samples / (num_samples - 2))
    expected = torch.from_numpy(p * (1 - p) / (2 * special.owens_t(h, slope)))
    torch.testing.assert_close(ratio, expected, rtol=1e-12, atol=0)
    rho = -1 / (num_samples - 1)
    if num_samples > 2:
        both = [stats.multivariate_normal.cdf([v, v], cov=[[1, rho], [rho, 1]]) for v in h[:4]]
        torch.testing.assert_close(ratio[:4], torch.from_numpy(p[:4] * (1 - p[:4]) / (p[:4] - both)), rtol=1e-6, atol=0)
    single = copulas.gaussian_independence_ratio(torch.tensor([-1e4, -90.0, 1.0, 1e4]), num_samples)
    assert bool(single.isfinite().all() and (single >= 0.5).all() and (single <= 1).all())


@pytest.mark.parametrize("num_samples", [2, 3, 6])
def test_draws_of_the_gaussian_copula_have_its_joint_law(num_samples):
    num_draws = 400_000
    z = copulas.gaussian_copula_bits(BITS.expand(num_draws, 5), num_samples).double()
    p = torch.sigmoid(BITS.double())
    both_one = p - p * (1 - p) / copulas.gaussian_independence_ratio(BITS.double(), num_samples)
    error = (both_one.clamp_min(0) * (1 - both_one) / num_draws).sqrt() + 1e-12
    assert bool((error < 0.1 * (p * p - both_one)).all())
    for i, j in itertools.combinations(range(num_samples), 2):
        assert bool(((z[i] * z[j]).mean(0) - both_one).abs().lt(5 * error + 1e-12).all())
    assert bool(((z.mean((0, 1)) - p).abs() < 5 * (p * (1 - p) / num_draws).sqrt()).all())


def test_the_two_copulas_are_one_for_two_draws():
    logits = torch.linspace(-9, 9, 50, dtype=torch.float64)
    torch.testing.assert_close(copulas.gaussian_independence_ratio(logits, 2), copulas.independence_ratio(logits, 2))


@pytest.mark.parametrize("num_samples", [2, 4])
def test_joint_law_of_two_carms_draws_is_that_of_the_ratios(num_samples):
    logits = torch.tensor([0.3, -1.0, 1.2, 0.1], dtype=torch.float64)
    num_draws = 200_000
    layer = sl.create("carms", latent_dim=1, num_categories=4, num_samples=num_samples)
    z = layer.sample(logits.expand(num_draws, 4)).z
    table = torch.einsum("na,nb->ab", z[0], z[-1])
    order = logits.argsort()
    p = logits.softmax(-1)[order]
    table = table[order][:, order]
    ratios = coupled_categorical.pair_ratios(stick_logits(logits[order]), num_samples)
    rank = torch.arange(4)
    first = torch.minimum(rank[:, None], rank[None, :])
    expected = p[:, None] * p[None, :] / ratios[first.clamp_max(2)]
    expected.fill_diagonal_(0)
    expected += torch.diag(p - expected.sum(1))  # what agreement is left by the marginals
    assert (expected.diagonal() < p * p).all()
    seen = expected > 1e-12  # for two draws some agreements are impossible
    assert (table[~seen] == 0).all()
    statistic = ((table - num_draws * expected) ** 2 / (num_draws * expected))[seen].sum()
    assert chi_square_p(float(statistic), int(seen.sum()) - 1) > FALSE_ALARM


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("code", ["ascending", "descending", "given", "tree"])
def test_bits_of_a_code_have_the_law_of_the_softmax(code, size):
    logits = torch.randn(size, dtype=torch.float64)
    if code == "tree":
        bit_logits, decode = tree_logits(logits), lambda bits: decode_tree(bits, size)
    else:
        bit_logits, decode = ordered_sticks(logits, code)
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(bit_logits))), dtype=torch.float64)
    weights = torch.where(outcomes == 1, bit_logits.sigmoid(), (-bit_logits).sigmoid()).prod(-1)
    z, reached = decode(outcomes)
    torch.testing.assert_close(weights @ z, logits.softmax(-1))
    # the bits on the path alone give the probability of the category
    log_bits = torch.where(outcomes == 1, bit_logits, -bit_logits).sigmoid().log()
    possible = z.sum(-1) == 1
    log_p = (z * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close((log_bits * reached).nan_to_num(neginf=0).sum(-1)[possible], log_p[possible])


def test_sticks_name_the_first_one():
    z, reached = decode_sticks(torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert z.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]] and reached.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_arms_with_two_draws_has_the_variance_of_disarm():
    (disarm, params), (arms, _) = (
        build("disarm", {"latent_dim": 3}),
        build("arms", {"latent_dim": 3, "num_samples": 2}),
    )
    cost = PolynomialCost("cubic", 3)
    a, a_error = variance_and_error(gradients(disarm, params, cost, 400_000))
    b, b_error = variance_and_error(gradients(arms, params, cost, 400_000))
    error = (a_error**2 + b_error**2) ** 0.5
    assert 8 * error < 0.05 * a  # a difference of 5 % would be seen with probability 0.998
    assert abs(a - b) < 5 * error


def test_arms_with_four_draws_varies_less_than_leave_one_out_and_than_two_pairs():
    cost, (arms, params) = PolynomialCost("cubic", 3), build("arms", {"latent_dim": 3, "num_samples": 4})
    others = (
        sl.create("reinforce", latent_dim=3, num_samples=4, baseline="leave_one_out"),
        sl.create("disarm", latent_dim=3, num_samples=4),
    )
    variance, error = variance_and_error(gradients(arms, params, cost, 100_000))
    for other in others:
        variance_other, error_other = variance_and_error(gradients(other, params, cost, 100_000))
        assert variance + 5 * (error + error_other) < variance_other


@pytest.mark.parametrize("kind", [k for k in COSTS if k != "constant"])
def test_disarm_varies_less_than_arm(kind):
    (arm, params), (disarm, _) = build("arm", {"latent_dim": 3}), build("disarm", {"latent_dim": 3})
    cost = PolynomialCost(kind, 3)
    a, a_error = variance_and_error(gradients(arm, params, cost, 100_000))
    d, d_error = variance_and_error(gradients(disarm, params, cost, 100_000))
    assert d + 5 * (a_error + d_error) < a


def test_disarm_is_the_conditional_expectation_of_arm(monkeypatch):
    params = torch.tensor([0.3, 0.8], dtype=torch.float64).logit()
    n = 100
    # the midpoint rule for both noises: exact, as ARM is linear in u between probabilities on the edges of the grid
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    monkeypatch.setattr(coupled, "_antithetic_noise", lambda logits, num_pairs: torch.cartesian_prod(grid, grid))
    sums = {}
    for name in ("arm", "disarm"):
        layer = sl.create(name, latent_dim=2, num_samples=2 * n * n)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        cost = PolynomialCost("cubic", 2)(sample.z)
        pair = torch.cat(sample.z.chunk(2), -1) @ torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
        for group in pair.unique().tolist():  # cost zero outside the event (b, b~): the mean over the event
            inside = (pair == group).to(cost.dtype).repeat(2)
            grad = torch.autograd.grad(sample.surrogate(cost * inside), leaf, retain_graph=True)[0]
            sums.setdefault(group, []).append(grad / inside.mean())
    assert len(sums) == 9  # of the three events of each bit (they agree in one way only, or disagree in two)
    for arm, disarm in sums.values():
        torch.testing.assert_close(arm, disarm)
    assert max(float(disarm.abs().max()) for _, disarm in sums.values()) > 0.3


@pytest.mark.parametrize(
    ("name", "options"),
    [("disarm", {}), ("arms", {"num_samples": 2}), ("reinforce", {"num_samples": 2, "baseline": "leave_one_out"})],
)
def test_toy_with_two_hundred_bits_has_the_published_variance(name, options):
    layer = sl.create(name, latent_dim=200, **options)
    params = torch.zeros(200, dtype=torch.float64)
    variance = gradients(layer, params, lambda z: ((z - 0.499) ** 2).mean(-1), 4000).var(0).mean()
    assert 1.2e-9 < variance < 1.3e-9  # published 1.3e-9; by hand (200 / 16 - 1 / 16) 1e-10 = 1.244e-9 for DisARM


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


def test_unread_bits_are_left_out_because_they_only_add_variance():
    layer, params = build("disarm", {"latent_dim": 2, "family": "categorical", "num_categories": 4})

    class AllBits(sl.DisARM):
        def code(self, params):
            logits, decode = super().code(params)
            return logits, lambda bits: (decode(bits)[0], torch.ones_like(bits))

    cost = PolynomialCost("quadratic", 8)
    plain = AllBits(2, family="categorical", num_categories=4)
    check_mean(plain, params, cost)
    low, low_error = variance_and_error(gradients(layer, params, cost, 50_000))
    high, high_error = variance_and_error(gradients(plain, params, cost, 50_000))
    assert low + 5 * (low_error + high_error) < high


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


def test_measured_variances_rank_as_documented():
    """The figures of docs/layers/coupled.md: run with -s to print them."""
    cost = PolynomialCost("cubic", 4)
    logits = torch.tensor([0.4, -0.8, 1.1, -0.2], dtype=torch.float64)
    figures = {}
    for name, options in [
        ("reinforce", {"num_samples": 2, "baseline": "leave_one_out"}),
        ("arm", {}),
        ("disarm", {}),
        ("arms", {}),
        ("reinforce", {"num_samples": 4, "baseline": "leave_one_out"}),
    ]:
        layer = sl.create(name, latent_dim=4, **options)
        figures[name, layer.num_samples] = variance_and_error(gradients(layer, logits, cost, 100_000))[0]
    cost = PolynomialCost("cubic", 8)
    logits = torch.tensor([0.4, -0.8, 1.1, -0.2, 0.0, 0.5, -1.0, 0.9], dtype=torch.float64)
    for name, options in [
        ("reinforce", {"num_samples": 2, "baseline": "leave_one_out", "family": "categorical"}),
        ("disarm", {"family": "categorical"}),
        ("disarm_tree", {}),
        ("carms", {"num_samples": 2}),
        ("reinforce", {"num_samples": 4, "baseline": "leave_one_out", "family": "categorical"}),
        ("carms", {"num_samples": 4}),
        ("reinforce", {"num_samples": 7, "baseline": "leave_one_out", "family": "categorical"}),
        ("arsm", {}),
    ]:
        layer = sl.create(name, latent_dim=2, num_categories=4, **options)
        figures[name, "categorical", layer.num_samples] = measure(layer, logits[None], cost, num_draws=100_000)
        moments = figures[name, "categorical", layer.num_samples]
        figures[name, "categorical", layer.num_samples] = float((moments.standard_error**2).sum() * moments.num_draws)
    print({k: round(v, 2) for k, v in figures.items()})
    assert figures["arms", 4] < figures["reinforce", 4] < figures["disarm", 2] < figures["arm", 2]
    assert figures["carms", "categorical", 4] < figures["reinforce", "categorical", 4]
