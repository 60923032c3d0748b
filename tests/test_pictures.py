"""Pictures: right, in any logger, and without a trace in training; and the numbers that are logged beside them."""

import lightning as L
import pytest
import torch
from image_runs import images, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import stochastic_layers as sl
from lightning_modules import VAE, CollapseWarning, HierarchicalVAE, Pictures, TemperatureSchedule
from lightning_modules.callbacks.figures import image_grid
from lightning_modules.callbacks.traversals import interpolations, traversal
from lightning_modules.data import Digits

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

LAYERS = {
    "gaussian": {"latent_dim": 3},
    "straight_through": {"latent_dim": 4},
    "gumbel_softmax": {"latent_dim": 2, "num_categories": 5},
    "vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 8},
    "residual_vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 4, "depth": 2},
    "lfq": {"latent_dim": 2, "code_dim": 3},
    "poisson": {"latent_dim": 3},
    "hard_concrete": {"latent_dim": 3},
    "invertible_gaussian": {"latent_dim": 2, "num_categories": 3},
}
IMAGES = {"samples", "reconstructions", "traversals", "interpolations"}


def model_of(name, **options):
    return VAE(name, LAYERS[name], **options).eval()


QUICK = ("gaussian", "vq")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYERS])
def test_pictures_of_every_family_leave_no_trace_in_training(name, tmp_path):
    def weights(callbacks):
        L.seed_everything(1, verbose=False)
        model = VAE(name, LAYERS[name])
        run = trainer(tmp_path, callbacks=callbacks)
        run.fit(model, loader(shuffle=True), loader())
        return {k: v.clone() for k, v in model.state_dict().items()}

    pictures = Pictures(str(tmp_path), num_images=4, every_n_epochs=2)
    with_pictures, without = weights([pictures, CollapseWarning()]), weights([])
    assert all(torch.equal(v, without[k]) for k, v in with_pictures.items())
    charts = {"latents", "curves"} | ({"usage"} if sl.create(name, **LAYERS[name]).family.discrete else set())
    if name in ("lfq", "vq", "residual_vq", "gumbel_softmax", "straight_through"):
        assert {f.stem for f in pictures.files} == IMAGES | charts
    assert [f.name for f in sorted(tmp_path.glob("epoch*"))] == ["epoch_0002"]
    for folder in (tmp_path, tmp_path / "epoch_0002"):
        assert {f"{n}.png" for n in IMAGES} < {f.name for f in folder.glob("*.png")}
        assert all(f.stat().st_size > 1000 for f in folder.glob("*.png"))
    assert not list(tmp_path.rglob(".*"))  # no half-written files


def test_modules_that_are_frozen_stay_in_the_mode_they_were_in(tmp_path):
    frozen = nn.BatchNorm1d(64)
    model = VAE("gaussian", {"latent_dim": 2}, encoder=nn.Sequential(nn.Flatten(), frozen, nn.Linear(64, 4)))

    class Freeze(L.Callback):
        def on_train_epoch_start(self, run, module):
            frozen.eval()

        def on_train_epoch_end(self, run, module):
            assert not frozen.training and module.layer.training

    pictures = Pictures(str(tmp_path), 3, every_n_epochs=1)
    trainer(tmp_path, max_epochs=1, callbacks=[pictures, Freeze()]).fit(model, loader(), loader())


def test_flipping_a_bit_and_walking_categories_decodes_just_that():
    x = images(20)
    model = model_of("straight_through")
    result = traversal(model, x, columns=6, rows=10)
    assert result.images.shape == (4, 3, 2, 1, 8, 8) and result.units == [0, 1, 2, 3] and result.values == ["0", "1"]
    z = model.layer.mode(model.encode(x))[:3]
    for unit in range(4):
        for bit in (0, 1):
            changed = z.clone()
            changed[:, unit] = bit
            torch.testing.assert_close(result.images[unit, :, bit], model.likelihood.mean(model.decode(changed)))
    model = model_of("gumbel_softmax")
    result = traversal(model, x, columns=6)
    assert result.images.shape == (2, 1, 5, 1, 8, 8)
    z = model.layer.mode(model.encode(x))[0].view(2, 5).clone()
    z[1] = torch.eye(5)[3]
    torch.testing.assert_close(result.images[1, 0, 3], model.likelihood.mean(model.decode(z.view(1, 10)))[0])


