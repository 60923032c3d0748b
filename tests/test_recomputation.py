"""Activation checkpointing around layers with state: a recomputation repeats its forward pass and learns nothing."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from diagnosed_layers import BUILDABLE, default_layer
from processes import torchrun
from recomputed_training import trained
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import stochastic_layers as sl
from stochastic_layers.recomputation import Pass

LAYERS = ("vq", "rotation_trick", "residual_vq", "diveq")
WAYS = {
    "checkpoint": lambda network: partial(checkpoint, network, use_reentrant=False),
    "no early stop": lambda network: partial(no_early_stop, network),
    "checkpoint_wrapper": lambda network: checkpoint_wrapper(network, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
}


def no_early_stop(network, x):
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return checkpoint(network, x, use_reentrant=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_training_through_a_codebook_is_the_same_bit_by_bit(name, way):
    plain, recomputed = trained(name, lambda network: network), trained(name, WAYS[way])
    assert plain.keys() == recomputed.keys()
    for key, value in plain.items():
        assert torch.equal(value, recomputed[key]), key


@pytest.mark.parametrize("missing", ["skip_update", "buffers_of_then"])
def test_both_the_codes_and_the_random_state_of_then_are_needed(missing, monkeypatch):
    """Control: the codes are started, move and are revived by random rows while the comparison above looks."""
    plain = trained("diveq", lambda network: network)
    monkeypatch.setattr(Pass, missing, lambda *args: nullcontext())
    recomputed = trained("diveq", WAYS["checkpoint"])
    assert not all(torch.equal(value, recomputed[key]) for key, value in plain.items())


def quantizer():
    torch.manual_seed(0)
    return sl.create("vq", latent_dim=2, code_dim=3, num_codes=4, decay=0.5)


def region(layer, x):
    return layer(x.sin()).square()


def losses(layer, inputs, recomputed):
    parts = [checkpoint(region, layer, x, use_reentrant=False) if recomputed else region(layer, x) for x in inputs]
    return sum(part.sum() for part in parts)


def test_several_forward_passes_before_the_backward_pass_each_have_their_own_codes():
    inputs = [torch.randn(8, 6, requires_grad=True) for _ in range(3)]
    gradients = []
    for recomputed in (False, True):
        layer = quantizer()
        gradients.append(torch.autograd.grad(losses(layer, inputs, recomputed), inputs))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_the_same_params_twice_with_an_update_between_are_refused():
    x = torch.randn(8, 6, requires_grad=True)
    between = torch.randn(8, 6, requires_grad=True)  # x alone may leave the codebook where it is
    with pytest.raises(RuntimeError, match="got 2 between which the codebook was updated"):
        losses(quantizer(), [x, between, x], True).backward()


def test_a_graph_that_is_kept_is_recomputed_twice():
    x = torch.randn(8, 6, requires_grad=True)
    layer = quantizer()
    loss = losses(layer, [x], True)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    plain = torch.autograd.grad(losses(quantizer(), [x], False), x)[0]
    assert torch.equal(first, plain) and torch.equal(second, plain)


@pytest.mark.parametrize("recomputed", [False, True])
def test_nothing_is_kept_when_the_graph_is_gone(recomputed):
    layer = quantizer()
    loss = losses(layer, [torch.randn(8, 6, requires_grad=True) for _ in range(2)], recomputed)
    if recomputed:
        assert len(layer.passes) == 2
    loss.backward()
    del loss
    assert len(layer.passes) == 0
    with torch.no_grad():
        layer(torch.randn(8, 6))
    layer.eval()(torch.randn(8, 6, requires_grad=True))
    assert len(layer.passes) == 0


@pytest.mark.skipif(not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="torch before 2.8")
def test_nothing_is_kept_outside_of_regions_that_are_recomputed():
    layer = quantizer()
    x, other = (torch.randn(8, 6, requires_grad=True) for _ in range(2))
    loss = losses(layer, [x], False)
    assert len(layer.passes) == 0
    loss = loss + losses(layer, [other], True)
    assert len(layer.passes) == 1
    loss.backward()


@pytest.mark.parametrize("between", [nullcontext, torch.autograd.graph.save_on_cpu])
def test_a_region_inside_a_region_has_the_codes_of_its_forward_pass(between):
    inputs = [torch.randn(8, 6, requires_grad=True) for _ in range(2)]

    def inner(layer, x):
        with between():
            return region(layer, x)

    def outer(layer, x):
        return checkpoint(inner, layer, x.cos(), use_reentrant=False).exp() + region(layer, x)

    gradients = []
    for call in (outer, partial(checkpoint, outer, use_reentrant=False)):
        layer = quantizer()
        loss = sum(call(layer, x).sum() for x in inputs)  # both are in flight, and the codes move four times
        gradients.append([*torch.autograd.grad(loss, inputs), *layer.buffers()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_a_layer_in_the_middle_of_a_step_can_be_copied():
    layer = quantizer()
    loss = losses(layer, [torch.randn(8, 6, requires_grad=True)], False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert len(other.passes) == 0 and torch.equal(other.codes.table(), layer.codes.table())
    loss.backward()


def test_a_random_state_that_was_not_put_back_is_not_moved():
    """Moved to where the forward pass was, it would give the same random numbers a second time."""
    loss = checkpoint(
        region, quantizer(), torch.randn(8, 6, requires_grad=True), use_reentrant=False, preserve_rng_state=False
    ).sum()
    torch.rand(1)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "message"), [("reinforce", "would be lost"), ("disarm", "would be lost"), ("vq", "got none")]
)
@pytest.mark.parametrize("way", ["checkpoint", "checkpoint_wrapper"])
def test_reentrant_checkpointing_is_refused_where_its_forward_pass_without_gradients_matters(name, message, way):
    layer = sl.create(name, latent_dim=2)
    encoder = torch.nn.Linear(4, layer.in_features)
    network = torch.nn.Sequential(encoder, layer, torch.nn.Linear(layer.out_features, 3))
    if way == "checkpoint":
        call = partial(checkpoint, network, use_reentrant=True)
    else:
        call = checkpoint_wrapper(network, checkpoint_impl=CheckpointImpl.REENTRANT)
    with sl.capture() as samples:
        y = call(torch.randn(6, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match=rf"use_reentrant=False.*{message}|{message}.*use_reentrant=False"):
        sl.surrogate(y.square().sum(-1), samples).mean().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at every tensor
def test_a_compiled_layer_that_is_recomputed_is_refused():
    layer = quantizer()
    compiled = torch.compile(lambda x: layer.sample(x).z, backend="aot_eager", fullgraph=True)
    loss = losses(compiled, [torch.randn(8, 6, requires_grad=True)], True)
    with pytest.raises(RuntimeError, match=r"a codebook under torch\.compile outside the region"):
        loss.backward()


@pytest.mark.parametrize("name", ["straight_through", "gaussian", "fsq"])
def test_reentrant_checkpointing_redraws_the_noise_of_layers_without_state(name):
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        layer = sl.create(name, latent_dim=2)
        x = torch.randn(6, layer.in_features, requires_grad=True)
        y = checkpoint(region, layer, x, use_reentrant=True) if recomputed else region(layer, x)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def trained_once(name, call, uses):
    """Gradients of params and of the layer's parameters after a backward pass inside the open capture."""
    torch.manual_seed(0)
    layer = default_layer(name)
    params = torch.randn(6, layer.in_features, requires_grad=True)
    with sl.capture() as samples:
        y = call(partial(uses, layer, samples), params)
        sl.surrogate(y.square().sum(-1), samples[:1]).sum().backward()
    assert len(samples) == 1  # a recomputation is not a second call
    return [p.grad for p in (params, *layer.parameters())]


