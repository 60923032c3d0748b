"""The monitor: three measurements against brute force, and the promise that watching changes nothing."""

import math

import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer

from lightning_modules import VAE, GradientMoments, GradientVarianceMonitor, HierarchicalVAE, StochasticClassifier
from lightning_modules.data import Digits
from lightning_modules.probe import probe_params, probe_weights

LOO = {"latent_dim": 4, "num_samples": 2, "baseline": "leave_one_out"}
BOTH = [{"name": "reinforce", **LOO}, {"name": "straight_through", "latent_dim": 3}]


class Everything(L.Callback):
    """Keeps every logged value by step."""

    def __init__(self):
        self.values = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for key, value in trainer.callback_metrics.items():
            self.values.setdefault(key, {})[trainer.global_step] = float(value)


def train(model_of, monitor=None, *, steps=6, compiled=False, ckpt_path=None, **options):
    L.seed_everything(3, verbose=False)
    history = Everything()
    callbacks = [history, *([monitor] if monitor else [])]
    options = {"max_steps": steps, "log_every_n_steps": 2, **options}
    trainer = quiet_trainer(callbacks=callbacks, **options)
    model = model_of()
    data = Digits(batch_size=20, binarization="dynamic")
    trainer.fit(torch.compile(model, backend="eager") if compiled else model, data, ckpt_path=ckpt_path)
    return model, history.values, trainer


def weights(model):
    return [*model.state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


FULL = dict(every_n_steps=1, num_draws=3, weights=True, decay=0.9)


# ---- watching changes nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        pytest.param({"compiled": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, at a graph break
def test_weights_are_bit_identical_with_and_without_a_monitor(options):
    def model_of():
        # clipping needs an optimizer that is not fused under mixed precision; the baseline has state to disturb
        return VAE("reinforce", {"latent_dim": 4, "baseline": "moving_average"}, optimizer=torch.optim.Adam)

    never, values, _ = train(model_of, GradientVarianceMonitor(every_n_steps=0), **options)
    assert not any("grad" in key for key in values)
    watched, values, _ = train(model_of, GradientVarianceMonitor(**FULL, basket=["disarm", "nvil"]), **options)
    assert same(never, watched)
    for key in ("grad", "weight_grad", "moving_grad"):
        assert math.isfinite(values[f"train/{key}_variance"][6]) and values[f"train/{key}_variance"][6] > 0
        assert math.isfinite(values[f"train/{key}_snr"][6])
    assert values["train/grad_variance/disarm"][6] != values["train/grad_variance"][6]


def test_measurements_are_made_in_the_precision_of_training():
    seen = set()

    def model_of():
        model = VAE("reinforce", LOO)
        model.decoder.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        seen.clear()  # of the dry run, which is not training
        return model

    train(model_of, GradientVarianceMonitor(**FULL), steps=2, precision="bf16-mixed", limit_val_batches=0)
    assert seen == {torch.bfloat16}


def test_hierarchies_are_watched_layer_by_layer():
    def model_of():
        return HierarchicalVAE(BOTH)

    never, _, _ = train(model_of, GradientVarianceMonitor(every_n_steps=0))
    watched, values, _ = train(model_of, GradientVarianceMonitor(**FULL))
    assert same(never, watched)
    for key in ("grad", "weight_grad"):
        parts = [values[f"train/{key}_variance/{level}"][6] for level in (1, 2)]
        assert values[f"train/{key}_variance"][6] == pytest.approx(sum(parts))
    sizes = [sum(p.numel() for p in network.parameters()) for network in watched.inference_networks]
    parts = [values[f"train/moving_grad_variance/{level}"][6] * n for level, n in enumerate(sizes, 1)]
    assert values["train/moving_grad_variance"][6] == pytest.approx(sum(parts) / sum(sizes))


def test_the_default_monitor_is_replaced_by_the_users_own():
    _, values, trainer = train(lambda: VAE("reinforce", LOO))
    assert set(values["train/grad_variance"]) == {2, 3, 4, 5, 6}  # from the first measurement on
    assert "train/weight_grad_variance" not in values
    assert sum(isinstance(c, GradientVarianceMonitor) for c in trainer.callbacks) == 1
    _, _, trainer = train(lambda: VAE("reinforce", LOO), GradientVarianceMonitor(every_n_steps=3))
    assert sum(isinstance(c, GradientVarianceMonitor) for c in trainer.callbacks) == 1


def test_accumulation_measures_once_a_step_and_the_moments_see_whole_steps():
    monitor = GradientVarianceMonitor(every_n_steps=1, decay=0.5)
    _, values, trainer = train(lambda: VAE("reinforce", LOO), monitor, steps=4, accumulate_grad_batches=3)
    assert monitor.moments[0].update_count == trainer.global_step == 4
    assert len(set(values["train/grad_variance"].values())) == 4


def test_moments_see_the_gradient_before_clipping():
    found = []
    for options in ({}, {"gradient_clip_val": 1e-3}):
        monitor = GradientVarianceMonitor(decay=0.9)
        train(lambda: VAE("reinforce", LOO), monitor, steps=1, **options)
        found.append(monitor.moments[0].mean)
    assert torch.equal(*found) and float(found[0].norm()) > 1e-2


def test_a_resumed_run_goes_on_with_its_moments_and_its_noise(tmp_path):
    def run(epochs, path=None):
        options = dict(max_steps=-1, max_epochs=epochs, limit_train_batches=3, limit_val_batches=0)
        return train(lambda: VAE("reinforce", LOO), GradientVarianceMonitor(**FULL), ckpt_path=path, **options)

    whole, values, _ = run(2)
    run(1)[2].save_checkpoint(tmp_path / "half.ckpt")
    again, resumed, _ = run(2, tmp_path / "half.ckpt")
    assert same(whole, again)
    for key in ("grad_variance", "weight_grad_variance", "moving_grad_variance"):
        assert resumed[f"train/{key}"] == {step: values[f"train/{key}"][step] for step in (4, 5, 6)}


# ---- the numbers are right ------------------------------------------------------------------------------------------


def separate_gradients(model, x, num_draws, of):
    """The gradient of the mean loss, once for each fresh draw of the noise."""
    rows = []
    for _ in range(num_draws):
        loss = model.loss(model.terms(x)).mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, of)]).double())
    return torch.stack(rows)


