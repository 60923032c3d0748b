"""The layers with coupled draws on small problems, and what the tests measure of them."""

import torch

CATEGORICAL = {"latent_dim": 2, "family": "categorical"}
PROVEN = [
    ("arm", {"latent_dim": 3}),
    ("disarm", {"latent_dim": 3}),
    ("arms", {"latent_dim": 3, "num_samples": 2}),
    ("arms", {"latent_dim": 2, "num_samples": 5}),
    ("arms", {"latent_dim": 2, "num_samples": 4, "copula": "gaussian"}),
    ("disarm", {**CATEGORICAL, "num_categories": 4}),
    ("disarm_tree", {**CATEGORICAL, "num_categories": 3}),
    ("carms", {**CATEGORICAL, "num_categories": 3, "num_samples": 2}),
    ("carms", {**CATEGORICAL, "num_categories": 4, "num_samples": 3}),
    ("arsm", {**CATEGORICAL, "num_categories": 3}),
]
OPTIONS = [
    ("disarm", {"latent_dim": 2, "num_samples": 6}),
    ("disarm", {**CATEGORICAL, "num_categories": 3, "order": "given", "num_samples": 4}),
    ("disarm", {**CATEGORICAL, "num_categories": 3, "order": "descending"}),
    ("disarm_tree", {**CATEGORICAL, "num_categories": 4}),
    ("arsm", {**CATEGORICAL, "num_categories": 3, "num_samples": 2}),
]
CASES = PROVEN + OPTIONS
BITS = torch.tensor([-2.5, -0.4, 0.0, 0.7, 1.5])
FALSE_ALARM = 1e-6  # of each chi-square test


def chi_square_p(statistic, degrees):
    """Probability of a larger chi-square statistic."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def gradients(layer, params, cost_fn, num_draws):
    """Gradients of ``num_draws`` independent repetitions: ``[num_draws, *params.shape]``."""
    leaf = params.expand(num_draws, *params.shape).clone().requires_grad_()
    sample = layer.sample(leaf)
    return torch.autograd.grad(sample.surrogate(cost_fn(sample.z)).sum(), leaf)[0]


def variance_and_error(draws):
    """Total variance over the coordinates of draws ``[N, ...]``, and its standard error."""
    squares = (draws - draws.mean(0)).flatten(1).square().sum(-1)
    return float(squares.mean()), float(squares.std() / squares.shape[0] ** 0.5)
