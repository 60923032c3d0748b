"""The runs of a comparison: what each measures, on equal footing, and what becomes of one that fails."""

import json
import math
import re
import sys
import time

import pytest
import torch
from small_comparison import small_comparison

import stochastic_layers as sl
from lightning_modules import VAE
from lightning_modules.comparison import measure, plots, pool, run
from lightning_modules.comparison.plan import Candidate, make_run
from lightning_modules.comparison.result import METRICS
from lightning_modules.comparison.runner import gather
from lightning_modules.comparison.settings import parse, settings_of
from lightning_modules.comparison.table import markdown_table
from stochastic_layers import registry


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_comparison(tmp_path)


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


def test_a_temperature_schedule_acts_on_the_layers_that_take_it_and_stops_no_other(small):
    _, shared, spec = small

    def steepest(layer, final):
        schedule = {"class_path": "TemperatureSchedule", "init_args": {"initial": 1.0, "final": final, "steps": 1}}
        trainer = shared.config["trainer"] | {"callbacks": [schedule]}
        record = run.execute(spec(layer, config=shared.config | {"trainer": trainer}).spec)
        assert record["status"] == "ok", record["error"]
        return record["curve"]["grad_variance"][-1]

    assert steepest("gumbel_softmax", 0.05) > 2 * steepest("gumbel_softmax", 1.0)
    for layer in ("disarm", "reinmax"):  # one without a temperature, one that takes none below 1
        assert steepest(layer, 0.05) == steepest(layer, 0.5)


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
