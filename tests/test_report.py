"""Comparisons in W&B: charts that are there when an offline run is uploaded, and reports that lose nothing."""

import json
import math
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import wandb
import wandb_offline
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from wandb_server import serving

from lightning_modules import Comparison
from lightning_modules.cli import main
from lightning_modules.comparison import report
from lightning_modules.comparison.charts import charts
from lightning_modules.comparison.plots import mean_curve
from lightning_modules.comparison.publish import Published, publish
from lightning_modules.comparison.report import make_reports, save
from lightning_modules.comparison.result import IDENTITY, METRICS

VARIANCES = {"exact": 0.0, "good": 0.5, "noisy": 50.0}  # label -> gradient variance; one run of "noisy" failed
SEEDS = (0, 1)


def a_comparison(kind="training", **settings):
    rows, curves = [], []
    for number, (label, variance) in enumerate(VARIANCES.items()):
        for seed in SEEDS:
            row = dict.fromkeys([*IDENTITY, *(m.name for m in METRICS[kind])])
            row |= {"label": label, "layer": label, "options": {"latent_dim": 4}, "seed": seed, "evaluations": 4}
            if label == "noisy" and seed == 1:
                rows.append(row | {"status": "failed", "error": "ValueError: it broke"})
                continue
            row |= {m.name: 1.0 + number for m in METRICS[kind]} | {"status": "ok", "grad_variance": variance}
            rows.append(row | ({"elbo": -10.0 * number - seed} if kind == "training" else {}))
            for step in (1, 2, 3) if kind == "training" else ():
                point = {"step": step, "seconds": 0.1 * step + seed, "elbo": -number - seed / step, "grad_snr": None}
                curves.append({"label": label, "seed": seed, **point, "grad_variance": variance})
    return Comparison(kind, "a title", rows, curves, {"enumeration": "too many."}, settings)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An offline run of W&B in a folder of the test."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.finish()  # an earlier test may have left one
    yield wandb.init(mode="offline", dir=tmp_path, project="here")
    wandb.finish()


def test_bars_are_the_means_in_the_order_of_the_table():
    found = {chart.key: chart for chart in charts(a_comparison())}
    assert set(found) == {
        *(f"compare/charts/{m.name}" for m in METRICS["training"] if m.drawn and m.better),
        *(f"compare/charts/{name}" for name in ("elbo_by_step", "elbo_by_seconds", "grad_variance_by_step")),
    }
    elbo = found["compare/charts/elbo"]
    assert elbo.fields == {"label": "layer", "value": "ELBO"} and "higher is better" in elbo.strings["title"]
    assert [row[:3] for row in elbo.rows] == [["exact", -0.5, -0.5], ["good", -10.5, -10.5], ["noisy", -20.0, -20.0]]
    assert [row[3:] for row in elbo.rows] == [[math.sqrt(0.5), 2], [math.sqrt(0.5), 2], [None, 1]]  # and no NaN
    assert [row[0] for row in charts(a_comparison(), "grad_variance")[0].rows] == ["exact", "good", "noisy"]


def test_values_that_differ_much_are_drawn_as_logarithms_and_say_so():
    found = {chart.key: chart for chart in charts(a_comparison())}
    variance = found["compare/charts/grad_variance"]
    assert variance.fields["value"] == "log10 of gradient variance" == variance.columns[1]
    expected = [["good", math.log10(0.5), 0.5], ["noisy", math.log10(50.0), 50.0]]  # 0 has no logarithm
    assert [row[:3] for row in variance.rows] == expected
    assert found["compare/charts/step_ms"].fields["value"] == "ms per step"  # 1, 2 and 3
    assert all(row[1] != "exact" for row in found["compare/charts/grad_variance_by_step"].rows)


