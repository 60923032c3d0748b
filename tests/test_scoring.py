"""Scores of other estimators on a frozen VAE: against exact gradients, without a trace, with reasons for refusals."""

import math

import pytest
import torch

import stochastic_layers as sl
from lightning_modules import VAE, HierarchicalVAE, score_layers
from lightning_modules.scoring import _Frozen
from stochastic_layers.diagnostics import gradient_reference

LOO = {"latent_dim": 3, "num_samples": 2, "baseline": "leave_one_out"}


def model_and_data(layer="reinforce", options=LOO, **kwargs):
    torch.manual_seed(1)
    model = VAE(layer, options, **kwargs)
    return model, torch.rand(3, 1, 8, 8).round()


def exact_gradient(model, x):
    """d loss / d params of the same model with its layer exchanged for enumeration."""
    exact = VAE("enumeration", {"latent_dim": 3}, objective=model.objective)
    exact.load_state_dict(model.state_dict(), strict=False)
    params = model.encode(x).detach().requires_grad_()
    return torch.autograd.grad(exact.loss(exact.terms(x, params)).sum(), params)[0].double()


@pytest.mark.parametrize("kl_method", ["analytic", "monte_carlo"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_exact_reference_is_the_gradient_of_the_objective(kl_method, beta):
    model, x = model_and_data(objective={"name": "elbo", "beta": beta})
    exact = exact_gradient(model, x)
    model.kl_method = kl_method  # estimating a KL does not change what is estimated
    params = model.encode(x).detach()
    state = _Frozen(model, model.objective, x)
    reference = gradient_reference(model.layer, params, state.cost, known=state.known)
    assert reference.kind == "exact"
    torch.testing.assert_close(reference.gradient, exact, rtol=1e-4, atol=1e-6)
    (score,) = score_layers(model, x, ["enumeration"], num_draws=2)
    assert score.relative_bias < 1e-5 and score.cosine == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"free_bits": 0.5}, {"kl_warmup_steps": 10}], ids=str)
def test_variance_and_snr_are_those_of_the_probe(options):
    model, x = model_and_data(objective={"name": "elbo", **options})
    (score,) = score_layers(model, x, [model.layer], num_draws=6000)
    (probe,) = model.probe(x, 6000)
    assert score.variance == pytest.approx(probe.total_variance, rel=0.1)
    assert score.snr == pytest.approx(probe.snr, rel=0.1)


def test_bias_is_seen_where_there_is_one_and_only_there():
    model, x = model_and_data()
    for score in score_layers(model, x, ["disarm", "arms", "leave_one_out", "gumbel_rao"], num_draws=3000):
        assert score.bias is not None and score.bias_standard_error is not None
        biased = score.bias > 5 * score.bias_standard_error
        assert biased == (score.name == "gumbel_rao"), score
        assert score.mse == pytest.approx(score.variance + score.bias**2, rel=0.02)
        assert score.variance_time == score.variance * score.seconds


def test_long_averages_agree_with_exact_references():
    model, x = model_and_data()
    exact, average = (
        {s.name: s for s in score_layers(model, x, ["gumbel_rao", "disarm"], num_draws=2000, reference=kind)}
        for kind in ("exact", "average")
    )
    assert exact["disarm"].reference == "exact" and average["disarm"].reference == "average"
    one, two = exact["gumbel_rao"], average["gumbel_rao"]
    assert abs(one.bias - two.bias) < 5 * two.bias_standard_error < 5 * 0.5 * one.bias


def test_latents_at_every_position_are_scored():
    networks = {"encoder": torch.nn.Conv2d(1, 1, 4, 4), "decoder": torch.nn.ConvTranspose2d(1, 1, 4, 4)}
    model, x = model_and_data("straight_through", {"latent_dim": 1}, **networks)
    scores = score_layers(model, x, ["reinforce", "disarm", "enumeration"], num_draws=500)
    assert [s.reference for s in scores] == ["exact", "exact"]  # 2 ** 4 outcomes of the four positions
    assert "batch dimensions cannot be summed" in scores.refused["enumeration"]
    for score in scores:
        assert score.bias < 5 * score.bias_standard_error


def test_scoring_leaves_no_trace():
    model, x = model_and_data("reinforce", {"latent_dim": 3, "baseline": "moving_average"})
    layer = sl.create("nvil", latent_dim=3).eval()
    model.loss(model.terms(x)).mean().backward()
    tensors = [torch.get_rng_state(), *model.state_dict().values(), *(p.grad for p in model.parameters())]
    before = [t.clone() for t in tensors]
    scores = score_layers(model, x, [model.layer, layer, "rebar"], num_draws=4)
    assert len(scores) == 3 and not scores.refused
    tensors = [torch.get_rng_state(), *model.state_dict().values(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert model.training and not layer.training


def test_a_model_is_scored_with_its_own_layer_and_all_that_fit():
    model, x = model_and_data("vq", {})
    scores = score_layers(model, x, num_draws=2)
    assert [s.name for s in scores] == ["vq"] and scores[0].reference == "none" and scores[0].bias is None
    assert "another one at the same params" in scores.refused["rotation_trick"]  # whose codebook is another


def test_options_of_the_family_are_those_of_the_model_and_baselines_see_the_data():
    family = {"name": "subset", "size": 3}
    model, x = model_and_data("straight_through", {"latent_dim": 1, "num_categories": 5, "family": family})
    layers = {"a": {"name": "reinforce", "baseline": {"name": "learned", "context_features": 64}}, "leave_one_out": {}}
    scores = score_layers(model, x, layers, num_draws=2)
    assert len(scores) == 2 and not scores.refused


def test_layers_that_do_not_fit_are_refused_with_the_reason():
    model, x = model_and_data()
    layers = {
        "a": "gaussian",
        "b": sl.create("disarm", latent_dim=4),
        "c": {"name": "disarm", "colour": "red"},
        "disarm": {"latent_dim": 3},
        "d": {"name": "decoupled_straight_through", "sampling_temperature": 3.0},
    }
    scores = score_layers(model, x, layers, num_draws=2)
    assert [s.name for s in scores] == ["disarm"]
    assert "family" in scores.refused["a"] and "in_features=3" in scores.refused["b"]
    assert "colour" in scores.refused["c"] and "law q" in scores.refused["d"]


def test_what_cannot_be_scored_is_said():
    model, x = model_and_data()
    with pytest.raises(ValueError, match="num_draws >= 2"):
        score_layers(model, x, num_draws=1)
    with pytest.raises(ValueError, match="a list of layers"):
        score_layers(model, x, "disarm")
    with pytest.raises(ValueError, match="the same twice"):
        score_layers(model, x, ["disarm", "disarm"])
    with pytest.raises(ValueError, match="objective 'elbo'"):
        score_layers(VAE("gaussian", {"num_samples": 2}, objective="iwae"), x)
    with pytest.raises(ValueError, match="needed a VAE"):
        score_layers(HierarchicalVAE(["reinforce"]), x)


def test_no_reference_where_none_is_asked_for():
    model, x = model_and_data()
    (score,) = score_layers(model, x, ["disarm"], num_draws=2, reference=None)
    assert score.bias is None and score.mse is None and score.cosine is None and math.isfinite(score.variance)
