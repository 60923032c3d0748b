"""Many draws in a training step, a few at a time: the recipe of docs/speed.md."""

import pytest
import torch
from torch import nn

import stochastic_layers as sl
from benchmarks.memory import peak

FAMILIES = {"leave_one_out": "bernoulli", "disarm": "bernoulli", "reinmax": "categorical", "gaussian": "gaussian"}


def build(name, hidden=16):
    options = {"num_categories": 3} if FAMILIES[name] == "categorical" else {}
    layer = sl.create(name, latent_dim=4, family=FAMILIES[name], num_samples=4, **options)
    encoder = nn.Sequential(nn.Linear(6, layer.in_features), nn.Tanh())
    decoder = nn.Sequential(nn.Linear(layer.out_features, hidden), nn.Tanh(), nn.Linear(hidden, 6))
    return encoder.double(), layer, decoder.double()


def accumulate(encoder, layer, decoder, x, parts):
    params = encoder(x)
    leaf = params.detach().requires_grad_()
    for _ in range(parts):
        sample = layer.sample(leaf)
        cost = (decoder(sample.z) - x).square().sum(-1)
        (sample.surrogate(cost).mean() / parts).backward()
    params.backward(leaf.grad)


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_add_up_to_the_gradient_of_all_draws(name):
    encoder, layer, decoder = build(name)
    x, parameters = torch.randn(5, 6, dtype=torch.float64), [*encoder.parameters(), *decoder.parameters()]
    torch.manual_seed(1)
    losses = []
    params = encoder(x)
    for _ in range(3):
        sample = layer.sample(params)
        losses.append(sample.surrogate((decoder(sample.z) - x).square().sum(-1)).mean())
    expected = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    torch.manual_seed(1)
    accumulate(encoder, layer, decoder, x, parts=3)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_memory_is_that_of_one_part():
    model = build("leave_one_out", hidden=512)
    x = torch.randn(64, 6, dtype=torch.float64)
    one, many = (peak(lambda n=n: accumulate(*model, x, n), "cpu") for n in (1, 8))
    assert one > 2**20 and many < 1.3 * one