def test_lines_are_the_mean_curves():
    result = a_comparison()
    found = {chart.key: chart for chart in charts(result)}
    for key, x in (("elbo_by_step", "step"), ("elbo_by_seconds", "seconds")):
        rows = found[f"compare/charts/{key}"].rows
        for label in VARIANCES:
            assert [(r[0], r[2]) for r in rows if r[1] == label] == list(
                zip(*mean_curve(result, label, x, "elbo"), strict=True)
            )
    scores = charts(a_comparison("scores"))
    assert {chart.preset for chart in scores} == {"wandb/bar/v0"} and len(scores) > 4
    assert charts(Comparison("training", "", [row | {"status": "failed"} for row in result.rows])) == []


def test_an_offline_run_holds_panels_over_tables_that_have_their_columns(offline):
    """What an upload brings: the panels are in the configuration, their tables among the logged values."""
    table = wandb.Table(columns=["layer", "ELBO"], data=[["a", 1.0]])
    offline.log({"bar": wandb.plot.bar(table, "layer", "ELBO", title="t")})
    offline.log({"lines": wandb.plot.line_series([[1]], [[2]], keys=["a"], title="t", xname="x")})
    result, folder = a_comparison(), Path(offline.dir).parent
    (run,) = publish(result, [], [CSVLogger("."), WandbLogger(experiment=offline)])
    wandb.teardown()  # until the files are written
    assert run == Published(f"here/{offline.id}", True, folder)
    panels = wandb_offline.config(folder)["_wandb"]["visualize"]
    own = {name: panels.pop(name)["panel_config"] for name in ("bar", "lines")}  # as the functions of W&B make them
    assert list(panels) == [chart.key for chart in charts(result)]
    logged = {key: value for row in wandb_offline.history(folder) for key, value in row.items()}
    for chart in charts(result):
        panel = panels[chart.key]["panel_config"]
        like = own["bar" if "bar" in chart.preset else "lines"]
        assert panel["panelDefId"] == chart.preset == like["panelDefId"]
        assert set(panel["fieldSettings"]) == set(like["fieldSettings"])
        assert set(panel["stringSettings"]) == set(like["stringSettings"])
        assert json.dumps(chart.table_key) in json.dumps(panel["userQuery"])
        content = json.loads((folder / "files" / logged[f"{chart.table_key}/path"]).read_text())
        assert set(panel["fieldSettings"].values()) <= set(content["columns"])
        assert content["data"] == chart.rows
    assert logged["compare/elbo/good"] == -10.5


def test_an_offline_comparison_says_how_its_report_is_made_later(capsys):
    published = [Published("here/abc123", True, Path("runs/wandb/offline-run-1"))]
    assert make_reports(a_comparison(), published, Path("runs/my results/training.json"), "iwae")
    said = capsys.readouterr().out.rpartition("later: ")[2].strip()
    first, second = said.split(" && ")
    assert shlex.split(first) == ["wandb", "sync", "runs/wandb/offline-run-1"]
    assert shlex.split(second) == [
        *("stochastic-layers", "report", "runs/my results/training.json", "here/abc123", "--sort", "iwae")
    ]


