"""Exact draws and their noise: laws against scipy, tails, many categories; kernels against plain formulas."""

import itertools
import math
import shutil

import pytest
import torch
from scipy import stats
from torch.distributions import Independent, Normal, OneHotCategorical, kl_divergence

import stochastic_layers as sl
from stochastic_layers import categorical, noise
from stochastic_layers.auxiliary import with_value
from stochastic_layers.categorical import (
    draw_categorical,
    draw_index,
    log_prob_of_index,
    log_softmax,
    one_hot,
    one_hot_categorical,
    softmax,
)
from stochastic_layers.distributions import Logistic
from stochastic_layers.noise import _uniform, double_uniform, laplace, log_exponential, logistic

double = torch.float64
FALSE_ALARM = 1e-5  # of each test of a law

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def chi_square(counts, probs):
    """p-value that ``counts [C]`` come from ``probs [C]``; categories expected fewer than ten times are joined."""
    order = probs.argsort()
    counts, expected = counts[order].double(), (probs / probs.sum())[order].double() * counts.sum()
    rare = int((expected.cumsum(0) < 10).sum()) + 1
    counts = torch.cat([counts[:rare].sum(0, keepdim=True), counts[rare:]])
    expected = torch.cat([expected[:rare].sum(0, keepdim=True), expected[rare:]])
    keep = expected > 0
    return stats.chisquare(counts[keep], expected[keep] * (counts[keep].sum() / expected[keep].sum())).pvalue


@pytest.fixture(params=["as the sizes are", "two levels", "two levels, many rows"])
def levels(request, monkeypatch):
    """The ways of an inversion that are taken for numbers and rows of every amount."""
    if request.param != "as the sizes are":
        monkeypatch.setattr(categorical, "SMALL", 0)
    if request.param == "two levels, many rows":
        monkeypatch.setattr(categorical, "FEW", 0)
        monkeypatch.setattr(categorical, "BISECTED", (0, math.inf))


def count(probs, num_draws, step=20_000):
    total = torch.zeros(probs.shape[-1], dtype=torch.long)
    for _ in range(0, num_draws, step):
        total += torch.bincount(draw_index(probs, step).flatten(), minlength=len(total))
    return total


@pytest.mark.parametrize("categories", [2, 10, 24, 25, 64, 97, 1000])
def test_draws_by_inversion_follow_the_law(categories, levels):
    probs = (3 * torch.randn(categories)).softmax(-1)
    probs[0] *= categories == 2
    counts = count(probs, 200_000)
    assert categories == 2 or counts[0] == 0
    assert chi_square(counts, probs) > FALSE_ALARM
    shifted = probs.roll(1)  # the test sees a law that is off by one category
    assert categories < 10 or chi_square(counts, shifted) < FALSE_ALARM


def test_many_rare_categories_after_a_frequent_one_are_drawn_as_often_as_they_should(levels):
    probs = torch.full((65_536,), 2e-8)  # each is less than the spacing of float32 near 1, together they are 0.13 %
    probs[0] = 1 - 65_535 * 2e-8
    draws = 200_000
    rare = int(draws - count(probs, draws)[0])
    expected = draws * 65_535 * 2e-8
    assert abs(rare - expected) < 5 * math.sqrt(expected)


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["two levels"], indirect=True)
def test_65536_categories_of_all_sizes_follow_the_law(levels):
    probs = (2 * torch.randn(65_536)).softmax(-1)
    assert chi_square(count(probs, 4_000_000), probs) > FALSE_ALARM


def test_rows_and_draws_are_independent_and_keep_their_places(levels):
    probs = torch.zeros(3, 2, 70)
    for row in range(6):
        probs.view(6, 70)[row, 11 * row] = 1.0
    index = draw_index(probs, 5)
    assert index.shape == (5, 3, 2, 1)
    assert torch.equal(index[..., 0], (11 * torch.arange(6)).view(3, 2).expand(5, 3, 2))
    two = draw_index(torch.full((1000, 32), 1 / 32), 2)[..., 0]  # [2, 1000]
    table = torch.bincount(two[0] % 2 + 2 * (two[1] % 2), minlength=4)
    assert stats.chisquare(table).pvalue > FALSE_ALARM


