"""Several layers, one cost: every layer's gradient against enumeration of the joint law."""

import copy
import itertools

import pytest
import torch

import stochastic_layers as sl

SIZE = 2  # bits of each layer
OUTCOMES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=SIZE)), dtype=torch.float64)


def bits(name, **options):
    return sl.create(name, latent_dim=SIZE, **options).double()


RLOO = {"baseline": "leave_one_out"}
PLAIN = {"baseline": "none"}


def leaf_values():
    generator = torch.Generator().manual_seed(3)
    shapes = {"first": (SIZE,), "weight": (SIZE, SIZE), "bias": (SIZE,), "theta": (2 * SIZE,), "other": (SIZE,)}
    return {k: 0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}


def cost_fn(z1, z2, leaves):
    """Not additive in z1 and z2, so that a layer that sees the wrong draws of the other is wrong."""
    linear = (torch.cat(torch.broadcast_tensors(z1, z2), -1) * leaves["theta"]).sum(-1)
    return (linear + 0.5) ** 2 + linear * (z1 * z2.flip(-1)).sum(-1)


def second_params(z1, leaves):
    return (z1.unsqueeze(-1) * leaves["weight"]).sum(-2) + leaves["bias"]


def log_q(logits, z):
    return torch.distributions.Bernoulli(logits=logits).log_prob(z).sum(-1)


def exact_nested(leaves):
    z1, z2 = OUTCOMES[:, None], OUTCOMES[None]
    log_joint = log_q(leaves["first"], z1) + log_q(second_params(z1, leaves), z2)
    return (log_joint.exp() * cost_fn(z1, z2, leaves)).sum()


def exact_parallel(leaves):
    z1, z2 = OUTCOMES[:, None], OUTCOMES[None]
    return ((log_q(leaves["first"], z1) + log_q(leaves["other"], z2)).exp() * cost_fn(z1, z2, leaves)).sum()


def exact_both(leaves):
    """Two layers side by side, and a third computed from both."""
    z1, z2, z3 = OUTCOMES[:, None, None], OUTCOMES[None, :, None], OUTCOMES[None, None]
    log_joint = log_q(leaves["first"], z1) + log_q(leaves["other"], z2)
    log_joint = log_joint + log_q(second_params(z1 - z2, leaves), z3)
    return (log_joint.exp() * cost_fn(z1 + z2, z3, leaves)).sum()


def check_joint(model, exact, *, num_draws, blind=()):
    """Compare gradient and value with enumeration: |z| < 5 per coordinate, an error of 5 % would stand 8 out.

    Args:
        model: Maps leaves ``[R, ...]`` to the cost, under capture.
        exact: Maps leaves ``[...]`` to the expected cost.
        num_draws: Number R of repetitions.
        blind: Leaves that the model does not use.
    """
    leaves = {k: v for k, v in leaf_values().items() if k not in blind}
    fixed = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    value = exact(fixed)
    exact_grads = torch.autograd.grad(value, list(fixed.values()))
    copies = {k: v.expand(num_draws, *v.shape).clone().requires_grad_() for k, v in leaves.items()}
    with sl.capture() as samples:
        cost = model(copies)
    loss = sl.surrogate(cost, samples)
    assert loss.shape == (num_draws,)
    torch.testing.assert_close(loss, cost.reshape(-1, num_draws).mean(0))  # all points here weigh the same
    grads = torch.autograd.grad(loss.sum(), list(copies.values()))
    for name, draws, target in zip(
        [*leaves, "value"], [*grads, loss.detach()], [*exact_grads, value.detach()], strict=True
    ):
        draws, target = draws.reshape(num_draws, -1), target.reshape(-1)
        error = draws.std(0) / num_draws**0.5
        along = draws @ target / target.square().sum()
        assert 8 * along.std() / num_draws**0.5 < 0.05, f"{name}: too few draws"
        largest = ((draws.mean(0) - target).abs() / (error + 1e-12)).max()
        assert largest < 5, f"{name} is {largest:.1f} standard errors off: {draws.mean(0)} for {target}"
        assert abs(along.mean() - 1) < 5 * along.std() / num_draws**0.5, name


def nested(first, second):
    def model(leaves):
        z1 = first(leaves["first"])
        return cost_fn(z1, second(second_params(z1, leaves)), leaves)

    return model


