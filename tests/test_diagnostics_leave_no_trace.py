"""The promise that measuring changes nothing: random state, buffers, gradients, also where the cost raises."""

import pytest
import torch
from diagnosed_layers import BUILDABLE, problem
from torch import nn

import stochastic_layers as sl
from stochastic_layers.diagnostics import gradient_statistics, preserved


def snapshot(layer, params):
    tensors = [torch.get_rng_state(), params.grad]
    tensors += [*layer.parameters(), *layer.buffers(), *(p.grad for p in layer.parameters())]
    return [None if t is None else t.detach().clone() for t in tensors]


def assert_identical(before, after):
    for a, b in zip(before, after, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("options", [{"baseline": "moving_average"}, {"baseline": "learned"}], ids=str)
def test_random_state_buffers_and_gradients_stay_bit_identical(options, with_gradients):
    layer = sl.create("reinforce", latent_dim=3, **options)
    params = torch.randn(4, 3, requires_grad=True)
    if with_gradients:
        sample = layer.sample(params)
        sample.surrogate(sample.z.sum(-1)).sum().backward()
    before = snapshot(layer, params)
    gradient_statistics(layer, params, lambda z: z.sum(-1), num_draws=20, chunk_size=7)
    assert_identical(before, snapshot(layer, params))
    assert layer.training and params.requires_grad


@pytest.mark.parametrize("name", BUILDABLE)
def test_every_layer_goes_on_as_if_it_had_not_been_measured(name):
    results = []
    for measured in (False, True):
        torch.manual_seed(5)  # before the layer is built: it may have networks
        layer, params, cost_fn = problem(name)
        losses = []
        for _ in range(2):
            sample = layer.sample(params)
            losses.append(sample.surrogate(cost_fn(sample.z)).detach())
            if measured:
                gradient_statistics(layer, params, cost_fn, num_draws=6, chunk_size=4)
        results.append([*losses, *layer.buffers()])
    assert_identical(*results)


def test_state_is_restored_when_the_cost_raises():
    layer = sl.create("reinforce", latent_dim=3)
    params = torch.zeros(4, 3)
    before = snapshot(layer, params)
    calls = []

    def fails_late(z):
        calls.append(z)
        if len(calls) == 2:
            raise RuntimeError("no cost")
        return z.sum(-1)

    with pytest.raises(RuntimeError, match="no cost"):
        gradient_statistics(layer, params, fails_late, num_draws=4, chunk_size=2)
    assert_identical(before, snapshot(layer, params))


class Counting(nn.Module):
    """A baseline whose state moves with every call, and which remembers what it answered."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.answers = []

    def forward(self, cost, context):
        self.answers.append(float(self.calls))
        self.calls += 1
        return self.calls - 1


def test_every_chunk_starts_from_the_same_state():
    layer = sl.create("reinforce", latent_dim=3, baseline=Counting())
    gradient_statistics(layer, torch.zeros(4, 3), lambda z: z.sum(-1), num_draws=10, chunk_size=3)
    assert layer.baseline.answers == [0, 0, 0, 0] and float(layer.baseline.calls) == 0


def test_preserved_restores_replaced_buffers_and_leaves_untouched_ones_alone():
    module = nn.BatchNorm1d(3)
    mean, counter = module.running_mean, module.num_batches_tracked
    version = module.running_var._version
    random = torch.get_rng_state()
    with preserved(module):
        module.running_mean = torch.rand(3)
        module.num_batches_tracked += 4
    assert module.running_mean is mean and not mean.any() and int(counter) == 0
    assert module.running_var._version == version  # writing even the same values would break a graph that holds it
    assert torch.equal(torch.get_rng_state(), random)