@pytest.mark.parametrize(
    ("name", "family", "size"),
    [("straight_through", {"name": "subset", "size": 3}, 5), ("leave_one_out", "permutation", 9)],
)
def test_a_choice_of_several_items_walks_over_whole_choices(name, family, size):
    torch.manual_seed(0)
    seen = []

    class Identity(nn.Module):
        def forward(self, z):
            seen.append(z)
            return z.view(-1, 1, 2, size)

    items = 5 if size == 5 else 3
    options = {"latent_dim": 2, "num_categories": items, "family": family}
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(2 * size, 2 * items))
    model = VAE(name, options, data_shape=(1, 2, size), encoder=encoder, decoder=Identity()).eval()
    traversal(model, torch.rand(20, 1, 2, size), columns=4)
    assert bool((torch.cat(seen).view(-1, 2, size).sum(-1) == 3).all())


def test_a_continuous_unit_walks_over_the_range_of_its_posterior():
    class Identity(nn.Module):
        def forward(self, z):
            return z.view(-1, 1, 1, 2)

    model = VAE(
        "gaussian",
        {"latent_dim": 2},
        data_shape=(1, 1, 2),
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(2, 4)),
        decoder=Identity(),
        likelihood="gaussian",
    ).eval()
    with torch.no_grad():
        model.encoder[1].weight.zero_()
        model.encoder[1].bias.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0]))  # q = N((1, -1), 1)
    result = traversal(model, torch.randn(128, 1, 1, 2), columns=5)
    expected = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 5))
    for unit, loc in ((0, 1.0), (1, -1.0)):
        seen = result.images[unit, 0, :, 0, 0, unit]
        assert (seen - (loc + expected)).abs().max() < 0.35  # quantiles of 1024 draws: 0.35 is four standard errors
        other = result.images[unit, 0, :, 0, 0, 1 - unit]
        torch.testing.assert_close(other, torch.full((5,), -loc))


def test_codes_that_a_unit_does_not_have_leave_empty_places():
    model = model_of("vq")
    x = images(20)
    with torch.no_grad():
        model.encoder[-1].weight[:3] = 0  # the first latent has one code, the second some
        model.encoder[-1].weight[3:] *= 30
    seen = traversal(model, x, columns=6)
    number = model.layer.indices(model.encode(x))[:, 1].unique().numel()
    assert number > 1
    assert seen.images.isnan().flatten(3).all(-1).sum().item() == seen.images.shape[1] * (min(number, 6) - 1)
    assert image_grid(seen.images.flatten(0, 2), seen.images.shape[2]).axes


@pytest.mark.parametrize("name", LAYERS)
def test_walks_start_and_end_at_the_reconstructions_and_pass_only_codes(name):
    model, x = model_of(name), images(6)
    walks = interpolations(model, x, columns=5)
    assert walks.shape == (3, 5, 1, 8, 8)
    both = model.reconstruct(x)
    torch.testing.assert_close(walks[:, 0], both[::2])
    torch.testing.assert_close(walks[:, -1], both[1::2])
    if model.layer.family.discrete:
        seen = []
        model.decode = lambda z: seen.append(z) or torch.zeros(*z.shape[:-1], 1, 8, 8)
        interpolations(model, x, columns=5)
        size = model.layer.out_features // model.layer.latent_dim
        z = model.layer.mode(model.encode(x)).view(6, -1, size)
        (path,) = seen
        path = path.view(3, 5, -1, size)
        one, two = z[::2].unsqueeze(1), z[1::2].unsqueeze(1)
        assert ((path == one).all(-1) | (path == two).all(-1)).all()
        switched = ((path == two).all(-1) & (one != two).any(-1)).sum(-1)
        assert (switched.diff(dim=1) >= 0).all()


