"""Files from strangers: no code of a checkpoint or a configuration runs, and what they may import can be restricted."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules import VAE, StochasticClassifier
from lightning_modules.untrusted import read_checkpoint, restrict_imports

ROOT = Path(__file__).parents[1]


class Touch:
    """Whoever unpickles it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def save(tmp_path):
    def write(**content):
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", **content}, path)
        return path

    return write


@pytest.mark.parametrize("model", [VAE, StochasticClassifier])
def test_code_in_a_checkpoint_does_not_run(model, save, tmp_path):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Touch(mark))).close()  # the control: it would
    assert mark.exists()
    mark.unlink()
    path = save(hyper_parameters={"layer": Touch(mark)})
    with pytest.raises(ValueError, match="tensors and plain data"):
        model.load_from_checkpoint(path)
    with pytest.raises(ValueError, match="needed weights_only=True"):
        model.load_from_checkpoint(path, weights_only=False)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"hyper_parameters": {"_instantiator": "os.system"}}, "got the function 'os.system'"),
        ({"hyper_parameters": {"_class_path": "stranger.Model"}}, "got 'stranger.Model'"),
        ({"hyper_parameters": {"_class_path": 1}}, "got 1"),
        ({"hyper_parameters": [1]}, "as a mapping, got list"),
        ({"state_dict": 3}, "with a state_dict"),
        ({"hyper_parameters": {"layer": "reinforced"}}, "did you mean 'reinforce'"),
        ({"hyper_parameters": {"unknown": 1}}, "model.ckpt: needed a checkpoint of VAE"),
        ({}, "model.ckpt: needed a checkpoint of VAE"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(content, message, save):
    with pytest.raises(ValueError, match=message):
        VAE.load_from_checkpoint(save(**content))


def test_a_missing_checkpoint_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.ckpt")


def test_an_open_file_is_a_checkpoint_too(save):
    model = VAE("gaussian", {"latent_dim": 2})
    path = save(state_dict=model.state_dict(), hyper_parameters=dict(model.hparams))
    with path.open("rb") as file:
        assert VAE.load_from_checkpoint(file).layer.latent_dim == 2


def test_the_restriction_is_0_or_1(monkeypatch):
    monkeypatch.setenv("STOCHASTIC_LAYERS_RESTRICT", "yes")
    with pytest.raises(ValueError, match="needed STOCHASTIC_LAYERS_RESTRICT=0 or 1"):
        restrict_imports()


# Each line: what a configuration may say, and whether the restriction lets it through.
ATTEMPTS = """
import contextlib, io, sys
from lightning_modules.cli import main

def attempt(*words):
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main(["fit", *words, "--print_config"])
    except SystemExit as stop:
        return "refused" if stop.code else "accepted"
    raise AssertionError(words)

sys.argv = ["stochastic-layers"]
for words in %r:
    print(attempt(*words), *words)
"""
REFUSED = [
    ["--model.optimizer=stranger.optimizer"],
    ["--model.optimizer=os.system"],
    ["--model.optimizer=lightning.pytorch.trainer.trainer.os.system"],  # by way of a trusted module
    ["--trainer.callbacks=stranger.Callback"],
    ["--trainer.logger=stranger.Logger"],
    ["--data=stranger.Data"],
    ["--config=stranger.yaml"],
]
AS_A_NAME = [  # not imported, and refused as the name of no registered layer when the model is built
    ["--model.layer=stranger.Layer"],
    ["--model.layer={'class_path': 'stranger.Layer'}"],
]
ACCEPTED = [
    ["--model.layer=reinforce"],
    ["--model.layer={'name': 'gumbel_softmax', 'temperature': 0.5}"],
    ["--model.layer=stochastic_layers.Reinforce", "--model.layer.latent_dim=3"],
    ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1"],
    ["--trainer.callbacks=LearningRateMonitor"],
    ["--trainer.logger=WandbLogger"],
    ["--data=MNIST"],
]


def attempts(tmp_path, words, restrict):
    # importing it leaves a mark
    (tmp_path / "stranger.py").write_text(
        "open('mark', 'w').close()\nfrom lightning_modules.data import Digits as Data\n"
    )
    (tmp_path / "stranger.yaml").write_text("trainer: {callbacks: [{class_path: stranger.Callback}]}")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
        "STOCHASTIC_LAYERS_RESTRICT": restrict,
    }
    command = [sys.executable, "-W", "ignore", "-c", ATTEMPTS % (words,)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line.split()[0] for line in done.stdout.splitlines()], (tmp_path / "mark").exists()


@pytest.mark.slow
def test_a_restricted_configuration_imports_nothing_but_what_is_trusted(tmp_path):
    jsonargparse = pytest.importorskip("jsonargparse")
    if "import_path_allowlist" not in (jsonargparse.set_parsing_settings.__doc__ or ""):
        pytest.skip("needs a jsonargparse that can restrict imports")
    harmless = AS_A_NAME + ACCEPTED
    expected = ["refused"] * len(REFUSED) + ["accepted"] * len(harmless)
    assert attempts(tmp_path, REFUSED + harmless, "1") == (expected, False)
    for layer in ("stranger.Layer", {"class_path": "stranger.Layer"}):
        with pytest.raises(ValueError, match="needed"):
            VAE(layer)
    # the control: without the restriction the same words import the stranger's module
    assert attempts(tmp_path, [["--data=stranger.Data"]], "0") == (["accepted"], True)
