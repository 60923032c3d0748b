"""The flow layer: its density is one, its draws follow it, and its gradient is that of the integral."""

import copy
import subprocess
import sys

import pytest
import torch

import stochastic_layers as sl
from stochastic_layers.diagnostics import gradient_statistics


def build(**options):
    pytest.importorskip("zuko", reason="needs the extra flows")
    return sl.create("flow", **{"latent_dim": 2, "hidden_features": [16], **options}).double()


def params_of(layer, *batch):
    return 0.5 * torch.randn(*batch, layer.in_features, dtype=torch.float64)


def grid(dim):
    """A lattice that covers the law: nodes ``[N, dim]`` and the volume of a cell."""
    line = torch.linspace(-10, 10, 8001 if dim == 1 else 161, dtype=torch.float64)
    return torch.cartesian_prod(*[line] * dim).view(-1, dim), float(line[1] - line[0]) ** dim


OPTIONS = [{}, {"transform": "affine"}, {"coupling": False}, {"context_features": 0}]
# a spline's density has kinks, which a lattice resolves in one dimension only
INTEGRABLE = [
    {"latent_dim": 1},
    {"transform": "affine"},
    {"transform": "affine", "coupling": False},
]


@pytest.mark.parametrize("options", INTEGRABLE, ids=str)
def test_density_integrates_to_one_and_gives_the_moments_of_the_draws(options):
    layer = build(**options, num_samples=40_000)
    params = params_of(layer)
    z, cell = grid(layer.latent_dim)
    density = layer.distribution(params).log_prob(z).exp().detach() * cell
    assert float(density.sum()) == pytest.approx(1.0, abs=1e-4)
    draws = layer.sample(params).z.detach()
    for values, exact in ((draws, z), (draws.square(), z.square())):
        error = values.std(0) / 200
        assert bool(((values.mean(0) - (density.unsqueeze(-1) * exact).sum(0)).abs() < 5 * error).all())


@pytest.mark.parametrize("options", INTEGRABLE, ids=str)
def test_gradient_of_the_params_is_that_of_the_integral(options):
    layer = build(**options)
    params = params_of(layer)
    weight = torch.tensor([1.0, -0.5], dtype=torch.float64)[: layer.latent_dim]
    cost = lambda z: (z @ weight - 0.3) ** 2  # noqa: E731
    leaf, (z, cell) = params.clone().requires_grad_(), grid(layer.latent_dim)
    value = (layer.distribution(leaf).log_prob(z).exp() * cell * cost(z)).sum()
    (exact,) = torch.autograd.grad(value, leaf)
    statistics = gradient_statistics(layer, params, cost, num_draws=100_000, chunk_size=20_000)
    error = (statistics.variance / statistics.num_draws).sqrt()
    assert 8 * float(error.norm()) < 0.1 * float(exact.norm())  # a bias of 10 % would be seen
    assert bool(((statistics.mean - exact).abs() < 5 * error + 1e-3 * exact.norm()).all())  # the lattice's own error


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_density_is_that_of_the_noise_over_the_volume_it_is_stretched_to(options):
    q = (layer := build(**options)).distribution(params_of(layer))
    for noise in torch.randn(5, 2, dtype=torch.float64):
        stretch = torch.linalg.slogdet(torch.autograd.functional.jacobian(q.push, noise)).logabsdet
        expected = torch.distributions.Normal(0, 1).log_prob(noise).sum() - stretch
        torch.testing.assert_close(q.log_prob(q.push(noise)), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_log_prob_of_the_draws_is_that_of_the_law(options):
    layer = build(**options, num_samples=5)
    sample = layer.sample(params_of(layer, 4))
    torch.testing.assert_close(sample.log_prob, sample.q.log_prob(sample.z), rtol=1e-6, atol=1e-6)
    assert sample.log_prob.shape == (5, 4)
    ours, theirs = (
        torch.autograd.grad(log_q.sum(), list(layer.parameters()), retain_graph=True)
        for log_q in (sample.log_prob, sample.q.log_prob(sample.z))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_params_hold_a_context_of_the_size_that_is_asked_for():
    assert [build(**options).in_features for options in ({}, {"context_features": 5}, {"context_features": 0})] == [
        6,
        9,
        4,
    ]


def test_gradient_reaches_the_network_and_the_entropy_term():
    layer = build()
    sample = layer.sample(params_of(layer, 8).requires_grad_())
    sample.surrogate(sample.z.square().sum(-1) + sample.log_prob).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    assert len(list(layer.parameters())) > 0


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)], ids=str)
def test_any_number_of_batch_dimensions(batch):
    layer = build(num_samples=3, num_transforms=1)
    params = params_of(layer, *batch).requires_grad_()
    sample = layer.sample(params)
    assert sample.z.shape == (3, *batch, 2) and layer.mode(params).shape == (*batch, 2)
    assert sample.log_prob.shape == (3, *batch)
    sample.surrogate(sample.z.sum(-1)).sum().backward()
    assert layer.eval().sample(params).z.requires_grad is False


def test_copies_have_networks_of_their_own():
    layer = build()
    other = copy.deepcopy(layer)
    assert other.family.network is other.network and other.network is not layer.network
    other.load_state_dict(layer.state_dict())
    params, z = params_of(layer, 4), torch.randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(other.distribution(params).log_prob(z), layer.distribution(params).log_prob(z))


def test_standard_prior_is_the_standard_normal():
    prior = build().family.standard()
    assert prior.event_shape == (2,) and float(prior.log_prob(torch.zeros(2))) == pytest.approx(-1.8379, abs=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, while it traces zuko
def test_compiles_without_fullgraph():
    torch._dynamo.reset()
    layer = build()
    params = params_of(layer, 4).requires_grad_()

    def loss(params):
        sample = layer.sample(params)
        return sample.surrogate(sample.z.square().sum(-1)).sum()

    torch.compile(loss, backend="aot_eager")(params).backward()
    assert bool((params.grad != 0).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "planar"}, "needed transform"),
        ({"num_transforms": 0}, "num_transforms >= 1"),
        ({"hidden_features": [0]}, "positive hidden_features"),
        ({"context_features": -1}, "context_features >= 0"),
        ({"latent_dim": 0}, "latent_dim >= 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    pytest.importorskip("zuko", reason="needs the extra flows")
    with pytest.raises(ValueError, match=message):
        sl.create("flow", **{"latent_dim": 2, **options})


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_import_of_zuko_leaves_the_argument_checks_of_torch_alone():
    pytest.importorskip("zuko", reason="needs the extra flows")
    assert (
        run(
            "import sys, stochastic_layers as sl; from torch.distributions import Distribution as D\n"
            "before = D._validate_args, 'zuko' in sys.modules; sl.create('flow', latent_dim=2)\n"
            "print(before, D._validate_args)"
        )
        == "(True, False) True"
    )


def test_without_zuko_the_error_names_the_extra():
    message = run(
        "import sys; sys.modules['zuko'] = None\n"
        "import stochastic_layers as sl\n"
        "try: sl.create('flow', latent_dim=2)\n"
        "except ImportError as error: print(error)"
    )
    assert "stochastic-layers[flows]" in message and "flow" in sl.list_layers()