@pytest.mark.slow
def test_latents_at_positions_and_hierarchies_are_drawn(tmp_path):
    encoder = nn.Conv2d(1, 4, 3, stride=2, padding=1)
    decoder = nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1)
    convolutional = VAE(sl.create("straight_through", latent_dim=4), encoder=encoder, decoder=decoder)
    hierarchy = HierarchicalVAE(["straight_through", {"name": "gaussian", "latent_dim": 2}])
    for number, model in enumerate((convolutional, hierarchy)):
        pictures = Pictures(str(tmp_path / str(number)), num_images=4)
        run = trainer(tmp_path, max_epochs=1, callbacks=[pictures])
        run.fit(model, loader(), loader())
        assert {f.stem for f in pictures.files} == IMAGES | {"latents", "usage", "curves"}
        assert run.callback_metrics["val/active_units"] <= model.evaluation("val").active_units.num_units
    assert convolutional.evaluation("val").active_units.num_units == 64


def test_data_that_are_no_images_get_a_sentence_and_the_charts(tmp_path, capfd, caplog):
    model = VAE("gaussian", {"latent_dim": 2}, data_shape=(5,), likelihood="gaussian")
    pictures = Pictures(str(tmp_path))
    with caplog.at_level("INFO"):
        trainer(tmp_path, callbacks=[pictures]).fit(model, loader(torch.randn(16, 5)), loader(torch.randn(16, 5)))
    assert {f.stem for f in pictures.files} == {"latents", "curves"}
    said = caplog.text + capfd.readouterr().err
    assert "examples of shape (5,) are no images" in said


def test_families_without_free_coordinates_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="points of a sphere"):
        traversal(VAE("pathwise", {"latent_dim": 3, "family": "power_spherical"}).eval(), images(4))
    pictures = Pictures(str(tmp_path), num_images=4)
    model = VAE("pathwise", {"latent_dim": 3, "family": "power_spherical"})
    trainer(tmp_path, max_steps=1, callbacks=[pictures]).fit(model, loader())
    assert {f.stem for f in pictures.files} == {"samples", "reconstructions", "interpolations"}


class Fake(L.pytorch.loggers.logger.Logger):
    """A logger that keeps pictures, as W&B or as TensorBoard takes them."""

    name = version = "fake"
    save_dir = None

    def __init__(self, kind):
        super().__init__()
        self.seen = {}
        if kind == "log_image":
            self.log_image = lambda key, images, step: self.seen.setdefault(key, []).append(step)
        else:
            self.experiment = type(
                "", (), {"add_figure": lambda _, key, fig, step: self.seen.setdefault(key, [step])}
            )()

    def log_metrics(self, metrics, step):
        pass

    def log_hyperparams(self, *args):
        pass


def test_loggers_get_pictures_through_what_they_have(tmp_path):
    loggers = [Fake("log_image"), Fake("add_figure")]
    run = trainer(tmp_path, max_epochs=1, logger=loggers, callbacks=[Pictures(str(tmp_path), num_images=3)])
    run.fit(VAE("gaussian", {"latent_dim": 2}), loader(), loader())
    for logger in loggers:
        assert logger.seen == {name: [5] for name in IMAGES | {"latents", "curves"}}


def test_options_out_of_range_are_refused():
    for options in ({"num_images": 1}, {"every_n_epochs": 0}):
        with pytest.raises(ValueError, match="needed"):
            Pictures(**options)
    for options in ({"initial": 0.0}, {"final": -1.0}, {"steps": 0}, {"shape": "cosine"}):
        with pytest.raises(ValueError, match="needed"):
            TemperatureSchedule(**options)
    for options in ({"min_active": 0.0}, {"after_steps": -1}, {"patience": 0}):
        with pytest.raises(ValueError, match="needed"):
            CollapseWarning(**options)


def test_schedules_are_drawn_where_something_moves(tmp_path):
    pictures = Pictures(str(tmp_path), num_images=3)
    model = VAE("gumbel_softmax", LAYERS["gumbel_softmax"], objective={"name": "elbo", "kl_warmup_steps": 5})
    trainer(tmp_path, callbacks=[pictures, TemperatureSchedule(steps=5)]).fit(model, loader())
    assert "schedules" in {f.stem for f in pictures.files}
    assert {"temperature", "beta"} <= set(pictures.history)


