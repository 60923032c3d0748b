"""Sweeps with W&B's own command line tools, which talk to a local server that answers as W&B's."""

import contextlib
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import wandb_offline
from one_step import check_config, one_step
from processes import run
from wandb_sweep_server import SWEEP, serving_sweeps

from lightning_modules.sweeps import Plan, SweepState
from lightning_modules.sweeps.plan import find_file, shipped_files
from lightning_modules.sweeps.record import read_record

pytest.importorskip("sweeps", reason="needs W&B's search: pip install 'stochastic-layers[sweeps]', see docs/sweeps.md")

BIN = Path(sys.executable).parent
PROJECT = "stochastic-layers"


@pytest.fixture
def server():
    for tool in ("wandb", "stochastic-layers"):
        if shutil.which(tool, path=str(BIN)) is None:
            pytest.skip(f"needs the command {tool} beside this Python")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(serving_sweeps())
        except OSError as error:
            pytest.skip(f"needs a port of this machine: {error}")
        yield server
    assert server.unknown == []


@pytest.fixture
def call(server, tmp_path, monkeypatch):
    """Run a command as a user of W&B would who is logged in to the server; its output."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    environment = {"WANDB_BASE_URL": server.address, "WANDB_API_KEY": "a" * 40, "NO_PROXY": "127.0.0.1"}
    environment |= {f"WANDB_{name}_DIR": str(tmp_path / "wandb-own") for name in ("CONFIG", "CACHE", "DATA")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "NETRC": str(tmp_path / "netrc")}

    def call(*words, timeout=120, **extra):
        status, output = run(list(map(str, words)), timeout, **environment | extra)
        assert status == 0, f"{status}: {output[-6000:]}"
        return output

    return call


def give_work(server, plan):
    """Let the server's next point be one of W&B's search."""
    server.points = [plan.propose(SweepState.open(Path("points"), plan.config), seed=0)]


@pytest.mark.parametrize("file", shipped_files())
def test_wandb_sweep_makes_a_sweep_of_exactly_the_shipped_file(file, server, call):
    output = call("wandb", "sweep", find_file(file))
    assert f"wandb agent me/{PROJECT}/{SWEEP}" in output
    assert server.sweep.projectName == PROJECT
    assert server.sweep.config == Plan.load(find_file(file)).config


@pytest.mark.slow
@pytest.mark.parametrize("file", shipped_files())
def test_wandb_agent_trains_what_the_server_asks_for(file, server, call, tmp_path):
    plan = one_step(file, tmp_path)
    call("wandb", "sweep", file)
    give_work(server, plan)
    output = call("wandb", "agent", "--count", 1, f"me/{PROJECT}/{SWEEP}")
    assert [command["type"] for command in server.commands] == ["run"] and server.runs, output
    ((id, run),) = server.runs.items()
    assert (id, run.entity, run.project, run.sweep, run.exitcode) == ("run0", "me", PROJECT, SWEEP, 0)
    assert any(plan.metric in row for row in run.history) and any("test/elbo" in row for row in run.history)
    check_config(run.config, server.points[0], tmp_path / f"runs/{PROJECT}/run0/config.yaml")
    assert list(tmp_path.glob("runs/wandb/*run-*-run0"))
    assert "locked" not in output  # W&B's warning that a value of the sweep was set again


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.ddp)])
def test_a_run_that_falls_behind_ends_when_the_server_says_so(processes, server, call, tmp_path):
    words = ["--trainer.max_epochs=100000", f"--trainer.devices={processes}"]
    plan = one_step("bayes.yaml", tmp_path, *words, *(["--trainer.strategy=ddp"] if processes > 1 else []))
    call("wandb", "sweep", "bayes.yaml")
    give_work(server, plan)
    server.stop_after = 1
    call("wandb", "agent", f"me/{PROJECT}/{SWEEP}", WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="1")
    assert [command["type"] for command in server.commands] == ["run", "stop", "exit"]
    (run,) = server.runs.values()
    assert run.exitcode == 0 and any(plan.metric in row for row in run.history)
    assert "wandb-metadata.json" in run.files


@pytest.mark.slow
@pytest.mark.parametrize("sweep_id", [None, SWEEP])
def test_the_printed_command_uploads_the_offline_runs_of_a_sweep(sweep_id, server, call, tmp_path):
    plan = one_step("layers.yaml", tmp_path)
    identity = ["--sweep-id", sweep_id] if sweep_id else []
    output = call("stochastic-layers", "sweep", "layers.yaml", "--count", 1, "--folder", "s", *identity)
    assert server.runs == {}
    command = output.split("to upload: ")[1].splitlines()[0]
    assert command == "xargs wandb sync < s/runs.txt"
    call("bash", "-c", command)
    state = SweepState.open(Path("s"), plan.config)
    (trial,), (run,) = state.trials, server.runs.values()
    assert set(server.runs) == {trial.id} and run.exitcode == 0
    assert (run.project, run.sweep, run.groupName) == (PROJECT, sweep_id, None if sweep_id else f"layers-{state.id}")
    if find_spec("wandb.sync") is None:  # older clients, which have it, send what the configuration was at first
        check_config(run.config, trial.parameters, tmp_path / f"runs/{PROJECT}/{trial.id}/config.yaml")
    (folder,) = read_record(state.record(trial)).runs
    assert metrics(run.history) == metrics(wandb_offline.history(folder)) and len(metrics(run.history)) > 2
    pictures = {str(path.relative_to(f"{folder}/files")) for path in Path(folder, "files").rglob("*.png")}
    assert pictures and pictures <= set(run.files)


def metrics(history):
    """The rows of a history less pictures and times."""
    kept = ("train/", "val/", "test/", "trainer/", "epoch")
    return [{name: value for name, value in row.items() if name.startswith(kept)} for row in history]
