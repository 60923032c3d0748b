"""Layers that sum in part: the mean over everything that their own noise can be is exact; known mistakes are caught."""

import itertools
from dataclasses import replace

import pytest
import torch
from exact_layers import ONE_OF_16, assert_exact
from small_problems import BITS, CATEGORIES, build
from torch.nn import functional

import stochastic_layers as sl
from stochastic_layers import rao_blackwell, without_replacement
from stochastic_layers.testing import COSTS, PolynomialCost, check_mean, enumerate_outcomes
from stochastic_layers.without_replacement import log_set_probs


def expected_loss(layer, params, cost_fn, probs):
    """The loss averaged over R planted choices: the layer has been made to take choice r in row r of ``[R, B, F]``."""
    leaf = params.clone().requires_grad_()
    sample = layer.sample(leaf.expand(len(probs), *leaf.shape))
    return (probs * sample.surrogate(cost_fn(sample.z))).sum(0), leaf


@pytest.mark.parametrize("kind", ["constant", "quadratic", "asymmetric"])
@pytest.mark.parametrize(
    ("options", "size", "baseline"),
    [
        (BITS, 2, "built_in"),
        (BITS, 3, "none"),
        (CATEGORIES, 1, "none"),
        (CATEGORIES, 2, "built_in"),
        (CATEGORIES, 3, "none"),
        (CATEGORIES, 4, "built_in"),
        (ONE_OF_16, 3, "built_in"),
    ],
    ids=str,
)
def test_unordered_set_is_exact_when_averaged_over_every_ordered_sample(monkeypatch, options, size, baseline, kind):
    layer, params = build("unordered_set", {**options, "num_samples": size, "baseline": baseline})
    ordered = torch.tensor(list(itertools.permutations(range(layer.num_outcomes), size)))  # [R, k]
    p = layer.joint_log_probs(params).exp()[:, ordered]  # [B, R, k]
    probs = (p / (1 - (p.cumsum(-1) - p))).prod(-1).T  # [R, B]: one draw after the other
    torch.testing.assert_close(probs.sum(0), torch.ones(2, dtype=torch.float64))
    monkeypatch.setattr(layer, "_draw_set", lambda joint, k: ordered.T.unsqueeze(-1).expand(k, *probs.shape))
    cost_fn = PolynomialCost(kind, layer.out_features)
    assert_exact(layer, params, cost_fn, *expected_loss(layer, params, cost_fn, probs), tolerance=1e-10)


