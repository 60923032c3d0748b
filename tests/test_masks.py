"""Categories that are ruled out by a logit of -1e4: never drawn, without gradient, and of no weight in the law."""

import math

import pytest
import torch
from torch.distributions import kl_divergence

import stochastic_layers as sl

MASK = torch.tensor([[False, False, True, False], [True, False, True, True]])  # a row with a single choice left


@pytest.mark.parametrize("name", sl.list_layers(family="categorical"))
def test_a_masked_category_takes_no_part(name):
    layer = sl.create(name, latent_dim=1, num_categories=4, family="categorical")
    logits = torch.tensor([[0.5, -0.3, 9.0, 0.1], [9.0, 0.2, 9.0, 9.0]], requires_grad=True)
    params = logits.masked_fill(MASK, -1e4)
    for _ in range(20):
        sample = layer.sample(params)
        weights = sample.weights.view(len(sample.z), -1, 1)  # [S, 1 or 2, 1]; of auxiliary points 0
        assert not (weights * sample.z)[:, MASK].any()
    cost = (sample.z * torch.arange(4.0)).sum(-1).square()
    (gradient,) = torch.autograd.grad(sample.surrogate(cost).sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[MASK].any()
    prior = layer.family.standard().expand(sample.q.batch_shape)
    assert float(kl_divergence(sample.q, prior)[1].detach()) == pytest.approx(math.log(4))


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("family", ["bernoulli", "categorical"])
def test_other_masks_are_refused_with_the_one_that_is_taken(value, family):
    categories = 2 if family == "categorical" else None
    layer = sl.create("straight_through", latent_dim=2, family=family, num_categories=categories)
    with pytest.raises(ValueError, match="mask logits with -1e4 instead of -inf"):
        layer(torch.full((3, layer.in_features), value))
