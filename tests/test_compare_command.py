"""The command that compares: mistakes, processes, interruptions and scores."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import heed_interrupts
from small_comparison import SMALL

from lightning_modules import Comparison, compare
from lightning_modules.cli import main
from lightning_modules.comparison import pool
from lightning_modules.comparison.command import parser
from lightning_modules.comparison.runner import Budget


def command(*args):
    with pytest.raises(SystemExit) as status:
        main(["compare", *args])
    return status.value.code


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layers=reinforc"], "did you mean 'reinforce'"),
        (["--steps=5", "--seconds=5"], "needed one budget"),
        (["--steps=0"], "needed steps > 0"),
        (["--sort=elbow"], "needed a metric to sort by"),
        (["--seeds=1,1"], "all different"),
        (["--workers=0"], "needed workers >= 1"),
        (["--evaluations=0"], "needed evaluations >= 1"),
        (["--ckpt_path=nowhere.ckpt"], "which is no file"),
        (["--score", "--model.layer=gaussian", "--model.objective=iwae"], "needed the objective 'elbo'"),
    ],
)
def test_mistakes_end_in_one_clear_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in str(command(*args))


def test_budgets():
    assert str(Budget.of(None, None)) == "1000 steps" and str(Budget.of(None, 1.5)) == "1.5 seconds"


def test_each_run_has_a_process_and_a_second_call_does_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [
        "--layers=straight_through, enumeration",
        "--steps=4",
        "--seeds=1",
        *SMALL[1:],
    ]  # 32 latents: no enumeration
    assert command(*args) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "max_outcomes" in out and "32 bernoulli latents" in out
    folder = tmp_path / "runs" / "compare"
    assert {p.name for p in folder.iterdir() if p.is_file()} == {
        *(f"training.{kind}" for kind in ("json", "csv", "md")),
        *(f"training-{name}.png" for name in ("dots", "elbo", "variance")),
    }
    (kept,) = (folder / "runs").glob("*.json")
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(pool, "_run", lambda *args: pytest.fail("a finished run was repeated"))
    result = compare(
        ["straight_through"],
        {"data": {"class_path": "Digits", "init_args": {"binarization": "dynamic"}}, "trainer": {"accelerator": "cpu"}},
        steps=4,
        seeds=[0],
    )
    assert kept.stat().st_mtime_ns == before and result.rows[0]["status"] == "ok"
    assert result.curves[-1]["step"] == 4 and list(result.rows[0]) == result.columns


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_an_interrupted_comparison_resumes_and_loses_no_finished_run(tmp_path, how):
    words = ["compare", "--layers=reinforce,disarm", "--steps=60", "--seeds=1", *SMALL]
    program = [sys.executable, "-m", "lightning_modules.cli", *words]
    first = subprocess.Popen(
        program,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    runs = tmp_path / "runs" / "compare" / "runs"
    deadline = time.monotonic() + 600
    while not list(runs.glob("*.json")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(getattr(signal, how))
    _, errors = first.communicate()
    if how != "SIGKILL":
        assert first.returncode == 130 and "interrupted" in errors
    kept = {p: p.stat().st_mtime_ns for p in runs.glob("*.json")}
    assert len(kept) == 1 and not any(json.loads(p.read_text())["error"] for p in kept)
    assert not (tmp_path / "runs/compare/training.json").exists()
    time.sleep(2)
    assert not alive(str(runs))  # no run outlives its parent
    assert subprocess.run(program, cwd=tmp_path).returncode == 0
    assert all(p.stat().st_mtime_ns == before for p, before in kept.items())
    result = Comparison.from_json(tmp_path / "runs/compare/training.json")
    assert len(result) == 2 and {row["status"] for row in result.rows} == {"ok"}


def alive(text):
    """The processes with these words in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in words and path.parent.name != str(os.getpid()):
            found.append(words)
    return found


@pytest.mark.slow
def test_scores_from_the_command_line_after_a_short_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("--score", "--layers", "enumeration", "disarm,gumbel_softmax", "--steps=20", *SMALL) == 0
    assert "frozen after 20 steps of straight_through" in capsys.readouterr().out
    scores = Comparison.from_json(tmp_path / "runs/compare/scores.json")
    rows = {row["layer"]: row for row in scores.rows}
    assert rows["enumeration"]["mse"] < rows["disarm"]["mse"] and rows["gumbel_softmax"]["bias"] > 0
    assert {row["reference"] for row in scores.rows} == {"exact"}


@pytest.mark.parametrize("words", [["arm", "disarm"], ["arm,disarm"], ["arm disarm"], ["arm, disarm"]])
def test_layers_are_named_with_spaces_or_commas(words):
    options = parser().parse_args(["--layers", *words])
    assert [name for part in options.layers for name in part] == ["arm", "disarm"]
