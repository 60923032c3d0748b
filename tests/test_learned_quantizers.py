"""The quantisers of later papers: gradients against explicit matrices, who learns from what, and revival of codes."""

import math

import pytest
import torch

import stochastic_layers as sl
from stochastic_layers.codes import CellCodes


def gradients(layer, params, slope, *parameters):
    """Of ``<slope, z>`` with respect to params and parameters, without the auxiliary losses."""
    z = layer.sample(params).z[0]
    return torch.autograd.grad((slope * z).sum(), [params, *parameters])


def embeddings(layer, *batch):
    return torch.randn(*batch, layer.in_features, dtype=torch.float64).requires_grad_()


# Binary spherical quantisation


def test_spherical_codes_have_length_one_and_do_not_see_the_length_of_the_embedding():
    layer = sl.create("bsq", latent_dim=2, code_dim=5).double()
    params = embeddings(layer, 7)
    z = layer(params)
    torch.testing.assert_close(z.view(7, 2, 5).norm(dim=-1), torch.ones(7, 2, dtype=torch.float64))
    assert torch.equal(z, layer(1e-3 * params))
    assert torch.equal(z.view(7, 2, 5) > 0, params.view(7, 2, 5) > 0)


def test_spherical_gradient_is_that_of_the_projection_matrix():
    layer = sl.create("bsq", latent_dim=1, code_dim=4, entropy_weight=0.0).double()
    params, slope = embeddings(layer), torch.randn(4, dtype=torch.float64)
    (gradient,) = gradients(layer, params, slope)
    length = params.detach().norm()
    u = params.detach() / length
    expected = (torch.eye(4, dtype=torch.float64) - torch.outer(u, u)) / length @ slope
    torch.testing.assert_close(gradient, expected)
    assert abs(float(gradient @ u)) < 1e-12  # the length of the embedding is not trained
    zero = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gradients(layer, zero, slope)[0], slope)  # no direction: straight through


def test_spherical_entropy_is_that_of_the_soft_assignment_to_all_codes():
    layer = sl.create(
        "bsq", latent_dim=1, code_dim=3, entropy_weight=1.0, commitment_weight=0.5, temperature=0.7
    ).double()
    params = embeddings(layer, 6)
    aux = layer.sample(params).aux
    u = params.detach() / params.detach().norm(dim=-1, keepdim=True)
    codes = layer.decode(torch.arange(8).unsqueeze(-1)).double()
    soft = (-(u.unsqueeze(1) - codes).square().sum(-1) / 0.7).softmax(-1)  # [6, 8]
    usage = soft.mean(0)
    expected = torch.special.entr(soft).sum(-1) - torch.special.entr(usage).sum()
    torch.testing.assert_close(aux["entropy"].detach(), expected, rtol=1e-6, atol=1e-7)
    nearest = (u - layer.mode(params).detach()).square().sum(-1)
    torch.testing.assert_close(aux["commitment"].detach(), 0.5 * nearest)


# SimVQ


def test_simvq_trains_the_matrix_by_the_codebook_loss_alone_and_the_embedding_by_the_others():
    layer = sl.create("simvq", latent_dim=1, code_dim=3, num_codes=5).double()
    params, slope = embeddings(layer, 4), torch.randn(4, 3, dtype=torch.float64)
    sample = layer.sample(params)
    loss = sample.surrogate((slope * sample.z).sum(-1)).sum()
    to_params, to_matrix = torch.autograd.grad(loss, [params, layer.codes.projection])
    basis, index = layer.codes.basis, layer.indices(params).squeeze(-1)
    hard = basis[index]  # the matrix starts as the identity
    torch.testing.assert_close(sample.z[0].detach(), hard)
    torch.testing.assert_close(to_params, slope + 0.25 * 2 * (params.detach() - hard))
    torch.testing.assert_close(to_matrix, basis[index].T @ (2 * (hard - params.detach())))