def as_module(layer, samples, x):
    return layer(x.sin())


def as_sample(layer, samples, x):
    sample = layer.sample(x.sin())
    if not samples:
        samples.append(sample)
    return sample.z[0] if len(sample.z) == 1 else sample.z


@pytest.mark.parametrize("uses", [as_module, as_sample])
@pytest.mark.parametrize("name", BUILDABLE)
def test_of_every_layer_a_recomputation_gives_the_same_gradient_or_is_refused(name, uses):
    plain = trained_once(name, lambda region, x: region(x), uses)
    for reentrant in (False, True):
        try:
            recomputed = trained_once(name, partial(checkpoint, use_reentrant=reentrant), uses)
        except RuntimeError as refused:
            assert reentrant and "use_reentrant=False" in str(refused)
            continue
        for ours, theirs in zip(plain, recomputed, strict=True):
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.ddp
def test_two_processes_recompute_without_waiting_for_each_other_and_agree(tmp_path):
    status, output = torchrun(Path(__file__).with_name("recomputed_training.py"), tmp_path, timeout=200)
    assert status == 0, output[-3000:]
    plain = [torch.load(tmp_path / f"False-{rank}.pt", weights_only=True) for rank in (0, 1)]
    recomputed = [torch.load(tmp_path / f"True-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in (0, 1):
        for key, value in plain[rank].items():
            assert torch.equal(value, recomputed[rank][key]), key
    assert all(torch.equal(v, recomputed[1][k]) for k, v in recomputed[0].items() if k.startswith("1.codes"))
    assert not torch.equal(recomputed[0]["loss 0"], recomputed[1]["loss 0"])  # they have different data
