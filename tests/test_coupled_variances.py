"""The variances of layers with coupled draws: which is lower, and the published and documented figures."""

import pytest
import torch
from coupled_problems import gradients, variance_and_error
from small_problems import build

import stochastic_layers as sl
from stochastic_layers import coupled
from stochastic_layers.testing import COSTS, PolynomialCost, check_mean, measure


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
    monkeypatch.setattr(coupled, "double_uniform", lambda shape, device: torch.cartesian_prod(grid, grid))
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
