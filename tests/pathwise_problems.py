"""Layers of each continuous family on small problems, with params whose gradients have moments."""

import torch
from torch.distributions import Independent

import stochastic_layers as sl

FAMILIES = sl.Pathwise.families


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