def test_simvq_moves_codes_that_nothing_was_assigned_to():
    torch.manual_seed(0)
    layer = sl.create("simvq", latent_dim=1, code_dim=2, num_codes=64)
    data = torch.randn(256, 2) @ torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    before, used = layer.codes.table().detach(), layer.perplexity(data)
    unused = torch.ones(64, dtype=torch.bool)
    unused[layer.indices(data).flatten()] = False
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        sum(v.mean() for v in layer.sample(data).aux.values()).backward()
        optimizer.step()
    assert bool(unused.any()) and bool((layer.codes.table()[unused] != before[unused]).all())
    assert float(layer.perplexity(data)) > 1.2 * float(used)


# DiVeQ


def test_diveq_splits_the_gradient_between_code_and_embedding():
    """Against autograd on the formula, and: what both receive together is the cost's gradient."""
    layer = sl.create("diveq", latent_dim=1, code_dim=4, num_codes=5, noise_scale=0.0, revive_below=0.0).double()
    params, slope = embeddings(layer, 6), torch.randn(6, 4, dtype=torch.float64)
    layer.sample(params)  # starts the codebook
    with torch.no_grad():
        layer.codes.shift.add_(0.3 * torch.randn(5, 4, dtype=torch.float64))  # k-means put codes upon embeddings
    to_params, to_codes = gradients(layer, params, slope, layer.codes.shift)
    index = layer.indices(params).squeeze(-1)
    error = layer.codes.table().detach()[index] - params.detach()
    e = error / error.norm(dim=-1, keepdim=True)
    along = (slope * e).sum(-1, keepdim=True) * e
    torch.testing.assert_close(to_params, slope - along)
    torch.testing.assert_close(to_codes, torch.zeros(5, 4, dtype=torch.float64).index_add_(0, index, along))


def test_diveq_value_is_the_code_and_the_noise_is_in_the_gradient():
    layer = sl.create("diveq", latent_dim=1, code_dim=4, num_codes=5, noise_scale=0.5, revive_below=0.0).double()
    params, slope = embeddings(layer, 6), torch.randn(6, 4, dtype=torch.float64)
    layer.sample(params)
    with torch.no_grad():
        layer.codes.shift.add_(0.3 * torch.randn(5, 4, dtype=torch.float64))
    first, second = (gradients(layer, params, slope, layer.codes.shift) for _ in range(2))
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(layer.sample(params).z[0], layer.eval()(params))


def test_diveq_survives_an_embedding_upon_its_code():
    layer = sl.create("diveq", latent_dim=1, code_dim=2, num_codes=2, noise_scale=0.0, revive_below=0.0).double()
    params = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    for gradient in gradients(layer, params, torch.ones(2, 2, dtype=torch.float64), layer.codes.shift):
        assert bool(gradient.isfinite().all())


def test_a_learned_codebook_starts_by_k_means_and_revives_dead_codes():
    torch.manual_seed(0)
    layer = sl.create("diveq", latent_dim=1, code_dim=2, num_codes=4, decay=0.5, revive_below=0.1).double()
    centers = torch.tensor([[9.0, 0.0], [-9.0, 0.0], [0.0, 9.0], [0.0, -9.0]], dtype=torch.float64)
    data = (centers.repeat(50, 1) + 0.01 * torch.randn(200, 2, dtype=torch.float64)).requires_grad_()
    layer.sample(data)
    distance = torch.cdist(centers, layer.codes.table().detach()).amin(1)
    assert float(distance.max()) < 0.05 or float(layer.perplexity(data)) > 2.5  # k-means may merge two clusters
    with torch.no_grad():
        layer.codes.shift[0] = 1e3  # nothing will be assigned to it
        layer.codes.counts.fill_(50.0)
    for _ in range(10):
        layer.sample(data)
    assert float(layer.codes.table().detach().abs().max()) < 10.0
    vectors = layer.codes.table().detach().clone()
    layer.eval()(data)
    layer.train()
    with torch.no_grad():
        layer(data)
    assert torch.equal(vectors, layer.codes.table().detach())


def test_a_learned_codebook_learns_a_toy_from_the_cost_alone():
    torch.manual_seed(1)
    layer = sl.create("diveq", latent_dim=1, code_dim=2, num_codes=8)
    data = torch.randn(512, 2)
    layer.sample(data)
    with torch.no_grad():
        layer.codes.anchors.mul_(0.2)  # spoil what k-means found
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    errors = []
    for _ in range(150):
        optimizer.zero_grad()
        sample = layer.sample(data)
        loss = sample.surrogate((sample.z - data).square().sum(-1)).mean()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.5 * errors[0]


