"""The importance-weighted bound against its exact gradients; what objectives refuse and log."""

import itertools
import math

import pytest
import torch
from gradients_of_models import check_gradients, exact_gradients
from objective_models import bound, discrete_model, enumerated, gaussian_model, integrated, log_joint, sampled

import stochastic_layers as sl
from lightning_modules import ELBO, IWAE, RWS, TVO, VAE, Renyi, Terms
from lightning_modules.cli import main
from stochastic_layers.testing import enumerate_outcomes


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(
    "objective", [IWAE("vimco"), IWAE("vimco", "arithmetic"), IWAE("ovis")], ids=["geometric", "arithmetic", "ovis"]
)
def test_discrete_gradients_of_the_importance_weighted_bound_are_exact_in_the_mean(objective, k):
    model, x = discrete_model(objective, k)
    check_gradients(model, x, enumerated(model, x, k))


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("straight_through", {}),
        ("reinforce", {"family": "categorical", "num_categories": 3, "latent_dim": 1, "baseline": "none"}),
    ],
)
def test_the_rule_replaces_the_estimator_of_the_layer(layer, options):
    model, x = discrete_model(IWAE("vimco"), 2, layer, **options)
    check_gradients(model, x, enumerated(model, x, 2))


CASES = [(g, 1) for g in ("pathwise", "stl", "dreg")]
CASES += [(g, k) for k in (2, 5) for g in ("pathwise", "dreg", "vimco", "ovis")]


@pytest.mark.parametrize(("gradient", "k"), CASES)
def test_gaussian_gradients_of_the_importance_weighted_bound_are_exact_in_the_mean(gradient, k):
    model, x = gaussian_model(IWAE(gradient), k)
    check_gradients(model, x, integrated(model, x, k, {1: 60, 2: 40, 5: 20}[k]))


def test_quadrature_is_exact_enough_to_be_a_reference():
    model, x = gaussian_model(IWAE(), 5)
    coarse, fine = integrated(model, x, 5, 17), integrated(model, x, 5, 20)
    assert max(float((coarse[name] - fine[name]).norm() / fine[name].norm()) for name in fine) < 1e-3


def test_score_function_rules_take_a_gaussian_of_a_layer_without_reparameterization():
    model, x = gaussian_model(IWAE("ovis"), 2, layer="reinforce")
    check_gradients(model, x, integrated(model, x, 2, 40), only=["q"])


class OvisGammaOne(IWAE):
    """The mistake to be seen: OVIS with gamma = 1, which adds the gradient of wake-phi."""

    def loss(self, terms, step):
        wake = (terms.log_weights.detach().softmax(0) * terms.log_q).sum(0)
        return super().loss(terms, step) - (wake - wake.detach())


@pytest.mark.parametrize("objective", [IWAE("stl"), OvisGammaOne("ovis")], ids=["stl", "ovis, gamma = 1"])
def test_gradients_that_are_biased_above_one_draw_are_seen_to_be(objective):
    model, x = gaussian_model(IWAE("pathwise"), 5)
    model.objective = objective  # past the check, which refuses STL
    with pytest.raises(AssertionError, match="standard errors off"):
        check_gradients(model, x, integrated(model, x, 5, 20), only=["q"])


def laplace(model, x, k, points=801, step=0.05):
    """The exact gradients of the bound of one Gaussian variable at any K, by two integrals of one dimension.

    log S = int_0^inf (e^-t - e^-tS) dt / t, so that E log sum_k w_k = int (e^-t - E[e^-tw]^K) dt / t.
    """
    q = model.layer.distribution(model.encode(x.unsqueeze(0)))
    noise = torch.linspace(-9, 9, points, dtype=torch.float64)
    probability = (-0.5 * noise.square()).exp()
    z = q.mean + q.stddev * noise.unsqueeze(-1)
    log_weights = log_joint(model, x, z) - model.layer.family.log_prob(q, z)
    log_t = torch.arange(-40.0, 80.0, step, dtype=torch.float64).unsqueeze(-1)
    center = log_weights.detach().max()  # of no effect: it keeps t w in range
    damped = (-(log_t + log_weights - center).exp()).exp()  # [T, points]
    moment = (damped * probability).sum(-1) / probability.sum()
    value = (((-log_t.squeeze(-1).exp()).exp() - moment.pow(k)) * step).sum() + center - math.log(k)
    return exact_gradients(model, -value), value.detach()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_reference_by_laplaces_identity_agrees_with_the_other_references(k):
    model, x = gaussian_model(IWAE(), k)
    ours, coarse = laplace(model, x, k)[0], laplace(model, x, k, points=401, step=0.1)[0]
    other = integrated(model, x, k, {1: 60, 2: 40, 5: 20}[k])
    for name in ours:
        torch.testing.assert_close(ours[name], coarse[name], rtol=1e-7, atol=1e-9)
        assert float((ours[name] - other[name]).norm() / other[name].norm()) < 2e-3


