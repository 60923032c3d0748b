"""A model with layers in it compiles whole; code that was compiled outside capture() sees one that is opened later."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import stochastic_layers as sl
from stochastic_layers import captures, noise

pytestmark = [  # the compiler looks at every tensor and makes an object of every class
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
]

NEEDS_COST = ["reinforce", "disarm"]
PLAIN = ["gumbel_softmax", "vq"]  # vq has a loss of its own
CATEGORICAL = sl.list_layers(family="categorical")
LATENTS = {"latent_dim": 2}
OPTIONS = {
    "gumbel_softmax": {**LATENTS, "num_categories": 3},
    "vq": {"latent_dim": 2, "code_dim": 3, "num_codes": 4},
    "reinforce": {**LATENTS, "baseline": "none"},
}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(noise, "fast_integers", noise.traceable_integers)  # so that both modes draw the same numbers
    torch.compiler.reset()
    yield
    assert not captures._traced and not captures._any_open and captures._number_open == 0
    torch.compiler.reset()


def model_of(name):
    torch.manual_seed(0)
    layer = sl.create(name, **OPTIONS.get(name, LATENTS))
    return nn.Sequential(nn.Linear(4, layer.in_features), layer, nn.Linear(layer.out_features, 2))


def captured_loss(model, x):
    with sl.capture() as samples:
        y = model(x)
    return sl.surrogate(y.square().sum(-1), samples).mean()


def plain_loss(model, x):
    return model(x).square().sum(-1).mean()


def steps(model, *losses):
    """Values and gradients of training steps without an optimizer."""
    torch.manual_seed(1)
    found = []
    for loss_of in losses:
        loss = loss_of(torch.linspace(-1, 1, 24).view(6, 4))
        found += [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    return found


def assert_same(compiled, eager):
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(compiled, eager, strict=True))


def whole(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_outside_capture_is_one_graph_with_the_gradient_of_eager_mode(name):
    eager, model = model_of(name), model_of(name)
    plain = partial(plain_loss, whole(model))
    assert_same(steps(model, plain, plain), steps(eager, *2 * [partial(plain_loss, eager)]))


@pytest.mark.parametrize("name", [*NEEDS_COST, *PLAIN])
def test_a_step_with_capture_inside_is_one_graph_with_the_gradient_of_eager_mode(name):
    eager, model = model_of(name), model_of(name)
    step = whole(partial(captured_loss, model))
    assert_same(steps(model, step, step), steps(eager, *2 * [partial(captured_loss, eager)]))


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_compiled_outside_capture_is_captured_inside(name):
    model, eager = model_of(name), model_of(name)
    compiled = torch.compile(model, backend="aot_eager")
    order = [plain_loss, captured_loss, plain_loss, captured_loss]
    assert_same(steps(model, *[partial(f, compiled) for f in order]), steps(eager, *[partial(f, eager) for f in order]))


def test_without_the_guard_the_capture_would_be_missed(monkeypatch):
    """Control: that captures are counted is what tells compiled code of one."""
    monkeypatch.setattr(captures, "_count", lambda change: None)
    compiled = torch.compile(model_of("gaussian"), backend="aot_eager")
    compiled(torch.zeros(6, 4))
    with sl.capture() as samples:
        compiled(torch.zeros(6, 4))
    assert samples == []


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", NEEDS_COST)
def test_a_compiled_layer_that_needs_the_cost_is_refused_outside_capture(name, fullgraph):
    model = model_of(name)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            assert compiled(torch.zeros(6, 4)).shape[-2:] == (6, 2)
        with pytest.raises(RuntimeError, match="outside"):
            compiled(torch.zeros(6, 4))
    if not fullgraph:
        eager = model_of(name)
        assert_same(steps(model, partial(captured_loss, compiled)), steps(eager, partial(captured_loss, eager)))


def test_nested_captures_in_one_graph_collect_what_is_called_in_each():
    model = model_of("disarm")

    def step(x):
        with sl.capture() as outer:
            first = model(x)
            with sl.capture() as inner:
                second = model(x)
            third = model(x)
        losses = [sl.surrogate(y.square().sum(-1), [s]) for y, s in [(first, outer[0]), (third, outer[1])]]
        return (sum(losses) + sl.surrogate(second.square().sum(-1), inner)).mean()

    assert_same(steps(model, whole(step)), steps(model, step))


def test_graphs_that_break_inside_capture_give_the_gradient_of_eager_mode():
    model = model_of("disarm")

    def step(x):
        x = x.sin()
        with sl.capture() as samples:
            hidden = model[0](x)
            torch._dynamo.graph_break()
            y = model[2](model[1](hidden))
            torch._dynamo.graph_break()
            y = y.cos()
        return sl.surrogate(y.square().sum(-1), samples).mean()

    counter = CompileCounterWithBackend("aot_eager")
    assert_same(steps(model, torch.compile(step, backend=counter)), steps(model, step))
    assert counter.frame_count > 1


def test_an_error_inside_a_compiled_capture_leaves_none_open():
    model = model_of("gaussian")

    def step(x):
        with sl.capture() as samples:
            model(x)
            raise ZeroDivisionError
        return samples

    with pytest.raises(ZeroDivisionError):
        torch.compile(step, backend="aot_eager")(torch.zeros(6, 4))


def test_a_capture_of_another_thread_collects_nothing_from_compiled_code():
    compiled = torch.compile(model_of("gaussian"), backend="aot_eager")
    x = torch.zeros(6, 4)
    compiled(x)
    opened, called = threading.Event(), threading.Event()
    theirs = []

    def hold_open():
        with sl.capture() as samples:
            opened.set()
            called.wait(60)
            compiled(x)
        theirs.append(len(samples))

    thread = threading.Thread(target=hold_open)
    thread.start()
    assert opened.wait(60)
    with sl.capture() as mine:
        compiled(x)
    compiled(x)
    called.set()
    thread.join(60)
    assert len(mine) == 1 and theirs == [1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("leave_one_out", {}),
        pytest.param("nvil", {"family": "gaussian", "baseline": "none"}, marks=pytest.mark.slow),
        pytest.param("sum_and_sample", {"num_exact": 1}, marks=pytest.mark.slow),
        pytest.param("unordered_set", {"num_samples": 2}, marks=pytest.mark.slow),
        ("carms", {"num_categories": 3}),
    ],
    ids=str,
)
def test_draws_that_a_compiled_model_changes_in_place_have_the_gradient_of_draws_that_it_does_not(name, options):
    """Eager code refuses them; compiled code copies the draws where they are changed."""

    def gradient(shifted):
        torch.manual_seed(0)
        layer = sl.create(name, **LATENTS, **options)
        params = torch.randn(4, layer.in_features, requires_grad=True)
        weights = torch.linspace(-0.5, 1, layer.out_features)

        def step(params):
            sample = layer.sample(params)
            return sample.surrogate((shifted(sample.z) * weights).sum(-1).square()).mean()

        return torch.autograd.grad(whole(step)(params), params)[0]

    apart, in_place = gradient(lambda z: 2 * z - 0.8), gradient(lambda z: z.mul_(2).sub_(0.8))
    assert torch.equal(apart, in_place) and bool(apart.any())


def test_depths_of_nesting_are_not_compiled_one_by_one():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model_of("gaussian"), backend=counter)

    def at(depth):
        if depth == 0:
            return compiled(torch.zeros(6, 4))
        with sl.capture():
            return at(depth - 1)

    for depth in (0, 1, 0):
        at(depth)
    before = counter.frame_count
    for depth in (2, 3, 4, 5, 1, 0):
        at(depth)
    assert counter.frame_count == before


MANY = [name if name == "straight_through" else pytest.param(name, marks=pytest.mark.slow) for name in CATEGORICAL]


@pytest.mark.parametrize("name", MANY)
def test_a_step_with_many_categories_is_one_graph(name):
    """Rows of more than some tens of categories are drawn by another formula."""
    layer = sl.create(name, latent_dim=1, family="categorical", num_categories=64)

    def step(params):
        with sl.capture() as samples:
            z = layer(params)
        return sl.surrogate(z.square().sum(-1), samples)

    leaf = torch.zeros(3, 64, requires_grad=True)
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # for the layers that differentiate the cost
        torch.compile(step, fullgraph=True, backend="eager")(leaf).sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())
