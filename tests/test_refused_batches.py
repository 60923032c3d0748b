"""Batches that a model cannot take are refused where they are first seen, or warned of."""

import pytest
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import VAE, HierarchicalVAE


def trainer(tmp_path, **options):
    defaults = dict(log_every_n_steps=2, max_epochs=1, default_root_dir=tmp_path, num_sanity_val_steps=0)
    return quiet_trainer(**(defaults | options))


@pytest.mark.parametrize("use", ["fit", "validate", "test"])
def test_grey_values_under_a_bernoulli_likelihood_are_warned_of_wherever_a_bound_is_measured(use, tmp_path):
    grey, bits = DataLoader(torch.rand(4, 1, 8, 8), 4), DataLoader(torch.rand(4, 1, 8, 8).round(), 4)
    model, run = VAE("gaussian", {"latent_dim": 2}), trainer(tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match="the Bernoulli likelihood got data other than 0 and 1"):
        run.fit(model, grey, bits) if use == "fit" else getattr(run, use)(model, grey, verbose=False)
    if use != "fit":
        getattr(run, use)(model, bits, verbose=False)


@pytest.mark.parametrize("likelihood", ["categorical", "discretized_logistic"])
@pytest.mark.parametrize("use", ["fit", "test"])
def test_data_beside_the_levels_of_a_likelihood_are_refused(likelihood, use, tmp_path):
    model, ends = VAE("gaussian", {"latent_dim": 2}, likelihood=likelihood), torch.zeros(4, 1, 8, 8)
    ends[0] = 1.0

    def run(x):
        loader = DataLoader(x, 4)
        getattr(trainer(tmp_path), use)(model, *([loader, loader] if use == "fit" else [loader]))

    for low, high in ((-1.0, 1.0), (0.0, 255.0)):
        with pytest.raises(ValueError, match=f"needed data from 0 to 1 .* got from {low:g} to {high:g}; divide"):
            run(low + (high - low) * ends)
    run(ends)


# who sees the data first: validation, the training step, or the gradient monitor that is due at it
FIRST = [{"num_sanity_val_steps": 2}, {"log_every_n_steps": 2}, {"log_every_n_steps": 1}]


@pytest.mark.parametrize("first", FIRST, ids=["validation", "training", "monitor"])
@pytest.mark.parametrize("build", [lambda: VAE("gaussian"), lambda: HierarchicalVAE(["gaussian"])], ids=["vae", "two"])
def test_data_of_another_shape_are_refused_with_the_remedy(build, first, tmp_path):
    images = DataLoader(TensorDataset(torch.zeros(8, 1, 28, 28)), batch_size=4)
    run = trainer(tmp_path, **first)
    with pytest.raises(ValueError, match=r"needed data \[N, 1, 8, 8\], got .*model with data_shape=\(1, 28, 28\)"):
        run.fit(build(), images, images)


@pytest.mark.parametrize("first", FIRST, ids=["validation", "training", "monitor"])
@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"image": torch.zeros(1, 8, 8)}, r"needed batches x or \(x, ...\), got dict"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), "needed floating-point data, got torch.uint8"),
    ],
    ids=["mapping", "bytes"],
)
def test_batches_that_are_mappings_or_integers_are_refused(example, message, first, tmp_path):
    batches = DataLoader([example] * 4, batch_size=2)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **first).fit(VAE("gaussian"), batches, batches)


def test_a_layer_in_evaluation_mode_is_not_trained_without_its_gradient(tmp_path):
    bits = DataLoader(torch.rand(4, 1, 8, 8).round(), 4)
    model = VAE("reinforce", {"latent_dim": 2, "num_samples": 2})
    model.layer.eval()
    with pytest.raises(ValueError, match=r"needed layer 'reinforce' in training mode, got eval\(\)"):
        trainer(tmp_path, max_steps=1).fit(model, bits, bits)
    model.encoder.requires_grad_(False)  # only what is behind the draws is trained
    with pytest.warns(UserWarning, match=r"Found 2 module\(s\) in eval mode"):
        trainer(tmp_path, max_steps=1).fit(model, bits, bits)
