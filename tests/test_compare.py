"""Comparing layers: equal treatment, honest numbers, and results that survive."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

import stochastic_layers as sl
from lightning_modules import VAE, Comparison, compare
from lightning_modules.cli import main
from lightning_modules.comparison import measure, plots, pool, run
from lightning_modules.comparison.plan import Candidate, candidates, make_run
from lightning_modules.comparison.publish import publish
from lightning_modules.comparison.result import IDENTITY, METRICS
from lightning_modules.comparison.runner import Budget, gather
from lightning_modules.comparison.settings import loggers, parse, settings_of
from lightning_modules.comparison.table import markdown_table, notes, rich_table
from stochastic_layers import registry

DOCS = Path(__file__).parent.parent / "docs"
SMALL = ["--model.layer_options.latent_dim=4", "--data.binarization=dynamic", "--trainer.accelerator=cpu"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Settings of a small model, and a function that makes the specification of a training run."""
    monkeypatch.chdir(tmp_path)
    parsed = parse(args=SMALL)
    shared = settings_of(parsed)

    def spec(layer, seed=0, start=None, config=shared.config, **options):
        base = {"config": config, "budget": {"steps": 4}, "points": 2, "start": start}
        candidate = Candidate(layer, layer, {"latent_dim": 4, "family": "bernoulli", **options}, 4)
        return make_run(tmp_path / "runs", "training", candidate, seed, base)

    return parsed, shared, spec


def some_result(values):
    """A comparison of the layers in ``values``: label -> ELBO of each seed, ``None`` for a failure."""
    rows, curves = [], []
    for number, (label, elbos) in enumerate(values.items()):
        for seed, elbo in enumerate(elbos):
            row = dict.fromkeys([*IDENTITY, *(m.name for m in METRICS["training"])])
            row |= {"label": label, "layer": label, "options": {"latent_dim": 4}, "seed": seed, "evaluations": 4}
            row |= {"status": "failed", "error": "ValueError: it broke"} if elbo is None else {"status": "ok"}
            if elbo is not None:
                row |= {m.name: 10.0 ** (number - 1) for m in METRICS["training"]} | {"elbo": elbo}
                for step in range(1, 6):
                    point = {"step": step, "seconds": 0.1 * step, "elbo": elbo - 10 / step, "grad_variance": 1 + number}
                    curves.append({"label": label, "seed": seed, **point, "grad_snr": None})
            rows.append(row)
    return Comparison("training", "a title", rows, curves, {"enumeration": "too many."}, {})


# ---- the plan


def test_layers_get_as_many_evaluations_as_asked_for_or_as_few_as_they_can(small):
    parsed, shared, _ = small
    found = {c.label: c for c in candidates(parsed.model, shared, evaluations=4)}
    assert set(found) == set(sl.list_layers(family="bernoulli"))
    for name in ("reinforce", "disarm", "arm", "gumbel_softmax", "muprop"):
        assert found[name].evaluations == 4, name
    assert found["muprop"].options["num_samples"] == 3  # and one at the mean
    assert found["rebar"].evaluations == 3 and found["coordinate_flip"].evaluations == 4
    assert (found["local_expectation"].evaluations, found["enumeration"].evaluations) == (5, 16)
    two = {c.label: c for c in candidates(parsed.model, shared, ["arms", "rebar", "straight_through"], 2)}
    assert [two[n].evaluations for n in ("arms", "rebar", "straight_through")] == [2, 3, 2]


def test_a_layer_may_be_named_with_options_and_twice(small):
    parsed, shared, _ = small
    layers = [{"name": "gumbel_softmax", "temperature": t} for t in (0.5, 2.0)] + [
        {"name": "reinforce", "num_samples": 2, "baseline": "leave_one_out", "label": "mine"}
    ]
    first, second, third = candidates(parsed.model, shared, layers)
    assert (first.label, second.label) == ("gumbel_softmax (temperature=0.5)", "gumbel_softmax (temperature=2.0)")
    assert (third.label, third.evaluations, third.options["baseline"]) == ("mine", 2, "leave_one_out")
    with pytest.raises(ValueError, match="different labels"):
        candidates(parsed.model, shared, ["reinforce", "reinforce"])
    with pytest.raises(ValueError, match="did you mean 'reinforce'"):
        candidates(parsed.model, shared, ["reinforc"])


