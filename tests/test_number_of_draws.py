"""The number of draws may be changed between steps; what the estimator cannot use is refused as at construction."""

import inspect

import pytest
import torch

import stochastic_layers as sl
from stochastic_layers.registry import layer_class
from stochastic_layers.testing.subject import Subject

CHANGEABLE = [name for name in sl.list_layers() if "num_samples" in inspect.signature(layer_class(name)).parameters]
SELF_COMPARING = ("arms", "carms", "double_cv", "leave_one_out", "rodeo", "unordered_set")


def gradient(layer, params, cost, *, between=lambda: None):
    """The gradient of one step, and z, with something done between the draw and its cost."""
    leaf = params.clone().requires_grad_()
    torch.manual_seed(3)
    sample = layer.sample(leaf)
    between()
    (found,) = torch.autograd.grad(sample.surrogate(cost(sample.z)).sum(), leaf)
    return found, sample.z.detach()


@pytest.mark.parametrize("name", CHANGEABLE)
@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_what_is_no_number_of_draws_is_refused_when_it_is_set(name, number):
    layer = Subject(name).build()
    before = layer.num_samples
    with pytest.raises(ValueError, match="needed num_samples >= 1, got"):
        layer.num_samples = number
    assert layer.num_samples == before


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("antithetic", 3, "needed an even num_samples"),
        ("arm", 3, "needed an even num_samples"),
        ("disarm", 1, "needed an even num_samples"),
        ("disarm_tree", 5, "needed an even num_samples"),
        ("arms", 1, "needed num_samples >= 2"),
        ("carms", 1, "needed num_samples >= 2"),
        ("double_cv", 1, "needed num_samples >= 2"),
        ("rodeo", 1, "needed num_samples >= 2"),
        ("unordered_set", 1, "needed num_samples >= 2 for baseline 'built_in'"),
        ("unordered_set", 11, "needed num_samples <= 10"),
        ("local_expectation", 2**28, "numbers in the points of an example"),
        ("measure_valued", 2**28, "numbers in the points of an example"),
        ("arsm", 2**28, "numbers in the points of an example"),
    ],
)
def test_what_the_estimator_cannot_use_is_refused_when_it_is_set(name, number, message):
    layer = Subject(name).build()
    before = layer.num_samples
    with pytest.raises(ValueError, match=message):
        layer.num_samples = number
    assert layer.num_samples == before


def test_a_single_draw_without_others_to_compare_it_with_is_refused_by_the_baseline():
    layer = sl.create("leave_one_out", latent_dim=2)
    layer.num_samples = 1
    with pytest.raises(ValueError, match="needed num_samples >= 2, got 1"):
        layer.sample(torch.zeros(3, 2, requires_grad=True)).surrogate(torch.ones(1, 3))


def test_a_set_of_one_draw_is_possible_without_its_baseline():
    layer = Subject("unordered_set", options={"baseline": "none"}).build()
    layer.num_samples = 1
    assert layer.sample(torch.zeros(5, layer.in_features)).z.shape == (1, 5, layer.out_features)


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_layer_whose_number_was_set_is_one_that_was_built_with_it(name):
    subject = Subject(name)
    number = 6 if subject.build().num_samples != 6 else 4
    changed, built = subject.build(), subject.build(num_samples=number)
    changed.num_samples = number
    found, expected = (gradient(layer, subject.params(4), subject.cost()) for layer in (changed, built))
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", SELF_COMPARING)
def test_the_cost_of_earlier_draws_is_credited_by_their_number(name):
    subject = Subject(name, options={"num_samples": 4})
    layer, params, cost = subject.build(), subject.params(4), subject.cost()
    expected, _ = gradient(subject.build(), params, cost)
    found, _ = gradient(layer, params, cost, between=lambda: setattr(layer, "num_samples", 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
