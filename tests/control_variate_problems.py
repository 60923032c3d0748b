"""Problems on which the layers with control variates are proven."""

import torch
from small_problems import BITS, CATEGORIES
from torch import nn

from stochastic_layers.testing import PolynomialCost, measure

SMALL = {"hidden_features": 8}
BOTH = {**SMALL, "control_variate": "both"}
UNSCALED = {"normalize": False, "baseline": {"name": "learned", "hidden_features": 8}}
CASES = [
    ("leave_one_out", BITS),
    ("leave_one_out", {**CATEGORIES, "num_samples": 3}),
    ("leave_one_out", {"latent_dim": 2, "family": "gaussian", "num_samples": 4}),
    ("nvil", {**BITS, **UNSCALED}),
    ("nvil", {**CATEGORIES, **UNSCALED, "num_samples": 2}),
    ("muprop", BITS),
    ("muprop", {**CATEGORIES, "num_samples": 2}),
    ("rebar", BITS),
    ("rebar", CATEGORIES),
    ("rebar", {**BITS, "num_samples": 2, "temperature": 0.2}),
    ("relax", {**BITS, **SMALL}),
    ("relax", {**CATEGORIES, **SMALL, "num_samples": 2}),
    ("relax", {**BITS, **BOTH}),
    ("relax", {**CATEGORIES, **BOTH, "num_samples": 2}),
    ("double_cv", BITS),
    ("double_cv", {**CATEGORIES, "num_samples": 3}),
    ("rodeo", {**BITS, **SMALL}),
    ("rodeo", {**BITS, **SMALL, "num_samples": 3}),
    ("rodeo", {**BITS, **SMALL, "taylor": False}),
]
DISCRETE = [case for case in CASES if case[1].get("family") != "gaussian"]
MAIN = [
    ("nvil", {**BITS, **UNSCALED}),
    *(case for case in CASES if case[1] in (BITS, {**BITS, **SMALL}, {**BITS, **BOTH})),
]
LEARNED = [case for case in CASES if case[0] in ("rebar", "relax", "rodeo")]


def disturb(layer):
    """Control variates that are neither at their start nor any good: an unbiased layer stays so."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def train(layer, params, cost, steps=300, copies=32, learning_rate=1e-2):
    """Let the layer learn about its control variates at fixed params, by the one backward a user calls."""
    own = list(layer.parameters())
    optimizer = torch.optim.Adam(own, lr=learning_rate) if own else None
    for _ in range(steps):
        leaf = params.expand(copies, *params.shape).clone().requires_grad_()
        sample = layer.sample(leaf)
        layer.zero_grad()
        sample.surrogate(cost(sample.z)).mean().backward()
        if optimizer is not None:
            optimizer.step()
    return layer


def total_variance(layer, params, cost, num_draws=20_000):
    """Trace of the covariance of the encoder gradient of one example; its own standard error is a few percent."""
    moments = measure(layer, params, cost, num_draws=num_draws)
    return float(moments.standard_error.square().sum() * num_draws / params.shape[0])


class Model(nn.Module):
    """Encoder, layer, decoder and a prior, each with parameters of its own."""

    def __init__(self, layer, features=5):
        super().__init__()
        self.encoder = nn.Linear(features, layer.in_features, dtype=torch.float64)
        self.layer = layer
        self.decoder = PolynomialCost("asymmetric", layer.out_features)
        self.prior = nn.Parameter(torch.full((layer.out_features,), 0.3, dtype=torch.float64))

    def loss(self, x):
        sample = self.layer.sample(self.encoder(x))
        return sample.surrogate(self.decoder(sample.z) - (sample.z * self.prior).sum(-1))


def gradients(model, loss):
    """Gradient of every parameter by name, 0 where there is none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