@pytest.mark.parametrize(
    ("gradient", "visible_bias"),
    [
        ("dreg", 0.02),
        pytest.param("ovis", 0.05, marks=pytest.mark.slow),
        pytest.param("vimco", 0.05, marks=pytest.mark.slow),
    ],
)
def test_gradients_at_fifty_draws_are_exact_in_the_mean(gradient, visible_bias):
    model, x = gaussian_model(IWAE(gradient), 50)
    check_gradients(model, x, laplace(model, x, 50)[0], replicates=500, visible_bias=visible_bias, only=["q"])


@pytest.mark.slow
def test_pathwise_gradient_at_fifty_draws_is_exact_in_the_mean():
    """Its signal has drowned, so that 5 % take many draws: that is what the other gradients are for."""
    model, x = gaussian_model(IWAE("pathwise"), 50)
    check_gradients(model, x, laplace(model, x, 50)[0], replicates=20_000, only=["q"])


def over_multisets(model, x, k):
    """Probability ``[M]`` of every multiset of K outcomes of one variable, and the objective's terms of each."""
    z = enumerate_outcomes(model.layer)
    counts = torch.tensor([c for c in itertools.product(range(k + 1), repeat=len(z)) if sum(c) == k])  # [M, outcomes]
    draws = torch.stack([z.repeat_interleave(c, 0) for c in counts], 1)  # [K, M, out]
    params = model.encode(x.unsqueeze(0))
    family, q = model.layer.family, model.layer.distribution(params)
    orders = math.lgamma(k + 1) - (counts + 1.0).double().lgamma().sum(1)
    probability = (orders + (counts * family.log_prob(q, z.unsqueeze(1)).squeeze(1)).sum(1)).exp()
    log_prior = family.log_prob(model.prior(x.device), draws)
    log_likelihood = model.log_likelihood(draws, x.expand(len(counts), -1))
    sample = model.layer.sample(params.expand(len(counts), -1))
    return probability, Terms(sample, log_likelihood, log_prior, family.log_prob(q, draws), None, draws)


def expected_over_multisets(model, x, k):
    """The mean of the objective's own gradient, and the gradient of the bound, without any noise."""
    probability, terms = over_multisets(model, x, k)
    assert abs(float(probability.sum().detach()) - 1) < 1e-9
    estimated = exact_gradients(model, (probability.detach() * model.loss(terms)).sum())
    probability, terms = over_multisets(model, x, k)
    return estimated, exact_gradients(model, -(probability * bound(terms.log_weights.T)).sum())


