"""The layers that can be built from their sizes alone, with a problem for each."""

import torch

import stochastic_layers as sl
from stochastic_layers.testing import PolynomialCost, exact_value


def default_layer(name):
    """The layer with its defaults and two latent variables, ``None`` where it needs more than its sizes."""
    for sizes in ({"latent_dim": 2}, {"latent_dim": 2, "num_categories": 3}):
        try:
            return sl.create(name, **sizes)
        except ValueError:
            continue
    return None


DISCRETE = sorted({n for f in ("bernoulli", "categorical") for n in sl.list_layers(family=f)})
BUILDABLE = [name for name in sl.list_layers() if default_layer(name) is not None]


def problem(name, seed=0):
    layer = default_layer(name).double()
    generator = torch.Generator().manual_seed(seed)
    params = 0.7 * torch.randn(2, layer.in_features, generator=generator, dtype=torch.float64) - 0.2
    layer.sample(params)  # a codebook is started by its first batch, whose size would be that of the pass
    return layer, params, PolynomialCost("quadratic", layer.out_features)


def discrete_problem(name):
    """Three bits, or two variables of three categories, an asymmetric cost, and its exact gradient."""
    torch.manual_seed(0)  # layers may have networks
    family = sl.describe(name).families[0]
    sizes = {"latent_dim": 3} if family == "bernoulli" else {"latent_dim": 2, "num_categories": 3}
    layer = sl.create(name, family=family, **sizes).double()
    generator = torch.Generator().manual_seed(2)
    params = 0.7 * torch.randn(2, layer.in_features, generator=generator, dtype=torch.float64) - 0.2
    cost_fn = PolynomialCost("asymmetric", layer.out_features)
    leaf = params.clone().requires_grad_()
    (exact,) = torch.autograd.grad(exact_value(layer, leaf, cost_fn).sum(), leaf)
    return layer, params, cost_fn, exact
