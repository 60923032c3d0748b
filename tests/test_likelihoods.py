"""Likelihoods of a model: their masses, shapes and precision."""

import copy

import pytest
import torch

from lightning_modules import VAE, GaussianLikelihood, HierarchicalVAE


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
