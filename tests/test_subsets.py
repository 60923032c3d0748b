"""Choices of k of n items: everything about their law against a sum over all of them, and layers that train by it."""

import copy
import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, OneHotCategorical, kl_divergence

import stochastic_layers as sl
from lightning_modules import VAE
from stochastic_layers import run_tables
from stochastic_layers import subsets as subsets_module
from stochastic_layers.diagnostics import gradient_statistics
from stochastic_layers.families import create_family
from stochastic_layers.registry import layer_class
from stochastic_layers.testing import PolynomialCost, check_mean, enumerate_outcomes

SIZES = [(2, 1), (3, 2), (4, 2), (5, 1), (5, 4), (6, 3), (8, 3), (9, 5)]
FALSE_ALARM = 1e-6


@pytest.fixture(autouse=True, params=["listed", "tree"])
def way(request, monkeypatch):
    """Every law here has few subsets, and is computed from their list; the tree is to give the same."""
    if request.param == "tree":
        monkeypatch.setattr(subsets_module, "FEW", 0)
        monkeypatch.setattr(subsets_module, "SHORT", 0)


def subsets(n, k):
    rows = [[float(i in chosen) for i in range(n)] for chosen in itertools.combinations(range(n), k)]
    return torch.tensor(rows, dtype=torch.float64)


def logits_of(*shape, seed=0, scale=1.5):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(logits, k):
    """All subsets ``[N, n]`` and their log-probabilities ``[..., N]``."""
    every = subsets(logits.shape[-1], k)
    return every, (logits @ every.T).log_softmax(-1)


def p_value(draws, every, probs):
    """Chi-square of draws ``[R, n]``; outcomes that are expected less than five times are pooled."""
    hits = torch.cdist(draws.double(), every, p=1) == 0
    assert bool(hits.any(-1).all()), "a draw is no subset"
    counts, expected = hits.sum(0).double(), probs * len(draws)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def fitting(name, **options):
    """A layer over two choices of 2 of 4 items."""
    return sl.create(name, latent_dim=2, family="subset", num_categories=4, **options).double()


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_density_mean_variance_and_entropy_are_those_of_the_sum_over_all_subsets(n, k):
    logits = logits_of(3, n)
    q = sl.KSubset(logits, k)
    every, log_probs = by_hand(logits, k)
    probs = log_probs.exp()
    torch.testing.assert_close(q.log_prob(every.unsqueeze(1)).T, log_probs)
    mean = probs @ every
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.variance, mean - mean.square())
    torch.testing.assert_close(q.entropy(), -(probs * log_probs).sum(-1))
    torch.testing.assert_close(q.mode, every[log_probs.argmax(-1)])
    other = sl.KSubset(logits_of(3, n, seed=1), k)
    wanted = (probs * (log_probs - by_hand(other.logits, k)[1])).sum(-1)
    torch.testing.assert_close(kl_divergence(q, other), wanted)


@pytest.mark.parametrize(("n", "k"), [(3, 2), (5, 2), (6, 3)])
def test_first_and_second_derivatives_are_those_of_the_sum_over_all_subsets(n, k):
    logits, vector = logits_of(2, n).requires_grad_(), logits_of(2, n, seed=2)

    def derivatives(mean, log_prob):
        (first,) = torch.autograd.grad((mean * vector).sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad((first * vector).sum(), logits, retain_graph=True)
        (score,) = torch.autograd.grad(log_prob.sum(), logits, create_graph=True)
        (curvature,) = torch.autograd.grad((score * vector).sum(), logits)
        return first, second, score, curvature

    q = sl.KSubset(logits, k)
    every, log_probs = by_hand(logits, k)
    found = derivatives(q.mean, q.log_prob(every[-1]))
    torch.testing.assert_close(found, derivatives(log_probs.exp() @ every, log_probs[..., -1]))
    assert torch.autograd.gradgradcheck(lambda x: sl.KSubset(x, k).mean, logits)


@pytest.mark.parametrize(("n", "k"), [(5, 2), (6, 3), (8, 3), (9, 5)])
def test_draws_follow_the_law(n, k):
    torch.manual_seed(0)
    logits = logits_of(2, n)
    draws = sl.KSubset(logits, k).sample((40_000,))
    assert draws.shape == (40_000, 2, n)
    every, log_probs = by_hand(logits, k)
    for row in range(2):
        assert p_value(draws[:, row], every, log_probs[row].exp()) > FALSE_ALARM
    assert abs(float(torch.corrcoef(draws.flatten(1).T)[0, n])) < 5 / math.sqrt(40_000)  # rows are independent


def test_control_the_largest_of_perturbed_logits_follow_another_law():
    torch.manual_seed(0)
    logits = logits_of(6)
    noise = -torch.empty(40_000, 6, dtype=torch.float64).exponential_().log()
    draws = torch.zeros_like(noise).scatter_(-1, (logits + noise).topk(3).indices, 1.0)
    every, log_probs = by_hand(logits, 3)
    assert p_value(draws, every, log_probs.exp()) < FALSE_ALARM


def test_one_of_n_is_the_categorical_law():
    logits = logits_of(3, 7)
    q, categorical = sl.KSubset(logits, 1), Categorical(logits=logits)
    torch.testing.assert_close(q.mean, categorical.probs)
    torch.testing.assert_close(q.entropy(), categorical.entropy())
    eye = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(eye[2]), OneHotCategorical(logits=logits).log_prob(eye[2]))


