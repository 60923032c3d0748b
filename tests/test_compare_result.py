"""The result of a comparison: rows, files, tables, pictures, and the page that shows them."""

import csv
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from small_comparison import some_result

from lightning_modules import Comparison
from lightning_modules.comparison import plots
from lightning_modules.comparison.publish import publish
from lightning_modules.comparison.result import IDENTITY, METRICS
from lightning_modules.comparison.settings import loggers, parse
from lightning_modules.comparison.table import markdown_table, notes, rich_table

DOCS = Path(__file__).parent.parent / "docs"


def test_the_rows_are_records_of_the_same_columns():
    result = some_result({"a": [-20.0, -21.0], "b": [None, -30.0]})
    assert len(result) == 4 and all(
        list(row) == result.columns for row in result.rows
    )  # so that a data frame takes them
    copied = result.to_dicts()
    copied[0]["label"] = "other"
    assert result.rows[0]["label"] == "a"


def test_the_result_is_written_and_read(tmp_path):
    result = some_result({"a": [-20.0, -21.0], "b": [None, -30.0]})
    result.to_json(tmp_path / "deep" / "r.json")
    result.to_csv(tmp_path / "r.csv")
    assert Comparison.from_json(tmp_path / "deep" / "r.json") == result
    with open(tmp_path / "r.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == result.columns and json.loads(rows[0]["options"]) == {"latent_dim": 4}
    assert [row["elbo"] for row in rows] == ["-20.0", "-21.0", "", "-30.0"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_summary_is_sorted_by_what_is_better_with_failures_last():
    result = some_result({"worst": [-30.0, -31.0], "best": [-20.0, -21.0], "broken": [None, None]})
    assert [s.label for s in result.summary()] == ["best", "worst", "broken"]
    assert [s.label for s in result.summary("step_ms")] == ["worst", "best", "broken"]
    best = result.summary()[0]
    assert best.mean["elbo"] == -20.5 and best.spread["elbo"] == pytest.approx(math.sqrt(0.5))
    with pytest.raises(ValueError, match="needed a metric"):
        result.summary("elbow")


def test_the_table_says_what_is_best_and_what_failed():
    result = some_result({"a": [-20.0, -21.0], "b": [None, -30.0], "c": [None, None]})
    table = rich_table(result)
    assert table.title == "a title" and table.row_count == 3
    text = markdown_table(result)
    assert "**-20.50 ± 0.71**" in text and "1 FAILED" in text
    assert notes(result)[:2] == ["b: 1 of 2 failed: ValueError: it broke", "c: 2 of 2 failed: ValueError: it broke"]
    assert notes(result)[2] == "enumeration was left out: too many."
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1


def test_pictures_are_drawn_and_name_every_layer(tmp_path):
    result = some_result({f"layer_{i}": [-20.0 - i / 10, -21.0] for i in range(20)} | {"broken": [None]})
    labels = [s.label for s in result.summary() if s.runs]
    figure = plots.elbo_curves(result, labels)
    assert sorted(t.get_text() for t in figure.axes[0].texts) == sorted(labels)
    heights = sorted(t.xyann[1] for t in figure.axes[0].texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.02  # no name on another
    assert len({(plots.style(i)["color"], plots.style(i)["linestyle"]) for i in range(28)}) == 28
    assert [p.name for p in plots.draw(result, tmp_path)] == [
        "training-dots.png",
        "training-elbo.png",
        "training-variance.png",
    ]
    assert all(p.stat().st_size > 10_000 for p in tmp_path.glob("*.png"))
    assert plots.draw(some_result({"broken": [None]}), tmp_path / "none") == []


def test_w_and_b_gets_the_table_and_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.finish()  # a logger takes up the run of the process, and an earlier test may have left one
    result = some_result({"a": [-20.0, -21.0], "b": [None, -30.0]})
    words = ["--trainer.logger=WandbLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.offline=true"]
    found = loggers(parse(args=words))
    assert [type(logger) for logger in found] == [WandbLogger]
    publish(result, [p for p in plots.draw(result, tmp_path / "plots") if p.stem.endswith("dots")], found)
    wandb.finish()  # until its files are written
    media = [p.name for p in (tmp_path / "wandb").rglob("media/**/*") if p.is_file()]
    assert any(n.startswith("runs_") for n in media) and any(n.startswith("curves_") for n in media)
    assert any(n.startswith("training-dots_") for n in media)


def test_the_page_documents_every_column():
    if not DOCS.is_dir():
        pytest.skip("docs/ is not part of a release")
    text = (DOCS / "compare.md").read_text()
    for name, meaning in IDENTITY.items():
        assert f"| `{name}` | {meaning} |" in text
    for metrics in METRICS.values():
        for metric in metrics:
            assert f"| `{metric.name}` | {metric.meaning} |" in text


def test_the_tables_of_the_page_are_those_of_the_committed_results():
    if not DOCS.is_dir():
        pytest.skip("docs/ is not part of a release")
    text = (DOCS / "compare.md").read_text()
    tables = dict(re.findall(r"<!-- table: (\S+) -->\n(.*?)\n<!-- end of table -->", text, re.S))
    results = {p.name: p for p in (DOCS.parent / "benchmarks" / "results" / "compare").glob("*.json")}
    assert set(tables) == set(results)
    for name, path in results.items():
        comparison = Comparison.from_json(path)
        assert tables[name] == markdown_table(comparison), f"paste markdown_table(Comparison.from_json({name!r}))"
        assert {row["status"] for row in comparison.rows} == {"ok"} and comparison.columns == list(comparison.rows[0])


def test_the_advice_quotes_the_results_as_they_are():
    if not DOCS.is_dir():
        pytest.skip("docs/ is not part of a release")
    text = " ".join((DOCS / "which-layer.md").read_text().split())
    results = DOCS.parent / "benchmarks" / "results" / "compare"
    scores, mnist = (Comparison.from_json(results / f"{name}.json").summary() for name in ("scores", "mnist"))
    times = {row.label: row.mean["gradient_ms"] for row in scores}
    exact = times.pop("enumeration")
    low, high = (round(exact / ms) for ms in (max(times.values()), min(times.values())))
    assert f"took {low} to {high} times as long as a gradient of the other layers" in text
    elbo = {row.label: row.mean["elbo"] for row in mnist}
    assert f"{elbo['disarm'] - elbo['reinforce']:.0f} nats lower than `disarm` on MNIST" in text
    ahead = sorted(elbo[name] - elbo["disarm"] for name in ("straight_through", "gumbel_softmax", "reinmax"))
    assert f"biased layers are {ahead[0]:.0f} to {ahead[-1]:.0f} nats ahead of the best unbiased one" in text
