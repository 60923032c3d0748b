"""Orders of n items: the Plackett-Luce law against a sum over all orders, and layers that train by it."""

import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import stochastic_layers as sl
from lightning_modules import VAE
from stochastic_layers.diagnostics import gradient_statistics
from stochastic_layers.families import create_family
from stochastic_layers.permutations import matrices
from stochastic_layers.testing import PolynomialCost, check_mean

FALSE_ALARM = 1e-6


def logits_of(*shape, seed=0, scale=1.5):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orders(n):
    return torch.tensor(list(itertools.permutations(range(n))))


def chances(logits):
    """The probability of every order of the items of ``logits [n]``, in the order of :func:`orders`: one by one."""
    weights, result = logits.exp(), []
    for order in orders(len(logits)):
        left = weights[order]
        result.append(torch.stack([left[i] / left[i:].sum() for i in range(len(left))]).prod())
    return torch.stack(result)


def fitting(name, **options):
    """A layer over two orders of three items."""
    return sl.create(name, latent_dim=2, family="permutation", num_categories=3, **options).double()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_density_is_that_of_choosing_one_item_after_another(n):
    logits = logits_of(n).requires_grad_()
    q, every = sl.PlackettLuce(logits), orders(n)
    wanted = chances(logits)
    torch.testing.assert_close(q.log_prob_of_order(every).exp(), wanted)
    torch.testing.assert_close(q.log_prob(matrices(every, logits)), q.log_prob_of_order(every))
    torch.testing.assert_close(wanted.sum(), torch.ones(()).double())
    assert torch.equal(q.mode, matrices(every[wanted.argmax()], logits))
    last = (q.log_prob_of_order(every[-1]).exp(), wanted[-1])
    found, by_hand = (torch.autograd.grad(chance, logits, retain_graph=True)[0] for chance in last)
    torch.testing.assert_close(found, by_hand)
    assert torch.autograd.gradgradcheck(lambda x: sl.PlackettLuce(x).log_prob_of_order(every[-1]), logits)


def draws_of_the_law(logits):
    return sl.PlackettLuce(logits).sample((40_000,))


def draws_of_soft_sort(logits):
    layer = sl.create("soft_sort", latent_dim=1, num_categories=logits.shape[-1], num_samples=40_000, hard=True)
    return layer.sample(logits).z.unflatten(-1, (logits.shape[-1], -1))


@pytest.mark.parametrize("draws", [draws_of_the_law, draws_of_soft_sort])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_draws_follow_the_law(n, draws):
    torch.manual_seed(0)
    logits = logits_of(2, n)
    z = draws(logits)
    assert z.shape == (40_000, 2, n, n) and bool(sl.PlackettLuce(logits).support.check(z).all())
    every = matrices(orders(n), logits).flatten(1)
    for row in range(2):
        hits = torch.cdist(z[:, row].flatten(1), every, p=1) == 0
        counts, expected = hits.sum(0), chances(logits[row]) * len(z)
        statistic = ((counts - expected).square() / expected).sum()
        p_value = float(torch.special.gammaincc(torch.tensor((len(every) - 1) / 2).double(), statistic / 2))
        assert p_value > FALSE_ALARM
    both = z[:, :, 0, 0] - z[:, :, 0, 0].mean(0)  # rows are independent
    assert abs(float(both.prod(-1).mean() / both.square().mean(0).prod().sqrt())) < 5 / math.sqrt(len(z))


def test_control_a_sort_with_normal_noise_follows_another_law():
    torch.manual_seed(0)
    logits = logits_of(3)
    order = (logits + 1.28 * torch.randn(40_000, 3).double()).argsort(-1, descending=True)
    counts = (order.unsqueeze(1) == orders(3)).all(-1).sum(0)
    expected = chances(logits) * len(order)
    statistic = ((counts - expected).square() / expected).sum()
    assert float(torch.special.gammaincc(torch.tensor(2.5).double(), statistic / 2)) < FALSE_ALARM


@pytest.mark.parametrize("large", [0.0, 1e4, 1e7, -1e7])
def test_of_two_items_that_come_first_or_last_only_their_difference_counts(large):
    # float32 numbers near 1e7 are 1 apart: logits plus noise in float32 would be integers
    torch.manual_seed(0)
    logits = torch.tensor([large, large + 1, 3.0, -2.0], requires_grad=True)
    q = sl.PlackettLuce(logits)
    order = q.sample_order((40_000,))
    first = (order == 1).int().argmax(-1) < (order == 0).int().argmax(-1)
    chance = 1 / (1 + math.exp(-1))
    assert abs(float(first.double().mean()) - chance) < 5 * math.sqrt(chance * (1 - chance) / len(order))
    (score,) = torch.autograd.grad(q.log_prob_of_order(order).mean(), logits)
    assert float(score.abs().max()) < 5 / math.sqrt(len(order))  # zero on average