@pytest.mark.parametrize("k", [2, 5, 50])
@pytest.mark.parametrize(
    "objective", [IWAE("vimco"), IWAE("vimco", "arithmetic"), IWAE("ovis")], ids=["geometric", "arithmetic", "ovis"]
)
def test_score_function_gradients_are_exact_over_all_multisets_of_draws(objective, k):
    options = {"family": "categorical", "num_categories": 3, "latent_dim": 1, "baseline": "none"}
    model, x = discrete_model(objective, k, "reinforce", **options)
    estimated, exact = expected_over_multisets(model, x, k)
    for name, gradient in exact.items():
        torch.testing.assert_close(estimated[name], gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("k", [2, 5, 50])
def test_ovis_of_gamma_one_is_seen_to_have_another_mean(k):
    options = {"family": "categorical", "num_categories": 3, "latent_dim": 1, "baseline": "none"}
    model, x = discrete_model(OvisGammaOne("ovis"), k, "reinforce", **options)
    estimated, exact = expected_over_multisets(model, x, k)
    assert float((estimated["q"] - exact["q"]).norm() / exact["q"].norm()) > 0.2
    torch.testing.assert_close(estimated["p"], exact["p"], rtol=1e-8, atol=1e-9)  # the model's gradient is that of IWAE


@pytest.mark.parametrize("k", [2, 50])
def test_sticking_the_landing_above_one_draw_is_seen_to_have_another_mean(k):
    model, x = gaussian_model(IWAE("pathwise"), k)
    model.objective = IWAE("stl")  # past the check, which refuses it
    with pytest.raises(AssertionError, match="standard errors off"):
        check_gradients(model, x, laplace(model, x, k)[0], replicates=500, visible_bias=0.2, only=["q"])


def test_doubly_reparameterized_gradient_is_far_quieter_than_the_pathwise_one():
    variance = {}
    for gradient in ("pathwise", "dreg", "vimco", "ovis"):
        model, x = gaussian_model(IWAE(gradient), 50)
        variance[gradient] = model.gradient_statistics(x.unsqueeze(0), num_draws=2000).total_variance
    assert variance["dreg"] < variance["pathwise"] / 100
    assert variance["ovis"] < variance["vimco"] < variance["pathwise"]


def test_sticking_the_landing_is_silent_where_q_is_the_posterior():
    model, x = gaussian_model(IWAE("stl"), 1, prior="standard")
    with torch.no_grad():
        weight, scale = model.decoder[0].weight[:, 0], model.likelihood.log_scale.exp()
        precision = 1 + weight.square().sum() / scale**2
        model.encoder[1].weight.zero_()
        model.encoder[1].bias[0] = (weight * (x - model.decoder[0].bias)).sum() / scale**2 / precision
        model.encoder[1].bias[1] = -precision.log()
    assert model.gradient_statistics(x.unsqueeze(0)).total_variance < 1e-24
    model.objective = IWAE("pathwise")
    assert model.gradient_statistics(x.unsqueeze(0)).total_variance > 0.01


@pytest.mark.parametrize("gradient", ["dreg", "vimco", "ovis"])
def test_every_gradient_reports_the_value_of_the_bound(gradient):
    model, x = gaussian_model("elbo", 4)
    torch.testing.assert_close(sampled(model, x, IWAE(gradient))[0], sampled(model, x, IWAE())[0])


def test_gradient_of_the_decoder_is_the_same_on_the_same_draws():
    model, x = gaussian_model("elbo", 4)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    pathwise = sampled(model, x, IWAE())[1][encoder:]
    for objective in (IWAE("dreg"), IWAE("vimco"), IWAE("ovis"), RWS()):
        torch.testing.assert_close(sampled(model, x, objective)[1][encoder:], pathwise)


def test_dreg_of_one_draw_is_sticking_the_landing_with_latents_at_every_position():
    networks = {"encoder": torch.nn.Conv2d(1, 6, 2, 2), "decoder": torch.nn.ConvTranspose2d(3, 1, 2, 2)}
    model = VAE("gaussian", {"latent_dim": 3}, data_shape=(1, 4, 4), **networks).double()
    x = torch.rand(1, 4, 4, dtype=torch.float64).round()
    for a, b in zip(sampled(model, x, IWAE("dreg")), sampled(model, x, IWAE("stl")), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_enormous_spread_give_finite_gradients():
    model, x = discrete_model("elbo", 3)
    with torch.no_grad():
        model.decoder[0].weight.mul_(1e4)
    for objective in (IWAE("vimco"), IWAE("ovis"), IWAE("vimco", "arithmetic"), Renyi(0.5, "vimco"), RWS(), TVO()):
        loss, gradient = sampled(model, x, objective)
        assert bool(loss.isfinite().all() and gradient.isfinite().all())


@pytest.mark.parametrize(
    ("layer", "options", "objective", "advice"),
    [
        ("reinforce", {}, IWAE(), "gradient='vimco' or 'ovis'"),
        ("rodeo", {}, IWAE(), "gradient='vimco' or 'ovis'"),
        ("straight_through", {"num_samples": 4}, IWAE("dreg"), "gradient='vimco' or 'ovis'"),
        ("gumbel_softmax", {"num_categories": 3}, IWAE("vimco"), "layer='reinforce'"),
        ("gumbel_softmax", {"num_categories": 3}, IWAE(), "layer='gaussian'"),
        ("antithetic", {"num_samples": 2}, IWAE("dreg"), "'gaussian'"),
        ("disarm", {"num_samples": 2}, IWAE("ovis"), "layer='reinforce'"),
        ("reinforce", {}, IWAE("vimco"), "num_samples': 8"),
        ("reinforce", {}, IWAE("ovis"), "num_samples': 8"),
        ("gaussian", {"num_samples": 2}, IWAE("stl"), "gradient='dreg'"),
        ("reinforce", {"num_samples": 2}, Renyi(), "gradient='vimco'"),
        ("gumbel_softmax", {"num_categories": 3}, "rws", "layer='reinforce'"),
        ("reinforce", {}, "tvo", "num_samples': 8"),
    ],
)
def test_impossible_combinations_are_refused_with_advice(layer, options, objective, advice):
    with pytest.raises(ValueError) as error:
        VAE(layer, {"latent_dim": 2, **options}, objective=objective)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda: IWAE("nonsense"),
        lambda: IWAE("vimco", "nonsense"),
        lambda: Renyi(math.inf),
        lambda: Renyi(0.5, "dreg"),
        lambda: TVO(0),
        lambda: TVO(3, 1.0),
        lambda: ELBO(beta=-1),
    ],
)
def test_bad_options_are_refused_at_construction(build):
    with pytest.raises(ValueError, match="needed"):
        build()


