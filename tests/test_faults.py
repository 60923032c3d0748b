"""The fault campaign: its record is complete and without a problem, and a short one runs."""

import json
import sys
from pathlib import Path

import pytest
from processes import run

FOLDER = Path(__file__).parent.parent / "benchmarks" / "faults"
PAGE = Path(__file__).parent.parent / "docs" / "faults.md"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="benchmarks are not part of a source distribution")


@pytest.fixture
def record():
    return json.loads((FOLDER / "results.json").read_text())


def test_the_published_campaign_has_200_trials_and_every_fault_and_no_problem(record):
    trials = record["trials"]
    assert len(trials) >= 200
    assert [t for t in trials if t["problem"]] == []
    assert all(t["lost"] <= record["interval"] for t in trials)
    assert {t["fault"] for t in trials} >= {"kill", "kill_saving", "rank_lost", "sigterm", "nan", "truncated"}
    assert {t["fault"] for t in trials} >= {"bit_flipped", "disk_full", "read_only", "wandb_unreachable", "wandb_dies"}
    assert {t["fault"] for t in trials} >= {"compare_interrupted", "sweep_interrupted"}


def test_the_report_is_that_of_the_record():
    status, output = run([sys.executable, str(FOLDER / "report.py")], 120)
    assert status == 0, output
    assert output.strip().endswith(PAGE.read_text().strip())


@pytest.mark.ddp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and reads /proc")
def test_a_short_campaign_has_no_problem(tmp_path, seed):
    faults = ["kill", "kill_saving", "rank_lost", "sigterm", "nan", "truncated", "bit_flipped"]
    command = [sys.executable, str(FOLDER / "campaign.py"), "--trials", "14", "--seed", str(100 + seed)]
    status, output = run([*command, "--only", *faults, "--out", str(tmp_path / "record.json")], 600)
    assert status == 0, output[-4000:]