# Finite scalar perturbation


@pytest.mark.parametrize("activation", ["tanh", "normal"])
@pytest.mark.parametrize("levels", [(2,), (3, 8), (5, 4, 7)], ids=str)
def test_cells_and_indices_are_a_bijection_and_codes_their_middles(levels, activation):
    codes = CellCodes(levels, activation)
    every = torch.arange(codes.num_codes)
    middles = codes.decode(every, torch.float64)
    assert len(middles.unique(dim=0)) == codes.num_codes
    share = middles / math.sqrt(12) + 0.5
    x = (2 * share - 1).atanh() if activation == "tanh" else torch.special.ndtri(share)
    assert torch.equal(codes.indices(x), every)
    far = torch.full((len(levels),), 1e10, dtype=torch.float64)
    assert int(codes.indices(far)) == codes.num_codes - 1 and int(codes.indices(-far)) == 0


def test_a_uniform_coordinate_has_codes_of_the_variance_of_its_cells():
    """Unit variance less 1 / L^2, what is lost by rounding to the middles of L cells."""
    codes = CellCodes((6,), "normal")
    share = (torch.arange(60_000, dtype=torch.float64) + 0.5) / 60_000
    z = codes.decode(codes.indices(torch.special.ndtri(share).unsqueeze(-1)), torch.float64)
    torch.testing.assert_close(float(z.square().mean()), 1 - 1 / 36, rtol=1e-9, atol=0)


def test_perturbed_points_stay_within_half_a_level_and_inside():
    torch.manual_seed(2)
    layer = sl.create("fsp", latent_dim=1, levels=(4, 7)).double()
    params = 3 * torch.randn(20_000, 2, dtype=torch.float64)
    share = layer.codes.share(params)
    noise = layer(params) / math.sqrt(12) + 0.5 - share
    bound = 0.5 / layer.codes.levels
    assert bool((noise.abs() <= bound + 1e-12).all())
    moved = share + noise
    assert bool((moved >= 0).all() and (moved <= 1).all())
    inner = ((share > bound) & (share < 1 - bound)).all(-1)
    scaled = noise[inner] / bound  # uniform on (-1, 1): mean 0, variance 1/3
    count = int(inner.sum())
    assert float(scaled.mean(0).abs().max()) < 5 / math.sqrt(3 * count)
    assert float((scaled.square().mean(0) - 1 / 3).abs().max()) < 5 * math.sqrt(4 / 45 / count)


def test_the_gradient_of_the_perturbation_is_that_of_the_smoothed_cost():
    """E f(a + noise) has the derivative (f(a + h) - f(a - h)) / 2 h, which the pathwise average must approach."""
    torch.manual_seed(3)
    layer = sl.create("fsp", latent_dim=1, levels=(4,)).double()
    x = torch.tensor([0.2], dtype=torch.float64)
    draws = 200_000
    params = x.expand(draws, 1).clone().requires_grad_()
    sample = layer.sample(params)
    (gradient,) = torch.autograd.grad(sample.surrogate(sample.z.pow(3).sum(-1)).sum(), params)
    share, half = torch.sigmoid(2 * x), 0.125
    ends = [(math.sqrt(12) * (share + sign * half - 0.5)) ** 3 for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * half) * 2 * share * (1 - share)
    error = float(gradient.std() / math.sqrt(draws))
    assert error < 0.01 * float(expected)
    assert abs(float(gradient.mean() - expected)) < 5 * error


def test_perturbation_evaluates_on_codes_and_refuses_unknown_activations():
    layer = sl.create("fsp", latent_dim=2, levels=(3, 5)).eval()
    params = torch.randn(9, 4)
    assert torch.equal(layer(params), layer.decode(layer.indices(params)))
    assert sl.describe("fsp").exact_draws is False
    with pytest.raises(ValueError, match="needed activation"):
        sl.create("fsp", latent_dim=2, activation="relu")
