"""The VAE: any layer by name or object, true bounds, one optimizer, plain checkpoints, undisturbed training."""

import math

import pytest
import torch
from quiet_trainer import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stochastic_layers as sl
from lightning_modules import ELBO, VAE, GradientVarianceMonitor, HierarchicalVAE, ReproducibleNoise
from lightning_modules.due import log_interval
from stochastic_layers.testing import enumerate_outcomes

DISCRETE = [
    ("straight_through", {"latent_dim": 3}),
    ("reinforce", {"latent_dim": 3, "num_samples": 4, "baseline": "leave_one_out"}),
    ("gumbel_softmax", {"latent_dim": 2, "num_categories": 3}),
]


@pytest.fixture
def loader():
    x = (torch.rand(40, 1, 8, 8) > 0.5).float()
    return DataLoader(TensorDataset(x), batch_size=8)


def trainer(tmp_path, **options):
    defaults = dict(log_every_n_steps=2, max_epochs=1, default_root_dir=tmp_path, num_sanity_val_steps=0)
    return quiet_trainer(**(defaults | options))


def exact_log_likelihood(model, x):
    """log p(x) by summing over all z."""
    z = enumerate_outcomes(model.layer).float().unsqueeze(1).expand(-1, len(x), -1)
    log_prior = model.layer.family.log_prob(model.prior(x.device), z)
    return (model.log_likelihood(z, x) + log_prior).logsumexp(0)


@pytest.mark.parametrize(("name", "options"), DISCRETE, ids=lambda v: str(v))
@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_validation_elbo_is_below_and_the_iwae_bound_close_to_the_exact_log_likelihood(name, options, prior, tmp_path):
    model = VAE(name, options, prior=prior, objective={"name": "elbo", "beta": 0.1}, iwae_samples={"val": 500})
    x = (torch.rand(16, 1, 8, 8) > 0.5).float()
    run = trainer(tmp_path)
    run.validate(model, DataLoader(TensorDataset(x), batch_size=8), verbose=False)
    with torch.no_grad():
        exact = float(exact_log_likelihood(model, x).mean())
        q = model.layer.distribution(model.encode(x))
        z = enumerate_outcomes(model.layer).float().unsqueeze(1).expand(-1, len(x), -1)
        log_q = model.layer.family.log_prob(q, z)
        log_joint = model.log_likelihood(z, x) + model.layer.family.log_prob(model.prior(x.device), z)
        elbo = float((log_q.exp() * (log_joint - log_q)).sum(0).mean())
        spread = float((log_q.exp() * (model.log_likelihood(z, x) ** 2)).sum(0).mean()) ** 0.5
    assert elbo < exact
    assert float(run.callback_metrics["val/elbo"]) == pytest.approx(elbo, abs=5 * spread / math.sqrt(16))
    assert float(run.callback_metrics["val/iwae"]) == pytest.approx(exact, abs=0.05)
    parts = run.callback_metrics["val/reconstruction"] - run.callback_metrics["val/kl"]
    assert float(parts) == pytest.approx(float(run.callback_metrics["val/elbo"]), abs=1e-4)


def test_importance_weighted_bound_in_chunks_is_the_bound_at_once(monkeypatch):
    model = VAE("gaussian", {"latent_dim": 2})
    x = (torch.rand(4, 1, 8, 8) > 0.5).float()
    draws = torch.randn(7, 4, 2)
    taken = []

    def sample(q, num_samples):
        taken.append(num_samples)
        start = sum(taken[:-1]) % 7
        return draws[start : start + num_samples]

    monkeypatch.setattr(model.layer.family, "sample", sample)
    whole = model.importance_weighted_bound(x, 7)
    monkeypatch.setattr("lightning_modules.base.MAX_POINTS", 12)
    torch.testing.assert_close(model.importance_weighted_bound(x, 7), whole)
    assert taken == [7, 3, 3, 1]


def test_analytic_and_monte_carlo_kl_give_the_same_gradient_in_the_mean():
    model = VAE("reinforce", {"latent_dim": 2, "num_samples": 2, "baseline": "leave_one_out"})
    x = (torch.rand(2, 1, 8, 8) > 0.5).float()
    bias = model.encoder[-1].bias

    def gradients(method, draws):
        model.kl_method = method
        rows = []
        for _ in range(draws):
            (g,) = torch.autograd.grad(model.objective.loss(model.terms(x), 0).sum(), bias)
            rows.append(g)
        return torch.stack(rows)

    a, b = gradients("analytic", 400), gradients("monte_carlo", 400)
    error = ((a.var(0) + b.var(0)) / 400).sqrt()
    assert ((a.mean(0) - b.mean(0)) / error).abs().max() < 5