def test_a_report_that_fails_is_said_and_the_next_one_is_made(capsys, monkeypatch):
    def save(comparison, run, sort):
        if run == "me/here/first":
            raise ConnectionError("the server is gone")
        return "address"

    monkeypatch.setattr(report, "save", save)
    runs = [Published(f"me/here/{name}", False, Path("folder")) for name in ("first", "second")]
    assert not make_reports(a_comparison(), runs, Path("training.json"), None)
    out, errors = capsys.readouterr()
    assert "ConnectionError: the server is gone" in errors and "The results are in training.json" in errors
    assert "stochastic-layers report training.json me/here/first" in errors and out == "report: address\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare", "--report"], "needed a W&B run for --report, got none; add --trainer.logger=WandbLogger"),
        (["report", "nowhere.json", "p/i"], "needed the results of a comparison, FOLDER/training.json"),
        (["report", "other.json", "p/i"], "needed the results of a comparison, FOLDER/training.json"),
        (["report", "training.json", "abc123"], r"needed [ENTITY/]PROJECT/ID of a W&B run, got 'abc123'"),
        (["report", "training.json", "p/i", "--sort", "elbow"], "needed a metric to sort by"),
    ],
)
def test_mistakes_end_in_one_clear_line_before_anything_runs(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", ModuleType("installed"))
    a_comparison().to_json("training.json")
    Path("other.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit) as status:
        main(args)
    assert message in str(status.value.code)


@pytest.mark.parametrize("args", [["compare", "--report"], ["report", "training.json", "me/project/abc123"]])
def test_a_missing_package_is_named_before_anything_runs(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    a_comparison().to_json("training.json")
    with pytest.raises(SystemExit) as status:
        main(args)
    assert "pip install 'stochastic-layers[report]'" in str(status.value.code)


@pytest.mark.slow
def test_a_comparison_offline_leaves_panels_and_the_command_for_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", ModuleType("installed"))
    wandb.finish()
    words = ["compare", "--report", "--layers=reinforce", "--steps=4", "--seeds=1", "--trainer.accelerator=cpu"]
    words += ["--trainer.logger=WandbLogger", "--trainer.logger.project=here", "--trainer.logger.offline=true"]
    with pytest.raises(SystemExit) as status:
        main(words)
    assert status.value.code == 0
    wandb.teardown()
    sync, later = capsys.readouterr().out.rpartition("later: ")[2].strip().split(" && ")
    folder = Path(shlex.split(sync)[-1])
    result = Comparison.from_json(shlex.split(later)[2])
    assert shlex.split(result.settings["command"]) == ["stochastic-layers", *words]
    assert shlex.split(later)[3] == f"here/{wandb_offline.run_record(folder).run_id}"
    assert list(wandb_offline.config(folder)["_wandb"]["visualize"]) == [chart.key for chart in charts(result)]


@pytest.fixture
def server(monkeypatch):
    """The reports that a server gets."""
    pytest.importorskip("wandb_workspaces.reports.v2", reason="needs the extra `report`")
    with serving() as (address, reports):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_SILENT", "true")
        wandb.teardown()  # which has the address of another one
        yield reports
        wandb.teardown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydantic, by the package
@pytest.mark.parametrize("run", ["me/project/abc123", "project/abc123"])
def test_a_report_has_the_table_the_charts_the_pictures_and_the_command(server, run):
    result = a_comparison(command="stochastic-layers compare --steps 3")
    address = save(result, run)
    (sent,) = server
    assert address.endswith("--report1") and "/me/project/reports/Layers-compared:-a-title" in address
    assert (sent["entityName"], sent["projectName"], sent["type"]) == ("me", "project", "runs/draft")
    blocks = json.loads(sent["spec"])["blocks"]
    texts = [json.dumps(block) for block in blocks if block["type"] != "panel-grid"]
    for words in ("a title", "under the same budget", "| `good` | 4 | -10.50", "it broke", "enumeration was left out"):
        assert any(words in text for text in texts), words
    assert "stochastic-layers compare --steps 3" in texts[-2]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    for grid in grids:
        (runs,) = grid["runSets"]
        (only,) = runs["filters"]["filters"]
        assert (only["key"]["name"], only["value"]) == ("name", ["abc123"])  # the id; the name is displayName
    panels = [p for g in grids for section in g["panelBankSectionConfig"]["panels"] for p in [section]]
    drawn = {p["config"]["userQuery"]["queryFields"][0]["fields"][0]["args"][0]["value"]: p for p in panels[:-4]}
    assert list(drawn) == [chart.table_key for chart in charts(result)]
    for chart in charts(result):
        config = drawn[chart.table_key]["config"]
        assert (config["panelDefId"], config["fieldSettings"]) == (chart.preset, chart.fields)
        assert config["stringSettings"] == chart.strings
    media = [key for panel in panels[-4:-1] for key in panel["config"]["mediaKeys"]]
    assert media == [f"compare/training-{name}" for name in ("dots", "elbo", "variance")]
    assert "compare/runs" in json.dumps(panels[-1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_that_was_not_uploaded_gets_no_empty_report(server):
    with pytest.raises(ValueError, match=r"got 'me/project/other'.*upload an offline run first, with `wandb sync`"):
        save(a_comparison("scores"), "me/project/other")
    assert not server
