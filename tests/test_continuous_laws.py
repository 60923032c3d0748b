"""The laws of the continuous families: draws, densities, priors, KL and modes against scipy and integration."""

import math

import pytest
import torch
from pathwise_problems import FAMILIES, KS_DRAWS, KS_LIMIT, build, ks_distance, law, params_of
from scipy import stats
from torch.distributions import Independent, Normal, Uniform, kl_divergence

import stochastic_layers as sl
from stochastic_layers import distributions
from stochastic_layers.distributions import HypersphericalUniform, Logistic, PowerSpherical
from stochastic_layers.gaussian_families import GaussianFamily
from stochastic_layers.normal import DiagonalNormal, LogVarianceNormal
from stochastic_layers.testing import exact_value


def marginals(family, q):
    """(coordinate or function of z, distribution function) pairs that describe the law of one batch element."""
    b = law(q)
    if family in ("gaussian_full", "gaussian_low_rank"):
        direction = torch.tensor([1.0, -2.0], dtype=torch.float64)
        spread = (direction @ q.covariance_matrix @ direction).sqrt()
        mixed = stats.norm(direction @ q.mean, spread).cdf
        return [
            (lambda z: z[:, 0], stats.norm(q.mean[0], q.variance[0].sqrt()).cdf),
            (lambda z: z @ direction.to(z.dtype), mixed),
        ]
    if family == "dirichlet":
        a = b.concentration[0]
        return [(lambda z, i=i: z[:, i], stats.beta(a[i], a.sum() - a[i]).cdf) for i in range(3)]
    if family == "power_spherical":
        cosine = stats.beta(1 + q.concentration, 1.0).cdf
        across = torch.linalg.svd(q.loc.unsqueeze(0)).Vh[1:]  # two directions of the tangent plane
        return [
            (lambda z: (1 + z @ q.loc.to(z.dtype)) / 2, cosine),
            (
                lambda z: torch.atan2(*(z @ across.T.to(z.dtype)).unbind(-1)) / (2 * math.pi) + 0.5,
                stats.uniform().cdf,
            ),
        ]
    frozen = {
        "gaussian": lambda i: stats.norm(b.mean[i], b.stddev[i]),
        "laplace": lambda i: stats.laplace(b.loc[i], b.scale[i]),
        "logistic": lambda i: stats.logistic(b.loc[i], b.scale[i]),
        "student_t": lambda i: stats.t(b.df[i], b.loc[i], b.scale[i]),
        "log_normal": lambda i: stats.lognorm(b.scale[i], scale=b.loc[i].exp()),
        "gamma": lambda i: stats.gamma(b.concentration[i], scale=1 / b.rate[i]),
        "beta": lambda i: stats.beta(b.concentration1[i], b.concentration0[i]),
        "kumaraswamy": lambda i: Kumaraswamy(b.concentration1[i].item(), b.concentration0[i].item()),
    }[family]
    return [(lambda z, i=i: z[:, i], frozen(i).cdf) for i in range(2)]


class Kumaraswamy:
    def __init__(self, a, b):
        self.a, self.b = a, b

    def cdf(self, x):
        return 1 - (1 - x**self.a) ** self.b


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_in_float32_follow_the_law(family, training):
    layer = build(family, num_samples=KS_DRAWS).float().train(training)
    params = params_of(layer, batch=())
    z = layer.sample(params.float().requires_grad_()).z
    assert z.dtype == torch.float32 and z.requires_grad == training
    for function, cdf in marginals(family, layer.distribution(params)):
        assert ks_distance(function(z), cdf) < KS_LIMIT


def test_the_ks_test_sees_a_law_that_is_a_little_wide():
    z = 1.06 * torch.randn(KS_DRAWS)
    assert ks_distance(z, stats.norm().cdf) > KS_LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_log_prob_is_that_of_scipy(family):
    layer = build(family)
    params = params_of(layer, batch=())
    q = layer.distribution(params)
    z = layer.eval().sample(params.expand(50, -1)).z[0]
    b = law(q)
    reference = {
        "gaussian": lambda: stats.norm(b.mean, b.stddev).logpdf(z).sum(-1),
        "gaussian_full": lambda: stats.multivariate_normal(q.mean, q.covariance_matrix).logpdf(z),
        "gaussian_low_rank": lambda: stats.multivariate_normal(q.mean, q.covariance_matrix).logpdf(z),
        "laplace": lambda: stats.laplace(b.loc, b.scale).logpdf(z).sum(-1),
        "logistic": lambda: stats.logistic(b.loc, b.scale).logpdf(z).sum(-1),
        "student_t": lambda: stats.t(b.df, b.loc, b.scale).logpdf(z).sum(-1),
        "log_normal": lambda: stats.lognorm(b.scale, scale=b.loc.exp()).logpdf(z).sum(-1),
        "gamma": lambda: stats.gamma(b.concentration, scale=1 / b.rate).logpdf(z).sum(-1),
        "beta": lambda: stats.beta(b.concentration1, b.concentration0).logpdf(z).sum(-1),
        "kumaraswamy": lambda: (
            torch.func.vmap(torch.func.vmap(torch.func.grad(_kumaraswamy_cdf)))(
                z, b.concentration1.expand_as(z), b.concentration0.expand_as(z)
            )
            .log()
            .sum(-1)
        ),
        "dirichlet": lambda: [stats.dirichlet(b.concentration[0].numpy()).logpdf(row / row.sum()) for row in z.numpy()],
        "power_spherical": lambda: q.concentration * (1 + z @ q.loc).log() - _log_normalizer_of_sphere(q.concentration),
    }[family]
    expected = torch.as_tensor(reference(), dtype=torch.float64)
    torch.testing.assert_close(layer.family.log_prob(q, z), expected, rtol=1e-9, atol=1e-9)


