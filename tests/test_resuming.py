"""A checkpoint on the command line: its model and data, and configurations that ask for others."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules.cli import main

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--model.iwae_samples={}"]
MODEL = ["--model.layer=reinforce", "--model.layer_options.num_samples=2", "--model.lr=0.002"]
DATA = ["--data.binarization=dynamic", "--data.batch_size=50"]

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")


def call(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stochastic-layers"])
        main([str(word) for word in words])


def refusal(*words):
    with pytest.raises(SystemExit) as stop:
        call(*words)
    return str(stop.value.code)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run in it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call("fit", *MODEL, *DATA, *SHORT)
    return folder


@pytest.fixture
def last(trained, monkeypatch):
    """Its checkpoint, with the folder as the working directory."""
    monkeypatch.chdir(trained)
    return "runs/version_0/checkpoints/last.ckpt"


def written(path, **model):
    path.write_text(yaml.safe_dump({"model": model}))
    return path


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"lr": 0.001}, "got model.lr = 0.001, where it has 0.002"),  # a default value, but stated
        ({"layer": "reinmax"}, "got model.layer = 'reinmax', where it has 'reinforce'"),
        ({"layer_options": {"num_samples": 3}}, "got model.layer_options = {'num_samples': 3}, where it has"),
        ({"prior": "learned", "lr": 0.002}, "got model.prior = 'learned', where it has 'standard'"),
    ],
)
def test_a_file_that_asks_for_another_model_is_refused(last, tmp_path, model, message):
    assert message in refusal("fit", "--config", written(tmp_path / "new.yaml", **model), "--ckpt_path", last, *QUIET)


def test_the_configuration_of_the_run_resumes_it_as_written_by_hand_or_by_the_run(last, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("fit", *MODEL, *DATA, *SHORT, "--print_config")  # every default is stated, and the likelihood is 'auto'
    (tmp_path / "whole.yaml").write_text(capsys.readouterr().out)
    assert "likelihood: auto" in (tmp_path / "whole.yaml").read_text()
    for file in (tmp_path / "whole.yaml", "runs/version_0/config.yaml"):
        call("fit", "--config", file, "--ckpt_path", last, "--trainer.max_epochs=2")
        assert "best weights" in capsys.readouterr().out


def test_a_test_takes_the_checkpoint_s_data_and_its_own_number_of_draws(last, capsys):
    call("test", "--ckpt_path", last, "--model.iwae_samples.test=3", "--data.eval_batch_size=70", *QUIET)
    out = capsys.readouterr().out
    assert "test/iwae" in out
    newest = max(Path("runs").glob("*/config.yaml"), key=lambda file: file.stat().st_mtime_ns)
    data = yaml.safe_load(newest.read_text())["data"]["init_args"]
    assert (data["binarization"], data["batch_size"], data["eval_batch_size"]) == ("dynamic", 50, 70)


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_untrained_weights_are_not_evaluated(last, command):
    message = refusal(command, *QUIET)
    assert f"needed the weights to {command} as --ckpt_path=FILE, got none" in message
    assert "runs/version_" in message and "best.ckpt" in message
    assert "got 'last', which is no file" in refusal(command, "--ckpt_path=last", *QUIET)


def test_where_nothing_is_trained_yet_the_next_step_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "`stochastic-layers fit` makes one" in refusal("test", *QUIET)


def test_objects_that_a_checkpoint_does_not_keep_come_from_the_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layer = ["--model.layer=stochastic_layers.Reinforce", "--model.layer.latent_dim=3", "--model.layer.num_samples=2"]
    call("fit", *layer, "--model.optimizer=torch.optim.SGD", *SHORT)
    last, config = "runs/version_0/checkpoints/last.ckpt", "runs/version_0/config.yaml"
    message = refusal("test", "--ckpt_path", last, *QUIET)
    assert "needed --model.layer=..., got" in message and f"add --config {config}" in message
    call("fit", "--config", config, "--ckpt_path", last, "--trainer.max_epochs=2")
    assert "best weights" in capsys.readouterr().out
    message = refusal("fit", "--config", config, "--ckpt_path", last, "--model.layer.latent_dim=4")
    assert "is [3, 256] and not [4, 256]" in message


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("hyper_parameters", "optimizer", "stranger.make", "no class path in a checkpoint, got optimizer"),
        ("hyper_parameters", "layer", {"class_path": "stranger.Layer"}, "no class path in a checkpoint, got layer"),
        ("hyper_parameters", "layers", ["gaussian"], "of a model with the option 'layers'"),
        ("datamodule_hyper_parameters", "_class_path", "stranger.Data", "whose data were 'stranger.Data'"),
    ],
)
@pytest.mark.parametrize("command", ["test", "compare"])
def test_no_checkpoint_names_what_is_imported(command, last, tmp_path, monkeypatch, part, name, value, message):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = torch.load(last, weights_only=True)
    checkpoint[part][name] = value
    torch.save(checkpoint, tmp_path / "stranger.ckpt")
    assert message in refusal(command, "--ckpt_path", tmp_path / "stranger.ckpt", *QUIET)
    assert not (tmp_path / "imported").exists()


def test_data_of_another_shape_are_refused_before_the_weights_are_loaded(last, tmp_path):
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"]["encoder.1.weight"] = torch.zeros(512, 784)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    message = refusal("test", "--ckpt_path", tmp_path / "other.ckpt", *QUIET)
    assert "in which encoder.1.weight is [512, 784] and not [512, 64]" in message and "--data" in message