@pytest.mark.parametrize("dtype", [torch.float32, double])
@pytest.mark.parametrize("categories", [3, 50])
def test_extreme_probabilities_draw_no_category_without_mass(dtype, categories, levels):
    logits = torch.full((20_000, categories), -1e4, dtype=dtype)
    logits[:, -2] = 1e4
    assert bool((draw_index(logits.softmax(-1), 2) == categories - 2).all())
    tiny = torch.zeros(20_000, categories, dtype=dtype)
    tiny[:, 1] = torch.finfo(dtype).tiny  # rows need not be normalised, and nothing underflows
    assert bool((draw_index(tiny, 1) == 1).all())
    assert draw_categorical(torch.zeros(0, categories), 3).shape == (3, 0, categories)


@pytest.mark.parametrize("draws", [1, 3])
def test_all_ways_to_find_a_sum_choose_the_same(draws, monkeypatch):
    # sums of few bits, and uniforms that meet them
    monkeypatch.setattr(categorical, "double_uniform", lambda shape, device: torch.randint(8, shape) / 8.0)
    probs = torch.randint(3, (500, 2, 9)).float()
    probs[..., 4] += 1
    found = []
    for limits, eager in (((math.inf, 0), True), ((0, math.inf), True), ((0, 0), False)):
        monkeypatch.setattr(categorical, "BISECTED", limits)
        monkeypatch.setattr(categorical, "eager_on_cpu", lambda tensor, eager=eager: eager)
        torch.manual_seed(0)
        found.append(draw_index(probs, draws))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert bool((probs.expand(draws, -1, -1, -1).gather(-1, found[0]) > 0).all())


def test_each_of_many_rare_categories_has_its_own_uniforms(monkeypatch, levels):
    probs = torch.full((9,), 2e-8)  # a third of the spacing of float32 near 1
    probs[0] = 1.0
    total = probs.double().sum()
    for category in range(1, 9):
        u = (1 + (category - 0.5) * probs[1].double()) / total
        monkeypatch.setattr(categorical, "double_uniform", lambda shape, device, u=u: u.expand(shape).clone())
        assert int(draw_index(probs, 1)) == category


def test_several_ones_in_a_row_are_set_where_told():
    found = one_hot(torch.tensor([[0, 2], [3, 1]]), torch.zeros(2, 4))
    assert torch.equal(found, torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))


def test_the_largest_uniform_stays_below_the_total():
    total = torch.rand(100_000, dtype=double) * 2.0 ** torch.randint(-100, 100, (100_000,))
    assert bool((total * (1 - torch.finfo(double).eps / 2) < total).all())


@pytest.mark.parametrize("dtype", [torch.float32, double])
def test_noise_follows_its_law(dtype):
    like = torch.zeros((), dtype=dtype)
    gumbel = -log_exponential((200_000,), like)
    assert gumbel.dtype == dtype
    assert stats.kstest(gumbel, "gumbel_r").pvalue > FALSE_ALARM
    assert stats.kstest(logistic((200_000,), like), "logistic").pvalue > FALSE_ALARM
    assert stats.kstest(laplace((200_000,), like), "laplace").pvalue > FALSE_ALARM
    assert stats.kstest(gumbel + 0.03, "gumbel_r").pvalue < FALSE_ALARM  # a shift by 3 % is seen


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_all_53_bits_of_a_uniform_are_random_compiled_too(compiled):
    def draw():
        return double_uniform((2, 50_000), torch.device("cpu"))

    first, second = (torch.compile(draw, fullgraph=True) if compiled else draw)()
    assert stats.kstest(first, "uniform").pvalue > FALSE_ALARM
    assert not torch.equal(first, second)
    digits = (first * 2**53).long()
    assert torch.equal(digits.double() * 2.0**-53, first)
    ones = [int((digits >> place & 1).sum()) for place in range(53)]
    assert min(stats.binomtest(n, 50_000).pvalue for n in ones) > FALSE_ALARM / 53  # of a float32 the lowest are zeros


