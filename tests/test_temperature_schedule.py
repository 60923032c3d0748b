"""A scheduled temperature follows the optimizer step, and is refused where there is none to set."""

import lightning as L
import pytest
import torch
from image_runs import loader, trainer

from lightning_modules import VAE, TemperatureSchedule

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

OPTIONS = {"latent_dim": 2, "num_categories": 5}


class Watch(L.Callback):
    """Keeps the temperature of every step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, run, module, *args):
        self.seen[run.global_step - 1] = float(module.layer.temperature)


def test_temperature_follows_the_optimizer_step_through_a_restart(tmp_path):
    def run(schedule, **options):
        watch, ckpt = Watch(), options.pop("ckpt_path", None)
        L.seed_everything(0, verbose=False)
        model = VAE("gumbel_softmax", OPTIONS)
        run = trainer(tmp_path, callbacks=[schedule, watch], max_epochs=4, **options)
        run.fit(model, loader(), ckpt_path=ckpt)
        return run, watch.seen, model

    schedule = TemperatureSchedule(1.0, 0.1, steps=12, shape="linear")
    whole, seen, model = run(schedule)
    assert seen == pytest.approx({s: max(0.1, 1 - 0.9 * s / 12) for s in range(20)}, rel=1e-6)
    assert whole.callback_metrics["train/temperature"] == pytest.approx(0.1)
    half, first, _ = run(schedule, max_steps=10)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, second, resumed = run(schedule, ckpt_path=tmp_path / "half.ckpt")
    assert first | second == seen
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in model.state_dict().items())
    whole.save_checkpoint(tmp_path / "whole.ckpt")  # nothing is left to train: it stays as it is
    _, _, resumed = run(schedule, ckpt_path=tmp_path / "whole.ckpt")
    assert torch.equal(resumed.layer.temperature, model.layer.temperature)
    _, accumulated, _ = run(schedule, accumulate_grad_batches=5)
    assert accumulated[3] == pytest.approx(1 - 0.9 * 3 / 12)


def test_temperature_schedule_refuses_layers_without_a_temperature_to_set(tmp_path):
    learned = VAE("gumbel_softmax", OPTIONS | {"learn_temperature": True})
    for model, message in ((VAE("gaussian"), "got 'gaussian'"), (learned, "learn_temperature=True")):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, callbacks=[TemperatureSchedule()]).fit(model, loader())