def test_a_uniform_number_of_zero_draws_nothing_impossible(monkeypatch):
    monkeypatch.setattr(
        subsets_module, "double_uniform", lambda shape, device: torch.zeros(*shape, dtype=torch.float64)
    )
    for certain in range(4):
        logits = torch.tensor([-1e4, 0.0, 0.1, -2e4]).roll(certain)
        z = sl.KSubset(logits, 2).sample((3,))
        assert torch.equal(z, (logits > -1).float().expand(3, 4))


@pytest.mark.parametrize("n", [40, 1000])
def test_what_is_left_out_is_a_subset_too(n):
    logits = logits_of(n)
    q, rest = sl.KSubset(logits, n // 4), sl.KSubset(-logits, n - n // 4)
    torch.testing.assert_close(q.mean, 1 - rest.mean)
    z = q.sample()
    torch.testing.assert_close(q.log_prob(z), rest.log_prob(1 - z))


@pytest.mark.parametrize("k", [1, 7, 2000, 3999])
def test_thousands_of_items(k):
    torch.manual_seed(0)
    logits = logits_of(2, 4000, scale=3.0).float().requires_grad_()
    q = sl.KSubset(logits, k)
    torch.testing.assert_close(q.mean.sum(-1), torch.full((2,), float(k)))
    torch.testing.assert_close(q.mean.double(), sl.KSubset(logits.detach().double(), k).mean, rtol=1e-4, atol=1e-12)
    z = q.sample((3,))
    assert bool((z.sum(-1) == k).all())
    (gradient,) = torch.autograd.grad(q.log_prob(z).sum(), logits)
    torch.testing.assert_close(gradient, (z - q.mean).sum(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("logits", "k", "probs"),
    [
        # the first is certain, the second is 0.1 behind the third although both are far below it
        ([1e4, 0.0, 0.1, -1e4], 2, [1.0, 0.475021, 0.524979, 0.0]),
        ([1e18, 0.0, 0.1, -1e18], 3, [1.0, 1.0, 1.0, 0.0]),
        ([1e4] * 5 + [-1e4] * 5, 6, [1.0] * 5 + [0.2] * 5),
        ([1e4] * 5 + [-1e4] * 5, 4, [0.8] * 5 + [0.0] * 5),
        ([0.0] * 64 + [60.0], 1, [8.7565e-27] * 64 + [1.0]),
    ],
)
def test_extreme_logits(logits, k, probs):
    torch.manual_seed(0)
    logits = torch.tensor(logits, requires_grad=True)
    q = sl.KSubset(logits, k)
    torch.testing.assert_close(q.mean, torch.tensor(probs), rtol=1e-4, atol=1e-30)
    z = q.sample((2000,))
    assert bool((z.sum(-1) == k).all())
    assert not bool((z.sum(0) > 0)[q.mean == 0].any())
    (gradient,) = torch.autograd.grad((q.mean * torch.arange(len(logits))).sum() + q.log_prob(z).sum(), logits)
    assert bool(torch.isfinite(gradient).all()) and bool(torch.isfinite(q.entropy()))


def test_rare_items_are_drawn_as_often_as_they_should():
    # sixty items that together are chosen once in a thousand draws, beside two that take nearly all
    torch.manual_seed(0)
    logits = torch.cat([torch.zeros(60), torch.full((2,), 11.7)])
    q = sl.KSubset(logits, 2)
    chance = float(q.mean[:60].double().sum())
    wanted = float(sl.KSubset(logits.double(), 2).mean[:60].sum())
    assert chance == pytest.approx(wanted, rel=1e-5) and chance == pytest.approx(0.001, rel=0.2)
    rare = int(q.sample((50_000,))[:, :60].sum())
    assert abs(rare - 50_000 * chance) < 5 * math.sqrt(50_000 * chance)


@pytest.mark.parametrize(("a", "size"), [(2, 3), (2, 2), (3, 5), (3, 4), (5, 5)])
def test_sums_over_pairs_and_their_derivatives_are_those_of_the_written_out_products(a, size, monkeypatch):
    table, x, around = logits_of(a, 4, 3), logits_of(a, 4, 3, seed=1), logits_of(size, 2, 3, seed=2)
    paired, joined = torch.zeros(2 * a - 1, 2, 3).double(), torch.zeros(2 * a - 1, 2, 3).double()
    for i, j in itertools.product(range(a), range(a)):
        paired[i + j] += table[i, 0::2] * table[j, 1::2]
        joined[i + j] += x[i, 0::2] * table[j, 1::2] + table[i, 0::2] * x[j, 1::2]
    leaf = table.clone().requires_grad_()

    def results():
        total = (around * run_tables.paired(leaf, size)).sum()
        return (
            run_tables.paired(table, size),
            run_tables.joined(x, table, size),
            run_tables.outside(around, table),
            torch.autograd.grad(total, leaf)[0],
        )

    row_by_row = results()
    torch.testing.assert_close(row_by_row[0], paired[:size])
    torch.testing.assert_close(row_by_row[1], joined[:size])
    torch.testing.assert_close(row_by_row[2], row_by_row[3])
    torch.testing.assert_close((row_by_row[2] * x).sum(), (around * joined[:size]).sum())
    monkeypatch.setattr(run_tables, "_by_formula", lambda tensor: True)
    torch.testing.assert_close(results(), row_by_row)


def test_a_hundred_thousand_logits_of_one_kind_do_not_underflow():
    q = sl.KSubset(torch.zeros(100_000), 1000)
    torch.testing.assert_close(q.mean, torch.full((100_000,), 0.01))


@pytest.mark.parametrize(
    "name",
    ["reinforce", "leave_one_out", "dice", "muprop", "double_cv", "unordered_set", "sum_and_sample", "enumeration"],
)
def test_unbiased_layers_have_the_exact_gradient(name):
    torch.manual_seed(0)
    layer = fitting(name)
    cost = PolynomialCost("asymmetric", layer.out_features)
    check_mean(layer, logits_of(layer.in_features, scale=0.8), cost)


def test_slopes_and_draws_without_replacement_lower_the_variance():
    torch.manual_seed(0)
    params, cost = logits_of(10, scale=1.0), PolynomialCost("quadratic", 10)

    def variance(name, **options):
        family = {"name": "subset", "size": 3}
        layer = sl.create(name, latent_dim=1, family=family, num_categories=10, **options).double()
        for _ in range(150):  # running moments settle
            leaf = params.expand(32, -1).clone().requires_grad_()
            sample = layer.sample(leaf)
            sample.surrogate(cost(sample.z)).mean().backward()
        return gradient_statistics(layer, params, cost, num_draws=10_000, reference=None).total_variance

    two, four = variance("leave_one_out"), variance("leave_one_out", num_samples=4)
    assert variance("double_cv") < 0.75 * two and variance("muprop") < 0.75 * two
    assert variance("unordered_set") < 0.97 * four < 0.97 * 0.5 * two
    assert variance("straight_through") < 0.2 * two


def test_straight_through_is_the_covariance_times_the_slope():
    layer, params = fitting("straight_through"), logits_of(3, 8).requires_grad_()
    slope = logits_of(3, 8, seed=1)
    (gradient,) = torch.autograd.grad((layer(params) * slope).sum(), params)
    every = enumerate_outcomes(layer)
    probs = layer.family.log_prob(layer.distribution(params), every.unsqueeze(1)).exp()  # [N, 3]
    centered = every.unsqueeze(1) - torch.einsum("nb,ni->bi", probs, every)
    covariance = torch.einsum("nb,nbi,nbj->bij", probs, centered, centered)
    torch.testing.assert_close(gradient, torch.einsum("bij,bj->bi", covariance, slope))


def test_outcomes_are_numbered_without_a_list_of_them():
    family = create_family({"name": "subset", "size": 3}, 1, 7)
    assert family.num_outcomes == 35
    assert torch.equal(family.outcomes(torch.float64), subsets(7, 3))
    # of 10 ** 12 subsets none is listed
    large = create_family({"name": "subset", "size": 10}, 1, 60)
    last = large.outcome_values(torch.tensor([[0], [large.num_outcomes - 1]]), torch.float32)
    assert last[0, :10].sum() == 10 and last[1, -10:].sum() == 10
    # some numbers that are not needed here, of subsets of fewer items, are beyond 64 bits
    all_but_one = create_family({"name": "subset", "size": 199}, 1, 200).outcomes(torch.float32)
    assert torch.equal(all_but_one, 1 - torch.eye(200).flip(0))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ({"name": "subset", "size": 0}, "size >= 1, got 0"),
        ({"name": "subset", "size": 4}, r"size < num_categories, which is 4, got 4"),
        ({"name": "subset", "size": 2.0}, "size >= 1, got 2.0"),
        ({"name": "subset", "count": 2}, "needed options of family 'subset', got 'count'; valid names: 'size'"),
        ({"name": "subset", "sizes": 2}, "did you mean 'size'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(family, message):
    with pytest.raises(ValueError, match=message):
        sl.create("straight_through", latent_dim=1, family=family, num_categories=4)


def test_what_was_first_asked_for_without_gradients_has_them_later():
    logits = logits_of(5).requires_grad_()
    q, other = sl.KSubset(logits, 2), sl.KSubset(logits, 2)
    with torch.no_grad():
        z, mean = q.sample(), q.mean
    torch.testing.assert_close(mean, other.mean)
    for quantity in (lambda law: law.mean[0], lambda law: law.log_prob(z), lambda law: law.entropy()):
        found, wanted = (torch.autograd.grad(quantity(law), logits, retain_graph=True)[0] for law in (q, other))
        torch.testing.assert_close(found, wanted)
        assert bool(found.any())


def test_support_and_expansion_are_those_of_a_law_of_torch():
    q = sl.KSubset(torch.arange(4.0), 2)
    rows = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert q.support.check(rows).tolist() == [True, False, False, False]
    many = q.expand((3,))
    assert many.batch_shape == (3,) and many.sample().shape == (3, 4)
    torch.testing.assert_close(many.mean, q.mean.expand(3, 4))


@pytest.mark.parametrize("size", [0, 6])
def test_a_law_of_no_subset_is_refused(size):
    with pytest.raises(ValueError, match=f"size from 1 to the number of items, 5, got {size}"):
        sl.KSubset(torch.zeros(5), size)


def test_subsets_of_two_sizes_have_no_divergence():
    with pytest.raises(ValueError, match="subsets of one size, got 2 and 3"):
        kl_divergence(sl.KSubset(torch.zeros(5), 2), sl.KSubset(torch.zeros(5), 3))


def test_too_many_subsets_are_refused_in_few_digits():
    with pytest.raises(ValueError, match=r"got 1e299 \*\* 1; use"):
        sl.create("enumeration", latent_dim=1, family={"name": "subset", "size": 500}, num_categories=1000)


def test_a_layer_says_how_to_build_it_again():
    layer = sl.create("straight_through", latent_dim=3, family={"name": "subset", "size": 2}, num_categories=5)
    assert "family={'name': 'subset', 'size': 2}, num_categories=5" in repr(layer)
    assert layer.family.spec == {"name": "subset", "size": 2}
    assert copy.deepcopy(layer).family.spec == layer.family.spec
    assert [name for name in sl.list_layers(family="subset") if "subset" not in layer_class(name).families] == []


def test_use_of_the_items_is_measured_by_their_probabilities():
    model = VAE("straight_through", {"latent_dim": 1, "family": {"name": "subset", "size": 2}, "num_categories": 5})
    metrics, logits = model.evaluation("val"), torch.tensor([9.0, 9.0, -9.0, -9.0, -9.0])
    for params in (logits.repeat(3, 1), logits.roll(2).repeat(3, 1)):  # the first two, then the next two
        bound = {"kl": torch.zeros(3), "reconstruction": torch.zeros(3)}
        metrics.update(bound, None, model.layer.distribution(params), params, None)
    assert float(metrics.perplexity.compute()) == pytest.approx(4, rel=1e-4)


def test_a_model_that_must_choose_learns_which_items_matter():
    # eight columns, of which two make the target: the layer has to find the pair
    torch.manual_seed(0)
    layer = sl.create("straight_through", latent_dim=1, family="subset", num_categories=8)
    logits = torch.nn.Parameter(torch.zeros(8))
    weights = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.Adam([logits, weights], lr=0.05)
    for _ in range(300):
        x = torch.randn(64, 8)
        chosen = layer(logits.expand(64, -1))
        loss = ((chosen * x * weights).sum(-1) - 2 * x[:, 1] + x[:, 6]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.mode(logits.detach()).nonzero().flatten().tolist() == [1, 6]
    assert float(layer.distribution(logits.detach()).mean.flatten()[[1, 6]].min()) > 0.9
