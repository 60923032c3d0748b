"""Small problems with discrete latent variables, on which an estimate can be compared with the exact gradient."""

import torch

import stochastic_layers as sl

BITS = {"latent_dim": 3}
CATEGORIES = {"latent_dim": 2, "family": "categorical", "num_categories": 3}


def build(name, options, batch=2, seed=1):
    """A layer in float64 and asymmetric params ``[batch, in_features]`` of both signs."""
    layer = sl.create(name, **options).double()
    return layer, asymmetric_params(layer, batch, seed)


def asymmetric_params(layer, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.8 * torch.randn(batch, layer.in_features, generator=generator, dtype=torch.float64) - 0.2
