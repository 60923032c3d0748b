"""Trials of sweeps, with models in them: what they record, when they stop, what W&B is told."""

import json
import os
import signal
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from one_step import check_config, one_step
from quiet_trainer import quiet_trainer

from lightning_modules import VAE
from lightning_modules.data import Digits
from lightning_modules.sweeps import Runner, SweepState, TrialRecord
from lightning_modules.sweeps.plan import shipped_files
from lightning_modules.sweeps.record import TRIAL_VARIABLE, read_record, stop_file

pytest.importorskip("sweeps", reason="needs W&B's search: pip install 'stochastic-layers[sweeps]', see docs/sweeps.md")

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("why", ["nothing", "a request", "the sweep was killed"])
def test_a_trial_ends_after_the_validation_that_follows_a_reason(why, tmp_path, monkeypatch):
    path = tmp_path / "trial.jsonl"
    monkeypatch.setenv(TRIAL_VARIABLE, str(path))
    (record,) = TrialRecord.from_environment()
    if why == "a request":
        stop_file(path).touch()
    elif why == "the sweep was killed":
        record._parent = -1
    trainer = quiet_trainer(
        max_epochs=3, limit_train_batches=1, log_every_n_steps=1, num_sanity_val_steps=1, callbacks=[record]
    )
    trainer.fit(VAE("gaussian", {"latent_dim": 2}), Digits(binarization="dynamic"))
    read = read_record(path)
    assert len(read.history) == (3 if why == "nothing" else 1)
    assert read.last("val/elbo") == float(trainer.callback_metrics["val/elbo"])
    with path.open("a") as file:
        file.write('{"val/elbo": 1')  # a line that is being written
    assert read_record(path) == read
    monkeypatch.delenv(TRIAL_VARIABLE)
    assert TrialRecord.from_environment() == []


def test_under_wandb_agent_sigterm_ends_training_after_the_batch(monkeypatch):
    monkeypatch.delenv(TRIAL_VARIABLE, raising=False)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    (stop,) = TrialRecord.from_environment()

    class Agent(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=4, log_every_n_steps=1, callbacks=[Agent(), stop])
    with pytest.raises(SIGTERMException):
        trainer.fit(VAE("gaussian", {"latent_dim": 2}), Digits(binarization="dynamic"))
    assert trainer.global_step == 2 and signal.getsignal(signal.SIGTERM) == before


def offline_run(state, trial):
    run = json.loads(state.record(trial).read_text().splitlines()[0])["runs"]
    return Path(*run)


@pytest.mark.slow
@pytest.mark.parametrize("file", shipped_files())
def test_the_metric_of_a_shipped_file_is_a_logged_key_and_the_configuration_is_whole(file, tmp_path, monkeypatch):
    import wandb_offline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = one_step(file, tmp_path)
    state = SweepState.open(tmp_path / "s", plan.config)
    Runner(plan, state, count=1).run()
    (trial,) = state.trials
    assert trial.state == "finished", state.log(trial).read_text()
    run = offline_run(state, trial)
    assert any(plan.metric in row for row in wandb_offline.history(run))  # letter for letter
    record = wandb_offline.run_record(run)
    assert (record.run_id, record.project) == (trial.id, "stochastic-layers")
    (saved,) = tmp_path.glob(f"runs/stochastic-layers/{trial.id}/config.yaml")
    check_config(wandb_offline.config(run), trial.parameters, saved)


@pytest.mark.ddp
def test_a_two_process_trial_is_one_run_and_obeys_a_request_to_stop(tmp_path, monkeypatch):
    import wandb_offline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    plan = one_step(
        "layers.yaml", tmp_path, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=500"
    )
    state = SweepState.open(tmp_path / "s", plan.config)

    def stop(trial):
        record = state.record(trial)
        if trial.state == "running" and record.exists() and "val/elbo" in record.read_text():
            record.with_suffix(".stop").touch()

    Runner(plan, state, count=1, sweep_id="abcd1234", watch=stop).run()
    (trial,) = state.trials
    assert trial.state == "stopped", state.log(trial).read_text()
    lines = state.record(trial).read_text().splitlines()
    assert len(lines) < 400 and "test/elbo" in lines[-1]
    (run,) = Path("runs/wandb").glob("offline-run-*")
    record = wandb_offline.run_record(run)
    assert (record.run_id, record.sweep_id, record.run_group) == (trial.id, "abcd1234", "")
    assert sum("val/elbo" in row for row in wandb_offline.history(run)) == len(lines) - 2
    assert str(wandb_offline.config(run)["trainer"]["devices"]) == "2"