def test_tails_of_the_noise_are_finer_than_float32_near_one(monkeypatch):
    like = torch.zeros(())
    ends = torch.tensor([1, 3, -1, 2**31 - 1, -(2**31) + 1], dtype=torch.int32)
    monkeypatch.setattr(noise, "fast_integers", lambda shape, dtype, like: ends.clone())
    u = _uniform((5,), like)
    assert 0 < u[0] < 1e-9 and u[3] < 1 and u[2] == -u[0] and u[4] == -u[3]
    torch.testing.assert_close(u[1], 3 * u[0])
    assert bool(log_exponential((5,), like).isfinite().all()) and bool(logistic((5,), like).isfinite().all())
    z = laplace((5,), like)
    assert z[0] < 21.6 and z[0] > 21 and z[2] == -z[0] and z[3] > 0 and z[4] == -z[3]
    assert torch.equal(Logistic(torch.zeros(5), torch.ones(5)).rsample(), logistic((5,), like))
    monkeypatch.undo()
    draws = 4_000_000
    rare = logistic((draws,), like).abs() > 14
    expected = draws * 2 * torch.sigmoid(torch.tensor(-14.0, dtype=double)).item()  # 6.7
    assert 0 < int(rare.sum()) < expected + 5 * math.sqrt(expected)


def test_a_rare_category_wins_a_race_of_gumbel_variables_as_often_as_it_should():
    layer = sl.create("straight_through_gumbel", latent_dim=1, num_categories=2)
    logits = torch.tensor([0.0, math.log(1e-4)]).expand(1_000_000, 2)
    expected = 1e6 * 1e-4 / (1 + 1e-4)
    assert abs(float(layer(logits)[:, 1].sum()) - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("categories", [2, 5, 15, 16, 40])
def test_softmax_is_torchs_to_all_orders(categories):
    scores = torch.randn(3, 2, categories, dtype=double, requires_grad=True)
    torch.testing.assert_close(softmax(scores), scores.softmax(-1))
    torch.testing.assert_close(log_softmax(scores), scores.log_softmax(-1))
    assert softmax(scores).is_contiguous() and log_softmax(scores).is_contiguous()
    assert torch.autograd.gradgradcheck(softmax, scores)
    assert softmax(torch.zeros(0, categories)).shape == (0, categories)


@pytest.mark.parametrize("categories", [4, 30])
def test_log_probability_of_draws_is_that_of_the_law_to_all_orders(categories):
    scores = torch.randn(3, categories, dtype=double, requires_grad=True)
    index = draw_index(scores.softmax(-1), 5)

    def ours(scores):
        return log_prob_of_index(one_hot_categorical(scores), index)

    plain = scores.log_softmax(-1).expand(5, -1, -1).gather(-1, index).squeeze(-1)
    torch.testing.assert_close(ours(scores), plain)
    assert torch.autograd.gradcheck(ours, scores)
    assert torch.autograd.gradgradcheck(ours, scores)
    third = torch.autograd.grad(ours(scores).sum(), scores, create_graph=True)[0]
    torch.testing.assert_close(third, torch.autograd.grad(plain.sum(), scores)[0])


def test_the_lazy_law_is_torchs():
    scores = torch.randn(4, 3, 6, requires_grad=True)
    lazy, plain = one_hot_categorical(scores), OneHotCategorical(logits=scores)
    assert not {"logits", "probs"} & set(vars(lazy._categorical))  # nothing was computed
    z = plain.sample((5,))
    other = OneHotCategorical(logits=torch.zeros(6))
    for ours, theirs in [
        (lazy.log_prob(z), plain.log_prob(z)),
        (lazy.entropy(), plain.entropy()),
        (lazy.probs, plain.probs),
        (lazy.logits, plain.logits),
        (lazy.expand((2, 4, 3)).mean, plain.expand((2, 4, 3)).mean),
        (kl_divergence(lazy, other), kl_divergence(plain, other)),
        (kl_divergence(other.expand((4, 3)), lazy), kl_divergence(other.expand((4, 3)), plain)),
    ]:
        torch.testing.assert_close(ours, theirs)
    assert lazy.sample((7,)).shape == (7, 4, 3, 6)


@pytest.mark.parametrize("size", [1.0, 20.0, 200.0, 1e4])
@pytest.mark.parametrize("options", [{}, {"family": "categorical", "num_categories": 3}], ids=str)
def test_the_kl_is_finite_where_probabilities_are_0_or_1_in_float32(options, size):
    """torch's is infinite there: that of bits from a logit of 17 on, as a learned prior of a bit always on has it."""
    layer = sl.create("reinforce", latent_dim=1, **options)
    rows = torch.tensor(list(itertools.product([-size, 0.5, size], repeat=layer.in_features)))
    every = torch.cartesian_prod(*[torch.arange(len(rows))] * 2)
    found, exact = [], []
    for dtype, results in ((torch.float32, found), (torch.float64, exact)):
        q, p = (rows[every[:, i]].to(dtype).requires_grad_() for i in range(2))
        if dtype == torch.float32:
            kl = kl_divergence(layer.distribution(q), layer.distribution(p))
        else:  # a bit is a category of logits (0, l)
            log_q, log_p = (layer.family.outcome_scores(t).squeeze(-2).log_softmax(-1) for t in (q, p))
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        results += [kl, *torch.autograd.grad(kl.sum(), (q, p))]
    rounding = 8 * torch.finfo(torch.float32).eps * size  # of differences of logits
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=rounding)