def test_the_layer_of_the_configuration_keeps_its_options_and_sets_the_evaluations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = '--model.layer_options={"latent_dim": 4, "num_samples": 6, "baseline": "learned"}'
    mapping = '--model.layer={"name": "reinforce", "latent_dim": 4, "num_samples": 6, "baseline": "learned"}'
    for words in (["--model.layer=reinforce", options], [mapping]):
        parsed = parse(args=words)
        own, other = candidates(parsed.model, settings_of(parsed), ["reinforce", "disarm"])
        assert own.options["baseline"] == "learned" and (own.evaluations, other.evaluations) == (6, 6)


def test_a_layer_that_needs_too_much_is_left_out_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = parse(args=["--model.layer_options.latent_dim=100"])
    everyone = {c.label: c.refusal for c in candidates(parsed.model, settings_of(parsed))}
    assert "101 evaluations a step; name it" in everyone["local_expectation"]
    assert "max_outcomes" in everyone["enumeration"] and not everyone["reinforce"]
    (named,) = candidates(parsed.model, settings_of(parsed), ["local_expectation"])
    assert not named.refusal


def test_the_key_of_a_run_changes_with_all_that_it_depends_on_and_with_nothing_else(small, tmp_path):
    spec = small[2]
    paths = {spec("reinforce").path, spec("reinforce", seed=1).path, spec("reinforce", num_samples=2).path}
    paths |= {spec("disarm").path, spec("reinforce", start={"path": "a.ckpt", "sha256": "0"}).path}
    for args in (["--model.lr=0.1"], ["--data.batch_size=7"], ["--trainer.gradient_clip_val=1"]):
        paths.add(spec("reinforce", config=settings_of(parse(args=[*SMALL, *args])).config).path)
    assert len(paths) == 8
    same = ["--trainer.max_epochs=3", "--trainer.logger=false", "--pictures.num_images=3", "--checkpoint.filename=x"]
    assert spec("reinforce", config=settings_of(parse(args=[*SMALL, *same])).config).path == spec("reinforce").path


def test_a_stale_or_broken_file_is_no_result(small):
    _, _, spec = small
    one = spec("reinforce")
    assert one.result() is None
    one.path.parent.mkdir()
    one.path.write_text('{"status": "ok", "spe')
    assert one.result() is None
    one.path.write_text(json.dumps({"status": "ok", "spec": one.spec | {"seed": 7}}))
    assert one.result() is None
    one.path.write_text(json.dumps({"status": "ok", "spec": one.spec}))
    assert one.result()["status"] == "ok"


def test_configurations_are_files_or_plain_data_and_checkpoints_bring_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"model": {"lr": 0.5, "layer_options": {"latent_dim": 3}}, "data": {"class_path": "Digits"}}
    before = torch.get_rng_state()
    shared = settings_of(parse(config))
    assert torch.equal(torch.get_rng_state(), before)
    assert shared.config["model"]["lr"] == 0.5 and shared.layer_options == {"latent_dim": 3}
    with pytest.raises(ValueError, match="needed a configuration of names"):
        parse({"model": {"layer": sl.create("disarm", latent_dim=2)}})
    with pytest.raises(ValueError, match="which is no file"):
        parse(args=["--ckpt_path=nowhere.ckpt"])
    with pytest.raises(ValueError, match="one device"):
        settings_of(parse(args=["--trainer.devices=2", "--trainer.accelerator=cpu"]))


# ---- what is measured


def test_the_bound_is_the_exact_one_up_to_its_draws():
    model = VAE("reinforce", {"latent_dim": 3, "family": "bernoulli"})
    x = torch.rand(6, 1, 8, 8).round()
    with torch.no_grad():
        q = model.layer.distribution(model.encode(x))
        outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)[:, None].expand(8, 6, 3)
        log_q = q.log_prob(outcomes)
        log_weights = model.log_likelihood(outcomes, x) + model.prior(x.device).log_prob(outcomes) - log_q
        exact = (log_q.exp() * log_weights).sum(0)
        spread = ((log_q.exp() * (log_weights - exact) ** 2).sum(0)).sqrt()
    draws = 20000
    error = float(spread.square().sum().sqrt()) / 6 / math.sqrt(draws)
    assert error < 0.01
    found = measure.bounds(model, [x[:4], x[4:]], draws)
    assert abs(found["elbo"] - float(exact.mean())) < 5 * error
    log_evidence = float((log_weights + log_q).logsumexp(0).mean())
    assert found["elbo"] < found["iwae"] and abs(found["iwae"] - log_evidence) < 0.01


