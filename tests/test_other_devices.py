"""Every layer and model keeps its tensors on the device of its data; a device without data stands in for a GPU.

Tensors of ``FakeTensorMode`` have shape, dtype and device and no numbers, and refuse to meet those of another device,
as a GPU's do. "lazy" is the one device beside the CPU whose gradients torch can take without a driver.
"""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import stochastic_layers as sl
from lightning_modules import VAE, HierarchicalVAE
from stochastic_layers import layer as layer_module
from stochastic_layers import recomputation
from stochastic_layers.straight_through import StraightThrough
from stochastic_layers.testing.subject import Subject

REGISTRY = [(name, family) for name in sl.list_layers() for family in sl.describe(name).families]


@contextmanager
def without_numbers():
    """Tensors have no numbers: what reads one gets a constant, and what only a real device has is left out."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(torch.Tensor, "item", lambda self: 0.5 if self.is_floating_point() else 1)
        patch.setattr(torch.Tensor, "__float__", lambda self: 0.5)
        patch.setattr(torch.Tensor, "__int__", lambda self: 1)
        patch.setattr(torch.Tensor, "__bool__", lambda self: True)
        patch.setattr(layer_module, "_without_autocast", lambda device_type: nullcontext())
        patch.setattr(recomputation, "_random_state", lambda device: [])
        for name in ("_standard_gamma", "_sample_dirichlet"):  # their kernels need numbers
            patch.setattr(torch, name, lambda concentration, **options: concentration * 1.0)
        patch.setattr(torch, "_dirichlet_grad", lambda x, concentration, total: x * total)
        patch.setattr(torch, "poisson", lambda rate: rate.detach() + 0.0)
        patch.setattr(torch, "binomial", lambda count, prob: count * prob)
        yield


def move(module, device):
    """Give a module parameters and buffers that have no numbers."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                part._parameters[name] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=device)


def train_and_evaluate(layer, cost, device):
    layer, cost = copy.deepcopy((layer, cost))
    with without_numbers():
        move(layer, device)
        move(cost, device)
        params = torch.empty(4, layer.in_features, device=device, requires_grad=True)
        for training in (True, False):
            sample = layer.train(training).sample(params)
            loss = sample.surrogate(cost(sample.z)).mean()
            if training:
                loss.backward()
            results = [sample.z, sample.weights, sample.log_prob, loss, *sample.aux.values(), layer.mode(params)]
            assert {result.device.type for result in results} == {"lazy"}


def on_either_spelling(work, *arguments):
    """``work`` with "lazy:0" and "lazy", which are one device under two names; torch uses one here and one there."""
    try:
        work(*arguments, "lazy:0")
    except RuntimeError as error:
        if "two" not in str(error) or "lazy:0" not in str(error) or "cpu" in str(error):
            raise
        work(*arguments, "lazy")


@pytest.mark.parametrize(("name", "family"), REGISTRY)
def test_a_layer_works_where_its_params_are(name, family):
    subject = Subject(name, family=family)
    on_either_spelling(train_and_evaluate, subject.build(torch.float32), subject.cost())


@pytest.mark.parametrize("num_categories", [10, 64])
@pytest.mark.parametrize("name", ["straight_through", "reinforce", "gumbel_softmax"])
def test_a_draw_of_few_or_many_categories_works_where_its_params_are(name, num_categories):
    subject = Subject(name, family="categorical", options={"num_categories": num_categories, "num_samples": 2})
    on_either_spelling(train_and_evaluate, subject.build(torch.float32), subject.cost())


class OnTheHost(StraightThrough):
    """A planted mistake."""

    def draw(self, params, context):
        sample = super().draw(params, context)
        return self._sample(sample.q, sample.z * torch.ones(self.out_features))


def test_a_tensor_left_on_the_host_is_seen():
    subject = Subject("straight_through")
    with pytest.raises(RuntimeError, match=r"devices.* cpu"):
        on_either_spelling(train_and_evaluate, OnTheHost(3), subject.cost())


MODELS = {
    "gaussian": lambda: VAE("gaussian", {"latent_dim": 3}, data_shape=(1, 4, 4)),
    "learned prior": lambda: VAE("relax", {"latent_dim": 3}, data_shape=(1, 4, 4), prior="learned"),
    "iwae": lambda: VAE("gaussian", {"latent_dim": 3, "num_samples": 3}, data_shape=(1, 4, 4), objective="iwae"),
    "discretized": lambda: VAE("pathwise", data_shape=(3, 4, 4), likelihood="discretized_logistic"),
    "hierarchy": lambda: HierarchicalVAE([LAYER, LAYER], data_shape=(1, 4, 4)),
}
LAYER = {"name": "leave_one_out", "latent_dim": 3, "num_samples": 2}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_works_where_its_data_are(kind):
    model = MODELS[kind]()

    def step(device):
        here = copy.deepcopy(model).train()
        with without_numbers():
            move(here, device)
            here._device = torch.device(device)  # as Lightning's .to() sets it
            x = torch.empty(5, *model.data_shape, device=device)
            loss = here.loss(here.terms(x)).mean()
            loss.backward()
            assert {p.grad.device.type for p in here.parameters() if p.grad is not None} == {"lazy"}
            bound = here.eval().bound(here.terms(x))
            assert {value.device.type for value in bound.values()} == {"lazy"}

    on_either_spelling(step)


@pytest.mark.parametrize("name", ["softmax", "straight_through", "reinforce", "reinmax", "gumbel_softmax", "gaussian"])
def test_the_bandwidth_is_measured_where_it_is_asked_for(name):
    bandwidth = pytest.importorskip("benchmarks.bandwidth", reason="a release does not hold the benchmarks")

    def measure(device):
        with without_numbers():
            forward, params = bandwidth.forward(name, (6, 5) if name == "gaussian" else (6, 5, 40), device)
            results = forward(params)
            gradients = bandwidth.work(forward, params, torch.empty_like(results[-1]))()
            copied = bandwidth.copy(8, device)()
            assert {tensor.device.type for tensor in (*results, *gradients, copied)} == {"lazy"}

    on_either_spelling(measure)