SMALL = dict(encoder={"name": "mlp", "hidden_features": (6,)}, decoder={"name": "mlp", "hidden_features": ()})


@pytest.mark.parametrize(
    "model_of", [lambda: VAE("reinforce", LOO, **SMALL), lambda: HierarchicalVAE(BOTH, **SMALL)], ids=["one", "two"]
)
def test_noise_at_the_weights_is_that_of_separate_backward_passes(model_of):
    torch.manual_seed(0)
    model, x = model_of(), torch.rand(5, 1, 8, 8).round()
    statistics = probe_weights(model, x, 600)
    for network, found in zip(model.inference_networks, statistics, strict=True):
        rows = separate_gradients(model, x, 600, list(network.parameters()))
        assert found.mean.shape == rows.shape[1:] and found.num_draws == 600
        error = ((rows.var(0) + found.variance) / 600).sqrt() + 1e-9
        assert bool(((found.mean - rows.mean(0)).abs() < 5.5 * error).all())
        squares = (rows - rows.mean(0)).square().sum(1)
        error = float(squares.std()) * (2 / 600) ** 0.5
        assert abs(found.total_variance - float(rows.var(0).sum())) < 5 * error < 0.35 * found.total_variance


def test_measurements_at_params_and_weights_are_different_numbers():
    torch.manual_seed(0)
    model, x = VAE("reinforce", LOO), torch.rand(5, 1, 8, 8).round()
    (params,), (at_weights,) = probe_params(model, x, 50), probe_weights(model, x, 50)
    assert params.mean.shape == (5, 4)
    assert at_weights.mean.shape == (sum(p.numel() for p in model.encoder.parameters()),)
    assert params.total_variance != pytest.approx(at_weights.total_variance, rel=0.05)


def test_moments_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    gradients = 3 + torch.randn(40, 7, generator=generator, dtype=torch.float64)
    moments = GradientMoments(decay=0.9)
    for row in gradients:
        moments.update([row[:3], row[3:].view(2, 2)])
    w = 0.9 ** torch.arange(39, -1, -1, dtype=torch.float64)
    w = w / w.sum()
    mean = (w[:, None] * gradients).sum(0)
    variance = ((w[:, None] * gradients.square()).sum(0) - mean.square()) / (1 - w.square().sum())
    found = moments.compute()
    torch.testing.assert_close(found["variance"], variance.mean(), rtol=1e-5, atol=0)
    signal = mean.square().mean() - w.square().sum() * variance.mean()
    torch.testing.assert_close(found["snr"], (signal / variance.mean()).sqrt(), rtol=1e-5, atol=0)