def test_evaluation_draws_do_not_depend_on_the_layer_and_disturb_nothing():
    x = torch.rand(5, 1, 8, 8).round()
    one, other = VAE("reinforce", {"latent_dim": 4}), VAE("rebar", {"latent_dim": 4})
    for part in ("encoder", "decoder"):
        getattr(other, part).load_state_dict(getattr(one, part).state_dict())
    before = torch.get_rng_state()
    first = measure.bounds(one, [x], 8)
    assert torch.equal(torch.get_rng_state(), before) and one.training
    torch.rand(3)
    assert measure.bounds(other, [x], 8) == first


def test_the_same_seed_starts_the_same_encoder_and_decoder_whatever_the_layer(small):
    _, _, spec = small

    def weights(layer, seed):
        model = run.built(spec(layer, seed).spec, layer, spec(layer, seed).candidate.options).model
        return torch.cat([p.flatten() for part in (model.encoder, model.decoder) for p in part.parameters()])

    assert torch.equal(weights("reinforce", 0), weights("nvil", 0))  # which has a network of its own
    assert torch.equal(weights("reinforce", 0), weights("relax", 0))
    assert not torch.equal(weights("reinforce", 0), weights("reinforce", 1))


def test_the_same_seed_brings_the_same_data(small):
    _, _, spec = small

    def batches(layer, seed):
        data = run.built(spec(layer, seed).spec, layer, spec(layer, seed).candidate.options).datamodule
        data.setup()
        return next(iter(data.train_dataloader()))[0]

    assert torch.equal(batches("reinforce", 0), batches("disarm", 0))
    assert not torch.equal(batches("reinforce", 0), batches("reinforce", 1))


def test_a_run_reports_what_it_did_and_repeats_exactly(small):
    _, _, spec = small
    seen = []
    one = spec("disarm", num_samples=2)
    record = run.execute(one.spec, lambda fraction, elbo: seen.append((fraction, elbo)))
    assert record["status"] == "ok", record["error"]
    assert record["curve"]["step"] == [2, 4] and record["steps"] == 4 and seen[-1][0] == 1.0
    assert {m.name for m in METRICS["training"]} <= set(record) and record["spec"] == one.spec
    assert record["variance_time"] == pytest.approx(record["step_ms"] * record["grad_variance"])
    assert record["seconds"] == pytest.approx(record["curve"]["seconds"][-1])
    assert record["peak_memory_mib"] is None or record["peak_memory_mib"] >= 0
    again = run.execute(one.spec)
    assert (again["elbo"], again["curve"]["grad_variance"]) == (record["elbo"], record["curve"]["grad_variance"])


def test_a_budget_of_seconds_is_training_time(small, monkeypatch):
    _, _, spec = small
    slow = measure.bounds

    def bounds(*args):
        time.sleep(0.3)
        return slow(*args)

    monkeypatch.setattr(measure, "bounds", bounds)
    specification = spec("straight_through").spec | {"budget": {"seconds": 0.5}}
    record = run.execute(specification)
    assert record["status"] == "ok", record["error"]
    assert 0.5 <= record["seconds"] < 0.8  # and not the 0.3 seconds of each evaluation
    assert len(record["curve"]["step"]) == 2 and record["steps"] > 1


def test_a_layer_that_fails_is_a_result_with_its_error(small, monkeypatch):
    _, _, spec = small
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))

    @sl.register("explosive")
    class Explosive(sl.StraightThrough):
        """Straight-through that explodes, one way or the other."""

        def __init__(self, latent_dim, *, family="bernoulli", num_samples=1, quietly=False):
            super().__init__(latent_dim, family=family, num_samples=num_samples)
            self.quietly = quietly

        def draw(self, params, context):
            if not self.quietly:
                raise RuntimeError("bang")
            sample = super().draw(params, context)
            return self._sample(sample.q, sample.z + params * float("inf"))

    loud = run.execute(spec("explosive").spec)
    assert (loud["status"], loud["error"]) == ("failed", "RuntimeError: bang")
    quiet = run.execute(spec("explosive", quietly=True).spec)
    assert quiet["status"] == "failed" and re.search(r"nan|finite", quiet["error"], re.I), quiet["error"]


