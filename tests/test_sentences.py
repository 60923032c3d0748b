"""What the system refuses (no folder, no room, no package) ends in a sentence, and leaves no half of a file."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch.utilities.exceptions import SIGTERMException
from matplotlib.figure import Figure
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

import lightning_modules.whole_files as whole_files
from lightning_modules import VAE
from lightning_modules.cli import main
from lightning_modules.whole_files import whole_file, write_text
from stochastic_layers.options import check_positive

TINY = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--model.iwae_samples={}"]
FIT = ["fit", *TINY, *QUIET]


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stochastic-layers"])
    Path("file").touch()

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        return str(stop.value.code)

    return call


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ([*FIT, "--trainer.default_root_dir=file/x"], "file/x"),
        ([*FIT, "--trainer.logger.save_dir=file/x"], "file/x"),
        ([*FIT, "--trainer.logger=false", "--trainer.default_root_dir=file/x"], "file/x"),
        ([*FIT, "--checkpoint.dirpath=file/x"], "file/x"),
        ([*FIT, "--pictures.folder=file/x"], "file/x"),
        (["compare", "--layers", "disarm", "--steps=2", "--folder=file/x", "--trainer.accelerator=cpu"], "file/x/runs"),
        (["sweep", "layers.yaml", "--folder=file/x"], "file/x"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named_before_anything_is_trained(refusal, words, place, monkeypatch):
    monkeypatch.setattr(VAE, "training_step", lambda *_: pytest.fail("trained"))
    message = refusal(*words)
    assert message.startswith("stochastic-layers: needed to read or write ") and f"{place}, got" in message
    assert "Not a directory" in message and "give another path" in message and "\n" not in message


def test_a_folder_that_is_there_and_cannot_be_written_is_named_before_a_comparison(refusal, monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    Path("there/runs").mkdir(parents=True)
    monkeypatch.setattr(whole_files.tempfile, "TemporaryFile", refuse)
    message = refusal("compare", "--layers", "disarm", "--steps=2", "--folder=there", "--trainer.accelerator=cpu")
    assert "needed to read or write there/runs, got 'Permission denied'" in message


def test_a_full_disk_is_a_sentence_and_leaves_no_half_picture(refusal, monkeypatch):
    def fill(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", fill)
    message = refusal(*FIT)
    assert message == "stochastic-layers: needed room on the disk, got 'No space left on device'; make room, and " + (
        "give the command again."
    )
    left = {file.name for file in Path("runs/version_0").iterdir()}
    assert left == {"checkpoints", "config.yaml", "metrics.csv"}


def test_a_file_is_whole_or_as_it_was(tmp_path):
    write_text(tmp_path / "new" / "result.json", "old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "new" / "result.json") as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["result.json"]
    assert (tmp_path / "new" / "result.json").read_text() == "old"


def test_a_missing_package_is_named_and_its_traceback_is_to_be_had(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refusal(*FIT, "--trainer.logger=WandbLogger")
    assert "needed a package that is not installed" in message and "wandb" in message and "pip install" in message
    monkeypatch.setenv("STOCHASTIC_LAYERS_TRACEBACK", "1")
    with pytest.raises(ModuleNotFoundError):
        main([*FIT, "--trainer.logger=WandbLogger"])


def test_an_interrupted_command_says_so_in_a_line(refusal, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_modules.catalogue.list_command", interrupt)
    assert refusal("list") == "130"
    assert capsys.readouterr().err == "stochastic-layers: interrupted.\n"


def test_a_missing_key_of_wandb_ends_in_a_sentence(refusal, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    monkeypatch.setenv("NETRC", "no_such_file")
    wandb.teardown()  # what an earlier test has told it
    message = refusal(*FIT, "--trainer.logger=WandbLogger")
    wandb.teardown()
    assert message.startswith("stochastic-layers: needed a run of W&B, got ")
    assert message.endswith("; call `wandb login`, or keep the run on this machine: --trainer.logger.offline=true.")


@pytest.mark.filterwarnings("ignore:Total length of `list`", "ignore:.*could not find the monitored key")
def test_a_run_without_validation_says_where_its_weights_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([*FIT, "--data.val_size=0"])
    assert "as no validation chose any: runs/version_0/checkpoints/last.ckpt" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="needed a val/elbo for --patience to wait for, got none"):
        main([*FIT, "--data.val_size=0", "--patience=2"])


@pytest.mark.parametrize("value", [None, "fast", "1e-3", float("nan"), float("inf"), -1.0])
def test_a_learning_rate_is_a_number(value):
    with pytest.raises(ValueError, match="needed lr >= 0, got"):
        VAE("gaussian", {"latent_dim": 2}, lr=value)
    with pytest.raises(ValueError, match="needed it > 0, got 0"):
        check_positive("it", 0)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The 'predict_dataloader'")
@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_data_in_double_precision_are_refused_by_a_model_in_single(stage):
    loader = DataLoader(torch.rand(4, 1, 8, 8).double().round(), batch_size=2)
    trainer = quiet_trainer(max_steps=1)
    with pytest.raises(ValueError, match=r"needed data in the precision of the model, torch.float32, got"):
        getattr(trainer, stage)(VAE("gaussian", {"latent_dim": 2}), loader)
    getattr(quiet_trainer(max_steps=1, precision="64-true"), stage)(VAE("gaussian", {"latent_dim": 2}), loader)


@pytest.mark.parametrize(("kind", "status"), [(KeyboardInterrupt, "130"), (SIGTERMException, "143")])
def test_an_interrupted_training_says_how_to_go_on(refusal, monkeypatch, capsys, kind, status):
    class Ends(VAE):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                raise kind

    monkeypatch.setattr("lightning_modules.cli.VAE", Ends)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert refusal(*FIT, "--trainer.max_epochs=2") == status
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    last = "runs/version_0/checkpoints/last.ckpt"
    assert f"interrupted; to go on: the same command with --ckpt_path={last}." in capsys.readouterr().err
    assert Path(last).is_file()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (
            ["fit", "--model.layr=reinforce"],
            "nrecognized arguments: --model.layr=reinforce\ndid you mean '--model.layer'",
        ),
        (["fit", "--data=MNITS"], "did you mean 'MNIST'"),
        (["fit", "--data=mnist"], "did you mean 'MNIST' or 'FashionMNIST' or 'BinarizedMNIST'?"),
        (["fit", "--data=zzz"], "valid names: 'BinarizedMNIST', 'Digits', 'FashionMNIST', 'MNIST', 'TensorData'."),
        (["fit", "--data.binarisation=dynamic"], "did you mean 'binarization'?"),
        (["fit", "--trainer.logger=WandbLoger"], "did you mean 'WandbLogger'"),
        (["compare", "--model.layr=reinforce"], "did you mean '--model.layer'"),
    ],
)
def test_a_misspelt_option_is_answered_in_a_few_lines_with_what_was_meant(refusal, capsys, words, meant):
    assert refusal(*words) == "2"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 20 and lines[0].startswith(f"usage: stochastic-layers {words[0]} [OPTIONS]")
    assert meant in "\n".join(lines) and f"stochastic-layers {words[0]} --help" in lines[0]


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_misspelt_option_in_a_file_is_answered_with_what_was_meant(refusal, capsys, command):
    for content, meant in (("model: {layr: disarm}", "model.layer"), ("trainer: {max_step: 3}", "trainer.max_steps")):
        Path("mine.yaml").write_text(content)
        assert refusal(command, "--config=mine.yaml") == "2"
        assert f"did you mean '{meant}'" in capsys.readouterr().err


def test_a_misspelt_option_of_a_comparison_is_not_left_to_the_parser_of_the_others(refusal):
    assert "got '--layer'; did you mean '--layers'?" in refusal("compare", "--layer", "disarm")
