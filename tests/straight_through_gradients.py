"""The expected gradient of straight-through layers, summed over all outcomes in numpy."""

import itertools
import math

import numpy as np
import torch
from two_variables import PARAMS

import stochastic_layers as sl
from stochastic_layers.testing import measure


def build(name, options):
    layer = sl.create(name, **options).double()
    return layer, PARAMS[:, : layer.in_features]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def jacobian(p):
    return np.diag(p) - np.outer(p, p)


def gumbel_jacobian(logits, winner, tau, nodes=48):
    """E[J(softmax((l + G) / tau)) / tau | argmax = winner] by quadrature over the noise, in numpy."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    x, w = 0.5 * (x + 1), 0.5 * w
    x, w = x * x * (3 - 2 * x), 6 * x * (1 - x) * w  # more nodes at the ends, where the quantile functions are steep
    total = np.logaddexp.reduce(logits)
    uniforms = np.stack(np.meshgrid(*[x] * len(logits), indexing="ij"), -1).reshape(-1, len(logits))
    weights = np.stack(np.meshgrid(*[w] * len(logits), indexing="ij"), -1).reshape(-1, len(logits)).prod(-1)
    top = total - np.log(-np.log(uniforms[:, winner]))  # the maximum is Gumbel, whichever index attains it
    # an index that loses: P(score < x | score < top) = u with P(score < x) = exp(-exp(l - x))
    scores = logits - np.log(-np.log(uniforms) + np.exp(logits - top[:, None]))
    scores[:, winner] = top
    p = softmax(scores / tau)
    return (np.einsum("n,ni,ij->ij", weights, p, np.eye(len(logits))) - np.einsum("n,ni,nj->ij", weights, p, p)) / tau


def expected_jacobian(layer, logits, winner):
    """Of one variable with at least two categories: E[dz/dl | z = winner] as the layer's formula states it."""
    z = np.eye(len(logits))[winner]
    if layer.name == "straight_through":
        return jacobian(softmax(logits))
    tau = float(layer.temperature)
    if layer.name == "decoupled_straight_through":
        return jacobian(softmax(logits / tau)) / tau
    if layer.name == "reinmax":
        return 2 * jacobian((softmax(logits / tau) + z) / 2) - jacobian(softmax(logits)) / 2
    if layer.name == "gapped_straight_through":
        moved = np.minimum(logits, logits.max() - layer.gap)
        moved[winner] = logits.max()
        return jacobian(softmax(moved / tau)) / tau
    return gumbel_jacobian(logits, winner, tau)


def expected_gradient(layer, params, cost_fn):
    """E[estimator] ``[B, in_features]``: a plain loop over all outcomes of all variables; bits are pairs (l, 0)."""
    bits = layer.num_categories is None
    result = torch.zeros_like(params)
    for row, values in enumerate(params.numpy()):
        logits = [np.array([v, 0.0]) for v in values] if bits else values.reshape(layer.latent_dim, -1)
        law = [softmax(x / getattr(layer, "sampling_temperature", 1.0)) for x in logits]
        sizes = [range(len(x)) for x in logits]
        jacobians = [
            [expected_jacobian(layer, x.copy(), k) for k in size] for x, size in zip(logits, sizes, strict=True)
        ]
        for outcome in itertools.product(*sizes):
            hots = [np.eye(len(x))[k] for x, k in zip(logits, outcome, strict=True)]
            z = torch.tensor(np.array([h[0] for h in hots]) if bits else np.concatenate(hots), requires_grad=True)
            slopes = torch.autograd.grad(cost_fn(z), z)[0].numpy().reshape(layer.latent_dim, -1)
            probability = math.prod(p[k] for p, k in zip(law, outcome, strict=True))
            for i, k in enumerate(outcome):
                slope = np.array([slopes[i, 0], 0.0]) if bits else slopes[i]
                part = probability * jacobians[i][k].T @ slope
                span = slice(i, i + 1) if bits else slice(i * len(part), (i + 1) * len(part))
                result[row, span] += torch.from_numpy(part[:1] if bits else part)
    return result


def assert_mean(layer, params, cost_fn, expected, num_draws=150_000):
    """No coordinate is 5 standard errors off (false alarm 6e-7 each), and an error of 5 % would be 8 of them."""
    moments = measure(layer, params, cost_fn, num_draws=num_draws)
    along = (moments.standard_error * expected).norm() / expected.square().sum()
    assert 8 * along < 0.05, f"{num_draws} draws see an error of 5 % as {0.05 / along:.1f} standard errors only"
    z = (moments.mean - expected).abs() / (moments.standard_error + 1e-9)
    assert z.max() < 5, f"{layer}: {z.max():.1f} standard errors off: {moments.mean} against {expected}"
    return moments