INDEPENDENT = [name for name in sl.list_layers() if sl.registry.layer_class(name).independent_draws]


@pytest.mark.parametrize("name", INDEPENDENT)
def test_layers_that_say_so_draw_independently_and_with_equal_weights(name):
    options = {"latent_dim": 2, "num_samples": 3}
    if sl.families.takes_categories(sl.describe(name).families[0]):
        options["num_categories"] = 3
    layer = sl.create(name, **options).double()
    assert layer.exact_draws
    params = torch.linspace(-1, 1, layer.in_features, dtype=torch.float64).expand(20_000, -1)
    sample = layer.sample(params)
    z = sample.z.detach()
    assert sample.equally_weighted and z.shape[0] == 3
    exact = layer.family.sample(layer.distribution(params), 3)
    error = (z.var(1) + exact.var(1)).div(20_000).sqrt()
    assert bool(((z.mean(1) - exact.mean(1)).abs() < 5 * error).all())
    z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    for a, b in itertools.combinations(z, 2):  # a correlation of 0.06 would be seen: 8 standard errors of 1 / sqrt(n)
        assert float((a * b).mean(0).abs().max()) < 5 / math.sqrt(20_000)


def test_probe_measures_the_gradient_of_the_objective_and_disturbs_nothing():
    model, x = discrete_model(IWAE("vimco"), 2)
    params = model.encode(x.unsqueeze(0)).detach().requires_grad_()
    z = enumerate_outcomes(model.layer)
    log_q = model.layer.family.log_prob(model.layer.distribution(params), z)
    log_weights = log_joint(model, x, z).detach() - log_q
    index = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    value = -(log_q[index].sum(1).exp() * bound(log_weights[index])).sum()
    (exact,) = torch.autograd.grad(value, params)
    before, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    statistics = model.gradient_statistics(x.unsqueeze(0), num_draws=40_000)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    error = (statistics.variance / 40_000).sqrt()
    assert 8 * float(error.norm()) < 0.3 * float(exact.norm())
    assert float(((statistics.mean - exact) / error).abs().max()) < 5


def test_probe_includes_the_terms_in_closed_form():
    model, x = discrete_model("elbo", 2)
    batch = x.expand(3, 3)
    model.layer.baseline = None
    plain = model.gradient_statistics(batch, num_draws=16)
    model.objective = ELBO(beta=0.0)
    without = model.gradient_statistics(batch, num_draws=16)
    torch.testing.assert_close(plain.variance, without.variance)  # the same noise, restored by the probe
    params = model.encode(batch).detach().requires_grad_()
    (kl,) = torch.autograd.grad(model.closed_form_kl(model.layer.distribution(params)).sum(), params)
    torch.testing.assert_close(plain.mean - without.mean, kl)


def test_probe_needs_training_mode_and_two_redraws():
    model, x = discrete_model("elbo", 2)
    with pytest.raises(ValueError, match="num_draws >= 2"):
        model.gradient_statistics(x.unsqueeze(0), num_draws=1)
    with pytest.raises(ValueError, match="training mode"):
        model.eval().gradient_statistics(x.unsqueeze(0))


@pytest.mark.parametrize(
    "words",
    [
        ["--model.objective", '{"name": "iwae", "gradient": "dreg"}'],
        ["--model.objective.name", "iwae", "--model.objective.gradient", "dreg"],
    ],
    ids=["mapping", "words"],
)
def test_command_line_sets_the_gradient_of_the_bound(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = {"fast_dev_run": "true", "logger": "false", "enable_progress_bar": "false", "accelerator": "cpu"}
    options = [word for key, value in quiet.items() for word in (f"--trainer.{key}", value)]
    main(["fit", "--model.layer", "gaussian", "--model.layer_options.num_samples", "4", *words, *options])


def test_command_line_answers_an_impossible_combination_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="gradient='vimco' or 'ovis'"):
        main(["fit", "--model.layer", "reinforce", "--model.objective", "iwae", "--trainer.accelerator", "cpu"])
