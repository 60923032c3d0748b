"""The monitor on a GPU: float16 with its gradient scaler, and the random state of the device."""

import math

import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer

from lightning_modules import VAE, GradientVarianceMonitor, score_layers
from lightning_modules.data import Digits
from stochastic_layers.diagnostics import preserved

pytestmark = pytest.mark.gpu

LOO = {"latent_dim": 4, "num_samples": 2, "baseline": "leave_one_out"}


def train(monitor, precision, optimizer):
    L.seed_everything(3, verbose=False)
    trainer = quiet_trainer(
        accelerator="gpu", devices=1, precision=precision, max_steps=6, log_every_n_steps=2, callbacks=[monitor]
    )
    model = VAE("reinforce", LOO, optimizer=optimizer)
    trainer.fit(model, Digits(batch_size=20, binarization="dynamic"))
    return model, trainer.callback_metrics


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_moments_are_unscaled_and_weights_untouched(precision, fused):
    def optimizer(groups):
        return torch.optim.Adam(groups, fused=fused)

    full = dict(every_n_steps=1, num_draws=3, weights=True, decay=0.9, basket=["disarm"])
    never, _ = train(GradientVarianceMonitor(every_n_steps=0), precision, optimizer)
    monitor = GradientVarianceMonitor(**full)
    watched, metrics = train(monitor, precision, optimizer)
    for a, b in zip(never.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for key in ("grad", "weight_grad", "moving_grad"):
        assert math.isfinite(float(metrics[f"train/{key}_variance"]))
    reference = GradientVarianceMonitor(**full)
    train(reference, "32-true", optimizer)
    size, other = float(monitor.moments[0].mean.norm()), float(reference.moments[0].mean.norm())
    assert size == pytest.approx(other, rel=0.5)  # other noise, but no factor of 65,536


def test_scoring_restores_the_devices_random_state():
    model = VAE("reinforce", LOO).cuda()
    x = torch.rand(4, 1, 8, 8).round()
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    scores = score_layers(model, x, ["disarm", "gumbel_rao"], num_draws=2000)
    after = torch.cuda.get_rng_state(), torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scores[0].bias < 5 * scores[0].bias_standard_error and scores[1].bias > 5 * scores[1].bias_standard_error
    with preserved(model):
        torch.rand(3, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