def test_with_value_has_the_value_of_one_and_the_gradient_of_the_other():
    soft = torch.rand(2, 3, requires_grad=True)
    hard = torch.rand(4, 2, 3)
    z = with_value(hard, soft)
    assert torch.equal(z, hard)
    slope = torch.randn(4, 2, 3)
    torch.testing.assert_close(torch.autograd.grad(z, soft, slope)[0], slope.sum(0))


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("categories", [3, 20])
def test_reinmax_is_its_formula_draw_by_draw(temperature, categories):
    options = {"latent_dim": 2, "family": "categorical", "num_categories": categories, "num_samples": 3}
    layer = sl.create("reinmax", **options, temperature=temperature).double()
    params = torch.randn(4, layer.in_features, dtype=double, requires_grad=True)
    z = layer(params)
    slope = torch.randn_like(z)
    (found,) = torch.autograd.grad(z, params, slope, create_graph=True)
    logits = params.detach().view(4, 2, categories)

    def jacobian(p):
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    middle = ((logits / layer.temperature.double()).softmax(-1) + z.detach().view(3, 4, 2, categories)) / 2
    matrix = 2 * jacobian(middle) - 0.5 * jacobian(logits.softmax(-1))
    plain = (matrix @ slope.view(3, 4, 2, categories, 1)).squeeze(-1).sum(0).flatten(1)
    torch.testing.assert_close(found.detach(), plain)
    # it is linear in the slope, which may itself have a gradient: that of a penalty on this gradient, say
    slope, v = slope.requires_grad_(), torch.randn_like(params)
    for create_graph in (True, False):
        (found,) = torch.autograd.grad(z, params, slope, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(found.detach(), plain)
        if create_graph:
            (back,) = torch.autograd.grad((found * v).sum(), slope)
            expected = (matrix @ v.view(4, 2, categories, 1)).squeeze(-1).flatten(2)
            torch.testing.assert_close(back, expected)


def test_the_gaussian_by_its_log_variance_is_torchs():
    family = sl.create("gaussian", latent_dim=5).family
    params = torch.randn(3, 10, dtype=double, requires_grad=True)
    loc, log_variance = params.chunk(2, -1)
    ours, plain = family.distribution(params), Independent(Normal(loc, (0.5 * log_variance).exp()), 1)
    standard = Independent(Normal(torch.zeros(5, dtype=double), torch.ones(5, dtype=double)), 1)
    z = plain.sample((4,))
    pairs = [
        (ours.log_prob(z), plain.log_prob(z)),
        (ours.entropy(), plain.entropy()),
        (ours.mean, plain.mean),
        (ours.stddev, plain.stddev),
        (ours.variance, plain.variance),
        (kl_divergence(ours, family.standard()), kl_divergence(plain, standard)),
        (kl_divergence(ours, standard), kl_divergence(plain, standard)),
        (kl_divergence(ours, ours.expand((3,))), torch.zeros(3, dtype=double)),
        (kl_divergence(standard, ours), kl_divergence(standard, plain)),
        (kl_divergence(family.standard().expand((3,)), ours), kl_divergence(standard, plain)),
        (kl_divergence(ours.base_dist, family.standard().base_dist).sum(-1), kl_divergence(plain, standard)),
    ]
    for one, other in pairs:
        torch.testing.assert_close(one, other)
        if other.requires_grad:
            slopes = [torch.autograd.grad(t.square().sum(), params, retain_graph=True)[0] for t in (one, other)]
            torch.testing.assert_close(*slopes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["straight_through", "reinmax", "reinforce", "gumbel_softmax", "gaussian"])
def test_draws_on_a_gpu_follow_the_law_and_have_gradients(name):
    family = "gaussian" if name == "gaussian" else "categorical"
    sizes = {"latent_dim": 1} if family == "gaussian" else {"latent_dim": 1, "num_categories": 100}
    layer = sl.create(name, family=family, **sizes).cuda()
    params = torch.randn(layer.in_features, device="cuda").expand(200_000, -1).clone().requires_grad_()
    sample = layer.sample(params)
    sample.surrogate(sample.z.sum(-1)).mean().backward()
    assert bool(torch.isfinite(params.grad).all())
    if family == "gaussian":
        loc, log_variance = params[0].detach().cpu()
        law = stats.norm(loc, math.exp(0.5 * log_variance))
        assert stats.kstest(sample.z.detach().flatten().cpu(), law.cdf).pvalue > FALSE_ALARM
    else:
        hard = sample.z.detach()[0].argmax(-1).cpu()  # of the soft draw, too
        probs = params[0].detach().softmax(-1).cpu()
        assert chi_square(torch.bincount(hard, minlength=100), probs) > FALSE_ALARM


@pytest.mark.parametrize("name", ["straight_through", "reinmax", "gumbel_softmax", "leave_one_out"])
def test_the_gradient_of_torch_func_is_that_of_autograd(name):
    layer = sl.create(name, latent_dim=2, family="categorical", num_categories=5, num_samples=2)
    params = torch.linspace(-1, 1, 30).view(3, 10)

    def loss(params):
        torch.manual_seed(0)
        sample = layer.sample(params)
        return sample.surrogate((sample.z * torch.arange(10.0)).sum(-1).square()).mean()

    leaf = params.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(params), expected)


