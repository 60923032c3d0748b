"""Pathwise layers of every continuous family: the law, its gradient and its KL, against references of their own."""

import math

import pytest
import torch
from torch.distributions import Independent, kl_divergence

import stochastic_layers as sl
from stochastic_layers.diagnostics import gradient_statistics
from stochastic_layers.families import create_family
from stochastic_layers.gaussian_families import LowRankGaussianFamily
from stochastic_layers.testing import PolynomialCost, check_mean, exact_value

stats = pytest.importorskip("scipy.stats")

FAMILIES = sl.Pathwise.families
KS_DRAWS = 50_000
# P(sqrt(n) D > x) <= 2 exp(-2 x^2): one false alarm in a million tests. A distribution function that is off by 0.02 at
# some point is seen with probability 0.999: the empirical one has a standard error of 0.0022 there at most
KS_LIMIT = math.sqrt(math.log(2 / 1e-6) / 2 / KS_DRAWS)


def build(family, name="pathwise", **options):
    if family == "dirichlet":
        options = {"latent_dim": 1, "num_categories": 3, **options}
    options = {"latent_dim": 3 if family == "power_spherical" else 2, **options}
    return sl.create(name, family=family, **options).double()


def params_of(layer, seed=1, batch=(2,)):
    generator = torch.Generator().manual_seed(seed)
    params = 0.7 * torch.randn(*batch, layer.in_features, generator=generator, dtype=torch.float64) - 0.1
    if layer.family.name == "student_t":
        params[..., -layer.latent_dim :] += 9  # tails that are light enough for the moments of a gradient to exist
    elif layer.family.name == "log_normal":
        params[..., -layer.latent_dim :] -= 2  # a cube of it else has moments that no sample of this size shows
    elif layer.family.name in ("gamma", "beta", "kumaraswamy", "dirichlet", "power_spherical"):
        params[..., -1:] += 1.5
    return params


def law(q):
    return q.base_dist if isinstance(q, Independent) else q


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


def ks_distance(values, cdf):
    values, n = values.detach().sort().values.double(), values.shape[0]
    u, grid = torch.as_tensor(cdf(values.numpy())), torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((grid[1:] - u).abs(), (u - grid[:-1]).abs()).max())


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


@pytest.mark.parametrize("family", FAMILIES)
def test_density_integrates_to_one(family):
    layer = build(family)
    total = exact_value(layer, params_of(layer), lambda z: torch.ones_like(z[..., 0]))
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_prior_fits_q_and_the_kl_is_the_integral(family):
    layer = build(family)
    params = params_of(layer)
    if family in ("beta", "kumaraswamy"):
        params = params + 1.5  # where the reference is accurate
    params.requires_grad_()
    q, prior = layer.distribution(params), layer.family.standard()
    assert prior.batch_shape == () and prior.event_shape == q.event_shape
    assert torch.isfinite(prior.log_prob(prior.sample((3,)))).all()
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
    gamma = sl.create("pathwise", family="gamma", latent_dim=2)
    mode = gamma.mode(raw)
    assert bool((mode > 0).all() and (mode < 1e-30).all())
    simplex = sl.create("pathwise", family="dirichlet", latent_dim=1, num_categories=4)
    torch.testing.assert_close(simplex.mode(raw - torch.arange(4)), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    uniform = simplex.family.standard()
    torch.testing.assert_close(simplex.family.mode(uniform), torch.full((4,), 0.25))


def test_student_t_has_an_infinite_kl_to_the_normal_where_it_has_no_variance():
    cauchy = torch.distributions.StudentT(torch.tensor([1.0, 3.0]))
    kl = kl_divergence(cauchy, torch.distributions.Normal(torch.zeros(2), torch.ones(2)))
    assert torch.isinf(kl[0]) and torch.isfinite(kl[1])


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


def test_power_spherical_accepts_any_direction():
    layer = sl.create("pathwise", family="power_spherical", latent_dim=4)
    directions = torch.stack([torch.zeros(4), torch.eye(4)[0], -torch.eye(4)[0], torch.full((4,), 1e17)])
    params = torch.cat([directions, torch.full((4, 1), 50.0)], -1).requires_grad_()
    z = layer(params)
    z.sum().backward()
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4))
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
    with pytest.raises(ValueError, match="options of family 'laplace'"):
        create_family({"name": "laplace", "rank": 2}, 4)
    with pytest.raises(ValueError, match="supports the families"):
        sl.create("pathwise", latent_dim=4, family={"name": "gausian"})


