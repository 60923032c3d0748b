"""Sweeps: W&B's file and search, trials as processes, early termination, interruption, ranking."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import heed_interrupts

from lightning_modules.cli import main
from lightning_modules.sweeps import Plan, Runner, SweepState, Trial, rank
from lightning_modules.sweeps.plan import find_file, shipped_files
from lightning_modules.sweeps.ranking import number
from lightning_modules.sweeps.runner import share, trial_environment
from lightning_modules.sweeps.state import new_id

pytest.importorskip("sweeps", reason="needs W&B's search: pip install 'stochastic-layers[sweeps]', see docs/sweeps.md")

ROOT = Path(__file__).parents[1]

# A trial without torch: its elbo is known, its history has `epochs` lines, one every `pause` seconds.
PROGRAM = """
import json, os, sys, time
words = dict(word[2:].split("=", 1) for word in sys.argv[1:])
path = os.environ["STOCHASTIC_LAYERS_TRIAL"]
with open("started.txt", "a") as file:
    file.write(os.environ["WANDB_RUN_ID"] + "\\n")
if float(words.get("x", 0)) > 90:
    sys.exit("x is too large")
with open(path, "a") as file:
    file.write(json.dumps({"runs": ["wandb/offline-run-" + os.environ["WANDB_RUN_ID"]]}) + "\\n")
for epoch in range(int(words.get("epochs", 2))):
    time.sleep(float(words.get("pause", 0)))
    elbo = -((float(words.get("x", 0)) - 2) ** 2) + 0.1 * float(words.get("seed_everything", 0))
    with open(path, "a") as file:
        file.write(json.dumps({"epoch": epoch, "val/elbo": elbo}) + "\\n")
    if os.path.exists(path.replace(".jsonl", ".stop")):
        break
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.py").write_text(PROGRAM)

    def write(**changes):
        config = {
            "program": "trial.py",
            "method": "grid",
            "metric": {"name": "val/elbo", "goal": "maximize"},
            "parameters": {"x": {"values": [0, 1, 2, 3]}},
            "command": ["${interpreter}", "${program}", "${args}"],
        } | changes
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
        return Plan.load(tmp_path / "sweep.yaml")

    return write


def call(*words):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *map(str, words)])
    return stop.value.code


def started():
    return Path("started.txt").read_text().split()