@pytest.mark.parametrize("name", sl.list_layers())
def test_every_registered_layer_fits_by_its_name_alone(name, loader, tmp_path):
    model = VAE(name, data_shape=(1, 8, 8), lr=1e-3)
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, loader, loader)
    assert math.isfinite(float(run.callback_metrics["train/grad_variance"]))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "gaussian", "discretized_logistic"])
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_likelihoods_and_networks_fit_together(likelihood, network, loader, tmp_path):
    options = (
        {"name": likelihood, "num_levels": 5} if likelihood in ("categorical", "discretized_logistic") else likelihood
    )
    model = VAE("gaussian", {"latent_dim": 4}, likelihood=options, encoder=network, decoder=network)
    trainer(tmp_path, max_steps=1).fit(model, loader, loader)
    assert model.generate(3).shape == model.reconstruct(torch.zeros(3, 1, 8, 8)).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: VAE("gaussian", iwae_samples={"val": 5}),
        lambda: HierarchicalVAE(["disarm", "gaussian"], iwae_samples={"val": 5}),
        lambda: HierarchicalVAE(["disarm", "gaussian"], prior="standard"),
    ],
    ids=["vae", "two", "two with a prior without params"],
)
def test_every_use_of_the_decoder_works_in_other_precisions(build, precision, loader, tmp_path):
    model, run = build(), trainer(tmp_path, precision=precision)
    run.fit(model, loader, loader)
    assert run.callback_metrics["val/elbo"].isfinite()
    assert model.reconstruct(torch.zeros(2, 1, 8, 8, dtype=model.dtype)).isfinite().all()
    assert model.generate(2).isfinite().all()


def test_odd_image_sizes_go_through_the_convolutional_nets():
    model = VAE("gaussian", {"latent_dim": 4}, encoder="conv", decoder="conv", data_shape=(3, 7, 10))
    assert model.generate(2).shape == (2, 3, 7, 10)


def test_latents_at_every_position_of_a_convolutional_encoder(loader, tmp_path):
    encoder = nn.Conv2d(1, 4, 3, stride=2, padding=1)
    decoder = nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1)
    layer = sl.create("reinforce", latent_dim=4, num_samples=2, baseline="leave_one_out")
    model = VAE(layer, encoder=encoder, decoder=decoder, iwae_samples={"val": 5})
    run = trainer(tmp_path)
    run.fit(model, loader, loader)
    assert model.latent_shape == (4, 4)
    assert run.callback_metrics["val/elbo"] < run.callback_metrics["val/iwae"] + 1
    assert model.generate(3).shape == (3, 1, 8, 8)
    assert model.predict_step((torch.zeros(2, 1, 8, 8),), 0).shape == (2, 4, 4, 4)


