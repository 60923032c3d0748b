"""DiCE: derivatives of the second order, of the encoder and mixed with the decoder, against exact ones."""

import pytest
import torch
from small_problems import BITS, CATEGORIES, build

from stochastic_layers.testing import PolynomialCost, check_mean, exact_value

CASES = [
    ({**BITS, "baseline": "none"}, "bernoulli"),
    ({**BITS, "num_samples": 3, "baseline": "leave_one_out"}, "bernoulli leave-one-out"),
    ({**CATEGORIES, "num_samples": 2, "baseline": "leave_one_out"}, "categorical leave-one-out"),
]


def second_derivatives(layer, params, cost, draws=60_000):
    """Every row of the Hessian by params, and of the mixed derivative by theta: estimates ``[draws, rows, ...]``."""
    leaf = params.expand(draws, *params.shape).clone().requires_grad_()
    theta = cost.theta.detach().expand(draws, 1, -1).clone().requires_grad_()
    sample = layer.sample(leaf)
    value = torch.func.functional_call(cost, {"theta": theta}, (sample.z,))
    (gradient,) = torch.autograd.grad(sample.surrogate(value).sum(), leaf, create_graph=True)
    rows = []
    for index in range(params.shape[-1]):
        by_leaf, by_theta = torch.autograd.grad(
            gradient[..., index].sum(), (leaf, theta), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([by_leaf.flatten(1), by_theta.flatten(1)], -1))
    return torch.stack(rows, 1)


def exact_second_derivatives(layer, params, cost):
    leaf = params.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact_value(layer, leaf, cost).sum(), leaf, create_graph=True)
    rows = [
        torch.autograd.grad(gradient[..., i].sum(), (leaf, cost.theta), retain_graph=True)
        for i in range(params.shape[-1])
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def largest_deviation(layer, params, cost):
    """In standard errors, and the size of those beside the exact derivatives."""
    draws, exact = second_derivatives(layer, params, cost), exact_second_derivatives(layer, params, cost)
    error = draws.std(0) / len(draws) ** 0.5
    return float(((draws.mean(0) - exact) / (error + 1e-10)).abs().max()), float(error.norm() / exact.norm())


@pytest.mark.parametrize(("options", "name"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_second_derivatives_are_exact_in_the_mean(options, name):
    layer, params = build("dice", options, batch=1)
    deviation, error = largest_deviation(layer, params, PolynomialCost("quadratic", layer.out_features))
    assert error < 0.05
    assert deviation < 5


def test_the_surrogate_of_reinforce_has_the_wrong_second_derivatives():
    """Why this layer exists, and proof that the test above can fail."""
    layer, params = build("reinforce", CASES[1][0], batch=1)
    deviation, _ = largest_deviation(layer, params, PolynomialCost("quadratic", 3))
    assert deviation > 20


@pytest.mark.parametrize("baseline", ["none", "moving_average", "learned", "leave_one_out"])
def test_first_gradient_is_that_of_reinforce(baseline):
    found = []
    for name in ("dice", "reinforce"):
        torch.manual_seed(0)
        layer, params = build(name, {**BITS, "num_samples": 2, "baseline": baseline})
        cost = PolynomialCost("cubic", 3)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        sample.surrogate(cost(sample.z)).sum().backward()
        found.append([leaf.grad, cost.theta.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.allclose(*pair, rtol=1e-12) for pair in zip(*found, strict=True))


def test_gradients_of_a_gaussian_are_exact_in_the_mean():
    layer, params = build(
        "dice", {"latent_dim": 2, "family": "gaussian", "num_samples": 4, "baseline": "leave_one_out"}
    )
    check_mean(layer, params, PolynomialCost("quadratic", 2))
