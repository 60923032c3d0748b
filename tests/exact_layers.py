"""Layers that sum over outcomes, with and without noise, and the check that a loss is the exact one."""

import torch
from small_problems import BITS, CATEGORIES

from stochastic_layers.testing import exact_value

ONE_OF_16 = {"latent_dim": 1, "family": "categorical", "num_categories": 16}
EXACT = [
    ("enumeration", BITS),
    ("enumeration", CATEGORIES),
    ("sparsemax_marginalization", CATEGORIES),
    ("sum_and_sample", {**BITS, "num_exact": 8}),
    ("sum_and_sample", {**BITS, "num_exact": 7}),
    ("sum_and_sample", {**CATEGORIES, "num_exact": 5, "num_samples": 4}),
    ("unordered_set", {**BITS, "num_samples": 8}),
    ("unordered_set", {**CATEGORIES, "num_samples": 9}),
    ("unordered_set", {**CATEGORIES, "num_samples": 10}),
]
RANDOM = [
    ("local_expectation", BITS),
    ("local_expectation", CATEGORIES),
    ("local_expectation", {**CATEGORIES, "num_samples": 2}),
    ("coordinate_flip", BITS),
    ("coordinate_flip", CATEGORIES),
    ("coordinate_flip", {**BITS, "num_samples": 3}),
    ("sum_and_sample", BITS),
    ("sum_and_sample", {**CATEGORIES, "num_exact": 2, "num_samples": 2}),
    ("sum_and_sample", {**CATEGORIES, "num_exact": 2, "baseline": "none"}),
    ("unordered_set", BITS),
    ("unordered_set", {**CATEGORIES, "num_samples": 3}),
    ("unordered_set", {**CATEGORIES, "num_samples": 2, "baseline": "none"}),
]
ALL = EXACT + RANDOM


def gradients(loss, *inputs):
    return torch.autograd.grad(loss.sum(), inputs, retain_graph=True)


def assert_exact(layer, params, cost_fn, loss, leaf, tolerance=1e-12):
    """The value and both gradients of the loss are those of the exact expectation."""
    reference = params.clone().requires_grad_()
    exact = exact_value(layer, reference, cost_fn)
    torch.testing.assert_close(loss, exact, rtol=tolerance, atol=tolerance)
    for got, expected in zip(
        gradients(loss, leaf, cost_fn.theta), gradients(exact, reference, cost_fn.theta), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
