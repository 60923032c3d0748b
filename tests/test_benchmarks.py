"""The machinery of the benchmarks, and that what is committed are results."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("benchmarks", reason="a release does not hold the benchmarks")

from benchmarks import bandwidth, measure, render
from benchmarks.measure import Row
from benchmarks.scaling import exponent

COMMITTED = sorted(measure.RESULTS.glob("*.json"))


def work(size):
    return lambda: sum(range(size))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    rows = measure.compare("sums", {"short": work(3_000), "long": work(30_000)}, reference="short", seconds=0.1)
    folder = tmp_path_factory.mktemp("results")
    return measure.write("sums", "Which?", rows, folder=folder, unavailable={"peer": "ImportError: none"})


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_result_keeps_the_schema_and_is_on_the_page(path):
    document = render.read(path)
    assert document["benchmark"] == path.stem
    assert render.section(document) in (path.parent / "README.md").read_text()
    assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("folder", [["--folder", "/home/me/results"], ["--folder=/home/me/results"], []], ids=str)
def test_the_command_is_recorded_without_the_folder_of_the_result(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/benchmarks/layers.py", "--seconds", "3", *folder, "--threads", "2"])
    path = measure.write("sums", "Which?", [Row("sums", "short", "s", 1.0, 1.0, 1.0, 9)], folder=tmp_path)
    assert render.read(path)["command"] == "python -m benchmarks.layers --seconds 3 --threads 2"


def test_results_are_committed():
    assert COMMITTED


def test_interleaved_ratios_find_what_takes_longer(result):
    rows = {row["name"]: row for row in render.read(result)["rows"]}
    assert 3 < rows["long"]["ratio"] < 30 and rows["short"]["ratio"] == 1
    assert rows["long"]["rounds"] == rows["short"]["rounds"] >= 9
    assert not list(result.parent.glob("*.part"))


class Clocked:
    """A case that says how long it takes, and what each call found: whether another case was called before."""

    def __init__(self, calls, seconds, cold=0.0):
        self.calls, self.seconds, self.cold = calls, seconds, cold

    def __call__(self):
        self.calls.append((self, self.seconds + (self.cold if self.calls and self.calls[-1][0] is not self else 0.0)))


@pytest.fixture
def calls(monkeypatch):
    """The calls of all cases; the clocks show what they say they take."""
    made = []
    monkeypatch.setattr(measure, "clock", lambda device="cpu": sum(seconds for _, seconds in made))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: sum(seconds for _, seconds in made))
    return made


def test_a_turn_is_long_and_does_not_count_its_first_call_with_cold_caches(calls):
    cases = {"short": Clocked(calls, 1e-3, cold=5e-4), "other": Clocked(calls, 8e-3, cold=5e-4)}
    times = measure.interleave(cases, seconds=0.0, min_rounds=4)
    assert times["short"] == pytest.approx([1e-3] * 4) and times["other"] == pytest.approx([8e-3] * 4)
    turns = [case for case, _ in calls[8:]]  # after the warm-up
    assert turns.count(cases["short"]) == 4 * (1 + 20) and turns.count(cases["other"]) == 4 * (1 + 3)


def test_a_case_longer_than_a_turn_is_called_once_a_round(calls):
    cases = {"short": Clocked(calls, 1e-2), "long": Clocked(calls, 0.3)}
    times = measure.interleave(cases, seconds=0.0, min_rounds=4)
    assert [case for case, _ in calls[8:]].count(cases["long"]) == 4
    assert times["long"] == pytest.approx([0.3] * 4)


@pytest.mark.parametrize("name", bandwidth.NUMBERS)
def test_the_bytes_of_the_limit_are_counted_by_the_size_of_z(name):
    shape = (6, 5) if name == "gaussian" else (6, 5, 4)
    forward, params = bandwidth.forward(name, shape, "cpu")
    results = forward(params)
    z, last = results[0], results[-1]
    (gradient,) = bandwidth.work(forward, params, torch.randn_like(last))()
    moved = params.numel() + z.numel() + (0 if name == "reinforce" else z.numel()) + gradient.numel()
    assert moved == (bandwidth.NUMBERS[name] - 1) * z.numel()  # all but what backward reads again
    assert gradient.shape == params.shape and gradient.any()


def test_a_layer_that_cannot_be_compiled_is_measured_without(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    unavailable = {}
    rows, bandwidth_of_copy = bandwidth.measure("reinmax", (6, 5, 4), 0.0, "cpu", unavailable)
    assert [row.name for row in rows] == [bandwidth.LIMIT, "eager"] and bandwidth_of_copy > 0
    assert unavailable == {"reinmax (6, 5, 4) compiled": "RuntimeError: no C++ compiler"}


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", bandwidth.NUMBERS)
def test_what_the_bandwidth_is_compared_with_compiles(name, device):
    unavailable = {}
    rows, _ = bandwidth.measure(name, (6, 5) if name == "gaussian" else (6, 5, 4), 0.0, device, unavailable)
    assert not unavailable and [row.name for row in rows] == [bandwidth.LIMIT, "eager", "compiled"]


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