def test_parts_that_do_not_fit_are_found_at_construction():
    with pytest.raises(ValueError, match=r"needed an encoder with outputs \[N, 8\].*got \[2, 9\]"):
        VAE("gaussian", {"latent_dim": 4}, encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 9)))
    with pytest.raises(ValueError, match=r"needed a decoder with outputs \[N, 1, 8, 8\].*got \[2, 63\]"):
        VAE("gaussian", {"latent_dim": 4}, decoder=nn.Linear(4, 63))
    images = nn.Sequential(nn.Flatten(), nn.Linear(784, 8))
    with pytest.raises(ValueError, match=r"needed an encoder of data \[2, 1, 8, 8\].*pass the data_shape"):
        VAE("gaussian", {"latent_dim": 4}, encoder=images)
    with pytest.raises(ValueError, match=r"needed a decoder of z \[2, 4\].*layer.out_features inputs"):
        VAE("gaussian", {"latent_dim": 4}, decoder=nn.Linear(5, 64))
    with pytest.raises(ValueError, match=r"needed a closed-form KL.*none for family 'flow'.*set free_bits=0"):
        VAE("flow", {"latent_dim": 4}, objective={"name": "elbo", "free_bits": 0.1})
    with pytest.raises(ValueError, match=r"got \[2, 64\]; end it with nn.Unflatten\(1, \(1, 8, 8\)\)"):
        VAE("gaussian", {"latent_dim": 4}, decoder=nn.Linear(4, 64))
    with pytest.raises(ValueError, match=r"a density for the prior 'learned', got a quantizer.*use prior='standard'"):
        VAE("vq", prior="learned")
    with pytest.raises(ValueError, match=r"got 'stochastic_layers\.GumbelSoftmax'; on the command line a class path"):
        VAE("stochastic_layers.GumbelSoftmax")
    with pytest.raises(ValueError, match="did you mean 'standard'"):
        VAE("gaussian", prior="standart")
    with pytest.raises(ValueError, match="has no option 'betta'; did you mean 'beta'"):
        VAE("gaussian", objective={"name": "elbo", "betta": 2})
    with pytest.raises(ValueError, match="needed beta >= 0"):
        ELBO(beta=-1)
    with pytest.raises(ValueError, match="needed a pathwise layer for objective 'iwae' with gradient 'pathwise'"):
        VAE("reinforce", objective="iwae")
    with pytest.raises(ValueError, match="no layer_options with a layer object"):
        VAE(sl.create("gaussian", latent_dim=2), {"latent_dim": 3})
    with pytest.raises(ValueError, match="'val' and 'test' in iwae_samples"):
        VAE("gaussian", iwae_samples={"train": 5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_shape": ()}, r"needed data_shape as the sizes of one example.*got \(\)"),
        ({"data_shape": 64}, "needed data_shape as the sizes of one example.*got 64"),
        ({"data_shape": (1, 8.0, 8)}, "needed data_shape as the sizes of one example"),
        ({"data_shape": (1, 0, 8)}, "needed data_shape as the sizes of one example"),
        ({"optimizer": "adam"}, "needed a function of parameter groups as optimizer, got 'adam'"),
        ({"iwae_samples": {"val": -1}}, r"needed iwae_samples\['val'\] >= 0, got -1; 0 is none"),
        (
            {"encoder": "conv", "data_shape": (64,)},
            r"needed data_shape \(channels, height, width\) for a convolutional",
        ),
        ({"likelihood": {"name": "gaussian", "initial_scale": 0}}, "needed a finite initial_scale >= 0.0001, got 0"),
        ({"likelihood": {"name": "categorical", "num_levels": 1}}, "needed num_levels >= 2, got 1"),
        ({"likelihood": {"name": "discretized_logistic", "num_levels": 1}}, "needed num_levels >= 2, got 1"),
        ({"iwae_samples": {"test": 2.5}}, r"needed iwae_samples\['test'\] >= 0, got 2.5"),
    ],
)
def test_options_out_of_range_are_found_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        VAE("gaussian", {"latent_dim": 4}, **options)


@pytest.mark.parametrize("every", [2, 3])
def test_two_optimizers_by_hand_are_logged_as_often_as_one(every, loader, tmp_path):
    class ByHand(VAE):
        def __init__(self):
            super().__init__("straight_through", {"latent_dim": 4})
            self.automatic_optimization = False
            self.logged = set()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.encoder, self.decoder)]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def log(self, name, *words, **options):
            self.logged.add((self.trainer.fit_loop.epoch_loop.batch_idx, name))
            super().log(name, *words, **options)

    model = ByHand()
    run = trainer(tmp_path, log_every_n_steps=every, limit_val_batches=0)
    run.fit(model, DataLoader(loader.dataset, batch_size=5), loader)
    assert run.global_step == 16
    due = range(every - 1, 8, every)
    assert {batch for batch, _ in model.logged} == set(due)
    assert {(batch, name) for batch in due for name in ("train/elbo", "train/grad_variance")} <= model.logged


def test_kl_warmup_rises_linearly_and_free_bits_stop_the_gradient_of_a_small_kl():
    assert [ELBO(beta=2, kl_warmup_steps=4).weight(s) for s in (0, 2, 4, 9)] == [0, 1, 2, 2]
    model = VAE("gaussian", {"latent_dim": 2}, objective={"name": "elbo", "free_bits": 100.0})
    x = (torch.rand(4, 1, 8, 8) > 0.5).float()
    terms = model.terms(x)
    assert terms.kl is not None
    loss = model.objective.loss(terms, 0) - terms.sample.surrogate(-terms.log_likelihood)
    (gradient,) = torch.autograd.grad(loss.sum(), model.encoder[-1].bias, allow_unused=True)
    assert float(loss[0].detach()) == pytest.approx(200.0, abs=1e-3)
    assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize("build", [VAE, lambda layer, **o: HierarchicalVAE([layer], **o)], ids=["vae", "hierarchy"])
def test_the_weight_of_the_kl_is_that_of_the_optimizer_step(build, loader, tmp_path):
    steps = []

    class Watched(ELBO):
        def weight(self, step):
            steps.append(step)
            return super().weight(step)

    monitor = GradientVarianceMonitor(every_n_steps=0)
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, limit_val_batches=0, callbacks=[monitor])
    run.fit(build("gaussian", objective=Watched(kl_warmup_steps=4)), loader, loader)
    assert steps == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]  # of five batches an epoch, the last one alone


