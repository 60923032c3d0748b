"""Layers of each continuous family on small problems, with params whose gradients have moments."""

import math

import torch
from torch.distributions import Independent

import stochastic_layers as sl

FAMILIES = sl.Pathwise.families
KS_DRAWS = 50_000
# P(sqrt(n) D > x) <= 2 exp(-2 x^2): one false alarm in a million tests. A distribution function that is off by 0.02 at
# some point is seen with probability 0.999: the empirical one has a standard error of 0.0022 there at most
KS_LIMIT = math.sqrt(math.log(2 / 1e-6) / 2 / KS_DRAWS)


def build(family, name="pathwise", **options):
    if family == "dirichlet":
        options = {"latent_dim": 1, "num_categories": 3, **options}
    options = {"latent_dim": 3 if family == "power_spherical" else 2, **options}
    return sl.create(name, family=family, **options).double()


def params_of(layer, seed=1, batch=(2,)):
    generator = torch.Generator().manual_seed(seed)
    params = 0.7 * torch.randn(*batch, layer.in_features, generator=generator, dtype=torch.float64) - 0.1
    if layer.family.name == "student_t":
        params[..., -layer.latent_dim :] += 9  # tails that are light enough for the moments of a gradient to exist
    elif layer.family.name == "log_normal":
        params[..., -layer.latent_dim :] -= 2  # a cube of it else has moments that no sample of this size shows
    elif layer.family.name in ("gamma", "beta", "kumaraswamy", "dirichlet", "power_spherical"):
        params[..., -1:] += 1.5
    return params


def law(q):
    return q.base_dist if isinstance(q, Independent) else q


def ks_distance(values, cdf):
    values, n = values.detach().sort().values.double(), values.shape[0]
    u, grid = torch.as_tensor(cdf(values.numpy())), torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((grid[1:] - u).abs(), (u - grid[:-1]).abs()).max())
