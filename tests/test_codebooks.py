"""Codes against brute force, codebooks against k-means, residual and lookup-free quantisers against their formulas."""

import copy
import math

import pytest
import torch
from quantizers import LEARNED, blobs, build, embeddings
from torch import nn
from torch.func import functional_call

import stochastic_layers as sl
from stochastic_layers.codebooks import Codebook
from stochastic_layers.codes import GridCodes, SignCodes, perplexity
from stochastic_layers.diagnostics import gradient_statistics, preserved

# Codes


def test_nearest_codes_are_those_of_brute_force():
    book = Codebook(4, 33).double()
    x = 3 * torch.randn(5, 200, 4, dtype=torch.float64)
    assert torch.equal(book.indices(x), torch.cdist(x, book.vectors).argmin(-1))
    assert torch.equal(book.decode(book.indices(x)), book.vectors[torch.cdist(x, book.vectors).argmin(-1)])


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_an_offset_of_embeddings_and_codes_does_not_hide_which_code_is_nearest(offset):
    book = Codebook(64, 128)
    book.vectors += offset
    x = offset + torch.randn(1000, 64)
    nearest = torch.cdist(x.double(), book.vectors.double()).argmin(-1)
    assert torch.equal(book.indices(x), nearest)


@pytest.mark.parametrize("levels", [(2,), (3,), (4,), (8, 5, 5), (7, 6, 2)], ids=str)
def test_the_grid_has_exactly_its_levels_and_indices_and_codes_are_a_bijection(levels):
    codes = GridCodes(levels)
    every = torch.arange(codes.num_codes)
    table = codes.decode(every, torch.float64)
    assert len(table.unique(dim=0)) == math.prod(levels)
    x = torch.cat([torch.linspace(-60, 60, 4001), torch.linspace(-3, 3, 4001)]).double()
    x = x.unsqueeze(-1).expand(-1, len(levels))
    reached = codes.decode(codes.indices(x), torch.float64)
    for i, n in enumerate(levels):
        expected = (torch.arange(n, dtype=torch.float64) - n // 2) / (n // 2)
        assert torch.equal(reached[:, i].unique(), expected)
        assert torch.equal(table[:, i].unique(), expected)
        assert reached[:, i].diff()[:4000].min() >= 0  # monotone
    layer = sl.create("fsq", latent_dim=1, levels=levels).double()
    z = _grid_embedding(codes, table)
    assert torch.equal(layer.indices(z).squeeze(-1), every)


def _grid_embedding(codes, table):
    half = (codes.levels - 1) * (1 - 1e-3) / 2
    offset = 0.5 * (1 - codes.levels % 2)
    return ((table * (codes.levels // 2) + offset) / half).clamp(-0.9999, 0.9999).atanh() - (offset / half).tan()


def test_signs_and_indices_are_a_bijection():
    codes = SignCodes(5)
    every = torch.arange(32)
    assert torch.equal(codes.indices(codes.decode(every)), every)
    assert torch.equal(codes.decode(every).abs(), torch.ones(32, 5))
    large = SignCodes(62)
    assert int(large.indices(torch.ones(62))) == 2**62 - 1
    assert torch.equal(large.decode(torch.tensor(2**62 - 1)), torch.ones(62))


def test_perplexity_counts_codes_in_use():
    torch.testing.assert_close(float(perplexity(torch.tensor([0, 1, 2, 3, 7]))), 5.0)
    torch.testing.assert_close(float(perplexity(torch.tensor([[4, 4], [4, 4]]))), 1.0)
    assert build("residual_vq").perplexity(torch.randn(30, 6)).shape == (3,)
    layer = build("lfq", latent_dim=1)
    torch.testing.assert_close(float(layer.perplexity(layer.decode(torch.arange(8).view(8, 1)))), 8.0)


# Codebooks


def test_the_first_batch_starts_the_codebook_at_a_fixed_point_of_k_means():
    _, x = blobs(spread=1.0)
    book = Codebook(2, 4).double()
    book.initialize(x)
    assert bool(book.initialized)
    for k in range(4):
        mine = x[torch.cdist(x, book.vectors).argmin(-1) == k]
        torch.testing.assert_close(book.vectors[k], mine.mean(0), rtol=0, atol=0.15)  # ten steps of Lloyd
        assert float(book.counts[k]) == pytest.approx(len(mine), abs=12)
    before = book.vectors.clone()
    book.initialize(x + 1)
    assert torch.equal(book.vectors, before)  # once


def test_moving_averages_end_at_the_centroids_of_k_means():
    _, x = blobs(spread=0.8)
    layer = sl.create("vq", latent_dim=1, code_dim=2, num_codes=5, decay=0.8).double()
    for _ in range(400):
        layer.sample(x)
    indices = layer.indices(x).squeeze(-1)
    assert indices.unique().numel() == 5
    for k in range(5):
        torch.testing.assert_close(layer.codes.vectors[k], x[indices == k].mean(0))
        torch.testing.assert_close(layer.codes.counts[k], (indices == k).sum().double())


def test_one_update_is_the_formula_with_codes_from_before():
    book = Codebook(2, 3, decay=0.9, revive_below=0.0).double()
    book.initialize(torch.randn(30, 2, dtype=torch.float64))
    vectors, counts, sums = (t.clone() for t in (book.vectors, book.counts, book.sums))
    x = torch.randn(11, 2, dtype=torch.float64) + 1
    indices = book.indices(x)
    book.update(x, indices)
    one_hot = nn.functional.one_hot(indices, 3).double()
    counts_after = 0.9 * counts + 0.1 * one_hot.sum(0)
    sums_after = 0.9 * sums + 0.1 * one_hot.T @ x
    torch.testing.assert_close(book.counts, counts_after)
    torch.testing.assert_close(book.sums, sums_after)
    used = one_hot.sum(0) > 0
    torch.testing.assert_close(book.vectors[used], (sums_after / counts_after[:, None])[used])
    assert torch.equal(book.vectors[~used], vectors[~used])


def test_dead_codes_are_moved_to_rows_of_the_batch_and_living_ones_are_not():
    book = Codebook(2, 5, decay=0.5, revive_below=0.05).double()
    _, x = blobs()
    book.initialize(x)
    with torch.no_grad():
        book.vectors[0] = 1000.0
        book.sums[0] = 1000.0 * book.counts[0]
    for _ in range(12):
        alive = book.vectors[1:].clone()
        book.update(x, book.indices(x))
        if float(book.vectors[0, 0]) != 1000.0:
            break
    assert (x == book.vectors[0]).all(-1).any()  # a row of the batch
    torch.testing.assert_close(book.vectors[1:], alive, rtol=0, atol=3.0)
    assert not (x == book.vectors[1]).all(-1).any()
    frozen = Codebook(2, 5, decay=0.5, revive_below=0.0).double()
    frozen.initialize(x)
    with torch.no_grad():
        frozen.vectors[0] = 1000.0
    for _ in range(50):
        frozen.update(x, frozen.indices(x))
    assert torch.equal(frozen.vectors[0], torch.full((2,), 1000.0).double())


def test_more_codes_than_rows_start_and_come_alive_later():
    layer = sl.create("vq", latent_dim=1, code_dim=2, num_codes=64).double()
    layer.sample(torch.randn(5, 2, dtype=torch.float64))
    for _ in range(60):
        layer.sample(torch.randn(200, 2, dtype=torch.float64))
    assert layer.codes.vectors.isfinite().all()
    used = len(layer.indices(torch.randn(2000, 2).double()).unique())
    assert used > 40


@pytest.mark.parametrize("name", LEARNED)
def test_codebooks_are_frozen_in_evaluation_and_without_gradients(name):
    layer = build(name)
    params = embeddings(layer, 50)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer(params)
    layer.eval()(params)
    layer.train().sample(torch.zeros(0, layer.in_features).double())  # nor by an empty batch
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    with preserved(layer):
        layer.sample(params)
        assert any(not torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    gradient_statistics(layer, params, lambda z: z.square().sum(-1), num_draws=3)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("name", LEARNED)
def test_a_resumed_codebook_goes_on_exactly(name):
    batches = [torch.randn(30, 6, dtype=torch.float64) for _ in range(4)]
    layer = build(name, decay=0.5, revive_below=0.3)
    for batch in batches[:2]:
        layer.sample(batch)
    resumed = build(name, decay=0.5, revive_below=0.3)
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
    for one in (layer, resumed):
        torch.manual_seed(3)
        for batch in batches[2:]:
            one.sample(batch)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in layer.state_dict().items())
    clone = copy.deepcopy(layer)
    assert clone.family.codes is clone.codes and clone.codes is not layer.codes


def test_functional_call_replaces_the_codebook():
    layer = build("vq").eval()
    state = {k: torch.zeros_like(v) for k, v in layer.state_dict().items()}
    assert torch.equal(functional_call(layer, state, (embeddings(layer, 4),)), torch.zeros(4, 6).double())


# Residual and lookup-free


def test_the_error_of_a_residual_quantiser_falls_with_depth():
    torch.manual_seed(1)
    x = torch.randn(600, 4, dtype=torch.float64)
    layer = sl.create("residual_vq", latent_dim=1, code_dim=4, num_codes=8, depth=5, decay=0.9).double()
    for _ in range(60):
        layer.sample(x)
    partial = layer.codes.partial_sums(layer.indices(x).squeeze(1))
    errors = (x.unsqueeze(1) - partial).square().sum(-1).mean(0)
    assert (errors[1:] < 0.85 * errors[:-1]).all(), errors
    assert torch.equal(partial[:, -1], layer.eval()(x))


def test_each_residual_stage_learns_from_what_the_stages_before_left():
    layer = build("residual_vq", latent_dim=1, revive_below=0.0, decay=0.9)
    x = embeddings(layer, 40)
    layer.codes.initialize(x)
    stages = [copy.deepcopy(stage) for stage in layer.codes.stages]
    sample = layer.sample(x)
    left, distance = x, 0.0
    for stage, updated in zip(stages, layer.codes.stages, strict=True):
        index = torch.cdist(left, stage.vectors).argmin(-1)
        after = left - stage.vectors[index]
        stage.update(left, index)
        torch.testing.assert_close(updated.vectors, stage.vectors)
        left, distance = after, distance + after.square().sum(-1)
    torch.testing.assert_close(sample.aux["commitment"], 0.25 * distance)
    torch.testing.assert_close(sample.z[0], x - left)


@pytest.mark.parametrize("code_dim", [3, 10])
def test_the_entropy_penalty_is_that_of_the_soft_assignment(code_dim):
    layer = build("lfq", code_dim=code_dim, commitment_weight=0.0, entropy_weight=0.6, temperature=1.7)
    params = embeddings(layer, 7).requires_grad_()
    aux = layer.sample(params).aux["entropy"]
    codes = layer.codes.decode(torch.arange(2**code_dim), torch.float64)
    soft = (-torch.cdist(params.view(-1, code_dim), codes).square() / 1.7).softmax(-1)  # [14, K]
    sure = torch.special.entr(soft).sum(-1).view(7, 2).sum(-1)
    if code_dim == 3:
        spread = torch.special.entr(soft.mean(0)).sum()
    else:  # blocks of 8 and 2 bits; bit i of the index is coordinate i
        joint = soft.mean(0).view(4, 256)
        spread = torch.special.entr(joint.sum(0)).sum() + torch.special.entr(joint.sum(1)).sum()
        assert spread > torch.special.entr(soft.mean(0)).sum()  # an upper bound
    expected = 0.6 * (sure - 2 * spread)
    torch.testing.assert_close(aux, expected)
    (a,) = torch.autograd.grad(aux.mean(), params)
    (b,) = torch.autograd.grad(expected.mean(), params)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("entropy_weight", [1.0, 0.0])
def test_the_entropy_penalty_and_nothing_else_spreads_a_crowded_batch_over_the_codes(entropy_weight):
    layer = sl.create("lfq", latent_dim=1, code_dim=3, entropy_weight=entropy_weight)
    params = (0.3 + 0.2 * torch.randn(64, 3)).requires_grad_()
    before = float(layer.perplexity(params))
    assert before < 3
    optimizer = torch.optim.Adam([params], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        sample = layer.sample(params)
        sample.surrogate((0 * sample.z).sum(-1)).mean().backward()
        optimizer.step()
    after = float(layer.perplexity(params))
    assert after > before + 1 if entropy_weight else after == before