def test_a_grid_runs_every_point_once_and_ranks_them(sweep, capsys):
    sweep(parameters={"x": {"values": [0, 1, 2, 3]}, "seed_everything": {"values": [0, 1, 2]}})
    assert call("sweep.yaml", "--workers", 2) == 0
    out = capsys.readouterr().out
    assert "highest val/elbo first" in out and "3 finished" in out and "runs.txt" in out
    folder = Path("runs/sweeps/sweep")
    ranking = json.loads((folder / "ranking.json").read_text())["ranking"]
    assert ranking[0]["parameters"]["x"] == 2 and len(started()) == 12
    assert [row["value"] for row in ranking] == pytest.approx([0.1, -0.9, -0.9, -3.9])
    assert [row["deviation"] for row in ranking] == pytest.approx([0.1] * 4)
    with open(folder / "ranking.csv") as file:
        assert [row["rank"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    assert len((folder / "runs.txt").read_text().split()) == 12
    assert call("sweep.yaml") == 0
    assert len(started()) == 12  # finished trials are not done again


def test_a_minimized_metric_ranks_the_other_way(sweep):
    plan = sweep(metric={"name": "val/elbo", "goal": "minimize"})
    state = SweepState.open(Path("s"), plan.config)
    Runner(plan, state, workers=2).run()
    assert rank(plan, state)[0].parameters["x"] == 0


def test_random_points_depend_on_seed_and_number_alone(sweep):
    plan = sweep(method="random", parameters={"x": {"min": 0.0, "max": 4.0}})

    def points(folder, counts, seed=0):
        for count in counts:
            state = SweepState.open(Path(folder), plan.config)
            Runner(plan, state, count=count, seed=seed).run()
        return [trial.parameters["x"] for trial in state.trials]

    first = points("a", [3])
    assert points("b", [1, 3]) == first != points("c", [3], seed=1)
    assert len(set(first)) == 3 and all(type(x) is float for x in first)


def test_a_nested_block_is_one_option_with_a_mapping(sweep, capsys):
    block = {"lr": {"values": [0.1, 0.2]}, "layer": {"values": [{"name": "disarm"}, {"name": "reinforce"}]}}
    plan = sweep(parameters={"model": {"parameters": block}, "seed_everything": {"values": [0, 1]}})
    state = SweepState.open(Path("s"), plan.config)
    while parameters := plan.propose(state, seed=0):
        state.trials.append(Trial(new_id(), parameters, "finished"))
    assert len(state.trials) == 8 == len({json.dumps(trial.parameters, sort_keys=True) for trial in state.trials})
    with pytest.raises(SystemExit):
        main(["fit", *plan.command(state.trials[-1].parameters)[2:], "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert {name: model[name] for name in block} == state.trials[-1].parameters["model"]
    assert model["encoder"] == "mlp"


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_proposed_numbers_are_pythons_wherever_they_are(sweep, method):
    numbers = {"n": {"min": 1, "max": 9}, "u": {"min": 0.1, "max": 0.2}}
    plan = sweep(method=method, parameters={**numbers, "block": {"parameters": numbers}})
    parameters = plan.propose(SweepState.open(Path("s"), plan.config), seed=0)
    for part in (parameters, parameters["block"]):
        assert (type(part["n"]), type(part["u"])) == (int, float)
    assert "np." not in " ".join(plan.command(parameters))


def test_the_bayesian_search_learns_from_the_metric(sweep):
    plan = sweep(method="bayes", parameters={"x": {"min": 0.0, "max": 40.0}}, run_cap=10)
    state = SweepState.open(Path("s"), plan.config)
    Runner(plan, state, workers=2).run()
    assert len(state.trials) == 10
    assert abs(rank(plan, state)[0].parameters["x"] - 2) < 2  # the chance of ten random points: 1 - 0.9**10 = 65 %
    assert sum(trial.parameters["x"] < 10 for trial in state.trials[4:]) >= 4


def test_hyperband_stops_the_worse_of_two_trials(sweep):
    plan = sweep(
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 3},
        parameters={"x": {"values": [2, 30]}, "epochs": {"value": 30}, "pause": {"value": 0.1}},
    )
    state = SweepState.open(Path("s"), plan.config)
    Runner(plan, state, workers=2).run()
    good, bad = state.trials
    assert (good.state, bad.state) == ("finished", "stopped")
    lines = [len(state.record(trial).read_text().splitlines()) for trial in (good, bad)]
    assert lines[0] == 31 and lines[1] < 25
    assert [row.parameters["x"] for row in rank(plan, state)] == [2, 30]


def test_an_unlogged_metric_ends_the_sweep_with_the_nearest_key(sweep):
    sweep(metric={"name": "val/elb", "goal": "maximize"})
    assert "did you mean 'val/elbo'" in call("sweep.yaml")
    assert len(started()) == 1


def test_a_failed_trial_is_ranked_last_with_its_reason_and_tried_again_on_the_next_call(sweep, capsys):
    sweep(parameters={"x": {"values": [2, 99]}})
    assert call("sweep.yaml") == 1
    assert "x is too large" in capsys.readouterr().out
    row = json.loads(Path("runs/sweeps/sweep/ranking.json").read_text())["ranking"][-1]
    assert (row["rank"], row["value"], row["states"]) == (0, None, ["failed"]) and row["errors"] == ["x is too large"]
    assert call("sweep.yaml") == 1
    assert len(started()) == 3  # 2 once, 99 twice


def test_three_failures_and_nothing_else_end_the_sweep(sweep):
    sweep(parameters={"x": {"values": [91, 92, 93, 94, 95]}})
    assert "3 failures in a row" in call("sweep.yaml")
    assert len(started()) == 3


def interrupted(number, *, wait_for):
    """Start a sweep in a process of its own, send it a signal when so many trials have started; its exit status."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lightning_modules.cli", "sweep", "sweep.yaml", "--workers", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, **quiet, preexec_fn=heed_interrupts)
    try:
        deadline = time.monotonic() + 120
        while not (Path("started.txt").exists() and len(started()) >= wait_for):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(60)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_interrupted_sweep_goes_on_and_redoes_nothing_that_is_done(sweep, number):
    sweep(parameters={"x": {"values": [0, 1, 2, 3, 4, 5]}, "pause": {"value": 0.3}})
    code = interrupted(number, wait_for=4)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    state = json.loads(Path("runs/sweeps/sweep/sweep.json").read_text())
    done = {trial["id"] for trial in state["trials"] if trial["state"] == "finished"}
    assert 2 <= len(done) < 6
    before = started()
    assert call("sweep.yaml", "--workers", 2) == 0
    again = SweepState.open(Path("runs/sweeps/sweep"), Plan.load(Path("sweep.yaml")).config)
    assert [trial.state for trial in again.trials] == ["finished"] * 6
    assert sorted(trial.parameters["x"] for trial in again.trials) == [0, 1, 2, 3, 4, 5]
    assert done <= {trial.id for trial in again.trials}
    assert len(started()) - len(before) == 6 - len(done)


def test_two_sweeps_do_not_share_a_folder(sweep):
    plan = sweep()
    state = SweepState.open(Path("s"), plan.config)
    with state.locked(), pytest.raises(ValueError, match="no other process"):
        Runner(plan, SweepState.open(Path("s"), plan.config)).run()
    state.save()
    other = sweep(parameters={"x": {"values": [7]}})
    with pytest.raises(ValueError, match="other content"):
        SweepState.open(Path("s"), other.config)
    (Path("s") / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="choose another one by --folder"):
        SweepState.open(Path("s"), plan.config)


def test_a_trial_gets_the_environment_of_an_agent(sweep, monkeypatch):
    plan = sweep(project="p", entity="e")
    state = SweepState.open(Path("s"), plan.config)
    runner = Runner(plan, state)
    trial = runner._propose()
    state.record(trial).parent.mkdir(parents=True)
    monkeypatch.setenv("WANDB_SWEEP_ID", "stale")
    alone, known = (trial_environment(plan, state, trial, sweep_id) for sweep_id in (None, "abc"))
    assert (alone["WANDB_MODE"], alone["WANDB_RUN_ID"], alone["WANDB_PROJECT"]) == ("offline", trial.id, "p")
    assert "WANDB_SWEEP_ID" not in alone and alone["WANDB_RUN_GROUP"] == f"sweep-{state.id}"
    assert known["WANDB_SWEEP_ID"] == "abc" and "WANDB_RUN_GROUP" not in known
    parameters = yaml.safe_load(Path(known["WANDB_SWEEP_PARAM_PATH"]).read_text())
    assert parameters == {"wandb_version": 1, "x": {"value": 0}}


@pytest.mark.parametrize("file", shipped_files())
def test_the_command_line_is_the_one_of_wandb_agent(file):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    plan = Plan.load(find_file(file))
    state = SweepState.open(Path("unused"), plan.config)
    parameters = plan.propose(state, seed=0)
    given = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in parameters.items()}})
    given |= {"env": ["/usr/bin/env"], "program": [plan.config["program"]]}
    words = [w for c in plan.config["command"] for w in (given[c[2:-1]] if c.startswith("${") else [c])]
    assert words[:2] == ["/usr/bin/env", "stochastic-layers"]
    ours = plan.command(parameters)
    assert ours[:3] == [sys.executable, "-m", "lightning_modules.cli"] and ours[3:] == words[2:]


def test_workers_share_the_gpus_and_the_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert share(0, 1) == {}
    assert share(1, 2) == {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "5,7"}
    assert share(0, 8) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share(2, 4) == {"CUDA_VISIBLE_DEVICES": "6"}


BAD = {
    "not yaml": ("a: [", "YAML file"),
    "a list": ("- 1", "needed a mapping"),
    "dates": ("a: 2020-01-01", "plain data"),
    "goal": ("program: p\nmethod: grid\nmetric: {name: a, goal: max}\nparameters: {x: {value: 1}}", "max"),
    "no metric": ("program: p\nmethod: grid\nparameters: {x: {value: 1}}", "no metric"),
    "null": (
        "program: p\nmethod: grid\nmetric: {name: a}\nparameters: {m: {values: [null, 1]}, n: {values: [{b: null}]}}",
        "null in ['m', 'n'], which no command line can say",
    ),
    "no program": ("method: grid\nmetric: {name: a}\nparameters: {x: {value: 1}}", "no program"),
    "no command": (
        "program: stochastic-layers\nmethod: grid\nmetric: {name: a}\nparameters: {x: {value: 1}}",
        "no command",
    ),
    "no arguments": (
        "program: p\nmethod: grid\nmetric: {name: a}\nparameters: {x: {value: 1}}\ncommand: [a]",
        "without ${args}",
    ),
    "unquoted": (
        "program: p\nmethod: grid\nmetric: {name: a}\nparameters: {x: {value: 1}}\ncommand:\n- --o={'a': 1}\n- ${args}",
        "in double quotes",
    ),
    "custom": ("program: p\nmethod: custom\nmetric: {name: a}\nparameters: {x: {value: 1}}", "custom"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_the_reason(case, tmp_path):
    text, message = BAD[case]
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        Plan.load(tmp_path / "bad.yaml")
    assert str(tmp_path / "bad.yaml") in str(caught.value) and message in str(caught.value)


def test_mistakes_on_the_command_line_end_in_one_clear_line(sweep):
    sweep(method="random", parameters={"x": {"min": 0.0, "max": 4.0}})
    assert "pass --count" in call("sweep.yaml")
    assert "count >= 1" in call("sweep.yaml", "--count", 0)
    assert "layers.yaml" in call("missing.yaml")
    sweep(command=["${interpreter}", "${program}", "${args_json}", "${args}"])
    assert "${args_json}" in call("sweep.yaml", "--folder", "other")
    sweep(parameters={"x": {"min": 0.0, "max": 4.0}})
    assert "disallowed type with grid search" in call("sweep.yaml", "--folder", "third")


def test_a_shipped_file_is_printed_to_be_copied_or_handed_to_wandb(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call("layers", "--print") == 0
    assert yaml.safe_load(capsys.readouterr().out) == Plan.load(find_file("layers.yaml")).config


def test_bounds_that_differ_by_hundredths_are_told_apart():
    assert [number(value) for value in (-123.584, -123.614, -84.0, 0.012345, 2.5e7)] == [
        *("-123.58", "-123.61", "-84.00", "0.01235", "2.5e+07")
    ]
    assert number(float("nan")) == "-"
