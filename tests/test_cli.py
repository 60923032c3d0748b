"""The command line: swap the layer by a word, configure by files, log anywhere, end with a table and pictures."""

import csv
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import wandb
import wandb_offline
import yaml

import stochastic_layers as sl
from lightning_modules import VAE
from lightning_modules.callbacks.codes import LatentCodes
from lightning_modules.cli import main
from lightning_modules.comparison.settings import parse
from lightning_modules.data import Digits

TINY = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=10", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["stochastic-layers"])
        main([str(a) for a in args])

    return call


def history(path):
    with open(path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(r[key]) for r in rows if r[key]] for key in rows[0]}


def test_fit_without_arguments_of_its_own_trains_reports_and_draws(run, tmp_path, capsys):
    run("fit", *TINY, *QUIET)
    out = capsys.readouterr().out
    for words in (
        "test ELBO",
        "100 draws",
        "test KL",
        "gradient variance",
        "signal-to-noise",
        "time per",
    ):
        assert words in out
    folder = tmp_path / "runs" / "version_0"
    for name in ("samples.png", "reconstructions.png", "curves.png", "config.yaml", "checkpoints/best.ckpt"):
        assert (folder / name).stat().st_size > 0
    logged = history(folder)
    for key in ("train/elbo", "train/kl", "train/reconstruction", "train/grad_variance", "train/grad_snr"):
        assert logged[key]
    assert 0 < logged["time/sec_per_step"][0] < 10
    for stage in ("val", "test"):
        assert logged[f"{stage}/elbo"][-1] == pytest.approx(
            logged[f"{stage}/reconstruction"][-1] - logged[f"{stage}/kl"][-1], abs=1e-3
        )
    assert logged["test/iwae"][-1] > logged["test/elbo"][-1] - 0.5
    assert (
        VAE.load_from_checkpoint(folder / "checkpoints/best.ckpt", weights_only=True).layer.name == "straight_through"
    )


def test_the_layer_is_swapped_by_a_word_and_its_options_by_dots(run, tmp_path):
    run("fit", "--model.layer", "reinforce", "--model.layer_options.num_samples", 8, *TINY, *QUIET)
    run(
        "fit", "--model.layer", "gumbel_softmax", "--model.layer_options.temperature", 0.5, *TINY, *QUIET
    )  # same folder
    first, second = (tmp_path / "runs" / f"version_{v}" / "checkpoints" / "best.ckpt" for v in (0, 1))
    reinforce = VAE.load_from_checkpoint(first, weights_only=True).layer
    assert (reinforce.name, reinforce.num_samples) == ("reinforce", 8)
    assert float(VAE.load_from_checkpoint(second, weights_only=True).layer.temperature) == pytest.approx(0.5)


def test_a_layer_by_class_path_and_parts_by_mapping(run, tmp_path):
    run(
        "fit",
        "--model.layer=stochastic_layers.Reinforce",
        "--model.layer.latent_dim=5",
        "--model.layer.baseline=leave_one_out",
        "--model.layer.num_samples=2",
        '--model.objective={"name": "elbo", "beta": 0.5}',
        "--model.encoder=conv",
        *TINY,
        *QUIET,
    )
    config = yaml.safe_load((tmp_path / "runs/version_0/config.yaml").read_text())
    assert config["model"]["layer"]["class_path"].endswith("Reinforce")
    assert config["model"]["objective"] == {"name": "elbo", "beta": 0.5}


