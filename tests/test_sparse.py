"""The sparse law of sparsemax marginalization: a projection, one law everywhere, and no gradient off its support."""

import pytest
import torch
from exact_layers import gradients
from small_problems import CATEGORIES
from torch.distributions import kl_divergence

import stochastic_layers as sl
from stochastic_layers.sparse import sparsemax


def bisected_sparsemax(scores):
    low, high = scores.amax(-1, keepdim=True) - 1, scores.amax(-1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        enough = (scores - middle).clamp_min(0).sum(-1, keepdim=True) > 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return (scores - low).clamp_min(0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_sparsemax_is_the_projection_onto_the_simplex(scale):
    scores = scale * torch.randn(200, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sparsemax(scores), bisected_sparsemax(scores), rtol=0, atol=1e-10)
    ties = torch.tensor([[2.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(sparsemax(ties), torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]))
    assert torch.autograd.gradcheck(sparsemax, scores[:5].requires_grad_())


def test_sparse_law_is_one_law_in_distribution_weights_log_prob_and_draws():
    layer = sl.create("sparsemax_marginalization", **CATEGORIES)
    params = torch.tensor([[0.4, 0.0, -2.0, 0.3, 0.2, 0.1], [5.0, 0.0, 0.0, 0.0, 9.0, 0.0]])
    probs = bisected_sparsemax(params.view(2, 2, 3))
    q = layer.distribution(params)
    torch.testing.assert_close(q.mean, probs)
    sample = layer.sample(params)
    assert sample.z.shape[0] == 6  # two categories of the first variable, three of the second
    assert sample.weights[:, 1].tolist() == [1, 0, 0, 0, 0, 0]
    assert torch.equal(sample.z[:, 1], sample.z[:1, 1].expand(6, 6))  # the likeliest outcome, whose cost is known
    torch.testing.assert_close((sample.weights.unsqueeze(-1) * sample.z).sum(0), probs.flatten(1))
    torch.testing.assert_close(sample.log_prob[:, 0].exp(), sample.weights[:, 0])
    assert torch.isfinite(sample.log_prob).all()  # also where points fill up with weight 0
    layer.eval()
    draws = layer.sample(params.expand(40_000, 2, 6)).z[0].view(40_000, 2, 2, 3)
    error = (probs * (1 - probs) / 40_000).sqrt()
    assert bool(((draws.mean(0) - probs).abs() <= 5 * error + 1e-6).all()) and not draws[..., probs == 0].any()


def test_off_the_support_there_is_no_gradient():
    layer = sl.create("sparsemax_marginalization", latent_dim=1, num_categories=4).double()
    params = torch.tensor([[0.4, 0.0, 0.2, -2.0]], dtype=torch.float64, requires_grad=True)
    sample = layer.sample(params)
    cost = sample.surrogate(sample.z @ torch.tensor([1.0, -5.0, 2.0, -9.0], dtype=torch.float64))
    kl = kl_divergence(layer.distribution(params), layer.family.standard().expand((1,)))
    for loss in (cost, kl):
        (gradient,) = gradients(loss, params)
        assert gradient[0, 3] == 0 and bool((gradient[0, :3].abs() > 1e-2).all())
        assert abs(float(gradient.sum())) < 1e-12  # so that the threshold stays where it is


def test_kl_of_the_sparse_law_to_a_full_prior_is_finite_and_its_reverse_is_infinite():
    layer = sl.create("sparsemax_marginalization", **CATEGORIES).double()
    params = torch.tensor([[0.4, 0.0, -2.0, 0.3, 0.2, 0.1]], dtype=torch.float64)
    prior = layer.family.distribution(torch.tensor([0.3, -0.4, 0.2, 0.1, 0.0, -0.6], dtype=torch.float64))

    def kl(p):
        return kl_divergence(layer.distribution(p), prior.expand((1,)))

    probs = bisected_sparsemax(params.view(1, 2, 3))
    ratio = torch.where(probs > 0, probs.clamp_min(1e-300).log() - prior.base_dist.logits, 0.0)
    torch.testing.assert_close(kl(params), (probs * ratio).sum((-1, -2)))
    assert torch.autograd.gradcheck(kl, params.requires_grad_())
    assert torch.isinf(kl_divergence(prior.expand((1,)), layer.distribution(params))).all()