def test_the_best_elbo_is_logged_and_survives_a_restart(tmp_path):
    class Elbos(L.Callback):
        def __init__(self):
            self.seen = []

        def on_validation_end(self, run, module):
            metrics = run.callback_metrics
            self.seen.append((float(metrics["val/elbo"]), float(metrics.get("val/elbo_best", "nan"))))

    def run(epochs, ckpt=None):
        elbos = Elbos()
        L.seed_everything(0, verbose=False)
        model = VAE("straight_through", {"latent_dim": 8}, lr=0.02)  # learns by heart, so that the ELBO falls again
        run = trainer(tmp_path, max_epochs=epochs, callbacks=[elbos])
        run.fit(model, loader(), loader(images(seed=1)), ckpt_path=ckpt)
        return run, elbos.seen

    whole, seen = run(8)
    values = [elbo for elbo, _ in seen]
    assert [best for _, best in seen] == pytest.approx([max(values[: i + 1]) for i in range(8)])
    assert values[-1] < max(values)
    half, _ = run(6)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, rest = run(8, tmp_path / "half.ckpt")
    assert rest == seen[6:]
    whole.validate(whole.lightning_module, loader(), verbose=False)
    assert "val/elbo_best" not in whole.callback_metrics
    whole.lightning_module.best_elbo = 0.0  # of a run before, perhaps on other data
    another = trainer(tmp_path, max_epochs=1)
    another.fit(whole.lightning_module, loader(), loader())
    assert float(another.callback_metrics["val/elbo_best"]) == pytest.approx(
        float(another.callback_metrics["val/elbo"])
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # resumed runs save nothing
def test_the_best_elbo_of_a_run_resumed_inside_an_epoch_is_that_of_the_validations_that_lightning_makes(tmp_path):
    class Elbos(L.Callback):
        def on_validation_end(self, run, module):
            if not run.sanity_checking:
                seen.append((run.global_step, float(run.callback_metrics["val/elbo"]), module.best_elbo))

    def run(ckpt, *callbacks):
        L.seed_everything(1, verbose=False)
        options = dict(max_epochs=1, limit_train_batches=7, limit_val_batches=1, val_check_interval=3)
        run = trainer(tmp_path, callbacks=[Elbos(), *callbacks], enable_checkpointing=bool(callbacks), **options)
        # so large a rate that the ELBO falls from the first validation to the second
        run.fit(VAE("vq", LAYERS["vq"], lr=0.1), Digits(50, binarization="dynamic"), ckpt_path=ckpt, weights_only=True)

    seen = []
    before = ModelCheckpoint(tmp_path / "before", "{step}", every_n_train_steps=3, save_top_k=-1)
    after = ModelCheckpoint(tmp_path / "after", "{step}", monitor="val/elbo", save_top_k=-1)
    run(None, before, after)
    (first, second), seen = seen, []
    assert first[:1] == (3,) and second[0] == 6 and second[1] < second[2] == first[1]
    run(tmp_path / "after" / "step=3.ckpt")
    assert seen == [second]
    seen = []
    run(tmp_path / "before" / "step=3.ckpt")  # saved before the validation of step 3, which is not made up for
    assert seen == [(6, second[1], second[1])]


def test_evaluation_logs_active_units_and_perplexity(tmp_path):
    model = VAE("vq", LAYERS["vq"], iwae_samples={"test": 3})
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    assert set(run.callback_metrics) == {
        f"test/{n}" for n in ("elbo", "kl", "reconstruction", "iwae", "active_units", "perplexity")
    }
    x = images()
    codes = model.layer.eval().indices(model.encode(x))
    expected = torch.unique(codes, return_counts=True)[1].double()
    expected = torch.special.entr(expected / expected.sum()).sum().exp()
    assert run.callback_metrics["test/perplexity"] == pytest.approx(float(expected))
