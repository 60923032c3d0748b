"""Every registered layer trains the VAE on the digits, through the command line, by its name alone."""

import sys

import lightning as L
import pytest
from quiet_trainer import quiet_trainer

import stochastic_layers as sl
from lightning_modules import VAE
from lightning_modules.cli import main
from lightning_modules.data import Digits

pytestmark = pytest.mark.slow


def validated(model):
    """val/elbo on the digits."""
    return quiet_trainer().validate(model, Digits(binarization="dynamic"), verbose=False)[0]["val/elbo"]


@pytest.mark.parametrize("name", sl.list_layers())
def test_a_layer_improves_the_bound(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stochastic-layers"])
    arguments = [
        "fit",
        f"--model.layer={name}",
        "--data=Digits",
        "--data.binarization=dynamic",
        "--model.iwae_samples={}",
        "--trainer.max_steps=250",
        "--trainer.check_val_every_n_epoch=25",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    main(arguments)
    trained = VAE.load_from_checkpoint("runs/version_0/checkpoints/best.ckpt", weights_only=True)
    L.seed_everything(0, verbose=False)
    at_start = validated(VAE(name))
    assert at_start < -44  # pixels of probability one half: 64 log 2 is 44.4 nats
    assert validated(trained) > -29.5 - _constant_kl(trained)  # independent pixels at their means reach about -27


def _constant_kl(model):
    """Quantisers have a KL that does not depend on the data: each code costs log K nats."""
    if model.layer.family.name != "quantized":
        return 0.0
    data = Digits(binarization="dynamic")
    data.setup()
    x, _ = next(iter(data.val_dataloader()))
    return float(model.terms(x).kl.sum(-1).mean())
