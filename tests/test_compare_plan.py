"""The plan of a comparison: which layers with which options, and what the key of a run depends on."""

import json

import pytest
import torch
from small_comparison import SMALL, small_comparison

import stochastic_layers as sl
from lightning_modules.comparison.plan import candidates
from lightning_modules.comparison.settings import parse, settings_of


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_comparison(tmp_path)


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