def _kumaraswamy_cdf(x, a, b):
    return 1 - (1 - x**a) ** b


def _log_normalizer_of_sphere(kappa):
    """The area integral of (1 + t)^kappa over the sphere in three dimensions, elementary there."""
    return math.log(2 * math.pi) + (kappa + 1) * math.log(2) - (kappa + 1).log()


def positive(raw):
    return (1 + raw.exp()).log() + 0.1


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gaussian_full"])  # that one has a test of its triangle
def test_params_are_read_as_documented(family):
    layer = build(family)
    params = params_of(layer, batch=())
    b, (a, *rest) = law(layer.distribution(params)), params.split(2 if len(params) > 3 else 3)
    found, expected = {
        "gaussian": lambda: ((b.mean, b.variance), (a, rest[0].exp())),
        "gaussian_low_rank": lambda: (
            (b.mean, b.covariance_matrix),
            (a, rest[0].exp().diag() + torch.outer(rest[1], rest[1])),
        ),
        "laplace": lambda: ((b.loc, b.scale), (a, rest[0].exp())),
        "logistic": lambda: ((b.mean, b.variance), (a, (math.pi * rest[0].exp()).square() / 3)),
        "student_t": lambda: ((b.loc, b.scale, b.df), (a, rest[0].exp(), 2 + positive(rest[1]))),
        "log_normal": lambda: ((b.loc, b.scale.square()), (a, rest[0].exp())),
        "gamma": lambda: ((b.concentration, b.rate), (positive(a), rest[0].exp())),
        "beta": lambda: ((b.concentration1, b.concentration0), (positive(a), positive(rest[0]))),
        "kumaraswamy": lambda: ((b.concentration1, b.concentration0), (positive(a), positive(rest[0]))),
        "dirichlet": lambda: ((b.concentration,), (positive(params).unsqueeze(0),)),
        "power_spherical": lambda: (
            (b.loc, b.concentration),
            (params[:3] / params[:3].norm(), positive(params[3])),
        ),
    }[family]()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_density_integrates_to_one(family):
    layer = build(family)
    total = exact_value(layer, params_of(layer), lambda z: torch.ones_like(z[..., 0]))
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 4, 7])
def test_power_spherical_law_in_any_dimension(dim):
    """A Beta law of the height, uniform on the circle of that latitude: a sphere of one dimension less."""
    layer = build("power_spherical", latent_dim=dim, num_samples=KS_DRAWS)
    q, z = layer.distribution(params_of(layer, batch=())), layer.sample(params_of(layer, batch=())).z
    height, half = z @ q.loc, (dim - 1) / 2
    beta = stats.beta(half + q.concentration, half)
    assert ks_distance((1 + height) / 2, beta.cdf) < KS_LIMIT
    area = math.log(2) + half * math.log(math.pi) - math.lgamma(half)
    expected = torch.as_tensor(beta.logpdf((1 + height) / 2)) - (dim - 3) / 2 * (1 - height.square()).log()
    expected = expected - math.log(2) - area
    away = 1 - height.abs() > 1e-6  # from the poles, where this sum loses its digits
    assert float(away.double().mean()) > 0.99
    torch.testing.assert_close(q.log_prob(z)[away], expected[away])
    torch.testing.assert_close(float(q.mean @ q.loc), 2 * beta.mean() - 1)
    assert float(q.entropy()) == pytest.approx(-float(expected.mean()), abs=0.05)  # the standard error is below 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_prior_fits_q_and_the_kl_is_the_integral(family):
    layer = build(family)
    params = params_of(layer)
    if family in ("beta", "kumaraswamy"):
        params = params + 1.5  # where the reference is accurate
    params.requires_grad_()
    q, prior = layer.distribution(params), layer.family.standard()
    assert prior.batch_shape == () and prior.event_shape == q.event_shape
    assert torch.isfinite(layer.family.log_prob(prior, layer.family.sample(prior, 3))).all()
    expanded = prior.expand(q.batch_shape)
    if family == "logistic":
        with pytest.raises(NotImplementedError):
            kl_divergence(q, expanded)
        return
    kl = kl_divergence(q, expanded)
    shape = q.event_shape
    log_ratio = lambda z: layer.family.log_prob(q, z) - prior.log_prob(z.unflatten(-1, shape))  # noqa: E731
    exact = exact_value(layer, params, log_ratio)
    if family == "laplace":  # the prior's kink is no node of the reference: E|z| by hand
        loc, scale = q.base_dist.loc.abs(), q.base_dist.scale
        exact = (loc + scale * (-loc / scale).exp() - 1 - scale.log()).sum(-1)
    torch.testing.assert_close(kl.double(), exact, rtol=2e-5, atol=2e-5)  # the prior is float32
    ours, reference = (torch.autograd.grad(t.sum(), params, retain_graph=True)[0] for t in (kl, exact))
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["student_t", "gaussian_full", "gaussian_low_rank", "kumaraswamy"])
def test_kl_to_a_prior_that_is_not_standard_is_the_integral(family):
    layer = build(family)
    low, high = torch.tensor([[-0.5, 0.0], [1.5, 2.0]], dtype=torch.float64)
    if family == "kumaraswamy":
        prior, narrow = (Independent(Uniform(low, top, validate_args=False), 1) for top in (high, high / 2))
    else:
        prior = Independent(Normal(low, high), 1)
    params = params_of(layer) + (1.5 if family == "kumaraswamy" else 0.0)
    q = layer.distribution(params)
    exact = exact_value(layer, params, lambda z: layer.family.log_prob(q, z) - prior.log_prob(z))
    torch.testing.assert_close(kl_divergence(q, prior.expand((2,))), exact, rtol=2e-5, atol=2e-5)
    if family == "kumaraswamy":
        assert bool(torch.isinf(kl_divergence(q, narrow.expand((2,)))).all())


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)], ids=str)
def test_gaussian_has_the_values_and_derivatives_of_torch_s_own_law(shape):
    """Draws, density and KL know their gradients; the second derivatives are those of the formulas."""
    loc, log_variance = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    value = torch.randn(*shape, 4, 5, dtype=torch.float64, requires_grad=True)
    prior, torch_prior = GaussianFamily(5).standard(), Independent(Normal(torch.zeros(5), torch.ones(5)), 1)

    def ours(loc, log_variance, value):
        q = DiagonalNormal(LogVarianceNormal(loc, log_variance))
        torch.manual_seed(0)
        return q.rsample(torch.Size(shape)), q.log_prob(value), kl_divergence(q, prior)

    def torch_s(loc, log_variance, value):
        q = Independent(Normal(loc, (0.5 * log_variance).exp()), 1)
        torch.manual_seed(0)
        return q.rsample(torch.Size(shape)), q.log_prob(value), kl_divergence(q, torch_prior)

    for one, other in zip(ours(loc, log_variance, value), torch_s(loc, log_variance, value), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (loc, log_variance, value))
    assert torch.autograd.gradgradcheck(ours, (loc, log_variance, value))