def test_moments_of_a_stationary_gradient_are_unbiased_from_the_second_step_on():
    torch.manual_seed(0)
    moments = GradientMoments(decay=0.999)
    moments.update([torch.randn(20_000)])
    assert math.isnan(float(moments.compute()["variance"]))
    for steps in range(2, 20):
        moments.update([torch.randn(20_000)])
        # relative standard error of the mean of 20,000 sample variances of `steps` draws
        assert abs(float(moments.compute()["variance"]) - 1) < 5 * (2 / (steps - 1) / 20_000) ** 0.5


def test_moments_survive_saving_and_refuse_another_size():
    moments = GradientMoments(decay=0.9)
    for _ in range(3):
        moments.update([torch.randn(4)])
    again = GradientMoments(decay=0.9)
    again.load_state_dict(moments.state_dict())
    gradient = torch.randn(4)
    moments.update([gradient])
    again.update([gradient])
    assert torch.equal(moments.compute()["variance"], again.compute()["variance"])
    with pytest.raises(ValueError, match="4 coordinates"):
        moments.update([torch.randn(5)])


class Scaled:
    """What the monitor asks of a Trainer whose gradients are scaled."""

    log_every_n_steps = 100
    _batches_that_stepped = 0

    def __init__(self):
        self.precision_plugin = self.fit_loop = self.epoch_loop = self
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.scaler.scale(torch.ones(()))  # which makes the scale


def test_scaled_gradients_are_divided_and_steps_that_overflow_are_left_out():
    model, x, trainer = VAE("enumeration", {"latent_dim": 3}), torch.rand(4, 1, 8, 8).round(), Scaled()
    weights = list(model.encoder.parameters())
    gradient = torch.autograd.grad(model.loss(model.terms(x)).mean(), weights)
    monitor = GradientVarianceMonitor(decay=0.9)
    monitor.on_fit_start(trainer, model)
    for handles_unscaling, factor in ((False, 1.0), (True, 1024.0), (True, math.inf)):
        optimizer = torch.optim.SGD(weights)
        optimizer._step_supports_amp_scaling = handles_unscaling  # as fused optimizers have it
        for weight, g in zip(weights, gradient, strict=True):
            weight.grad = g * factor
        monitor.on_before_optimizer_step(trainer, model, optimizer)
    assert monitor.moments[0].update_count == 2
    torch.testing.assert_close(monitor.moments[0].mean, torch.cat([g.flatten() for g in gradient]))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": -1}, "every_n_steps >= 0"),
        ({"num_draws": 1}, "num_draws >= 2"),
        ({"num_examples": 0}, "num_examples >= 1"),
        ({"decay": 1.0}, "decay < 1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradientVarianceMonitor(**options)


def test_a_basket_that_does_not_fit_is_refused_as_training_starts():
    with pytest.raises(ValueError, match="basket of layers that fit the model, got 'gaussian': "):
        train(lambda: VAE("reinforce", LOO), GradientVarianceMonitor(basket=["disarm", "gaussian"]))


@pytest.mark.filterwarnings("ignore:Found 2 module")  # Lightning's own word on it
def test_a_decoder_is_trained_behind_an_encoder_and_a_layer_that_are_frozen():
    def frozen():
        model = VAE("reinforce", LOO)
        model.encoder.requires_grad_(False)
        model.layer.eval()
        return model

    model, history, _ = train(frozen)
    assert "train/elbo" in history and "train/grad_variance" not in history
    assert not same(model.decoder, frozen().decoder)


def test_other_modules_are_refused():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(ValueError, match="needed a VAE or HierarchicalVAE"):
        train(lambda: StochasticClassifier(network, num_classes=10), GradientVarianceMonitor())


# ---- no noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["vq", "enumeration"])
def test_a_gradient_without_noise_has_the_ratio_of_rounding_in_the_log(layer):
    monitor = GradientVarianceMonitor(every_n_steps=1, num_draws=3, weights=True, decay=0.9)
    _, values, _ = train(lambda: VAE(layer, {"latent_dim": 2}), monitor)
    assert all(math.isfinite(value) for series in values.values() for value in series.values())
    for key in ("grad", "weight_grad"):
        assert max(values[f"train/{key}_variance"].values()) < 1e-14
        assert 1e6 < min(values[f"train/{key}_snr"].values()) <= max(values[f"train/{key}_snr"].values()) < 1e7
    assert "train/moving_grad_snr" in values  # the data have noise of their own