def test_parts_may_be_passed_one_by_one():
    layer = sl.create("pathwise", latent_dim=3, family="gaussian_full")
    assert layer(tuple(torch.zeros(5, n) for n in (3, 3, 3))).shape == (5, 3)
    layer = sl.create("pathwise", latent_dim=3, family="power_spherical")
    assert layer((torch.randn(5, 3), torch.zeros(1))).shape == (5, 3)
    with pytest.raises(ValueError, match="n = \\(3, 1\\)"):
        layer((torch.randn(5, 3), torch.zeros(5, 2)))


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


# antithetic pairs


@pytest.mark.parametrize("family", sl.Antithetic.families)
def test_antithetic_is_exact_in_the_mean(family):
    layer = build(family, "antithetic")
    params = params_of(layer)
    check_mean(layer, params, PolynomialCost("asymmetric" if family.startswith("gaussian") else "quadratic", 2))
    check_mean(layer, params, PolynomialCost("quadratic", 2), of="decoder")
    check_mean(layer, params, PolynomialCost("quadratic", 2), of="value")


def test_antithetic_about_the_wrong_centre_is_seen():
    class Planted(sl.Antithetic):
        def draw(self, params, context):
            sample = super().draw(params, context)
            half = sample.z[: self.num_samples // 2]
            return self._sample(sample.q, torch.cat([half, -half]))

    layer = Planted(2).double()
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params_of(layer), PolynomialCost("quadratic", 2))


@pytest.mark.parametrize("family", sl.Antithetic.families)
def test_antithetic_pairs_have_no_variance_where_the_cost_is_odd(family):
    layer = build(family, "antithetic", num_samples=4)
    params = params_of(layer)
    theta = torch.tensor([1.5, -0.5], dtype=torch.float64)
    sample = layer.sample(params)
    estimate = sample.surrogate(sample.z @ theta)
    torch.testing.assert_close(estimate, layer.mode(params) @ theta)  # the value itself
    statistics = gradient_statistics(layer, params, lambda z: z @ theta)
    assert float(statistics.variance.max()) < 1e-25
    loc = statistics.mean[..., : layer.latent_dim]
    torch.testing.assert_close(loc, theta.expand_as(loc))
    # of a quadratic cost the gradient of the loc is linear in z
    quadratic = gradient_statistics(layer, params, lambda z: (z @ theta) ** 2)
    assert float(quadratic.variance[..., : layer.latent_dim].max()) < 1e-25


def test_antithetic_pairs_gain_nothing_where_the_cost_is_even():
    params = params_of(build("gaussian"))
    loc = params[..., :2]
    pair, single = build("gaussian", "antithetic"), build("gaussian")
    torch.manual_seed(3)
    of_pair = pair.sample(params.requires_grad_())
    torch.manual_seed(3)
    of_single = single.sample(params)
    values = [s.surrogate((s.z - loc.detach()).square().sum(-1)) for s in (of_pair, of_single)]
    torch.testing.assert_close(*values)  # two evaluations are worth exactly one
    independent = build("gaussian", num_samples=2)
    variances = [
        gradient_statistics(
            layer, params, lambda z: (z - loc.detach()).square().sum(-1), num_draws=20_000, chunk_size=20_000
        )
        .variance[..., 2:]
        .sum()
        for layer in (pair, independent)
    ]
    assert float(variances[0] / variances[1]) == pytest.approx(2.0, rel=0.1)


