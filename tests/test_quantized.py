"""Quantisers: codes against brute force, stand-in gradients against explicit matrices, codebooks against k-means."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence
from torch.func import functional_call

import stochastic_layers as sl
from stochastic_layers.codebooks import Codebook
from stochastic_layers.codes import GridCodes, SignCodes, perplexity
from stochastic_layers.diagnostics import gradient_statistics, preserved
from stochastic_layers.testing import PolynomialCost, enumerate_outcomes, exact_value

SMALL = {
    "vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 7},
    "rotation_trick": {"latent_dim": 2, "code_dim": 3, "num_codes": 7},
    "residual_vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 7, "depth": 3},
    "fsq": {"latent_dim": 2, "levels": (4, 3, 5)},
    "lfq": {"latent_dim": 2, "code_dim": 3},
    "bsq": {"latent_dim": 2, "code_dim": 3},
    "simvq": {"latent_dim": 2, "code_dim": 3, "num_codes": 7},
    "diveq": {"latent_dim": 2, "code_dim": 3, "num_codes": 7},
}
NAMES = sorted(SMALL)
LEARNED = ("vq", "rotation_trick", "residual_vq", "diveq")


def build(name, **options):
    return sl.create(name, **{**SMALL[name], **options}).double()


def embeddings(layer, *batch):
    return torch.randn(*batch, layer.in_features, dtype=torch.float64)


# Contract


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)], ids=str)
def test_shapes_for_every_batch(name, batch):
    layer = build(name)
    params = embeddings(layer, *batch).requires_grad_()
    sample = layer.sample(params)
    assert sample.z.shape == (1, *batch, layer.out_features)
    assert sample.log_prob.shape == (1, *batch)
    assert layer(params).shape == (*batch, layer.out_features)
    assert layer.indices(params).shape == (*batch, 2, *([3] if name == "residual_vq" else []))
    loss = sample.surrogate(sample.z.square().sum(-1))
    loss.sum().backward()
    assert loss.shape == batch and params.grad.shape == params.shape


@pytest.mark.parametrize("name", NAMES)
def test_training_evaluation_mode_law_and_decoded_indices_agree_exactly(name):
    layer = build(name, **({"revive_below": 0.0, "decay": 0.999999} if name in LEARNED else {}))
    params = embeddings(layer, 40)
    layer.sample(params)  # starts the codebook
    layer.eval()
    trained = copy.deepcopy(layer).train().sample(params.clone().requires_grad_())
    z = layer(params)
    assert torch.equal(trained.z[0], z)
    assert torch.equal(layer.mode(params), z)
    assert torch.equal(layer.distribution(params).mean, z)
    torch.testing.assert_close(layer.decode(layer.indices(params)).double(), z, rtol=0, atol=1e-7)
    assert torch.equal(trained.log_prob, torch.zeros(1, 40, dtype=torch.float64))
    assert torch.equal(layer.distribution(params).log_prob(z + 1e-9), torch.full((40,), -math.inf).double())


@pytest.mark.parametrize("name", NAMES)
def test_kl_to_the_uniform_prior_is_the_log_of_the_number_of_codes(name):
    layer = build(name)
    prior = layer.family.standard()
    expected = 2 * {"fsq": math.log(60), "lfq": math.log(8), "bsq": math.log(8), "residual_vq": 3 * math.log(7)}.get(
        name, math.log(7)
    )
    q = layer.distribution(embeddings(layer, 5))
    torch.testing.assert_close(kl_divergence(q, prior.expand((5,))), torch.full((5,), expected).double())
    torch.testing.assert_close(float(prior.entropy()), expected)
    assert prior.batch_shape == () and prior.event_shape == q.event_shape
    z = prior.sample((4,)).double()
    assert z.shape == (4, layer.out_features)
    if name != "residual_vq":  # its codes are sums, of which the greedy choice need not find the same one
        torch.testing.assert_close(layer.mode(_embedding_of(layer, z)), z, rtol=0, atol=1e-7)


def _embedding_of(layer, z):
    if not isinstance(layer.codes, GridCodes):
        return z
    grid = layer.codes  # a tanh inside each cell: the inverse of the bound at the level
    half = (grid.levels - 1) * (1 - 1e-3) / 2
    offset = 0.5 * (1 - grid.levels % 2)
    level = z.view(-1, 2, 3) * (grid.levels // 2)
    return (((level + offset) / half).clamp(-0.9999, 0.9999).atanh() - (offset / half).tan()).flatten(-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_a_stand_in_for_one_that_is_zero(name):
    layer = build(name)
    params = embeddings(layer, 6).requires_grad_()
    layer.sample(params.detach())
    cost = PolynomialCost("quadratic", layer.out_features)
    (stand_in,) = torch.autograd.grad(layer.sample(params).surrogate(cost(layer.sample(params).z)).sum(), params)
    near = params.detach() + 1e-9
    assert torch.equal(layer.eval()(params.detach()), layer(near))  # z is piecewise constant: the true gradient is zero
    assert float(stand_in.norm()) > 0.1  # so that all of this is bias


def test_enumeration_sums_a_point_mass_to_the_value_at_the_code():
    layer = build("lfq", code_dim=2)
    params = embeddings(layer, 4)
    assert enumerate_outcomes(layer).shape == (16, 4)
    cost = PolynomialCost("cubic", 4)
    torch.testing.assert_close(exact_value(layer, params, cost), cost(layer.eval()(params)))
    assert len(enumerate_outcomes(build("residual_vq", latent_dim=1, depth=2))) == 49


@pytest.mark.parametrize("name", NAMES)
def test_extreme_embeddings_stay_finite(name):
    layer = build(name).float()
    for scale in (1e4, 1e-30, 0.0):
        params = (scale * torch.randn(20, layer.in_features)).requires_grad_()
        sample = layer.sample(params)
        sample.surrogate(sample.z.sum(-1)).mean().backward()
        assert sample.z.isfinite().all() and params.grad.isfinite().all()
    with pytest.raises(ValueError, match="magnitude"):
        layer(torch.full((1, layer.in_features), 1e20))


@pytest.mark.parametrize("name", NAMES)
def test_sample_cost_and_surrogate_compile_into_one_graph(name):
    layer = sl.create(name, **SMALL[name])
    twin = copy.deepcopy(layer)

    def step(layer, params):
        sample = layer.sample(params)
        return sample.surrogate((sample.z - 0.3).square().sum(-1)).mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        params = torch.randn(20, layer.in_features, generator=torch.Generator().manual_seed(seed))
        a, b = params.clone().requires_grad_(), params.clone().requires_grad_()
        torch.manual_seed(seed)
        expected = step(twin, a)
        torch.manual_seed(seed)
        got = compiled(layer, b)
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(b.grad, a.grad)
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


def test_autocast_does_not_reach_the_codebook():
    layer = sl.create("vq", **SMALL["vq"])
    params = torch.randn(50, layer.in_features)
    layer.sample(params)
    layer.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(params)
        coarse = layer(params.bfloat16())
    assert torch.equal(z, layer(params)) and z.dtype == torch.float32
    assert coarse.dtype == torch.bfloat16
    assert torch.equal(coarse, layer(params.bfloat16().float()).bfloat16())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vq", {"num_codes": 1}, "num_codes"),
        ("vq", {"code_dim": 0}, "code_dim"),
        ("vq", {"decay": 1.0}, "decay"),
        ("vq", {"revive_below": 1.0}, "revive_below"),
        ("vq", {"commitment_weight": -1.0}, "commitment_weight"),
        ("vq", {"family": "bernoulli"}, "supports the families"),
        ("vq", {"latent_dim": 0}, "latent_dim"),
        ("residual_vq", {"depth": 0}, "depth"),
        ("fsq", {"levels": ()}, "levels"),
        ("fsq", {"levels": (3, 1)}, "levels"),
        ("fsq", {"levels": (1000,) * 30}, "2\\*\\*63"),
        ("lfq", {"code_dim": 63}, "code_dim"),
        ("lfq", {"temperature": 0.0}, "temperature"),
        ("lfq", {"entropy_weight": math.nan}, "entropy_weight"),
    ],
)
def test_bad_options_are_refused_at_construction(name, options, message):
    with pytest.raises(ValueError, match=message):
        sl.create(name, **{**SMALL[name], **options})


def test_what_is_not_an_index_is_refused():
    layer = build("vq")
    for bad in (torch.zeros(5, 2), torch.zeros(5, 3, dtype=torch.long), torch.tensor(1)):
        with pytest.raises(ValueError, match="indices"):
            layer.decode(bad)


# Gradients


@pytest.mark.parametrize("name", ["vq", "residual_vq", "lfq"])
def test_the_straight_through_gradient_is_the_identity(name):
    layer = build(name, commitment_weight=0.0, **({"entropy_weight": 0.0} if name == "lfq" else {}))
    params = embeddings(layer, 5).requires_grad_()
    weights = torch.randn(5, layer.out_features, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((layer(params) * weights).sum(), params)
    assert torch.equal(gradient, weights)


def test_the_gradient_of_the_rotation_trick_is_that_of_the_explicit_matrix():
    layer = build("rotation_trick", commitment_weight=0.0)
    layer.sample(embeddings(layer, 50))
    params = embeddings(layer, 9).requires_grad_()
    z = layer(params)
    upstream = torch.randn_like(z)
    (gradient,) = torch.autograd.grad(z, params, upstream)
    eye = torch.eye(3, dtype=torch.float64)
    for x, code, g, got in zip(
        *(t.detach().view(-1, 3) for t in (params, z, upstream)), gradient.view(-1, 3), strict=True
    ):
        a, b = x / x.norm(), code / code.norm()
        # the rotation in the plane of a and b, built from its angle rather than from reflections
        cosine = a @ b
        side = (b - cosine * a) / (b - cosine * a).norm()
        sine = b @ side
        plane = torch.stack([a, side], 1)
        turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
        rotation = eye - plane @ plane.T + plane @ turn @ plane.T
        matrix = rotation * code.norm() / x.norm()
        torch.testing.assert_close(matrix @ x, code)
        torch.testing.assert_close(got, matrix.T @ g)


def test_the_rotation_trick_survives_opposite_and_zero_embeddings():
    layer = build("rotation_trick", latent_dim=1, commitment_weight=0.0).train()
    with torch.no_grad():
        layer.codes.vectors.fill_(1.0)
        layer.codes.initialized.fill_(True)
    params = torch.tensor([[-2.0, -2.0, -2.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(params), params, torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(gradient[0], torch.full((3,), -0.5).double())  # |z|/|x| = 1/2, and the axis is flipped
    torch.testing.assert_close(gradient[1], torch.ones(3).double())


def test_the_gradient_of_fsq_is_the_slope_of_the_tanh():
    layer = build("fsq")
    params = embeddings(layer, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(params).sum(), params)
    half = torch.tensor([1.4985, 0.999, 1.998], dtype=torch.float64)
    shift = torch.tensor([math.tan(0.5 / 1.4985), 0.0, 0.0], dtype=torch.float64)
    expected = (1 - torch.tanh(params.detach().view(-1, 3) + shift) ** 2) * half / torch.tensor([2, 1, 2])
    torch.testing.assert_close(gradient.view(-1, 3), expected)


def test_the_surrogate_trains_the_commitment_loss():
    layer = build("vq", commitment_weight=0.7)
    params = embeddings(layer, 5).requires_grad_()
    sample = layer.sample(params)
    loss = sample.surrogate((sample.z * 0).sum(-1) + 2.0)
    assert torch.equal(loss, torch.full((5,), 2.0).double())  # the value is the cost
    (gradient,) = torch.autograd.grad(loss.mean(), params)
    torch.testing.assert_close(gradient, 2 * 0.7 * (params - sample.z[0]).detach() / 5)
    torch.testing.assert_close(sample.aux["commitment"], 0.7 * (params - sample.z[0]).square().sum(-1).detach())


@pytest.mark.parametrize("name", ["vq", "residual_vq", "lfq"])
def test_a_plain_call_has_the_gradient_of_capture_and_surrogate(name):
    layer = build(name)
    twin = copy.deepcopy(layer)
    params = embeddings(layer, 6).requires_grad_()
    torch.manual_seed(0)
    plain = layer(params)
    torch.manual_seed(0)
    with sl.capture() as samples:
        captured = twin(params)
    assert torch.equal(plain, captured)
    (a,) = torch.autograd.grad(plain.pow(3).sum(-1).mean(), params)
    (b,) = torch.autograd.grad(sl.surrogate(captured.pow(3).sum(-1), samples).mean(), params)
    torch.testing.assert_close(a, b)
    (bare,) = torch.autograd.grad(captured.pow(3).sum(-1).mean(), params)
    assert not torch.allclose(a, bare)  # the auxiliary loss is there
    with torch.no_grad():
        assert not layer(params).requires_grad


# Codes


def test_nearest_codes_are_those_of_brute_force():
    book = Codebook(4, 33).double()
    x = 3 * torch.randn(5, 200, 4, dtype=torch.float64)
    assert torch.equal(book.indices(x), torch.cdist(x, book.vectors).argmin(-1))
    assert torch.equal(book.decode(book.indices(x)), book.vectors[torch.cdist(x, book.vectors).argmin(-1)])


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


def blobs(n=40, spread=0.05):
    centers = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0], [3.0, 3.0]], dtype=torch.float64)
    return centers, (centers.repeat_interleave(n, 0) + spread * torch.randn(5 * n, 2, dtype=torch.float64))


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


# Training


@pytest.mark.parametrize("name", NAMES)
def test_an_autoencoder_learns_a_toy(name):
    torch.manual_seed(0)
    options = {"fsq": {"levels": (4, 4)}, "lfq": {"code_dim": 4}, "bsq": {"code_dim": 4}}.get(
        name, {"code_dim": 2, "num_codes": 16}
    )
    layer = sl.create(name, latent_dim=1, **options)
    encoder, decoder = (
        nn.Linear(2, layer.in_features),
        nn.Sequential(nn.Linear(layer.out_features, 32), nn.ReLU(), nn.Linear(32, 2)),
    )
    _, x = blobs(n=20, spread=0.1)
    x = x.float() / 4
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        sample = layer.sample(encoder(x))
        sample.surrogate((decoder(sample.z) - x).square().sum(-1)).mean().backward()
        optimizer.step()
    layer.eval()
    error = float((decoder(layer(encoder(x))) - x).detach().square().sum(-1).mean())
    assert error < 0.1 * float((x - x.mean(0)).square().sum(-1).mean()), error
    assert float(layer.perplexity(encoder(x)).max()) > 3