def test_a_run_does_not_warn_of_what_its_user_cannot_change(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run("fit", *TINY, *QUIET)
    assert [str(warning.message) for warning in seen if "LeafSpec" in str(warning.message)] == []


def test_a_saved_configuration_repeats_the_run(run, tmp_path):
    run("fit", "--model.layer=reinforce", *TINY, *QUIET)
    run("fit", "--config", "runs/version_0/config.yaml")
    first, second = (history(tmp_path / "runs" / f"version_{v}") for v in (0, 1))
    assert first["test/elbo"] == second["test/elbo"] and first["train/elbo"] == second["train/elbo"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_test_and_predict_take_a_checkpoint(run, capsys):
    run("fit", *TINY, *QUIET)
    capsys.readouterr()
    for command in ("validate", "test", "predict"):
        run(command, "--ckpt_path", "runs/version_0/checkpoints/best.ckpt", "--trainer.accelerator=cpu", *QUIET)
    out = capsys.readouterr().out
    assert "test/elbo" in out
    file = Path(re.search(r"^latent codes \[360, 32\]: (.*codes\.pt)$", out, re.MULTILINE)[1])
    model, data = VAE.load_from_checkpoint("runs/version_0/checkpoints/best.ckpt").eval(), Digits(binarization="none")
    data.setup()
    with torch.no_grad():
        expected = model.layer.mode(model.encode(data.test_set[:][0]))
    torch.testing.assert_close(torch.load(file, weights_only=True), expected)


def test_codes_of_several_processes_are_refused():
    with pytest.raises(ValueError, match=r"needed one process to predict.*got 2; set --trainer.devices=1"):
        LatentCodes().setup(SimpleNamespace(world_size=2), VAE(), "predict")


def test_a_second_prediction_does_not_hold_the_codes_of_the_first(tmp_path):
    model, data, codes = VAE("straight_through", {"latent_dim": 4}), Digits(), LatentCodes()
    run = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, callbacks=[codes]
    )
    for _ in range(2):
        run.predict(model, data, return_predictions=False)
        (file,) = tmp_path.rglob("codes.pt")
        assert torch.load(file).shape == (360, 4)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_options_that_a_checkpoint_would_override_are_refused(run, tmp_path):
    model = ["--model.layer", "reinforce", "--model.layer_options.num_samples", 2, "--model.lr=0.002"]
    run("fit", *model, *TINY, *QUIET)
    start = ["--ckpt_path", tmp_path / "runs/version_0/checkpoints/last.ckpt", *QUIET, *TINY]
    for option, message in (
        ("--model.lr=0.5", r"got model.lr = 0.5, where it has 0.002"),
        ("--model.layer=reinmax", "got model.layer = 'reinmax', where it has 'reinforce'"),
        ("--model.layer_options.num_samples=3", "got model.layer_options = "),
    ):
        with pytest.raises(SystemExit) as stop:
            run("fit", *start, option)
        assert message in str(stop.value.code)
    run("fit", *start, *model, "--trainer.max_epochs=2")  # the same ones are none
    with pytest.raises(SystemExit) as stop:
        run("test", "--ckpt_path", "nowhere.ckpt")
    assert "needed a checkpoint as ckpt_path, got 'nowhere.ckpt', which is no file" in str(stop.value.code)


def test_no_option_puts_another_optimizer_in_the_place_of_the_models_with_its_groups(run, capsys):
    for option in ("--optimizer=Adam", "--lr_scheduler=StepLR"):
        with pytest.raises(SystemExit) as stop:
            run("fit", option)
        assert stop.value.code == 2 and f"nrecognized arguments: {option}" in capsys.readouterr().err


def test_early_stopping_by_patience(run, tmp_path):
    run("fit", "--patience=1", "--model.lr=0", *TINY, *QUIET, "--trainer.max_epochs=6")
    assert len(history(tmp_path / "runs/version_0")["val/elbo"]) == 2


@pytest.mark.parametrize("logger", ["WandbLogger", "TensorBoardLogger", "CSVLogger"])
def test_loggers_take_metrics_and_pictures_without_a_key(run, tmp_path, monkeypatch, logger):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("fit", f"--trainer.logger={logger}", "--trainer.logger.save_dir=logs", *TINY, *QUIET)
    assert list((tmp_path / "logs").rglob("samples.png"))
    assert list((tmp_path / "logs").rglob("config.yaml"))
    if logger == "WandbLogger":
        wandb.finish()
        (folder,) = (tmp_path / "logs/wandb").glob("offline-run-*")
        config = wandb_offline.config(folder)
        model = VAE(likelihood={"name": "discretized_logistic", "num_levels": 17})
        flat = {name: config[name] for name in ("layer_name", "n_params", "world_size", "seed_everything")}
        size = sum(parameter.numel() for parameter in model.parameters())
        assert flat == {"layer_name": "straight_through", "n_params": size, "world_size": 1, "seed_everything": 0}
        assert any("time/sec_per_step" in row for row in wandb_offline.history(folder))


def test_binarized_data_get_the_bernoulli_likelihood(run, tmp_path):
    run("fit", "--data=Digits", "--data.binarization=dynamic", *TINY, *QUIET)
    run("fit", "--data=Digits", "--model.likelihood=gaussian", *TINY, *QUIET)
    configs = [yaml.safe_load((tmp_path / f"runs/version_{v}/config.yaml").read_text()) for v in (0, 1)]
    assert [c["model"]["likelihood"] for c in configs] == ["bernoulli", "gaussian"]


def test_another_data_module_starts_from_its_own_defaults(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("fit", "--data=MNIST", "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert (config["binarization"], config["val_size"]) == ("dynamic", 10000)
    (tmp_path / "config.yaml").write_text("data: {class_path: MNIST}")
    (tmp_path / "of_fit.yaml").write_text("fit: {data: {class_path: MNIST}}")
    for words in (
        ["fit", "--config=config.yaml"],
        ["--config=of_fit.yaml", "fit"],
        ["--config", "of_fit.yaml", "fit"],
        ["fit", "--data.class_path=MNIST"],
    ):
        with pytest.raises(SystemExit):
            run(*words, "--print_config")
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["data"]["init_args"]["binarization"] == "dynamic", words
    with pytest.raises(SystemExit):
        run("fit", "--data.batch_size=7", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["batch_size"] == 7


OWN_DATA = """
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Rows(LightningDataModule):
    data_shape = (6,)

    def batches(self):
        return DataLoader(TensorDataset((torch.arange(64 * 6).view(64, 6) % 5 > 2).float()), batch_size=16)

    train_dataloader = val_dataloader = test_dataloader = batches


class WithoutShape(Rows):
    data_shape = property()  # an AttributeError


class Mappings(Rows):
    def train_dataloader(self):
        return DataLoader([{"x": torch.zeros(6)}] * 4)

    val_dataloader = train_dataloader
"""


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A module of the user's, whose classes have no options."""
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_data", raising=False)


def test_any_data_module_that_knows_the_shape_of_an_example_will_do(run, own_data, tmp_path):
    run("fit", "--data=own_data.Rows", "--model.layer=disarm", *TINY, *QUIET)
    assert "test/elbo" in history(tmp_path / "runs" / "version_0")
    assert parse(args=["--data=own_data.Rows"]).model.data_shape == (6,)  # and so it is for a comparison


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WithoutShape", "takes it from the attribute data_shape of the data module"),
        ("Mappings", "needed batches x or (x, ...), got dict"),
    ],
)
def test_data_of_ones_own_that_do_not_fit_are_refused_in_a_sentence(run, own_data, name, message):
    with pytest.raises(SystemExit) as stop:
        run("fit", f"--data=own_data.{name}", *TINY, *QUIET)
    assert message in str(stop.value.code)


def test_list_and_describe_print_capabilities(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    run("list")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    table = {line.split()[0]: line for line in lines if line and line[0] != " "}
    assert set(sl.list_layers()) <= set(table)  # no name is broken or shortened
    assert re.match("gumbel_softmax +categorical, +no +cost_gradient, +S", table["gumbel_softmax"])
    run("describe", "reinforce")
    out = capsys.readouterr().out
    assert "Williams" in out and "leave_one_out" in out
    run("list", "--markdown")
    assert capsys.readouterr().out.startswith("| layer | families |")


def test_list_is_narrowed_by_capability(run, capsys):
    run("list", "--names", "--family", "gaussian", "--unbiased", "--needs", "cost", "--exact-draws")
    expected = sl.list_layers(family="gaussian", unbiased=True, needs="cost", exact_draws=True)
    assert capsys.readouterr().out.split() == expected and "reinforce" in expected
    run("list", "--names", "--no-exact-draws")
    assert "gumbel_softmax" in capsys.readouterr().out.split()


def test_every_command_is_in_the_overview(run, capsys):
    run("--help")
    out = capsys.readouterr().out
    for command in ("fit", "test", "compare", "sweep", "report", "list", "describe", "certify"):
        assert f"\n  {command} " in out
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert stop.value.code in (None, 0)
        assert "usage: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run()
    assert str(stop.value.code) + "\n" == out
    run("--version")
    assert capsys.readouterr().out.strip() == sl.__version__


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fti"], "needed a command, got 'fti'; did you mean 'fit'?"),
        (["fit", "--model.lr=-1"], "needed lr >= 0, got -1"),
        (["describe", "gumble_softmax"], "did you mean 'gumbel_softmax'"),
        (["fit", "--model.layer=reinforced"], "did you mean 'reinforce'"),
        (["fit", "--model.layer=reinforce", "--model.layer_options.num_sample=2"], "did you mean 'num_samples'"),
        (["fit", "--model.prior=lerned"], "did you mean 'learned'"),
        (["list", "--family=gausian"], "did you mean 'gaussian'"),
        (["list", "--family", "flow", "--no-unbiased"], "needed a layer with --family flow --no-unbiased, got none"),
        (
            ["fit", "--model.layer=disarm", "--model.layer.num_samples=4"],
            "add 'name', or write layer_options.num_samples",
        ),
        (["fit", "--data=MNIST", "--data.root=nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_in_one_clear_line(run, args, message):
    with pytest.raises(SystemExit) as stop:
        run(*args, *(TINY + QUIET if args[0] == "fit" else []))
    assert message in str(stop.value.code)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "needed a mapping of options, such as `model: {lr: 0.001}`, got an empty file; write some into it"),
        (b"# later", "got an empty file"),
        (b"- model", "got a list"),
        (b"model", "got a str"),
        (b"\xff\xfe", "needed a text file of options, got other bytes"),
        (
            b"model:\n  layer: gaussian\n bad: 1",
            "config.yaml, line 3: needed YAML, got what is none (expected",
        ),
        (b"model: {layer: gaussian", "config.yaml, line 1: needed YAML"),
        (b'model: "\x01"', "config.yaml: needed YAML, got what is none (unacceptable character #x0001"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_configuration_file_without_options_is_named(run, tmp_path, command, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(command, "--data=Digits", "--config=config.yaml")
    assert str(stop.value.code).startswith("stochastic-layers: config.yaml") and message in str(stop.value.code)


@pytest.mark.slow
def test_mnist_with_200_bits_trains_for_an_epoch(run, tmp_path, data_root):
    run(
        "fit",
        "--data=MNIST",
        f"--data.root={data_root}",
        "--model.layer=reinforce",
        '--model.layer_options={"latent_dim": 200, "num_samples": 4, "baseline": "leave_one_out"}',
        "--model.iwae_samples={}",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        *QUIET,
    )
    elbo = history(tmp_path / "runs/version_0")["val/elbo"][-1]
    assert -210 < elbo < -100  # independent pixels at their mean reach about -207
