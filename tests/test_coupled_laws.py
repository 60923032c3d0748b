"""The joint laws of coupled draws: copulas, ratios, and the codes that turn categories into bits."""

import itertools
import math

import pytest
import torch
from coupled_problems import BITS, FALSE_ALARM, chi_square_p
from scipy import special, stats

import stochastic_layers as sl
from stochastic_layers import arms as copulas
from stochastic_layers import coupled, coupled_categorical, discrete_families
from stochastic_layers.binary_codes import decode_sticks, decode_tree, ordered_sticks, stick_logits, tree_logits


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


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", ["arm", "disarm", "leave_one_out", "arms"])
def test_what_happens_once_in_a_billion_draws_happens_when_its_noise_comes_up(name, sign, monkeypatch):
    logits = torch.tensor(sign * math.log(1e9)).expand(4)  # in float32 a sigmoid of it is 1e-9, or 1
    u = torch.tensor([0.5e-9, 2e-9, 1 - 0.5e-9, 1 - 2e-9], dtype=torch.float64)
    for module in (coupled, discrete_families):
        monkeypatch.setattr(module, "double_uniform", lambda shape, device: u.expand(shape).clone())
    noise = torch.stack([torch.ones(4), torch.tensor([0.5e-9, 2e-9, 1.0, 1.0])])
    monkeypatch.setattr(copulas, "exponential", lambda shape, like: noise)
    first, second = sl.create(name, latent_dim=4, num_samples=2).sample(logits).z
    unlikely = (1 - sign) // 2
    low, high = (torch.tensor(where) for where in ([1.0, 0, 0, 0], [0, 0, 1.0, 0]))  # where u < 1e-9, and 1 - u
    if sign > 0:
        low, high = high, low
    expected = {"arms": (torch.tensor([1.0, 0, 0, 0]), torch.zeros(4)), "leave_one_out": (low, low)}
    for z, rare in zip((first, second), expected.get(name, (high, low)), strict=True):
        assert torch.equal(z, torch.where(rare > 0, float(unlikely), 1.0 - unlikely))


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
    outcomes, weights = outcomes[weights > 0], weights[weights > 0]  # no leaf that a tree is filled up with
    z, reached = decode(outcomes)
    torch.testing.assert_close(weights @ z, logits.softmax(-1))
    # the bits on the path alone give the probability of the category
    log_bits = torch.where(outcomes == 1, bit_logits, -bit_logits).sigmoid().log()
    torch.testing.assert_close((log_bits * reached).sum(-1), (z * logits.log_softmax(-1)).sum(-1))


def test_sticks_name_the_first_one():
    z, reached = decode_sticks(torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert z.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]] and reached.tolist() == [[1, 1, 0], [1, 1, 1]]