NESTED = {
    "reinforce over reinforce": (bits("reinforce", **PLAIN), bits("reinforce", **PLAIN)),
    "disarm over disarm": (bits("disarm"), bits("disarm")),
    "reinforce over disarm": (bits("disarm"), bits("reinforce", **PLAIN)),
    "disarm over reinforce": (bits("reinforce", **PLAIN), bits("disarm")),
    "three over two": (bits("disarm"), bits("arms", num_samples=3)),
    "two over three": (bits("reinforce", num_samples=3, **RLOO), bits("disarm")),
    "leave one out over arm": (bits("arm"), bits("reinforce", num_samples=3, **RLOO)),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_layers_have_the_gradient_of_the_joint(name):
    check_joint(nested(*NESTED[name]), exact_nested, num_draws=300_000, blind=["other"])


def parallel(first, second):
    def model(leaves):
        return cost_fn(first(leaves["first"]), second(leaves["other"]), leaves)

    return model


PARALLEL = {
    "one beside one": (bits("reinforce", **PLAIN), bits("reinforce", **PLAIN)),
    "disarm beside leave one out": (bits("disarm"), bits("reinforce", num_samples=2, **RLOO)),
    "disarm beside disarm": (bits("disarm"), bits("disarm")),
    "one beside three": (bits("reinforce", **PLAIN), bits("arms", num_samples=3)),
    "three beside one": (bits("arms", num_samples=3), bits("reinforce", **PLAIN)),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_layers_have_the_gradient_of_the_joint(name):
    check_joint(parallel(*PARALLEL[name]), exact_parallel, num_draws=300_000, blind=["weight", "bias"])


BOTH = {
    "all single": (bits("reinforce", **PLAIN), bits("reinforce", **PLAIN), bits("reinforce", **PLAIN)),
    "all double": (bits("disarm"), bits("reinforce", num_samples=2, **RLOO), bits("disarm")),
    "mixed": (bits("reinforce", **PLAIN), bits("disarm"), bits("arms", num_samples=3)),
}


@pytest.mark.parametrize("name", BOTH)
def test_a_layer_over_two_parallel_ones_has_the_gradient_of_the_joint(name):
    first, other, last = BOTH[name]

    def model(leaves):
        z1, z2 = first(leaves["first"]), other(leaves["other"])
        return cost_fn(z1 + z2, last(second_params(z1 - z2, leaves)), leaves)

    check_joint(model, exact_both, num_draws=1_000_000 if name == "all single" else 300_000)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_pathwise_layer_beside_a_score_function_layer(num_samples):
    gaussian = sl.create("gaussian", latent_dim=1, num_samples=num_samples)
    score = bits("reinforce", num_samples=num_samples, baseline="none" if num_samples == 1 else "leave_one_out")

    def cost(z, b):
        return z.squeeze(-1) * b[..., 0] + z.squeeze(-1) ** 2 + b[..., 1]

    def model(leaves):  # loc and log-variance
        return cost(gaussian(leaves["first"]), score(leaves["other"]))

    def exact(leaves):
        (loc, log_variance), p = leaves["first"], torch.sigmoid(leaves["other"])
        return loc * p[0] + loc**2 + log_variance.exp() + p[1]

    def in_other_order(leaves):
        b = score(leaves["other"])
        return cost(gaussian(leaves["first"]), b)

    for order in (model, in_other_order):
        check_joint(order, exact, num_draws=1_000_000, blind=["weight", "bias", "theta"])


def test_a_pathwise_layer_over_bits_passes_its_gradient_on():
    first, second = bits("disarm"), sl.create("gaussian", latent_dim=1, num_samples=2)

    def model(leaves):
        z1 = first(leaves["first"])
        return (second(second_params(z1, leaves)).squeeze(-1) + z1[..., 0]) ** 2

    def exact(leaves):
        loc, log_variance = second_params(OUTCOMES, leaves).unbind(-1)
        values = (loc + OUTCOMES[:, 0]) ** 2 + log_variance.exp()
        return (log_q(leaves["first"], OUTCOMES).exp() * values).sum()

    check_joint(model, exact, num_draws=200_000, blind=["other", "theta"])


def test_parallel_layers_of_different_batch_shapes_share_their_points():
    """A latent for each of two positions beside a latent for the whole, with two points each."""
    local, whole = bits("disarm"), bits("reinforce", num_samples=2, **RLOO)

    def model(leaves):
        z1 = local(torch.stack([leaves["first"], leaves["bias"]], -2))  # [2, R, 2, SIZE]
        return cost_fn(z1[..., 0, :] + z1[..., 1, :], whole(leaves["other"]), leaves)

    def exact(leaves):
        a, b, c = OUTCOMES[:, None, None], OUTCOMES[None, :, None], OUTCOMES[None, None]
        log_joint = log_q(leaves["first"], a) + log_q(leaves["bias"], b) + log_q(leaves["other"], c)
        return (log_joint.exp() * cost_fn(a + b, c, leaves)).sum()

    check_joint(model, exact, num_draws=300_000, blind=["weight"])


@pytest.mark.parametrize("third_first", [False, True])
def test_a_single_draw_over_one_of_two_parallel_layers(third_first):
    first, second, third = bits("disarm"), bits("reinforce", **PLAIN), bits("reinforce", num_samples=2, **RLOO)

    def model(leaves):
        z3 = third(leaves["other"]) if third_first else None
        z1 = first(leaves["first"])
        z2 = second(second_params(z1, leaves))  # [2, R, SIZE]
        return cost_fn(z1 + (third(leaves["other"]) if z3 is None else z3), z2, leaves)

    def exact(leaves):
        z1, z2, z3 = OUTCOMES[:, None, None], OUTCOMES[None, :, None], OUTCOMES[None, None]
        log_joint = log_q(leaves["first"], z1) + log_q(second_params(z1, leaves), z2) + log_q(leaves["other"], z3)
        return (log_joint.exp() * cost_fn(z1 + z3, z2, leaves)).sum()

    check_joint(model, exact, num_draws=600_000)


class CreditGaussian(sl.Gaussian):
    """The pathwise gradient, but taken inside credit from the graph of the cost."""

    def draw(self, params, context):
        sample = super().draw(params, context)
        z = sample.z.detach().requires_grad_()

        def credit(cost):
            (gradient,) = torch.autograd.grad(cost.sum(), z, retain_graph=True)
            return (gradient * sample.z).sum(-1).mean(0)

        return self._sample(sample.q, z, credit=credit)


@pytest.mark.parametrize("gaussian_first", [False, True])
def test_a_credit_that_differentiates_the_cost_sees_its_graph_beside_another_layer(gaussian_first):
    gaussian, score = CreditGaussian(1, num_samples=2), bits("reinforce", num_samples=2, **RLOO)

    def model(leaves):
        z = gaussian(leaves["first"]) if gaussian_first else None
        b = score(leaves["other"])
        z = gaussian(leaves["first"]) if z is None else z
        return z.squeeze(-1) * b[..., 0] + z.squeeze(-1) ** 2 + b[..., 1]

    def exact(leaves):
        (loc, log_variance), p = leaves["first"], torch.sigmoid(leaves["other"])
        return loc * p[0] + loc**2 + log_variance.exp() + p[1]

    check_joint(model, exact, num_draws=600_000, blind=["weight", "bias", "theta"])


STATEFUL = [
    ("reinforce", {"baseline": "moving_average"}),
    ("dice", {"baseline": "moving_average"}),
    ("nvil", {"baseline": "moving_average"}),
    ("relax", {}),
    ("double_cv", {}),
    ("rodeo", {"taylor": False}),
]


def trained(name, options):
    """A layer whose running statistics and networks have moved."""
    layer = bits(name, **options)
    optimizer = torch.optim.SGD([*layer.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)
    for _ in range(3):
        sample = layer.sample(torch.zeros(8, SIZE, dtype=torch.float64, requires_grad=True))
        optimizer.zero_grad()
        sample.surrogate(1 + (sample.z.sum(-1) - 0.3) ** 2).mean().backward()
        optimizer.step()
    return layer


@pytest.mark.parametrize(("name", "options"), STATEFUL, ids=str)
def test_a_layer_that_is_called_twice_sees_its_own_cost_no_more_than_two_layers_do(name, options):
    """Statistics that the upper call has updated contain the draw of the lower one: they shrink its gradient."""
    layer = trained(name, {**options, "num_samples": 2})
    leaves, found = leaf_values(), []
    for shared in (False, True):
        first = copy.deepcopy(layer)
        second = first if shared else copy.deepcopy(layer)
        torch.manual_seed(0)
        leaf = leaves["first"].expand(5, SIZE).clone().requires_grad_()
        with sl.capture() as samples:
            z1 = first(leaf)
            z2 = second(second_params(z1, leaves))
        sl.surrogate(cost_fn(z1, z2, leaves), samples).mean().backward()
        found.append(leaf.grad)
    assert found[0].any()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), STATEFUL, ids=str)
def test_a_second_surrogate_of_a_sample_has_the_gradient_of_the_first(name, options):
    layer = trained(name, {**options, "num_samples": 2})
    leaf = torch.zeros(5, SIZE, dtype=torch.float64, requires_grad=True)
    sample = layer.sample(leaf)
    cost = 1 + (sample.z * torch.tensor([1.0, -2.0], dtype=torch.float64)).sum(-1) ** 3
    one, other = (torch.autograd.grad(sample.surrogate(cost).mean(), leaf, retain_graph=True)[0] for _ in range(2))
    assert one.any()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_sign_error_in_the_lower_layer_is_caught():
    class Flipped(sl.DisARM):
        def code(self, params):
            logits, decode = super().code(params)
            return 2 * logits.detach() - logits, decode

    with pytest.raises(AssertionError, match="first is"):
        check_joint(nested(Flipped(SIZE), bits("disarm")), exact_nested, num_draws=300_000, blind=["other"])


def test_one_sample_is_its_own_surrogate():
    layer = bits("disarm")
    logits = torch.zeros(5, SIZE, dtype=torch.float64, requires_grad=True)
    with sl.capture() as samples:
        z = layer(logits)
    cost = z.sum(-1) ** 2
    (a,) = torch.autograd.grad(sl.surrogate(cost, samples).sum(), logits, retain_graph=True)
    (b,) = torch.autograd.grad(samples[0].surrogate(cost).sum(), logits)
    assert torch.equal(a, b)


def test_no_samples_is_an_error_that_says_what_to_do():
    with sl.capture() as samples:
        pass
    with pytest.raises(ValueError, match=r"at least one sample, got none; .*sl\.capture"):
        sl.surrogate(torch.zeros(3), samples)


@pytest.mark.parametrize("shape", [(), (2,), (5,), (3, 5), (2, 4), (2, 2, 5), (5, 2)])
def test_a_cost_that_does_not_fit_is_refused(shape):
    with sl.capture() as samples:
        bits("disarm")(torch.zeros(5, SIZE))
    with pytest.raises(ValueError, match="needed a cost"):
        sl.surrogate(torch.zeros(shape), samples)


def test_a_cost_reduced_over_the_batch_of_single_draws_is_refused():
    with sl.capture() as samples:
        bits("reinforce")(torch.zeros(5, SIZE))
    with pytest.raises(ValueError, match="needed a cost"):
        sl.surrogate(torch.zeros(()), samples)


def test_a_dimension_for_a_single_draw_is_refused_and_the_sentence_says_that_it_has_none():
    with sl.capture() as samples:
        sl.create("straight_through", latent_dim=2)(torch.zeros(4, 2, requires_grad=True))
    with pytest.raises(ValueError, match=r"got \[1, 4\].*without a dimension for layers that draw one point"):
        sl.surrogate(torch.zeros(1, 4), samples)


def test_weighted_points_side_by_side_are_refused():
    with sl.capture() as samples:
        bits("disarm")(torch.zeros(5, SIZE))
        bits("disarm")(torch.zeros(5, SIZE))
    weighted = [sl.Sample(s.z, s.weights, s.q, s.log_density, s.credit, {}, False) for s in samples]
    with pytest.raises(ValueError, match="needed equally weighted draws"):
        sl.surrogate(torch.zeros(2, 5), weighted)


@pytest.mark.parametrize("reward", [torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3) > 0, [[1.0] * 3] * 2])
def test_a_reward_that_is_no_number_of_floating_point_is_refused_with_the_conversion(reward):
    sample = sl.create("leave_one_out", latent_dim=2).sample(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"floating-point cost of shape \[2, 3\], got .*; convert it, cost.float\(\)"):
        sample.surrogate(reward)