def test_the_kl_of_gaussians_has_the_shape_of_torch_s_and_refuses_what_torch_refuses():
    q, prior = GaussianFamily(5).distribution(torch.randn(3, 10)), GaussianFamily(5).standard()
    alone = kl_divergence(q, prior)
    torch.testing.assert_close(kl_divergence(q, prior.expand((2, 3))), alone.expand(2, 3))
    torch.testing.assert_close(kl_divergence(q.base_dist, prior.expand((2, 3)).base_dist).sum(-1), alone.expand(2, 3))
    for wrong in (GaussianFamily(4).standard(), prior.expand((2,))):
        with pytest.raises(RuntimeError, match="must match"):
            kl_divergence(q, wrong)


def test_the_kl_of_gaussians_is_finite_where_the_ratio_of_their_variances_underflows():
    loc = torch.tensor([[0.0, 2.0, -1.0]]).repeat(2, 1)
    variances = torch.tensor([[-80.0, -50.0, 0.3], [20.0, 50.0, 0.3]])
    results = []
    for dtype in (torch.float32, torch.float64):
        params = torch.cat([loc, variances], -1).to(dtype).requires_grad_()
        if dtype == torch.float32:
            q, p = (GaussianFamily(3).distribution(row) for row in params)
        else:
            q, p = (Independent(Normal(row[:3], (0.5 * row[3:]).exp()), 1) for row in params)
        kl = kl_divergence(q, p)
        results.append([kl, *torch.autograd.grad(kl, params)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_more_probable_than_the_mode(family):
    layer = build(family)
    params = params_of(layer) + (1.5 if family in ("gamma", "beta", "kumaraswamy", "dirichlet") else 0.0)
    q, mode = layer.distribution(params), layer.mode(params)
    best = layer.family.log_prob(q, mode)
    z = layer.eval().sample(params.expand(20_000, 2, -1)).z[0]
    assert mode.shape == (2, layer.out_features)
    assert bool((layer.family.log_prob(q, z) <= best + 1e-9).all())


def test_modes_at_the_ends_of_the_support_are_points_of_it():
    raw = torch.tensor([-3.0, -3.0, -4.0, -3.0])  # all concentrations below 1
    for family, expected in (("beta", (1.0, 0.0)), ("kumaraswamy", (1.0, 0.0))):
        layer = sl.create("pathwise", family=family, latent_dim=2)
        mode = layer.mode(torch.tensor([-3.0, -4.0, -4.0, -3.0]))
        torch.testing.assert_close(mode, torch.tensor(expected))
        assert bool(torch.isfinite(layer.family.log_prob(layer.distribution(raw), mode)).all())
        # one concentration above 1 and one below; and both ends alike, where the middle is the least probable
        torch.testing.assert_close(layer.mode(torch.tensor([0.7, 0.0, -0.7, 0.0])), torch.tensor([1.0, 0.0]))
    beta = sl.create("pathwise", family="beta", latent_dim=2).family
    torch.testing.assert_close(beta.mode(beta.standard()), torch.full((2,), 0.5))
    gamma = sl.create("pathwise", family="gamma", latent_dim=2)
    mode = gamma.mode(raw)
    assert bool((mode > 0).all() and (mode < 1e-30).all())
    simplex = sl.create("pathwise", family="dirichlet", latent_dim=1, num_categories=4)
    torch.testing.assert_close(simplex.mode(raw - torch.arange(4)), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    uniform = simplex.family.standard()
    torch.testing.assert_close(simplex.family.mode(uniform), torch.full((4,), 0.25))


def test_laws_of_our_own_have_the_quantiles_and_moments_of_scipy():
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    loc, scale, one = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 1.7, 1.0))
    ours, theirs = Logistic(loc, scale), stats.logistic(0.3, 1.7)
    torch.testing.assert_close(ours.icdf(u), torch.as_tensor(theirs.ppf(u)))
    torch.testing.assert_close(ours.cdf(ours.icdf(u)), u)
    assert float(ours.entropy()) == pytest.approx(theirs.entropy())
    assert float(ours.variance) == pytest.approx(theirs.var()) and float(ours.mean) == float(ours.mode) == 0.3
    kumaraswamy = distributions.Kumaraswamy(scale, 2.5 * one)
    torch.testing.assert_close(kumaraswamy.cdf(kumaraswamy.icdf(u)), u)
    torch.testing.assert_close(kumaraswamy.cdf(u), Kumaraswamy(1.7, 2.5).cdf(u))
    for q in (ours, kumaraswamy, distributions.Kumaraswamy(0.1 * one, 0.1 * one).expand((3,))):
        ends = q.icdf(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
        assert ends.shape[1:] == (q.batch_shape or (1,))
        assert bool(torch.isfinite(ends).all() and torch.isfinite(q.log_prob(ends)).all())
    sphere = PowerSpherical(torch.tensor([0.0, 0.6, -0.8], dtype=torch.float64), scale)
    for dim, area in ((2, 2 * math.pi), (3, 4 * math.pi), (4, 2 * math.pi**2)):
        uniform = HypersphericalUniform(dim, like=u)
        assert float(uniform.entropy()) == -float(uniform.log_prob(uniform.sample())) == pytest.approx(math.log(area))
    # the height in three dimensions: (1 + t) / 2 is a Beta(1 + concentration, 1) variable
    mean = 2 * stats.beta(2.7, 1).mean() - 1
    torch.testing.assert_close(sphere.mean, mean * sphere.loc)
    assert float(sphere.log_prob(-sphere.loc)) > -100  # the antipode, where the density is zero


def test_student_t_has_an_infinite_kl_to_the_normal_where_it_has_no_variance():
    cauchy = torch.distributions.StudentT(torch.tensor([1.0, 3.0]))
    kl = kl_divergence(cauchy, torch.distributions.Normal(torch.zeros(2), torch.ones(2)))
    assert torch.isinf(kl[0]) and torch.isfinite(kl[1])
