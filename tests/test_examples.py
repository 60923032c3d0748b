"""The example programs run, with every layer that they name, and learn what they are there to show."""

import logging
import os
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "examples"
TINY = {
    "black_box_design": ["--budget", "20", "--seeds", "2"],
    "feature_selection": ["--steps", "2", "--seeds", "1"],
    "hard_attention": ["--steps", "2"],
    "image_codes": ["--epochs", "1", "--prior-steps", "2", "--layer", "vq", "rotation_trick", "simvq", "fsq"],
    "job_order": ["--steps", "2", "--seeds", "1"],
    "mixture_of_experts": ["--steps", "2", "--seeds", "1"],
    "rollouts": ["--iterations", "2", "--seeds", "1"],
}


@pytest.fixture(autouse=True)
def what_a_program_sets_for_itself_ends_with_it():
    """A program may quieten Lightning and seed everything; other tests are to find the process as it was."""
    logger, environment, threads = logging.getLogger("lightning.pytorch"), dict(os.environ), torch.get_num_threads()
    level = logger.level
    yield
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


def run(name, words, out):
    """The names of a program after its ``main``."""
    program = runpy.run_path(str(FOLDER / f"{name}.py"))
    program["main"]([*words, "--out", str(out)])
    return program


def test_every_program_is_tried_and_named():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(TINY)
    page = (FOLDER / "README.md").read_text()
    assert sorted(set(re.findall(r"\]\((\w+)\.py\)", page))) == sorted(TINY)


@pytest.mark.parametrize("name", TINY)
def test_programs_run(name, tmp_path, capsys):
    run(name, TINY[name], tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert "┃" in capsys.readouterr().out  # a table


@pytest.mark.slow
def test_attention_learns_where_to_look(tmp_path, capsys):
    run("hard_attention", ["--layer", "leave_one_out", "--steps", "300"], tmp_path)
    random, learned = map(float, re.findall(r"([\d.]+) %", capsys.readouterr().out))
    assert learned > random + 10


@pytest.mark.slow
def test_experts_share_the_work(tmp_path, capsys):
    words = ["--layer", "reinmax", "leave_one_out", "--steps", "1500", "--seeds", "1"]
    run("mixture_of_experts", words, tmp_path)
    lost = [float(v) for v in re.findall(r"([\d.]+) %", capsys.readouterr().out)]
    assert max(lost) < 6  # one plane for all would lose more than half


@pytest.mark.slow
def test_useless_columns_are_found(tmp_path):
    program = run("feature_selection", ["--layer", "disarm", "--steps", "1", "--seeds", "1"], tmp_path)
    gates, _, _ = program["train"]("disarm", 1500, 0)
    assert gates.tolist() == [1.0] * 5 + [0.0] * 45


@pytest.mark.slow
def test_the_agent_finds_the_exit(tmp_path):
    program = run("rollouts", TINY["rollouts"], tmp_path)
    shortest = float(program["shortest"]().mean())
    _, curve, found = program["train"]("moving_average", 150, 0)
    assert curve[0] > 3 * shortest and found < 1.3 * shortest


@pytest.mark.slow
def test_designs_come_close_to_the_best(tmp_path):
    program = run("black_box_design", TINY["black_box_design"], tmp_path)
    simulator = program["Simulator"]()
    optimum = simulator.best()
    curve, best = program["search"]("disarm", simulator, 1000, 0)
    assert curve[-1][1] > 0.85 * optimum > curve[0][1] and 0.93 * optimum < best <= optimum * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leave_one_out", "soft_sort"])
def test_jobs_are_put_in_nearly_the_best_order(name, tmp_path):
    program = run("job_order", TINY["job_order"], tmp_path)
    assert program["train"](name, 0, 0)[1] > 1.2 and 1 <= program["train"](name, 400, 0)[1] < 1.02