@pytest.mark.parametrize("kind", ["constant", "quadratic", "asymmetric"])
@pytest.mark.parametrize(("options", "num_exact"), [(BITS, 1), (BITS, 3), (CATEGORIES, 2), (ONE_OF_16, 3)], ids=str)
@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("baseline", ["exact_part", "none"])
def test_sum_and_sample_is_exact_when_averaged_over_every_draw(
    monkeypatch, options, num_exact, num_samples, baseline, kind
):
    layer, params = build(
        "sum_and_sample", {**options, "num_exact": num_exact, "num_samples": num_samples, "baseline": baseline}
    )
    p, order = layer.joint_log_probs(params).exp().sort(-1, descending=True)  # [B, N]
    p, order = p[:, num_exact:], order[:, num_exact:]
    p = p / p.sum(-1, keepdim=True)
    tuples = torch.tensor(list(itertools.product(range(p.shape[-1]), repeat=num_samples)))  # [R, m]
    probs = p[:, tuples].prod(-1).T  # [R, B]
    monkeypatch.setattr(layer, "_draw_rest", lambda rest: order[:, tuples].permute(2, 1, 0))
    cost_fn = PolynomialCost(kind, layer.out_features)
    assert_exact(layer, params, cost_fn, *expected_loss(layer, params, cost_fn, probs), tolerance=1e-10)


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
def test_local_expectation_is_exact_when_averaged_over_every_draw(monkeypatch, options, kind):
    layer, params = build("local_expectation", options)
    outcomes = enumerate_outcomes(layer).unsqueeze(1).expand(-1, 2, -1)  # [R, B, out]
    probs = layer.family.log_prob(layer.distribution(params), outcomes).exp()
    monkeypatch.setattr(layer.family, "sample", lambda q, n: outcomes.unsqueeze(0))
    cost_fn = PolynomialCost(kind, layer.out_features)
    assert_exact(layer, params, cost_fn, *expected_loss(layer, params, cost_fn, probs))


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("options", [BITS, CATEGORIES, {**CATEGORIES, "num_categories": 4}], ids=str)
def test_coordinate_flip_is_exact_when_averaged_over_every_draw_coordinate_and_value(monkeypatch, options, kind):
    layer, params = build("coordinate_flip", options)
    outcomes = enumerate_outcomes(layer)
    latents, others = layer.latent_dim, (layer.num_categories or 2) - 1
    choices = torch.cartesian_prod(torch.arange(len(outcomes)), torch.arange(latents), torch.arange(others))
    draw = outcomes[choices[:, 0]].unsqueeze(1).expand(-1, 2, -1)  # [R, B, out]
    probs = layer.family.log_prob(layer.distribution(params), draw).exp() / latents  # [R, B]
    chosen = functional.one_hot(choices[:, 1], latents).double()[None, :, None].expand(1, -1, 2, -1)
    monkeypatch.setattr(layer.family, "sample", lambda q, n: draw.unsqueeze(0))
    monkeypatch.setattr(layer, "_choose", lambda shape, like: chosen)
    taken = []

    def planted(p, num_samples):  # the r-th of the values that differ from the draw's, and how likely it was
        assert bool((p.sum(-1) - 1).abs().max() < 1e-12) and bool(((p > 0).sum(-1) == others).all())
        rank = choices[:, 2].view(1, -1, 1, 1).expand(*p.shape[:-1], 1)
        index = p.argsort(-1, descending=True).gather(-1, rank)
        taken.append(p.gather(-1, index)[0, ..., 0])
        return torch.zeros_like(p).scatter_(-1, index, 1.0).unsqueeze(0)

    monkeypatch.setattr(rao_blackwell, "draw_categorical", planted)
    if layer.num_categories is not None:
        layer.sample(params.expand(len(choices), *params.shape))  # one pass to learn the probabilities of the values
        probs = probs * taken[0]
    torch.testing.assert_close(probs.sum(0), torch.ones(2, dtype=torch.float64))
    cost_fn = PolynomialCost(kind, layer.out_features)
    assert_exact(layer, params, cost_fn, *expected_loss(layer, params, cost_fn, probs))


def test_set_probabilities_equal_the_sum_over_all_orders():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 7, generator=generator, dtype=torch.float64).softmax(-1)[:, :4].T  # [k, B]
    rest = 1 - p.sum(0)
    log_h = log_set_probs(p.log(), rest.log())
    for subset in range(16):
        members = [i for i in range(4) if subset >> i & 1]
        mass = rest + p[members].sum(0)
        expected = torch.zeros(2, dtype=torch.float64)
        for order in itertools.permutations(members):
            left, term = mass, torch.ones(2, dtype=torch.float64)
            for i in order:
                term, left = term * p[i] / left, left - p[i]
            expected = expected + term
        torch.testing.assert_close(log_h[subset].exp(), expected, rtol=1e-12, atol=0)


# ---- negative controls -----------------------------------------------------------------------------------------------


class MeanBaseline(sl.UnorderedSet):
    """A baseline that contains the own draw."""

    def draw(self, params, context):
        sample = super().draw(params, context)
        return replace(sample, credit=lambda cost: sample.credit(cost - cost.mean(0)))


class FlipWithoutFactor(sl.CoordinateFlip):
    """Forgets that one coordinate stands for all."""

    def _bit_flips(self, draws, logits):
        flips, factors = super()._bit_flips(draws, logits)
        return flips, factors / self.latent_dim


class UniformRest(sl.SumAndSample):
    """Draws from the rest without regard to its law."""

    def _draw_rest(self, rest):
        return super()._draw_rest(torch.where(rest > -torch.inf, 0.0, rest))


@pytest.mark.parametrize(
    "layer",
    [
        MeanBaseline(3, num_samples=3, baseline="none"),
        FlipWithoutFactor(3),
        UniformRest(3, num_exact=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_known_mistakes_are_caught(layer):
    _, params = build("reinforce", BITS)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("asymmetric", 3))


@pytest.mark.parametrize("mistake", [lambda p, rest: log_set_probs(p, torch.full_like(rest, -torch.inf))])
def test_ratios_that_forget_the_outcomes_outside_the_set_are_caught(monkeypatch, mistake):
    layer, params = build("unordered_set", {**CATEGORIES, "num_samples": 3})
    monkeypatch.setattr(without_replacement, "log_set_probs", mistake)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("asymmetric", 6))
