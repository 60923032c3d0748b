"""Every layer that states to need no gradient of the cost trains a model whose cost leaves autograd."""

import numpy as np
import pytest
import torch
from torch import nn

import stochastic_layers as sl
from stochastic_layers.testing.subject import Subject

CASES = [
    (name, family)
    for name in sl.list_layers()
    if "cost_gradient" not in sl.describe(name).needs
    for family in sl.describe(name).families
]
X = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def black_box(z):
    """The distance in steps of a half from a target that depends on x: through numpy, and flat almost everywhere."""
    points = z.detach().numpy()
    signs = 1.0 - 2.0 * (np.arange(points.shape[-1]) % 2)
    return torch.from_numpy(np.ceil(2 * np.abs(points @ signs - 2 * np.sign(X[:, 0].numpy()))) / 2)


def expected_cost(layer, encoder):
    """The mean over 100 draws of q, the same noise each time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer.eval()
        return float(np.mean([float(black_box(layer.sample(encoder(X)).z).mean()) for _ in range(100)]))


def train(name, family):
    """Expected cost before and after 60 steps of a linear encoder."""
    torch.manual_seed(0)
    layer = Subject(name, family=family).build()
    encoder = nn.Linear(3, layer.in_features).double()
    before = expected_cost(layer, encoder)
    optimizer = torch.optim.Adam([*encoder.parameters(), *layer.parameters()], lr=0.1)
    layer.train()
    for _ in range(60):
        optimizer.zero_grad()
        sample = layer.sample(encoder(X))
        loss = sample.surrogate(black_box(sample.z)).mean()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    return before, expected_cost(layer, encoder)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_layer_without_cost_gradient_lowers_a_black_box_cost(name, family):
    before, after = train(name, family)
    assert after < 0.8 * before, (before, after)


@pytest.mark.parametrize("name", ["straight_through", "gaussian"])
def test_a_layer_with_cost_gradient_learns_nothing_from_it(name):
    with pytest.warns(UserWarning, match="the cost does not depend on z through autograd"):
        before, after = train(name, None)
    assert after == before