def test_the_first_item_has_the_categorical_law():
    torch.manual_seed(0)
    logits = logits_of(20)
    first = sl.PlackettLuce(logits).sample_order((40_000,))[:, 0].bincount(minlength=20)
    probs = Categorical(logits=logits).probs
    common = probs * 40_000 > 5
    difference = (first - 40_000 * probs)[common] / (40_000 * probs * (1 - probs)).sqrt()[common]
    assert float(difference.abs().max()) < 5


def test_a_matrix_puts_rows_in_order():
    q = sl.PlackettLuce(torch.tensor([0.0, 2.0, 1.0]))
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(q.mode @ rows, rows[[1, 2, 0]])
    assert torch.equal(q.mode.mT @ torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 2.0]))  # the place of each


def test_expected_places_are_those_of_the_sum_over_all_orders():
    logits = logits_of(5)
    places = orders(5).argsort(-1).double()  # [120, 5]
    torch.testing.assert_close(sl.PlackettLuce(logits).expected_places, chances(logits) @ places)


def test_a_latent_order_is_active_by_its_expected_places_and_not_by_its_mode():
    # the most probable order is another one for each example, but any other is nearly as probable
    for scale, active in ((1e-3, 0), (1.0, 2)):
        model = VAE("leave_one_out", {"latent_dim": 2, "family": "permutation", "num_categories": 3})
        metrics, params = model.evaluation("val"), scale * torch.randn(50, 6)
        metrics.update(
            {"kl": torch.zeros(50), "reconstruction": torch.zeros(50)},
            None,
            model.layer.distribution(params),
            params,
            None,
        )
        assert metrics.active_units.compute() == active
    # places 0, 1, ..., n - 1 have variance one in these units
    certain = model.layer.distribution(1e4 * torch.arange(6.0))
    torch.testing.assert_close(model.layer.family.center(certain).var(-1, correction=0), torch.ones(2))


@pytest.mark.parametrize(
    "matrix", [[[1.0, 0.0], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]], [[2.0, -1.0], [-1.0, 2.0]]]
)
def test_matrices_that_are_no_orders_are_outside_the_support(matrix):
    support = sl.PlackettLuce(torch.zeros(2)).support
    assert not bool(support.check(torch.tensor(matrix))) and bool(support.check(torch.eye(2)))


def test_outcomes_are_numbered_as_by_itertools():
    family = create_family("permutation", 1, 5)
    assert family.num_outcomes == 120
    assert torch.equal(family.outcomes(torch.float64).view(-1, 5, 5), matrices(orders(5), torch.zeros(5).double()))
    logits = logits_of(3, 5)
    scores = family.outcome_scores(logits)
    torch.testing.assert_close(scores.exp()[1, 0], chances(logits[1]))


@pytest.mark.parametrize(
    "name", ["reinforce", "leave_one_out", "dice", "unordered_set", "sum_and_sample", "enumeration"]
)
def test_unbiased_layers_have_the_exact_gradient(name):
    torch.manual_seed(0)
    layer = fitting(name)
    check_mean(layer, logits_of(layer.in_features, scale=0.8), PolynomialCost("asymmetric", layer.out_features))


def test_draws_without_replacement_lower_the_variance():
    torch.manual_seed(0)
    params, cost = logits_of(6, scale=1.0), PolynomialCost("quadratic", 18)

    def variance(name):
        layer = fitting(name, num_samples=4)
        return gradient_statistics(layer, params, cost, num_draws=10_000, reference=None).total_variance

    assert variance("unordered_set") < 0.9 * variance("leave_one_out")


def test_layers_of_orders_are_those_that_need_no_mean():
    assert set(sl.list_layers(family="permutation")) == {
        "dice", "enumeration", "leave_one_out", "nvil", "reinforce", "soft_sort", "sum_and_sample", "unordered_set"
    }  # fmt: skip
    with pytest.raises(ValueError, match="supports the families"):
        sl.create("straight_through", latent_dim=1, family="permutation", num_categories=3)


@pytest.mark.parametrize("logit", [2e9, -2e9])
def test_logits_beside_which_noise_is_lost_are_refused(logit):
    layer = fitting("reinforce")
    with pytest.raises(ValueError, match=r"magnitude at most 1e\+09 for family 'permutation', got 2e\+09"):
        layer.sample(torch.tensor([logit, 0.0, 0.0, 0.0, 0.0, 0.0]))


def test_orders_without_end_are_refused_in_few_digits():
    with pytest.raises(ValueError, match=r"got 1e9130 \*\* 1; use 'reinforce'"):
        sl.create("enumeration", latent_dim=1, family="permutation", num_categories=3000)


def test_a_law_of_one_order_stands_for_a_batch():
    q = sl.PlackettLuce(logits_of(4))
    many, order = q.expand((3, 2)), torch.tensor([2, 0, 3, 1])
    assert many.batch_shape == (3, 2) and many.sample().shape == (3, 2, 4, 4)
    torch.testing.assert_close(many.log_prob_of_order(order.expand(3, 2, 4)), q.log_prob_of_order(order).expand(3, 2))