def test_pathwise_iwae_loss_is_the_bound(monkeypatch):
    model = VAE("gaussian", {"latent_dim": 2, "num_samples": 5}, objective="iwae")
    terms = model.terms((torch.rand(4, 1, 8, 8) > 0.5).float())
    weights = (terms.log_likelihood + terms.log_prior - terms.log_q).exp()
    torch.testing.assert_close(model.objective.loss(terms, 0), -weights.mean(0).log())


def test_each_validation_counts_its_own_examples(loader, tmp_path):
    model = VAE("gaussian", {"latent_dim": 2})
    trainer(tmp_path, max_epochs=3, limit_train_batches=1).fit(model, loader, loader)
    assert int(model.evaluation("val").kl_per_dimension.count) == len(loader.dataset)


def test_checkpoints_hold_plain_data_and_rebuild_the_model(loader, tmp_path):
    model = VAE("reinforce", {"latent_dim": 4, "baseline": "learned"}, prior="learned", lr=0.01)
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, loader, loader)
    run.save_checkpoint(tmp_path / "model.ckpt")
    again = VAE.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert again.layer.latent_dim == 4 and again.lr == 0.01
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_a_checkpoint_of_a_layer_object_asks_for_the_object(loader, tmp_path):
    layer = sl.create("gaussian", latent_dim=3)
    run = trainer(tmp_path, max_steps=1)
    run.fit(VAE(layer), loader, loader)
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="pass the same object"):
        VAE.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert VAE.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, layer=layer).layer is layer


def test_gradient_probe_changes_neither_noise_nor_buffers_nor_gradients():
    decoder = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Unflatten(1, (1, 8, 8)))
    model = VAE("reinforce", {"latent_dim": 4}, decoder=decoder)
    x = (torch.rand(8, 1, 8, 8) > 0.5).float()
    model.training_step((x,), 1).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    assert model.gradient_statistics(x, num_draws=4).total_variance > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_logged_gradient_variance_is_that_of_brute_force():
    model = VAE("straight_through", {"latent_dim": 4})
    x = (torch.rand(6, 1, 8, 8) > 0.5).float()
    params = model.encode(x).detach()
    rows = []
    for _ in range(1500):
        leaf = params.clone().requires_grad_()
        sample = model.layer.sample(leaf)
        cost = -model.log_likelihood(sample.z, x)
        rows.append(torch.autograd.grad(sample.surrogate(cost).sum(), leaf)[0])
    rows = torch.stack(rows)
    brute = float(rows.var(0).sum() / len(x))
    probes = []
    for seed in range(100):
        torch.manual_seed(seed)  # the probe gives the random state back
        probes.append(model.gradient_statistics(x, num_draws=8).total_variance)
    probes = torch.tensor(probes)
    deviation = (rows - rows.mean(0)).square().sum((1, 2)) / len(x)
    error = (float(probes.var() / 100) + float(deviation.var() / 1500)) ** 0.5
    assert error < 0.05 * brute
    assert abs(float(probes.mean()) - brute) < 5 * error


@pytest.mark.parametrize(("given", "interval"), [(0, 1), (1, 1), (7, 7)])
def test_the_interval_of_the_log_is_that_of_the_trainer(given, interval, tmp_path):
    assert log_interval(trainer(tmp_path, log_every_n_steps=given)) == interval


def test_noise_is_added_by_default_and_not_twice(loader, tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(VAE("gaussian"), loader, loader)
    assert sum(isinstance(c, ReproducibleNoise) for c in run.callbacks) == 1
    own = ReproducibleNoise(seed=3)
    run = trainer(tmp_path, max_steps=1, callbacks=[own])
    run.fit(VAE("gaussian"), loader, loader)
    assert [c for c in run.callbacks if isinstance(c, ReproducibleNoise)] == [own]


def test_a_refused_model_leaves_the_parts_it_was_given_in_training_mode():
    layer, encoder = sl.create("reinforce", latent_dim=4), nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Dropout())
    with pytest.raises(ValueError, match="needed a decoder with outputs"):
        VAE(layer, encoder=encoder, decoder=nn.Linear(4, 63))
    assert layer.training and all(module.training for module in encoder.modules())


@pytest.mark.parametrize("build", [VAE, lambda *args, **parts: HierarchicalVAE([*args], prior="standard", **parts)])
def test_networks_that_return_a_pair_are_answered_with_how_to_join_it(build):
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)), x

    layer = sl.create("gaussian", latent_dim=2)
    for part, network in (("encoder", Pair(64, 4)), ("decoder", Pair(2, 64))):
        with pytest.raises(ValueError, match=f"needed an? {part} whose output is one tensor, got a tuple; join"):
            build(layer, **{part: network})
