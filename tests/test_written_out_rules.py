"""Gradients and sums that are written out for speed, against the formulas that autograd differentiates."""

import pytest
import torch

import stochastic_layers as sl
from stochastic_layers import rodeo
from stochastic_layers.binary_codes import ascending_stick_logits, stick_logits, tree_logits
from stochastic_layers.gumbel_straight_through import Term, sum_of_products, with_slope
from stochastic_layers.simplex_maps import entmax15, sparsemax

ORDERS = (stick_logits, ascending_stick_logits)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_sticks_in_ascending_order_are_those_of_any_order(scale):
    logits = (scale * torch.randn(7, 5, dtype=torch.float64)).sort(-1).values.requires_grad_()
    vector = torch.randn(7, 4, dtype=torch.float64)
    pairs = [(f(logits), torch.autograd.grad((f(logits) * vector).sum(), logits)[0]) for f in ORDERS]
    for right, ours in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_tree_has_the_logits_of_its_halves_and_their_first_and_second_derivatives(size, scale):
    logits = (scale * torch.randn(3, size, dtype=torch.float64)).requires_grad_()
    leaves = [[*range(size)]]
    expected = []
    while len(leaves[0]) > 1:  # level by level: the categories of a node are those of its two halves
        half = (2 ** (max(map(len, leaves)) - 1).bit_length()) // 2
        parts = [(node[:half], node[half:]) for node in leaves]
        expected += [tuple(logits[:, part].logsumexp(-1) for part in both) for both in parts]
        leaves = [part for both in parts for part in both]
    ours = tree_logits(logits)
    seen = [i for i, (left, right) in enumerate(expected) if left.isfinite().all() and right.isfinite().all()]
    right = torch.stack([expected[i][1] - expected[i][0] for i in seen], -1)
    torch.testing.assert_close(ours[:, seen], right)
    vector = torch.randn_like(right)
    slopes = [torch.autograd.grad((t * vector).sum(), logits)[0] for t in (ours[:, seen], right)]
    torch.testing.assert_close(*slopes)
    if scale == 1.0:
        assert torch.autograd.gradgradcheck(tree_logits, logits)


def test_the_slope_of_a_hard_draw_is_the_sum_of_its_terms_twice_differentiable():
    points = torch.randn(6, 2, 3, 4, 5, dtype=torch.float64).softmax(-1)  # [K, S, B, L, C]
    matrix = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    weight = torch.tensor([0.3], dtype=torch.float64)
    terms = [Term(weight, points.movedim(-1, 0)), Term(-weight, matrix + matrix.mT, is_matrix=True)]
    hard = torch.eye(5, dtype=torch.float64)[torch.randint(5, (2, 3, 4))]
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    z = with_slope(hard, logits, terms)
    assert torch.equal(z, hard)
    cost, shift = (z * torch.arange(5.0)).sum(-1).square().sum(), torch.randn_like(hard)
    (gradient,) = torch.autograd.grad(cost, logits, create_graph=True)
    slope = 2 * (hard * torch.arange(5.0)).sum(-1, keepdim=True) * torch.arange(5.0).double()
    jacobian = torch.diag_embed(points) - points.unsqueeze(-1) * points.unsqueeze(-2)
    full = 0.3 * jacobian.sum(0) - 0.3 * (matrix + matrix.mT)
    torch.testing.assert_close(gradient, (full @ slope.unsqueeze(-1)).squeeze(-1).sum(0))
    torch.testing.assert_close(sum_of_products(terms, shift), (full @ shift.unsqueeze(-1)).squeeze(-1))
    (second,) = torch.autograd.grad(gradient.sum(), logits)
    assert second.abs().max() > 0


@pytest.mark.parametrize("function", [entmax15, sparsemax])
def test_maps_onto_the_simplex_have_first_and_second_derivatives(function):
    scores = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradgradcheck(function, scores)


def test_the_network_of_rodeo_in_chunks_is_the_network(monkeypatch):
    monkeypatch.setattr(rodeo, "CHUNK", 4)
    network = sl.create("rodeo", latent_dim=3, taylor=False).network.double()
    inputs, vector = torch.randn(2, 10, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    network[0].bias.requires_grad_(False)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    ours = rodeo._InChunks.apply(inputs, *network.parameters())
    right = network(inputs.mT)
    torch.testing.assert_close(ours.mT, right)
    gradients = torch.autograd.grad((ours.mT * vector).sum(), trained)
    for one, other in zip(gradients, torch.autograd.grad((right * vector).sum(), trained), strict=True):
        torch.testing.assert_close(one, other)


def test_the_network_of_relax_with_one_pass_of_the_context_is_the_network():
    layer = sl.create("relax", latent_dim=3, num_samples=2, context_features=4).double()
    torch.nn.init.normal_(layer.network[-1].weight)
    points = torch.rand(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(5, 4, dtype=torch.float64)
    ours = layer._network_part(points, context, 2)
    value = layer.network(torch.cat([points, context.expand(2, 2, 5, 4)], -1)).squeeze(-1)
    right = value[1], torch.autograd.grad(value.sum(), points, create_graph=True)[0]
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other)
    trained = list(layer.network.parameters())
    slopes = [torch.autograd.grad(v.square().sum() + s.square().sum(), trained) for v, s in (ours, right)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)
        assert one.any()
