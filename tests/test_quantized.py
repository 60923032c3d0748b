"""Quantisers: the contract, stand-in gradients against explicit matrices, a toy learned."""

import copy
import math

import pytest
import torch
from quantizers import LEARNED, NAMES, SMALL, blobs, build, embeddings
from torch import nn
from torch.distributions import kl_divergence

import stochastic_layers as sl
from stochastic_layers.codes import GridCodes
from stochastic_layers.testing import PolynomialCost, enumerate_outcomes, exact_value

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
    params = embeddings(layer, 40).requires_grad_()  # fewer leave the last stage nothing to quantise
    layer.sample(params.detach())
    cost = PolynomialCost("quadratic", layer.out_features)
    (stand_in,) = torch.autograd.grad(layer.sample(params).surrogate(cost(layer.sample(params).z)).sum(), params)
    near = params.detach() + 1e-9
    assert torch.equal(layer.eval()(params.detach()), layer(near))  # z is piecewise constant: the true gradient is zero
    assert float(stand_in.norm()) > 0.1  # so that all of this is bias


@pytest.mark.parametrize("name", NAMES)
def test_the_prior_is_where_its_codes_are(name):
    prior = build(name).to("meta").family.standard()
    assert prior.entropy().device.type == prior.sample().device.type == "meta"


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
        ("fsq", {"levels": (2,) * 63}, "2\\*\\*63"),
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", ["one too large", -1])
def test_a_number_that_is_no_code_s_is_not_decoded_as_another_s(name, number):
    layer = build(name)
    indices = layer.indices(embeddings(layer, 5))
    indices.view(-1)[-1] = layer.num_codes if number == "one too large" else number
    with pytest.raises(ValueError, match=f"needed indices from 0 to {layer.num_codes - 1}, got"):
        layer.decode(indices)


def test_truth_values_are_no_indices():
    layer = build("lfq")
    with pytest.raises(ValueError, match="needed integer indices"):
        layer.decode(layer.indices(embeddings(layer, 5)) > 0)


@pytest.mark.parametrize("name", ["lfq", "bsq"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_set_is_checked(name, temperature):
    layer = build(name, temperature=0.5)
    with pytest.raises(ValueError, match="needed temperature > 0"):
        layer.temperature = temperature
    assert layer.temperature == 0.5


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