def test_bits_follow_their_probabilities_also_where_these_are_extreme():
    draws, logits = 2_000_000, torch.tensor([0.0, 1.5, -11.5, 11.5, -200.0, 200.0])
    family = sl.create("reinforce", latent_dim=6, family="bernoulli").family
    ones = family.sample(family.distribution(logits), draws).double().sum(0)
    for count, p in zip(ones.tolist(), logits.double().sigmoid().tolist(), strict=True):
        assert stats.binomtest(round(count), draws, min(p, 1.0)).pvalue > FALSE_ALARM
    assert ones[-2:].tolist() == [0, draws]
    shifted = torch.sigmoid(logits[1].double() + 0.02).item()  # a shift of a logit by 0.02 is seen
    assert stats.binomtest(round(ones[1].item()), draws, shifted).pvalue < FALSE_ALARM


@pytest.mark.parametrize("categories", [3, 20])  # short rows, and rows of whole vectors
def test_the_relaxed_draw_can_be_differentiated_twice(categories):
    layer = sl.create("gumbel_softmax", latent_dim=2, num_categories=categories, temperature=0.7, num_samples=2)
    params = torch.randn(2, 2 * categories, dtype=double, requires_grad=True)

    def draw(params):
        torch.manual_seed(0)
        return layer.sample(params).z

    assert torch.autograd.gradcheck(draw, params) and torch.autograd.gradgradcheck(draw, params)
