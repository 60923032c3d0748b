"""Hierarchies against exact gradients by enumeration of the joint; mixed latents by quadrature; evaluation and logs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gradients_of_models import check_gradients, exact_gradients
from quiet_trainer import quiet_trainer

from lightning_modules import ELBO, HierarchicalVAE
from lightning_modules.data import Digits
from stochastic_layers.testing import enumerate_outcomes

LINEAR = {"name": "mlp", "hidden_features": []}
LOO = {"name": "reinforce", "latent_dim": 2, "num_samples": 2, "baseline": "leave_one_out"}
ONE = {"name": "reinforce", "latent_dim": 1, "baseline": "none"}
GAUSSIAN = {"name": "gaussian", "latent_dim": 1}


def hierarchy(layers, scale=0.8, **options):
    torch.manual_seed(5)
    options = {"data_shape": (3,), "encoder": LINEAR, "decoder": LINEAR, **options}
    model = HierarchicalVAE(layers, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return model.double(), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def nodes_of(layer, q, nodes=40):
    """Every point of a layer of law q ``[..., batch]``: z ``[N, ..., out_features]`` and its probability ``[N, ...]``.

    Quadrature nodes move with q, so that the gradient of a weighted sum over them is the exact one.
    """
    batch = q.batch_shape
    if layer.family.discrete:
        z = enumerate_outcomes(layer)
        z = z.view(len(z), *[1] * len(batch), -1).expand(-1, *batch, -1)
        return z, layer.family.log_prob(q, z).exp()
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    z = q.mean + q.stddev * points.view(-1, *[1] * (len(batch) + 1))
    return z, (weights / math.sqrt(2 * math.pi)).view(-1, *[1] * len(batch)).expand(z.shape[:-1])


def exact_elbo(model, x, beta=1.0):
    """The ELBO of one example as a sum over the joint outcomes of all layers; written from the definition."""
    layers = model.stochastic_layers
    q = layers[0].distribution(model.encode(x.unsqueeze(0)))
    below, probability, value = None, torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for level, layer in enumerate(layers):
        z, weight = nodes_of(layer, q)
        probability = weight * probability
        value = value - beta * layer.family.log_prob(q, z)
        if level == 0:
            value = value + model.likelihood.log_prob(model.decode(z), x.unsqueeze(0))
        else:
            shape = z.shape[:-1]
            conditional = layers[level - 1].distribution(model.downwards[level - 1](z.flatten(0, -2)).view(*shape, -1))
            value = value + beta * layers[level - 1].family.log_prob(conditional, below.expand(*shape, -1))
        if level + 1 < len(layers):
            q = layers[level + 1].distribution(model.upwards[level](z.flatten(0, -2)).view(*z.shape[:-1], -1))
        below = z
    value = value + beta * layers[-1].family.log_prob(model.prior(x.device), below)
    return (probability * value).sum()


def test_reference_by_quadrature_has_converged(monkeypatch):
    model, x = hierarchy([GAUSSIAN, GAUSSIAN], scale=0.3)
    fine = exact_gradients(model, -exact_elbo(model, x))
    monkeypatch.setattr(nodes_of, "__defaults__", (30,))
    coarse = exact_gradients(model, -exact_elbo(model, x))
    assert max(float((coarse[n] - fine[n]).norm() / fine[n].norm()) for n in fine) < 1e-4


CASES = {
    "two layers": [LOO, LOO],
    "three layers": [LOO, LOO, {**LOO, "num_samples": 3}],
    "single draws": [ONE, {**ONE, "latent_dim": 2}],
    "moving average": [{**ONE, "baseline": "moving_average"}, {**ONE, "baseline": "moving_average"}],
    "one draw below several": [ONE, LOO],
    "gaussian over bits": [LOO, GAUSSIAN],
    "bits over gaussian": [GAUSSIAN, LOO],
    "categories over bits": [LOO, {**LOO, "family": "categorical", "num_categories": 3, "latent_dim": 1}],
    "gaussians": [GAUSSIAN, {**GAUSSIAN, "num_samples": 2}],
}


@pytest.mark.parametrize("layers", CASES.values(), ids=CASES)
def test_gradient_of_every_network_is_exact_in_the_mean(layers):
    # tame where quadrature meets quadrature, whose outer nodes multiply
    model, x = hierarchy(layers, scale=0.3 if all(layer["name"] == "gaussian" for layer in layers) else 0.8)
    check_gradients(model, x, exact_gradients(model, -exact_elbo(model, x)))


def test_gradient_is_exact_where_the_top_has_no_closed_form():
    model, x = hierarchy([LOO, LOO])
    model.kl_method = "monte_carlo"
    check_gradients(model, x, exact_gradients(model, -exact_elbo(model, x)))


def test_gradient_is_that_of_the_weighted_kl():
    model, x = hierarchy([LOO, GAUSSIAN], objective=ELBO(beta=0.3))
    check_gradients(model, x, exact_gradients(model, -exact_elbo(model, x, beta=0.3)))


def test_the_kl_is_warmed_up():
    losses = []
    for objective in (ELBO(kl_warmup_steps=10), ELBO(beta=0.0), ELBO()):
        model, x = hierarchy([LOO, GAUSSIAN], objective=objective)
        torch.manual_seed(0)
        losses.append(model.loss(model.terms(x.unsqueeze(0))))
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])  # at the first step


def test_straight_through_is_exact_where_the_cost_is_linear():
    """A Gaussian likelihood around W z + b with large b and tiny W is linear in z but for 1e-8 of it."""
    layers = [{"name": "straight_through", "latent_dim": 2}, {"name": "straight_through", "latent_dim": 2}]
    model, x = hierarchy(layers, objective=ELBO(beta=0.0), likelihood={"name": "gaussian", "initial_scale": 1.0})
    with torch.no_grad():
        model.decoder[0].weight.copy_(1e-4 * torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.5, 1.0]]))
        model.decoder[0].bias.copy_(torch.tensor([3000.0, -2000.0, 1000.0]))
        model.likelihood.log_scale.fill_(0.0)
    exact = exact_gradients(model, -exact_elbo(model, x, beta=0.0))["q"]
    loss = model.loss(model.terms(x.unsqueeze(0)))  # no spread at all: one draw will do
    assert float(exact.norm()) > 0.1
    torch.testing.assert_close(exact_gradients(model, loss.sum())["q"], exact, rtol=1e-6, atol=1e-7)


class MissingCredit(HierarchicalVAE):
    """The mistake to be seen: the draws of the upper layer are not credited with log p(z_1 | z_2)."""

    def terms(self, x, params=None):
        terms = super().terms(x, params)
        (log_prior,) = terms.log_priors
        return replace(terms, log_priors=(log_prior - log_prior.detach(),))


def test_a_missing_credit_is_seen():
    torch.manual_seed(5)
    good, x = hierarchy([LOO, LOO])
    bad = MissingCredit([LOO, LOO], data_shape=(3,), encoder=LINEAR, decoder=LINEAR).double()
    bad.load_state_dict(good.state_dict())
    with pytest.raises(AssertionError, match="standard errors off"):
        check_gradients(bad, x, exact_gradients(bad, -exact_elbo(bad, x)))


@pytest.mark.parametrize("layers", [[LOO, LOO, LOO], [LOO, GAUSSIAN]], ids=["bits", "mixed"])
def test_reported_bound_is_exact_in_the_mean_in_training_and_in_evaluation(layers):
    model, x = hierarchy(layers)
    exact = float(exact_elbo(model, x).detach())
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            values = [model.bound(model.terms(x.expand(1000, 3))) for _ in range(50)]
        for value in values:
            torch.testing.assert_close(value["elbo"], value["reconstruction"] - value["kl"])
        elbo = torch.stack([v["elbo"].mean() for v in values])
        error = float(elbo.std()) / math.sqrt(50)
        assert 8 * error < 0.05 * abs(exact) and abs(float(elbo.mean()) - exact) < 5 * error


def test_importance_weighted_bound_tends_to_the_log_evidence():
    model, x = hierarchy([LOO, LOO])
    outcomes = enumerate_outcomes(model.stochastic_layers[0])
    index = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    below, above = outcomes[index[:, 0]], outcomes[index[:, 1]]
    conditional = model.layers[0].distribution(model.downwards[0](above))
    log_joint = (
        model.layers[1].family.log_prob(model.prior(x.device), above)
        + model.layers[0].family.log_prob(conditional, below)
        + model.likelihood.log_prob(model.decode(below).unsqueeze(1), x.unsqueeze(0)).squeeze(1)
    )
    evidence = float(log_joint.logsumexp(0).detach())
    model.eval()
    bound = float(model.importance_weighted_bound(x.unsqueeze(0), 200_000))
    assert abs(bound - evidence) < 0.02
    assert evidence - float(exact_elbo(model, x).detach()) > 0.1  # so that the bound is seen to have moved


@torch.no_grad()
def test_ancestral_draws_follow_the_model():
    model, _ = hierarchy([LOO, LOO])
    outcomes = enumerate_outcomes(model.stochastic_layers[0])
    top = model.layers[1].family.log_prob(model.prior(torch.device("cpu")), outcomes).exp()
    middle = (
        model.layers[0]
        .family.log_prob(model.layers[0].distribution(model.downwards[0](outcomes)), outcomes.unsqueeze(1))
        .exp()
    )  # [z_1, z_2]
    exact = ((middle @ top).unsqueeze(-1) * model.likelihood.mean(model.decode(outcomes))).sum(0)
    draws = model.generate(40_000)
    error = draws.std(0) / 200
    assert float(((draws.mean(0) - exact).abs() / error).max()) < 5
    assert 8 * float(error.max()) < 0.05


def test_training_logs_the_keys_of_a_vae_and_the_variance_of_every_layer(tmp_path):
    model = HierarchicalVAE([{**LOO, "latent_dim": 8}, GAUSSIAN], iwae_samples={"test": 3})
    trainer = quiet_trainer(
        max_steps=6, log_every_n_steps=2, limit_val_batches=1, limit_test_batches=1, default_root_dir=tmp_path
    )
    trainer.fit(model, Digits(batch_size=32, binarization="dynamic"))
    names = ("elbo", "kl", "reconstruction", "grad_variance", "grad_snr", "grad_variance/1", "grad_variance/2")
    metrics = trainer.callback_metrics
    assert {f"train/{n}" for n in names} <= set(metrics)
    parts = metrics["train/grad_variance/1"] + metrics["train/grad_variance/2"]
    torch.testing.assert_close(metrics["train/grad_variance"], parts)
    trainer.test(model, Digits(batch_size=32, binarization="dynamic"), verbose=False)
    assert set(trainer.callback_metrics) == {
        f"test/{n}" for n in ("elbo", "kl", "reconstruction", "iwae", "active_units")
    }


def test_checkpoint_restores_a_hierarchy_of_names_and_asks_for_objects(tmp_path):
    model = HierarchicalVAE([{**LOO, "latent_dim": 8}, GAUSSIAN])
    trainer = quiet_trainer(max_epochs=0, default_root_dir=tmp_path)
    trainer.fit(model, Digits(binarization="dynamic"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    restored = HierarchicalVAE.load_from_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restored.parameters(), strict=True))
    held = HierarchicalVAE([model.stochastic_layers[0], GAUSSIAN])
    trainer.fit(held, Digits(binarization="dynamic"))
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="needed layers="):
        HierarchicalVAE.load_from_checkpoint(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": []}, "list of layers"),
        ({"layers": "gaussian"}, "list of layers"),
        ({"layers": ["nonsense"]}, "nonsense"),
        ({"layers": [LOO], "objective": "iwae"}, "objective 'elbo'"),
        ({"layers": [LOO], "objective": ELBO(free_bits=0.1)}, "without free_bits"),
        ({"layers": [LOO], "encoder": torch.nn.Flatten()}, "needed an encoder"),
        ({"layers": [LOO], "decoder": torch.nn.Identity()}, "needed a decoder"),
        ({"layers": ["fsq", "gaussian"]}, "needed layers with a density below the last one"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalVAE(options.pop("layers"), **options)
