"""Importance-weighted categorical DisARM: what two draws of CARMS are, over every outcome of the coupled bits."""

import itertools

import pytest
import torch

import stochastic_layers as sl
from stochastic_layers import coupled_categorical
from stochastic_layers.binary_codes import stick_logits
from stochastic_layers.testing import PolynomialCost, exact_value

PARAMS = {
    3: torch.tensor([0.4, -0.8, 1.1, -0.2, 2.0, -1.0], dtype=torch.float64),
    4: torch.tensor([0.4, -0.8, 1.1, -0.2, 0.0, 1.9, -1.0, 0.9], dtype=torch.float64),
}


def pairs_of_bits(params, size):
    """Every outcome of two antithetic bits for each stick, ``[2, N, L, C - 1]``, and its probability ``[N]``."""
    logits = params.view(-1, size).sort(-1).values
    p = stick_logits(logits).sigmoid().flatten()
    assert float(p.max()) < 0.5  # the rarest category first: two zeros are possible at every stick
    law = torch.stack([1 - 2 * p, p, p], -1)  # of (0, 0), (1, 0) and (0, 1)
    kinds = torch.tensor(list(itertools.product(range(3), repeat=len(p))))
    weights = law.expand(len(kinds), *law.shape).gather(-1, kinds.unsqueeze(-1)).squeeze(-1).prod(-1)
    bits = torch.stack([kinds == 1, kinds == 2]).to(p.dtype)
    return bits.view(2, len(kinds), len(logits), size - 1), weights


def enumerated(monkeypatch, size):
    """Gradients of the layer ``[N, L * C]``, the pairs ``[2, N, L * C]``, their costs and their probabilities."""
    params = PARAMS[size]
    bits, weights = pairs_of_bits(params, size)
    monkeypatch.setattr(coupled_categorical, "copula_bits", lambda logits, num_samples: bits)
    layer = sl.create("carms", latent_dim=2, num_categories=size, num_samples=2).double()
    leaf = params.expand(len(weights), -1).clone().requires_grad_()
    sample = layer.sample(leaf)
    cost = PolynomialCost("cubic", layer.out_features)(sample.z).detach()
    (grads,) = torch.autograd.grad(sample.surrogate(cost).sum(), leaf)
    return layer, grads, sample.z.view(2, len(weights), 2, size), cost, weights


def importance_weighted(z, cost, weights, params, size, weighting):
    """(f(z) - f(z')) / 2 * q(z) q(z') / P(z, z') * (score(z) - score(z')), with P summed from the outcomes."""
    q = params.view(2, size).softmax(-1)
    cells = []
    for latent in range(2):
        joint = torch.einsum("n,na,nb->ab", weights, z[0, :, latent], z[1, :, latent])
        ratio = q[latent][:, None] * q[latent][None, :] / joint.clamp_min(1e-300)
        cells.append(torch.einsum("na,ab,nb->n", z[0, :, latent], ratio, z[1, :, latent]))
    ratio = torch.stack(cells, -1)  # [N, L]
    if weighting == "of all latents":
        ratio = ratio.prod(-1, keepdim=True).expand_as(ratio)
    elif weighting == "none":
        ratio = torch.ones_like(ratio)
    score = (z[0] - q) - (z[1] - q)
    return (0.5 * (cost[0] - cost[1])[:, None, None] * ratio[..., None] * score).flatten(1)


@pytest.mark.parametrize("size", [3, 4])
def test_two_draws_of_carms_are_exact_over_all_outcomes(size, monkeypatch):
    layer, grads, z, _, weights = enumerated(monkeypatch, size)
    torch.testing.assert_close(float(weights.sum()), 1.0)
    for point in z:  # each of the two alone follows q
        torch.testing.assert_close(torch.einsum("n,nlc->lc", weights, point), PARAMS[size].view(2, size).softmax(-1))
    leaf = PARAMS[size].clone().requires_grad_()
    (exact,) = torch.autograd.grad(exact_value(layer, leaf, PolynomialCost("cubic", layer.out_features)), leaf)
    torch.testing.assert_close(weights @ grads, exact, rtol=1e-10, atol=1e-12)
    assert float(exact.abs().min()) > 1e-3


@pytest.mark.parametrize("size", [3, 4])
def test_they_are_importance_weighted_disarm_pair_by_pair(size, monkeypatch):
    _, grads, *pairs = enumerated(monkeypatch, size)
    torch.testing.assert_close(
        grads, importance_weighted(*pairs, PARAMS[size], size, "of each latent"), rtol=1e-10, atol=1e-12
    )


def test_one_weight_for_all_latents_is_caught(monkeypatch):
    """Two antithetic draws never agree on a rare category, so that the other latents lack what such pairs would say."""
    _, grads, *pairs = enumerated(monkeypatch, 3)
    weights = pairs[-1]
    product = importance_weighted(*pairs, PARAMS[3], 3, "of all latents")
    found, exact = ((weights @ g).view(2, 3) for g in (product, grads))
    bias = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert bool((bias > 1e-3).all()) and float(bias.max()) > 0.02  # without any noise: all is summed


@pytest.mark.parametrize("size", [3, 4])
def test_pairs_without_their_weights_are_caught(size, monkeypatch):
    _, grads, *pairs = enumerated(monkeypatch, size)
    bare = importance_weighted(*pairs, PARAMS[size], size, "none")
    bias = float((pairs[-1] @ (bare - grads)).norm() / (pairs[-1] @ grads).norm())
    assert bias > 0.1
