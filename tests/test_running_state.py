"""Running statistics keep their precision in a model that is converted to half precision."""

import copy

import lightning as L
import pytest
import torch

import stochastic_layers as sl
from lightning_modules import VAE
from lightning_modules.data import Digits

LAYERS = {
    "reinforce": {},
    "nvil": {},
    "double_cv": {},
    "rodeo": {},
    "vq": {"code_dim": 3, "num_codes": 8},
    "residual_vq": {"code_dim": 3, "num_codes": 8},
    "diveq": {"code_dim": 3, "num_codes": 8},
}


def trained(layer, dtype, steps=300):
    """The layer after some steps on the same params, which bfloat16 can write down, and noise."""
    torch.manual_seed(1)
    params = torch.randn(256, layer.in_features).bfloat16()
    for _ in range(steps):
        sample = layer.sample(params.to(dtype).requires_grad_())
        cost = 3 + sample.z.float().sum(-1)
        sample.surrogate(cost).sum().backward()
    return layer


@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16)], ids=["bfloat16", "to"])
def test_half_precision_is_that_of_the_parameters(name, convert):
    layer = trained(sl.create(name, latent_dim=2, **LAYERS[name]), torch.float32, steps=3)
    exact = copy.deepcopy(dict(layer.named_buffers()))
    convert(layer)
    for key, buffer in layer.named_buffers():
        assert torch.equal(buffer, exact[key]) and buffer.dtype == exact[key].dtype, key
    assert all(p.dtype in (torch.bfloat16, torch.float16) for p in layer.parameters())
    assert all(b.dtype == torch.float64 for b in layer.double().buffers() if b.is_floating_point())


def test_a_half_default_dtype_leaves_running_statistics_alone():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = sl.create("reinforce", latent_dim=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {b.dtype for b in layer.buffers()} == {torch.float32}


@pytest.mark.parametrize("name", ["reinforce", "vq"])
def test_a_bfloat16_layer_has_the_statistics_of_a_float32_one(name):
    layers = [sl.create(name, latent_dim=2, **LAYERS[name]) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    single, half = trained(layers[0], torch.float32), trained(layers[1].bfloat16(), torch.bfloat16)
    for (key, expected), got in zip(single.named_buffers(), half.buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["double_cv", "rodeo", "reinforce"])
def test_statistics_train_under_bf16_true(name):
    model = VAE(name, {"latent_dim": 8})
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=3, limit_val_batches=1, precision="bf16-true", **quiet
    )
    trainer.fit(model, Digits(binarization="dynamic"))
    assert torch.isfinite(trainer.callback_metrics["val/elbo"])
    assert {b.dtype for b in model.layer.buffers()} == {torch.float32}
