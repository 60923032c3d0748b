"""Pathwise layers: the gradient is that of the integral, for every family, shape and size of params."""

import copy
import math

import pytest
import torch
from pathwise_problems import FAMILIES, build, params_of
from scipy import stats
from torch.distributions import kl_divergence

import stochastic_layers as sl
from stochastic_layers.families import create_family
from stochastic_layers.gaussian_families import LowRankGaussianFamily
from stochastic_layers.testing import PolynomialCost, check_mean


@pytest.mark.parametrize("kind", ["quadratic", "cubic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_the_encoder_is_that_of_the_integral(family, kind):
    layer = build(family)
    check_mean(layer, params_of(layer), PolynomialCost(kind, layer.out_features))


@pytest.mark.parametrize("of", ["decoder", "value"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gaussian"])
def test_gradient_of_the_decoder_and_the_value_are_exact_in_the_mean(family, of):
    layer = build(family)
    check_mean(layer, params_of(layer, seed=2), PolynomialCost("quadratic", layer.out_features), of=of)


def test_the_check_sees_a_scale_that_gets_no_gradient():
    class Planted(sl.Pathwise):
        def draw(self, params, context):
            loc, log_scale = params.chunk(2, -1)
            return super().draw(torch.cat([loc, log_scale.detach()], -1), context)

    layer = Planted(2, family="laplace").double()
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params_of(layer), PolynomialCost("quadratic", 2))


def test_gamma_draws_have_the_implicit_derivative():
    """With z = F^-1(u; a) at fixed u, dz/da = -(dF/da) / q: against finite differences of scipy's quantile function."""
    layer = build("gamma", latent_dim=1, num_samples=200)
    params = torch.tensor([0.9, 0.0], dtype=torch.float64, requires_grad=True)
    z = layer.sample(params).z.squeeze(-1)
    ours = torch.stack([torch.autograd.grad(v, params, retain_graph=True)[0][0] for v in z])
    raw = params[0].item()
    softplus, step = math.log1p(math.exp(raw)) + 0.1, 1e-5
    u = stats.gamma.cdf(z.detach(), softplus)
    slope = (stats.gamma.ppf(u, softplus + step) - stats.gamma.ppf(u, softplus - step)) / (2 * step)
    expected = torch.from_numpy(slope) / (1 + math.exp(-raw))
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-6)  # torch's series are good to three digits


@pytest.mark.parametrize("value", [-1e4, -79.0, -39.0, -5.0, 0.0, 5.0, 39.0, 79.0, 1e4])
@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_params_are_finite_or_refused_in_words(family, value):
    layer = build(family, num_samples=64).float()
    params = torch.full((8, layer.in_features), value, requires_grad=True)
    if family == "gaussian_full":  # the triangle may be any number; here one that leaves the covariance regular
        params = torch.cat([params[:, :4].detach(), torch.zeros(8, 1)], -1).requires_grad_()
    try:
        sample = layer.sample(params)
    except ValueError as error:
        assert "needed" in str(error) and abs(value) >= 5 and family in FAMILIES[:8]
        return
    sample.surrogate(sample.z.sum(-1)).sum().backward()
    for name, tensor in (("z", sample.z), ("log_prob", sample.log_prob), ("gradient", params.grad)):
        assert bool(torch.isfinite(tensor).all()), name


def test_concentrations_that_float32_cannot_hold_are_refused():
    for family in ("gamma", "beta", "kumaraswamy", "dirichlet", "power_spherical", "student_t"):
        layer = build(family).float()
        params = torch.zeros(3, layer.in_features)
        params[0, 0 if family != "student_t" and family != "power_spherical" else -1] = 1e6
        with pytest.raises(ValueError, match="raw_concentration"):
            layer.sample(params)
        layer.sample(-params)  # a small concentration, which is at least 0.1


def test_power_spherical_accepts_any_direction():
    layer = sl.create("pathwise", family="power_spherical", latent_dim=4)
    sizes = [torch.full((4,), size) for size in (1e17, 1e-30)]  # the square of the second underflows
    directions = torch.stack([torch.zeros(4), torch.eye(4)[0], -torch.eye(4)[0], *sizes])
    params = torch.cat([directions, torch.full((5, 1), 50.0)], -1).requires_grad_()
    z = layer(params)
    z.sum().backward()
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(5))
    assert bool(torch.isfinite(params.grad).all())
    assert bool((z * layer.mode(params)).sum(-1).min() > 0.5)  # the reflection carries the pole to the direction


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)], ids=str)
def test_any_number_of_batch_dimensions(family, batch):
    layer = build(family, num_samples=4)
    params = params_of(layer, batch=batch).requires_grad_()
    sample = layer.sample(params)
    cost = sample.z.square().sum(-1)
    assert sample.z.shape == (4, *batch, layer.out_features) and sample.log_prob.shape == (4, *batch)
    assert layer.mode(params).shape == (*batch, layer.out_features)
    assert not layer.family.sample(layer.distribution(params), 2).requires_grad
    sample.surrogate(cost + sample.log_prob).sum().backward()
    assert params.grad.shape == params.shape and bool(torch.isfinite(params.grad).all())


def test_full_gaussian_without_a_triangle_is_the_diagonal_gaussian():
    full, diagonal = build("gaussian_full", latent_dim=3), build("gaussian", latent_dim=3)
    params = params_of(diagonal)
    z = torch.randn(4, 2, 3, dtype=torch.float64)
    ours = full.distribution((*params.chunk(2, -1), torch.zeros(3, dtype=torch.float64))).log_prob(z)
    torch.testing.assert_close(ours, diagonal.distribution(params).log_prob(z))


