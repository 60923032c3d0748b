"""The machinery of the benchmarks, and that what is committed are results."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="a release does not hold the benchmarks")

from benchmarks import measure, render
from benchmarks.measure import Row
from benchmarks.scaling import exponent

COMMITTED = sorted(measure.RESULTS.glob("*.json"))


def work(size):
    return lambda: sum(range(size))


@pytest.fixture
def result(tmp_path):
    rows = measure.compare("sums", {"short": work(3_000), "long": work(30_000)}, reference="short", seconds=0.1)
    return measure.write("sums", "Which?", rows, folder=tmp_path, unavailable={"peer": "ImportError: none"})


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_result_keeps_the_schema_and_is_on_the_page(path):
    document = render.read(path)
    assert document["benchmark"] == path.stem
    assert render.section(document) in (path.parent / "README.md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000


def test_results_are_committed():
    assert COMMITTED


def test_interleaved_ratios_find_what_takes_longer(result):
    rows = {row["name"]: row for row in render.read(result)["rows"]}
    assert 3 < rows["long"]["ratio"] < 30 and rows["short"]["ratio"] == 1
    assert rows["long"]["rounds"] == rows["short"]["rounds"] >= 9
    assert not list(result.parent.glob("*.part"))


def test_the_page_names_losses_and_what_was_not_measured(result):
    text = render.page(result.parent).read_text()
    assert "long at sums" in text and "ImportError: none" in text
    assert (result.parent / "sums.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 0}, "schema"),
        ({"rows": []}, "at least one row"),
        ({"environment": {}}, "environment"),
        ({"question": None}, "question"),
    ],
)
def test_what_is_not_a_result_is_refused(result, change, message):
    document = json.loads(Path(result).read_text())
    with pytest.raises(ValueError, match=message):
        measure.check({**document, **change})


@pytest.mark.parametrize(
    "change", [{"median": -1.0}, {"q1": 9e9}, {"reference": "nobody"}, {"ratio": None}, {"rounds": 0}]
)
def test_a_row_that_cannot_be_is_refused(result, change):
    document = json.loads(Path(result).read_text())
    document["rows"][1] = {**document["rows"][1], **change}
    with pytest.raises(ValueError, match="needed"):
        measure.check(document)
    document["rows"] = [asdict(Row("g", "n", "s", 1.0, 1.0, 1.0, 1))] * 2
    with pytest.raises(ValueError, match="twice"):
        measure.check(document)


def test_the_exponent_of_a_power_is_found():
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