def test_training_starts_from_a_checkpoint_whatever_its_layer(small, tmp_path):
    _, _, spec = small
    kept = tmp_path / "kept.ckpt"
    first = run.execute(spec("nvil").spec, weights=kept)
    assert first["status"] == "ok", first["error"]
    for parsed in (parse(args=[f"--ckpt_path={kept}"]), parse({"ckpt_path": str(kept)})):
        shared = settings_of(parsed)
        assert parsed.config["ckpt_path"] == str(kept)
    assert (shared.layer, shared.layer_options["latent_dim"]) == ("nvil", 4)
    assert shared.config["data"]["init_args"]["binarization"] == "dynamic"
    model = run.built(spec("disarm").spec, "disarm", {"latent_dim": 4}).model
    run.load_weights(model, str(kept))
    state = torch.load(kept, weights_only=True)["state_dict"]
    assert torch.equal(model.state_dict()["encoder.1.weight"], state["encoder.1.weight"])
    with pytest.raises(ValueError, match="differs in"):
        run.load_weights(run.built(spec("disarm").spec, "disarm", {"latent_dim": 5}).model, str(kept))


def test_scores_hold_all_layers_to_one_exact_gradient(small, tmp_path):
    _, shared, spec = small
    kept = tmp_path / "kept.ckpt"
    run.execute(spec("straight_through").spec, weights=kept)
    start = {"path": str(kept), "sha256": "0"}
    state = {"config": shared.config, "state": ["straight_through", {"latent_dim": 4}], "start": start}
    runs = {
        name: make_run(
            tmp_path / "runs",
            "scores",
            Candidate(name, name, {"latent_dim": 4, "family": "bernoulli"}, 1),
            None,
            state | {"examples": 4, "draws": 64},
        )
        for name in ("enumeration", "disarm", "straight_through")
    }
    records = {name: run.execute(r.spec) for name, r in runs.items()}
    assert {r["reference"] for r in records.values()} == {"exact"}
    assert records["enumeration"]["mse"] < 1e-9 < records["disarm"]["mse"]
    assert records["enumeration"]["grad_snr"] is None  # no noise, and JSON has no infinity
    assert records["disarm"]["bias"] < 5 * records["disarm"]["bias_error"]
    for r in runs.values():
        pool.write_text(r.path, json.dumps(records[r.candidate.name]))
    scores = gather("scores", "a title", list(runs.values()), {}, {})
    assert scores.summary()[0].label == "enumeration"
    assert "bias" in markdown_table(scores)
    assert [p.name for p in plots.draw(scores, tmp_path)] == ["scores-dots.png"]


# ---- the result


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


# ---- processes, the command line and interruptions


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


def test_a_process_that_dies_is_a_failed_run(small, monkeypatch):
    _, _, spec = small
    one, other = spec("reinforce"), spec("disarm")
    program = "import os, sys; sys.stdin.readline(); print('boo', file=sys.stderr); os.kill(os.getpid(), 9)"
    started = pool._Processes.started
    monkeypatch.setattr(
        pool._Processes, "started", lambda self, args, **kw: started(self, [sys.executable, "-c", program], **kw)
    )
    pool.run_all([one, other], workers=2)
    assert "SIGKILL (out of memory?). boo" in one.error and one.result()["status"] == "failed"


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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
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
    assert command("--score", "--layers=enumeration,disarm,gumbel_softmax", "--steps=20", *SMALL) == 0
    assert "frozen after 20 steps of straight_through" in capsys.readouterr().out
    scores = Comparison.from_json(tmp_path / "runs/compare/scores.json")
    rows = {row["layer"]: row for row in scores.rows}
    assert rows["enumeration"]["mse"] < rows["disarm"]["mse"] and rows["gumbel_softmax"]["bias"] > 0
    assert {row["reference"] for row in scores.rows} == {"exact"}


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
