"""Rényi bound, reweighted wake-sleep and thermodynamic objective against their exact gradients."""

import itertools
import math

import pytest
import torch
from gradients_of_models import check_gradients, exact_gradients
from objective_models import (
    discrete_model,
    enumerated,
    fresh_log_weights,
    gaussian_model,
    integrated,
    log_joint,
    renyi,
    sampled,
    tuples,
)

from lightning_modules import IWAE, TVO, Renyi, Terms
from stochastic_layers.testing import enumerate_outcomes


@pytest.mark.parametrize("alpha", [-0.5, 0.5, 1.0, 2.0])
def test_gradients_of_the_renyi_bound_are_exact_in_the_mean(alpha):
    def value(log_weights):
        return log_weights.mean(-1) if alpha == 1 else renyi(log_weights, alpha)

    model, x = discrete_model(Renyi(alpha, "vimco"), 2)
    check_gradients(model, x, enumerated(model, x, 2, value))
    model, x = gaussian_model(Renyi(alpha), 2)
    check_gradients(model, x, integrated(model, x, 2, 60, value))


@pytest.mark.parametrize(
    ("objective", "alpha"),
    [
        (IWAE("vimco"), 0.0),
        (IWAE("vimco", control="arithmetic"), 0.0),
        (IWAE("ovis"), 0.0),
        (Renyi(0.5, "vimco"), 0.5),
        (Renyi(-1.0, "vimco"), -1.0),
    ],
    ids=str,
)
def test_each_draw_is_compared_with_the_bound_that_has_the_mean_of_the_others_in_its_place(objective, alpha):
    k, power = 4, 1 - alpha
    log_joint, log_q = torch.randn(2, k, 3, dtype=torch.float64)
    log_q.requires_grad_()
    terms = Terms(sample=None, log_likelihood=log_joint, log_prior=0 * log_joint, log_q=log_q, kl=None)
    (gradient,) = torch.autograd.grad(objective.loss(terms, 0).sum(), log_q)
    weights = (log_joint - log_q).detach()
    for draw in range(k):
        others, replaced = torch.cat([weights[:draw], weights[draw + 1 :]]), weights.clone()
        replaced[draw] = others.mean(0)
        if objective == IWAE("vimco", control="arithmetic"):
            replaced[draw] = others.logsumexp(0) - math.log(k - 1)
        if objective == IWAE("ovis"):
            replaced[draw] = -math.inf
        advantage = renyi(weights.T, alpha) - renyi(replaced.T, alpha)
        expected = (power * weights).softmax(0)[draw] - advantage  # of minus the bound; the first is that of its value
        torch.testing.assert_close(gradient[draw], expected)


def test_renyi_bounds_run_from_the_importance_weighted_bound_to_the_elbo_and_below():
    model, x = gaussian_model("elbo", 4)
    for a, b in zip(sampled(model, x, Renyi(0.0)), sampled(model, x, IWAE()), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(sampled(model, x, Renyi(1 - 1e-7)), sampled(model, x, Renyi(1.0)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    log_weights = model.terms(x.expand(5, 2)).log_weights.detach()
    torch.testing.assert_close(-sampled(model, x, Renyi(1.0))[0], fresh_log_weights(model, x).mean(0))
    values = [-sampled(model, x, Renyi(alpha))[0] for alpha in (-1.0, 0.0, 0.5, 1.0, 3.0)]
    assert log_weights.shape == (4, 5)
    assert all(bool((a > b).all()) for a, b in itertools.pairwise(values))


def test_wake_phi_gradient_is_that_of_the_self_normalised_weights():
    model, x = discrete_model("rws", 3)
    probability, log_weights, log_q, log_p = tuples(model, x, 3)
    weights = log_weights.softmax(-1).detach()
    follows = ((weights * log_q).sum(-1) + (weights * log_p).sum(-1)) * probability.detach()
    check_gradients(model, x, exact_gradients(model, -follows.sum()))


def test_model_under_wake_sleep_follows_the_importance_weighted_bound():
    model, x = discrete_model("rws", 2)
    check_gradients(model, x, enumerated(model, x, 2), only=["p"])


def test_thermodynamic_objective_of_one_partition_is_the_elbo():
    model, x = discrete_model(TVO(partitions=1), 2)
    check_gradients(model, x, enumerated(model, x, 1))


@pytest.mark.parametrize("k", [2, 16])
def test_thermodynamic_objective_lies_between_elbo_and_log_evidence_and_rises_with_partitions(k):
    model, x = discrete_model("elbo", k)
    elbo, iwae = -sampled(model, x, TVO(1))[0], fresh_log_weights(model, x).logsumexp(0) - math.log(k)
    coarse, fine = (-sampled(model, x, TVO(p, 0.01))[0] for p in (3, 300))
    assert bool((elbo <= coarse + 1e-9).all() and (coarse <= fine + 1e-9).all() and (fine <= iwae + 1e-9).all())
    assert bool((elbo < iwae - 0.01).any())  # draws that differ
    torch.testing.assert_close(fine, iwae, rtol=0, atol=0.1)


def test_thermodynamic_gradient_tends_to_the_exact_one():
    """On a sample that holds every outcome in proportion to q, expectations are exact but for K / (K - 1)."""
    model, x = discrete_model(TVO(3, 0.2), 2)
    with torch.no_grad():  # q(z) = 1/4, 3/4 for each bit
        model.encoder[1].weight.zero_()
        model.encoder[1].bias.copy_(torch.tensor([3.0, 1 / 3], dtype=torch.float64).log())
    family, params = model.layer.family, model.encode(x.unsqueeze(0))
    outcomes = enumerate_outcomes(model.layer)
    q = model.layer.distribution(params)
    probability = family.log_prob(q, outcomes.unsqueeze(1)).exp().squeeze(1)
    log_weights = log_joint(model, x, outcomes) - probability.log()
    exact = 0.0
    ends = model.objective.betas()
    for beta, end in itertools.pairwise(ends):
        pi = (probability.log() + beta * log_weights).softmax(0)
        exact = exact + (end - beta) * (pi * log_weights).sum()
    expected, exact = exact_gradients(model, -exact), exact.detach()

    copies = (probability.detach() * 16 * 2000).round().long()
    z = outcomes.repeat_interleave(copies, 0).unsqueeze(1)
    params = model.encode(x.unsqueeze(0))
    log_q = family.log_prob(model.layer.distribution(params), z)
    log_prior = family.log_prob(model.prior(x.device), z)
    sample = model.layer.sample(params)
    loss = model.loss(Terms(sample, model.log_likelihood(z, x.unsqueeze(0)), log_prior, log_q, None, z)).sum()
    torch.testing.assert_close(loss.detach(), -exact, rtol=1e-9, atol=1e-9)
    got = exact_gradients(model, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-4, atol=2e-4)
