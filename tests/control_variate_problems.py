"""Problems on which the layers with control variates are proven."""

import torch
from torch import nn

import stochastic_layers as sl
from stochastic_layers.testing import PolynomialCost, measure

BITS = {"latent_dim": 3}
CATEGORIES = {"latent_dim": 2, "num_categories": 3, "family": "categorical"}


def build(name, options, batch=2, seed=1):
    """A layer in float64 and asymmetric params ``[batch, in_features]`` of both signs."""
    layer = sl.create(name, **options).double()
    return layer, asymmetric_params(layer, batch, seed)


def asymmetric_params(layer, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.8 * torch.randn(batch, layer.in_features, generator=generator, dtype=torch.float64) - 0.2


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
