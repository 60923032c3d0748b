"""Likelihoods of a model: their masses, shapes and precision."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_modules import (
    VAE,
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedLogistic,
    GaussianLikelihood,
    HierarchicalVAE,
)
from lightning_modules.likelihoods import at_least_float32


@pytest.mark.parametrize("num_levels", [2, 5, 256])
def test_discretized_logistic_masses_sum_to_one(num_levels):
    model = VAE("gaussian", {"latent_dim": 2}, likelihood={"name": "discretized_logistic", "num_levels": num_levels})
    output = 6 * torch.randn(3, 2, 8, 8, dtype=torch.float64)
    levels = torch.linspace(0, 1, num_levels, dtype=torch.float64).view(-1, 1, 1, 1, 1)
    masses = model.likelihood.value_log_prob(output, levels).exp().sum(0)
    torch.testing.assert_close(masses, torch.ones_like(masses))
    assert torch.isfinite(model.likelihood.value_log_prob(1e4 * output, levels)).all()


def test_categorical_likelihood_reads_levels_and_gaussian_learns_its_scale():
    model = VAE("gaussian", {"latent_dim": 2}, likelihood={"name": "categorical", "num_levels": 3})
    output = torch.randn(2, 3, 8, 8)
    expected = output.view(2, 3, 1, 8, 8).log_softmax(1)[:, 2].flatten(1).sum(1)
    torch.testing.assert_close(model.likelihood.log_prob(output, torch.ones(2, 1, 8, 8)), expected)
    likelihood = GaussianLikelihood()
    likelihood.log_prob(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)).sum().backward()
    assert likelihood.log_scale.grad.abs() > 0


@pytest.mark.parametrize("shape", [(12,), (6, 2)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "gaussian", "discretized_logistic"])
def test_data_of_fewer_dimensions_have_the_likelihood_of_images_of_size_one(likelihood, shape):
    few = VAE("gaussian", {"latent_dim": 2}, likelihood=likelihood, data_shape=shape)
    image_shape = (*shape, *[1] * (3 - len(shape)))
    images = VAE("gaussian", {"latent_dim": 2}, likelihood=likelihood, data_shape=image_shape)
    x, output = torch.rand(5, *shape).round(), torch.randn(3, 5, *few.output_shape)
    same_output = output.view(3, 5, *images.output_shape)
    expected = images.likelihood.log_prob(same_output, x.view(5, *image_shape))
    torch.testing.assert_close(few.likelihood.log_prob(output, x), expected)
    means = images.likelihood.mean(same_output)
    torch.testing.assert_close(few.likelihood.mean(output), means.view(3, 5, *shape))


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "gaussian", "discretized_logistic"])
@pytest.mark.parametrize("build", [VAE, lambda layer, **options: HierarchicalVAE([layer, layer], **options)])
def test_nothing_that_is_reported_is_rounded_to_bfloat16(likelihood, build):
    levels = 2 if likelihood == "bernoulli" else 256
    spec = {"name": likelihood, "num_levels": levels} if likelihood.startswith(("cat", "disc")) else likelihood
    model = build("gaussian", likelihood=spec, iwae_samples={"val": 5}).eval()
    exact = torch.randint(levels, (16, 1, 8, 8)) / (levels - 1)  # Lightning rounds the data to the precision
    model, x = model.to(torch.bfloat16), exact.bfloat16()
    with torch.no_grad():
        terms = model.terms(x)
        z = (terms.sample if isinstance(model, VAE) else terms.samples[0]).z
        found, outputs = model.log_likelihood(z, x), model.decode(z).double()
        data = x if likelihood == "gaussian" else exact  # levels are known in spite of the rounding
        expected = copy.deepcopy(model.likelihood).double().log_prob(outputs, data.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
        reported = [found, *model.bound(terms).values()]
        reported += [model.importance_weighted_bound(x, 5), *model.log_weight_chunks(x, 5)]
    for value in reported:
        assert value.dtype == torch.float32 and (value != value.bfloat16()).any()


def test_log_prob_is_the_sum_over_the_values_of_an_example():
    output, x = torch.randn(3, 5, 1, 2, 2, dtype=torch.float64), torch.rand(5, 1, 2, 2, dtype=torch.float64)
    probs = output.sigmoid()
    soft = x * probs.log() + (1 - x) * (1 - probs).log()  # Bernoulli, of data between 0 and 1 too
    gauss = stats.norm(output, 0.7).logpdf(x)
    two = torch.randn(3, 5, 2, 2, 2, dtype=torch.float64)
    levels = (4 * x).round() / 4
    law = stats.logistic(two[..., :1, :, :].sigmoid(), (two[..., 1:, :, :] - 2).exp())
    upper, lower = law.cdf(levels + 0.125), law.cdf(levels - 0.125)
    binned = np.log(np.where(levels == 1, 1, upper) - np.where(levels == 0, 0, lower))
    for likelihood, outputs, values in (
        (BernoulliLikelihood(), output, soft),
        (GaussianLikelihood(0.7).double(), output, gauss),
        (DiscretizedLogistic(5), two, binned),
    ):
        expected = torch.as_tensor(values).flatten(-3).sum(-1)
        torch.testing.assert_close(likelihood.log_prob(outputs, x), expected, rtol=1e-6, atol=1e-6)


def test_the_scale_of_a_gaussian_has_a_floor():
    likelihood = GaussianLikelihood(1e-4)
    torch.testing.assert_close(likelihood.distribution(torch.zeros(1)).stddev, torch.tensor([1e-4]))
    with torch.no_grad():
        likelihood.log_scale.fill_(-200.0)
    assert bool(torch.isfinite(likelihood.log_prob(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8))).all())
    for scale in (0.0, 1e-5, math.inf, math.nan):
        with pytest.raises(ValueError, match="needed a finite initial_scale"):
            GaussianLikelihood(scale)


@pytest.mark.parametrize("num_levels", [256, 65_536])
def test_discretized_logistic_loses_no_digits_to_float32(num_levels):
    likelihood = DiscretizedLogistic(num_levels)
    output = torch.cat([torch.randn(16, 1, 8, 8), 4 * torch.rand(16, 1, 8, 8)], 1)  # scales from 0.14 to 7
    x = torch.randint(num_levels, (16, 1, 8, 8)) / (num_levels - 1)
    exact = likelihood.log_prob(output.double(), x.double())
    torch.testing.assert_close(likelihood.log_prob(output, x).double(), exact, rtol=0, atol=2e-4)  # of 350 to 700 nats


# a logistic variable has its mean before it is rounded to a level
@pytest.mark.parametrize(
    ("likelihood", "error"),
    [(CategoricalLikelihood(64), 1e-12), (DiscretizedLogistic(64), 0.5 / 63)],
    ids=["cat", "disc"],
)
def test_the_mean_is_that_of_the_law(likelihood, error):
    output = 2 * torch.randn(4, likelihood.outputs_per_value, 8, 8, dtype=torch.float64)
    levels = torch.linspace(0, 1, 64, dtype=torch.float64)
    expected = (likelihood.distribution(output).probs * levels).sum(-1)
    torch.testing.assert_close(likelihood.mean(output), expected, rtol=0, atol=error)


def test_every_level_is_found_again_in_float32():
    output, x = torch.randn(100, 100, 1, 1), (torch.arange(100) / 99).view(100, 1, 1, 1)
    assert not torch.equal((99 * x).long().flatten(), torch.arange(100))  # some are rounded to less
    expected = output.view(100, 100).log_softmax(1).diagonal()
    torch.testing.assert_close(CategoricalLikelihood(100).log_prob(output, x), expected)


def test_halves_are_summed_in_single_precision():
    for given, summed in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert at_least_float32(torch.zeros(1, dtype=given)).dtype == summed