def test_antithetic_refuses_an_odd_number_and_a_skewed_family():
    with pytest.raises(ValueError, match="even num_samples"):
        sl.create("antithetic", latent_dim=2, num_samples=3)
    with pytest.raises(ValueError, match="supports the families"):
        sl.create("antithetic", latent_dim=2, family="gamma")


# quasi-Monte Carlo


@pytest.mark.parametrize("num_samples", [3, 4])
@pytest.mark.parametrize("family", sl.QuasiMonteCarlo.families)
def test_quasi_monte_carlo_is_exact_in_the_mean(family, num_samples):
    layer = build(family, "quasi_monte_carlo", num_samples=num_samples)
    params = params_of(layer)
    check_mean(layer, params, PolynomialCost("quadratic", 2))
    check_mean(layer, params, PolynomialCost("quadratic", 2), of="value")


def test_quasi_monte_carlo_without_a_shift_is_seen():
    class Planted(sl.QuasiMonteCarlo):
        def draw(self, params, context):
            u = (
                (self.points.double() / 2**30)
                .clamp(1e-4, 1 - 1e-4)[:, None, None, :]
                .expand(-1, *params.shape[:-1], -1)
            )
            q = self.law(params)
            return self._sample(q, q.base_dist.icdf(u))

    layer = Planted(2, num_samples=4).double()
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params_of(layer), PolynomialCost("quadratic", 2))


def test_quasi_monte_carlo_stratifies_every_axis():
    layer = build("gaussian", "quasi_monte_carlo", latent_dim=7, num_samples=16)
    params = params_of(layer, batch=(50,))
    u = layer.distribution(params).base_dist.cdf(layer.sample(params).z)  # [16, 50, 7]
    cells = (u * 16).long().sort(0).values
    assert bool((cells == torch.arange(16).view(-1, 1, 1)).all())


def test_quasi_monte_carlo_draws_each_follow_the_law_and_examples_are_independent():
    layer = build("gaussian", "quasi_monte_carlo", num_samples=2)
    z = layer.sample(torch.zeros(KS_DRAWS, 4, dtype=torch.float64)).z
    for values in (z[0, :, 0], z[1, :, 0], z[0, :, 1]):
        assert ks_distance(values, stats.norm().cdf) < KS_LIMIT
    neighbours = (z[0, 1:] * z[0, :-1]).mean(0) * math.sqrt(KS_DRAWS)
    assert float(neighbours.abs().max()) < 5


def test_quasi_monte_carlo_has_a_lower_variance_than_independent_draws():
    params = params_of(build("gaussian"))
    cost = PolynomialCost("quadratic", 2)
    totals = [
        gradient_statistics(
            build("gaussian", name, num_samples=16), params, cost, num_draws=4000, chunk_size=4000
        ).total_variance
        for name in ("quasi_monte_carlo", "pathwise")
    ]
    assert totals[0] < totals[1] / 5  # about 1 / 8 here, and 0.4 for a steep cubic


def test_quasi_monte_carlo_refuses_more_dimensions_than_the_sequence_has():
    with pytest.raises(ValueError, match="latent_dim <= 21201"):
        sl.create("quasi_monte_carlo", latent_dim=30_000)


@pytest.mark.parametrize("name", ["antithetic", "quasi_monte_carlo"])
def test_coupled_pathwise_layers_compile_and_take_any_batch(name):
    torch._dynamo.reset()
    layer = build("gaussian", name)

    def loss(params):
        sample = layer.sample(params)
        return sample.surrogate(sample.z.square().sum(-1)).sum()

    for batch in [(), (0,), (2, 3)]:
        params = params_of(layer, batch=batch).requires_grad_()
        loss(params).backward()
        assert bool(torch.isfinite(params.grad).all())
    params = params_of(layer).requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(params).backward()
    assert bool((params.grad != 0).all())
    sample = layer.eval().sample(params)
    assert not sample.z.requires_grad and sample.z.shape[0] == layer.num_samples