def test_there_is_no_closed_form_of_the_divergence():
    q = sl.PlackettLuce(torch.zeros(3))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, q)


@pytest.mark.parametrize("relaxation", ["soft_sort", "neural_sort"])
class TestSoftSort:
    def test_rows_are_softmaxes_whose_largest_entries_are_an_exact_draw(self, relaxation):
        soft, hard = (fitting("soft_sort", num_samples=50, relaxation=relaxation, hard=hard) for hard in (False, True))
        params = logits_of(4, 6)
        torch.manual_seed(0)
        z = soft(params).view(50, 4, 2, 3, 3)
        torch.manual_seed(0)
        exact = hard(params).view_as(z)
        torch.testing.assert_close(z.sum(-1), torch.ones(50, 4, 2, 3).double())
        assert bool(hard.distribution(params).base_dist.support.check(exact).all())
        assert torch.equal(z.argmax(-1), exact.argmax(-1))

    def test_the_limit_of_low_temperatures_is_discrete(self, relaxation):
        soft, hard = (
            fitting("soft_sort", num_samples=50, relaxation=relaxation, hard=hard, temperature=1e-6)
            for hard in (False, True)
        )
        params = logits_of(4, 6)
        torch.manual_seed(0)
        z = soft(params)
        torch.manual_seed(0)
        torch.testing.assert_close(z, hard(params), rtol=0, atol=1e-3)

    def test_the_formula(self, relaxation, monkeypatch):
        monkeypatch.setattr("stochastic_layers.soft_sort.log_exponential", lambda shape, like: torch.zeros(shape))
        layer = sl.create("soft_sort", latent_dim=1, num_categories=3, temperature=0.7, relaxation=relaxation).double()
        s = [0.3, 1.1, -0.4]
        z = layer(torch.tensor(s, dtype=torch.float64)).view(3, 3)
        for i, largest in enumerate(sorted(s, reverse=True)):
            if relaxation == "soft_sort":
                scores = [-abs(largest - x) / 0.7 for x in s]
            else:
                scores = [((3 + 1 - 2 * (i + 1)) * x - sum(abs(x - y) for y in s)) / 0.7 for x in s]
            torch.testing.assert_close(z[i], torch.tensor(scores, dtype=torch.float64).softmax(-1))

    def test_hard_draws_have_the_gradient_of_the_soft_ones(self, relaxation):
        slope, gradients = logits_of(4, 18, seed=1), []
        for hard in (False, True):
            layer, params = fitting("soft_sort", relaxation=relaxation, hard=hard), logits_of(4, 6).requires_grad_()
            torch.manual_seed(0)
            gradients.append(torch.autograd.grad((layer(params) * slope).sum(), params)[0])
        torch.testing.assert_close(*gradients)
        assert bool(gradients[0].all())

    def test_a_learned_temperature_has_the_gradient_of_finite_differences(self, relaxation):
        layer, slope = fitting("soft_sort", relaxation=relaxation, learn_temperature=True), logits_of(4, 18, seed=1)

        def value(log_temperature):
            torch.manual_seed(0)
            with torch.no_grad():
                layer.log_temperature.fill_(log_temperature)
            return (layer(logits_of(4, 6)) * slope).sum()

        (gradient,) = torch.autograd.grad(value(0.3), layer.log_temperature)
        wanted = (value(0.3 + 1e-5) - value(0.3 - 1e-5)).detach() / 2e-5
        torch.testing.assert_close(gradient[0], wanted, rtol=1e-5, atol=0)

    def test_what_the_cost_has_to_take(self, relaxation):
        soft, hard = (fitting("soft_sort", relaxation=relaxation, hard=hard) for hard in (False, True))
        assert soft.needs == ("cost_gradient", "relaxable_cost") and hard.needs == ("cost_gradient",)


def test_unknown_relaxations_are_refused():
    with pytest.raises(ValueError, match="'soft_sort' or 'neural_sort', got 'sinkhorn'"):
        fitting("soft_sort", relaxation="sinkhorn")


@pytest.mark.parametrize("name", ["leave_one_out", "soft_sort"])
def test_a_model_learns_an_order_from_what_it_costs(name):
    # items are to be put in the order of weights that only the cost knows
    torch.manual_seed(0)
    layer = sl.create(name, latent_dim=1, family="permutation", num_categories=5)
    weights, places = torch.tensor([0.2, 1.0, -0.5, 0.6, 0.0]), torch.arange(5.0)
    logits = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        sample = layer.sample(logits.expand(64, -1))
        cost = ((sample.z.unflatten(-1, (5, 5)) @ weights) * places).sum(-1)  # the largest first
        loss = sample.surrogate(cost).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = layer.mode(logits.detach()).view(5, 5).argmax(-1)
    assert best.tolist() == weights.argsort(descending=True).tolist()