def test_full_gaussian_fills_its_triangle_row_by_row():
    layer = build("gaussian_full", latent_dim=3)
    params = torch.arange(9.0, dtype=torch.float64) / 10
    factor = layer.distribution(params).scale_tril
    assert factor[1, 0] == 0.6 and factor[2].tolist() == [0.7, 0.8, pytest.approx(math.exp(0.25))]


def test_rank_is_an_option_of_the_family():
    layer = sl.create("pathwise", latent_dim=4, family={"name": "gaussian_low_rank", "rank": 2})
    assert isinstance(layer.family, LowRankGaussianFamily) and layer.in_features == 4 + 4 + 8
    q = layer.distribution(torch.randn(16))
    smallest = torch.linalg.eigvalsh(q.covariance_matrix - torch.diag(q._unbroadcasted_cov_diag))
    assert int((smallest > 1e-4).sum()) == 2
    with pytest.raises(ValueError, match="rank >= 1"):
        create_family({"name": "gaussian_low_rank", "rank": 0}, 4)
    with pytest.raises(ValueError, match="needed options of family 'laplace', got 'rank'; it has none"):
        create_family({"name": "laplace", "rank": 2}, 4)
    with pytest.raises(ValueError, match="supports the families"):
        sl.create("pathwise", latent_dim=4, family={"name": "gausian"})


def test_low_rank_density_keeps_its_digits_where_the_factor_is_far_above_the_diagonal():
    layer = sl.create("pathwise", latent_dim=5, family={"name": "gaussian_low_rank", "rank": 2}, num_samples=3)
    params = torch.randn(20, layer.in_features)
    params[:, 5:10] -= 14  # deviations of 1e-3 beside a factor of size 1
    sample = layer.sample(params)
    q = copy.deepcopy(layer).double().distribution(params.double())
    exact = torch.distributions.MultivariateNormal(q.mean, q.covariance_matrix).log_prob(sample.z.double())
    torch.testing.assert_close(sample.log_prob.double(), exact, rtol=0, atol=0.01)
    assert float((sample.q.log_prob(sample.z) - exact).abs().max()) > 1  # as torch computes it


def test_low_rank_overflow_is_looked_for_example_by_example():
    layer = sl.create("pathwise", latent_dim=1, family="gaussian_low_rank")
    large, small = torch.tensor([0.0, 0.0, 1e10]), torch.tensor([0.0, -40.0, 1.0])
    assert bool(torch.isfinite(layer.sample(torch.stack([large, small])).log_prob).all())
    with pytest.raises(ValueError, match="the inverse covariance overflows"):
        layer.sample(torch.tensor([0.0, -40.0, 1e10]))


@pytest.mark.parametrize("log_variance", [-39.0, -45.0, -60.0, -79.0])
@pytest.mark.parametrize("factor", [0.0, 1e-8, 1.0, 1e3])
def test_a_small_variance_beside_a_factor_has_finite_derivatives_or_is_refused(log_variance, factor):
    layer = sl.create("pathwise", latent_dim=2, family="gaussian_low_rank")
    params = torch.tensor([0.1, 0.2, log_variance, 0.0, factor, factor], requires_grad=True)
    try:
        sample = layer.sample(params)
    except ValueError as error:
        assert (
            log_variance < -40 or factor > 1
        ) and "the inverse covariance overflows in float32, or its derivative" in str(error)
        return
    for value in (kl_divergence(sample.q, layer.family.standard()), sample.log_prob.sum(), sample.z.sum()):
        assert bool(torch.isfinite(torch.autograd.grad(value, params, retain_graph=True)[0]).all())


def test_parts_may_be_passed_one_by_one():
    layer = sl.create("pathwise", latent_dim=3, family="gaussian_full")
    assert layer(tuple(torch.zeros(5, n) for n in (3, 3, 3))).shape == (5, 3)
    layer = sl.create("pathwise", latent_dim=3, family="power_spherical")
    assert layer((torch.randn(5, 3), torch.zeros(1))).shape == (5, 3)
    with pytest.raises(ValueError, match="n = \\(3, 1\\)"):
        layer((torch.randn(5, 3), torch.zeros(5, 2)))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (torch.int64, torch.float32, torch.float32),  # a loc of zeros that was written as integers
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_draws_of_parts_have_the_precision_that_holds_them_all(first, second, expected, training):
    layer = sl.create("gaussian", latent_dim=3).train(training)
    z = layer((torch.zeros(5, 3, dtype=first), torch.zeros(3, dtype=second)))
    assert z.dtype == expected
    assert bool((z != 0).any())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, on Dirichlet draws
@pytest.mark.parametrize("family", ["gaussian_full", "student_t", "dirichlet", "kumaraswamy", "power_spherical"])
def test_pathwise_compiles_to_one_graph(family):
    torch._dynamo.reset()
    layer = build(family).float()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(params):
        sample = layer.sample(params)
        return sample.surrogate(sample.z.square().sum(-1)).sum()

    params = params_of(layer).float().requires_grad_()
    loss(params).backward()
    assert bool((params.grad != 0).any() and torch.isfinite(params.grad).all())


def test_half_precision_params_give_half_precision_draws():
    for family in FAMILIES:
        layer = build(family).float()
        params = params_of(layer).bfloat16().requires_grad_()
        sample = layer.sample(params)
        sample.surrogate(sample.z.square().sum(-1)).sum().backward()
        assert sample.z.dtype == torch.bfloat16 and bool(torch.isfinite(params.grad).all())
