"""REBAR and RELAX: the coupling, what tuning does, and the mistakes that others made."""

import pytest
import torch
from control_variate_problems import total_variance, train
from small_problems import BITS, CATEGORIES, asymmetric_params, build

import stochastic_layers as sl
from stochastic_layers import rebar, relax
from stochastic_layers.testing import PolynomialCost, check_mean, measure

SMALL = {"hidden_features": 8}


@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
def test_hard_draws_follow_q(options):
    layer, params = build("rebar", options)
    sample = layer.sample(params.expand(200_000, *params.shape))
    mean = sample.z[0].detach().mean(0)
    expected = rebar.mean_point(layer.law(params), params)
    error = (expected * (1 - expected) / 200_000).sqrt()
    assert float(((mean - expected) / error).abs().max()) < 5
    assert float((error / expected).max()) < 0.01


@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
def test_noise_drawn_anew_agrees_with_the_hard_draw_and_has_the_law_of_the_first(options):
    layer, params = build("rebar", options, batch=1)
    hard, scores, _ = rebar.couple(layer.family, params, 100_000)
    for perturbed in scores:
        if layer.num_categories is None:
            again = (perturbed > 0).to(hard.dtype)
        else:
            rows = layer.family.unflatten(perturbed)
            again = torch.zeros_like(rows).scatter_(-1, rows.argmax(-1, keepdim=True), 1.0).flatten(-2)
        assert torch.equal(again, hard)
    first, anew = scores.squeeze(2).sort(1).values  # Kolmogorov and Smirnov's distance of two samples, per coordinate
    grid = torch.linspace(-6, 6, 400, dtype=torch.float64).expand(first.shape[-1], -1).contiguous()
    cdfs = [torch.searchsorted(t.T.contiguous(), grid) / t.shape[0] for t in (first, anew)]
    assert float((cdfs[0] - cdfs[1]).abs().max()) < 2.5 * (2 / 100_000) ** 0.5
    joint = [(hard[:, 0] * s[:, 0]).mean(0) for s in scores]
    assert float((joint[0] - joint[1]).abs().max()) < 0.03


@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
def test_derivative_of_the_conditional_noise_is_that_of_finite_differences(options, monkeypatch):
    """At fixed noise and a fixed hard draw, along every logit."""
    layer, params = build("rebar", options, batch=1)
    torch.manual_seed(0)
    hard, _, slope = rebar.couple(layer.family, params, 4)
    vector = torch.randn_like(hard)
    mean = rebar.mean_point(layer.law(params), params)
    found = rebar.through_conditional(layer.family, mean, slope, vector)
    step = 1e-6
    for index in range(layer.in_features):
        ends = []
        for sign in (1, -1):
            moved = params.clone()
            moved[0, index] += sign * step
            torch.manual_seed(0)
            same, scores, _ = rebar.couple(layer.family, moved, 4)
            assert torch.equal(same, hard)
            ends.append(scores[1])
        numeric = (vector * (ends[0] - ends[1])).sum(-1) / (2 * step)
        assert torch.allclose(found[..., index], numeric, atol=1e-7)


def detached(name, options, monkeypatch):
    """The mistake of several libraries: noise drawn anew is taken for a constant, so that only z moves with theta."""
    layer, params = build(name, options)

    def wrong(family, mean, slope, vector):
        return vector  # as if the perturbed logits were logits + constant noise

    monkeypatch.setattr(rebar, "through_conditional", wrong)
    return layer, params


@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_detached_conditional_noise_is_caught(name, options, monkeypatch):
    layer, params = detached(name, {**options, **(SMALL if name == "relax" else {})}, monkeypatch)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.6 * torch.randn_like(parameter))  # 0.3 leaves some networks too flat
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("quadratic", layer.out_features))


def test_size_of_the_bias_of_detached_conditional_noise(monkeypatch):
    """Large: tens of percent of the gradient for a plain quadratic in each bit."""
    layer, params = detached("rebar", BITS, monkeypatch)
    cost = PolynomialCost("asymmetric", 3)
    moments = measure(layer, params, cost, num_draws=40_000)
    print(f"relative bias {moments.relative_bias:.3f}")
    assert moments.relative_bias > 0.1
    assert float(moments.standard_error.norm() / moments.exact.norm()) < 0.03


@pytest.mark.parametrize(
    ("name", "options"),
    [("rebar", BITS), ("relax", {**BITS, **SMALL}), ("relax", {**BITS, **SMALL, "control_variate": "both"})],
    ids=str,
)
def test_a_sign_flip_is_caught(name, options, monkeypatch):
    layer, params = build(name, options)
    module = {"rebar": rebar, "relax": relax}[name]
    right = module.inject
    monkeypatch.setattr(module, "inject", lambda gradient, params: -right(gradient, params))
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("linear", 3))


def test_a_leak_of_the_relaxed_cost_into_the_decoder_is_caught():
    """Two libraries let the control variate's cost train the decoder as well."""

    class Leaking(sl.Rebar):
        def draw(self, params, context):
            sample = super().draw(params, context)
            right = sample.credit
            return self._sample(
                sample.q, sample.z, weights=sample.weights, credit=lambda cost: right(cost) + cost[1] - 0.5 * cost[2]
            )

    layer = Leaking(3).double()
    cost = PolynomialCost("asymmetric", 3)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, asymmetric_params(layer), cost, of="decoder")


def test_a_network_lowers_the_variance_of_the_relaxed_cost():
    """At the start, before the network has learned, the two are REBAR with eta = 1, draw by draw."""
    cost, start, variance = PolynomialCost("cubic", 3), [], []
    for name, options in (("rebar", {}), ("relax", {**SMALL, "control_variate": "both"})):
        layer, params = build(name, {**BITS, **options}, batch=1)
        torch.manual_seed(5)
        leaf = params.expand(9, 1, 3).clone().requires_grad_()
        sample = layer.sample(leaf)
        start.extend(torch.autograd.grad(sample.surrogate(cost(sample.z)).sum(), leaf))
        variance.append(total_variance(train(layer, params, cost, copies=16), params, cost))
    torch.testing.assert_close(*start)
    print("tuned", variance)
    assert variance[1] < 0.85 * variance[0]


def test_a_black_box_leaves_the_network_of_both():
    """Where the cost does not depend on z through autograd, the gradient is that of the network alone."""
    cost, found = PolynomialCost("cubic", 3), []
    for choice in ("network", "both"):
        torch.manual_seed(0)
        layer, params = build("relax", {**BITS, **SMALL, "control_variate": choice})
        torch.manual_seed(1)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        with torch.no_grad():
            value = cost(sample.z)
        sample.surrogate(value).sum().backward()
        found.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for network, both in zip(*found, strict=True):
        torch.testing.assert_close(network, both)


def test_relax_states_what_its_option_needs_and_refuses_the_cost_alone():
    layer = sl.create("relax", latent_dim=2, control_variate="both")
    assert layer.needs == sl.create("rebar", latent_dim=2).needs and sl.describe("relax").needs == ("cost",)
    assert layer.sample(torch.zeros(4, 2)).z.shape == (3, 4, 2)
    with pytest.raises(ValueError, match="use 'rebar' for the cost alone"):
        sl.create("relax", latent_dim=2, control_variate="cost")


@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_tuning_lowers_the_variance_below_that_of_the_start_and_of_reinforce(name, options):
    """300 steps; from an eta of 2.5 for REBAR, whose default start is near its best."""
    layer, params = build(name, {**options, **(SMALL if name == "relax" else {})}, batch=1)
    cost = PolynomialCost("quadratic", layer.out_features)
    if name == "rebar":
        with torch.no_grad():
            layer.eta.fill_(2.5)
    start = total_variance(layer, params, cost)
    end = total_variance(train(layer, params, cost, copies=16), params, cost)
    reinforce, _ = build("reinforce", {**options, "baseline": "moving_average"}, batch=1)
    plain = total_variance(train(reinforce, params, cost, steps=100), params, cost)
    print(name, f"start {start:.3g}, tuned {end:.3g}, REINFORCE with a moving average {plain:.3g}")
    assert end < 0.9 * start
    assert end < 0.9 * plain


def test_tuning_reaches_the_best_eta_of_a_grid():
    layer, params = build("rebar", BITS, batch=1)
    cost = PolynomialCost("quadratic", 3)
    layer.log_temperature.requires_grad_(False)
    train(layer, params, cost, steps=400, copies=64)
    tuned = float(layer.eta.detach())
    grid = {}
    for eta in torch.linspace(0.2, 2.0, 10).tolist():
        with torch.no_grad():
            layer.eta.fill_(eta)
        torch.manual_seed(0)  # common noise
        grid[eta] = total_variance(layer, params, cost)
    assert abs(tuned - min(grid, key=grid.get)) < 0.25


def test_units_of_the_cost_do_not_change_the_tuning():
    """With a cost a million times larger, the parameters take the same path."""
    found = []
    for unit in (1.0, 1e6):
        torch.manual_seed(0)
        layer, params = build("rebar", BITS)
        train(layer, params, Scaled(unit), steps=20)
        found.append({n: p.detach().clone() for n, p in layer.named_parameters()})
    assert abs(float(found[0]["eta"]) - 1) > 0.05
    for key in found[0]:
        assert torch.allclose(found[0][key], found[1][key], rtol=1e-6), key


class Scaled(PolynomialCost):
    """A quadratic cost in another unit."""

    def __init__(self, unit):
        super().__init__("quadratic", 3)
        self.unit = unit

    def forward(self, z):
        return self.unit * super().forward(z)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_relax_learns_in_any_unit_of_the_cost(unit):
    layer, params = build("relax", {**BITS, **SMALL}, batch=1)
    start = total_variance(layer, params, Scaled(unit))
    assert total_variance(train(layer, params, Scaled(unit), copies=16), params, Scaled(unit)) < 0.7 * start


@pytest.mark.parametrize("options", [BITS, CATEGORIES], ids=str)
@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_points_are_credited_at_the_temperature_that_they_were_drawn_at(name, options):
    """An optimizer step, or a schedule, may come between the draw and its cost; another temperature would be biased."""
    gradients = []
    for later in (0.5, 2.0):
        torch.manual_seed(0)
        layer, params = build(name, options)
        if name == "relax":  # a network that has learned something
            torch.nn.init.normal_(layer.network[-1].weight)
        sample = layer.sample(params.requires_grad_())
        layer.temperature = later
        cost = PolynomialCost("quadratic", layer.out_features)
        gradients += torch.autograd.grad(sample.surrogate(cost(sample.z)).sum(), params)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_parameters_have_one_dimension_and_survive_a_round_trip():
    layer = sl.create("rebar", latent_dim=3, temperature=0.25)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {"eta": (1,), "log_temperature": (1,)}
    assert float(layer.temperature.detach()) == pytest.approx(0.25)
    params = torch.randn(4, 3)
    train(layer, params, lambda z: z.pow(2).sum(-1), steps=3)
    other = sl.create("rebar", latent_dim=3)
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in layer.state_dict().items())


def test_frozen_parameters_need_no_second_derivative_of_the_cost():
    class FirstOrder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.pow(2)

        @staticmethod
        def backward(ctx, gradient):
            if torch.is_grad_enabled():
                raise RuntimeError("no second derivative")
            (z,) = ctx.saved_tensors
            return 2 * z * gradient

    layer, params = build("rebar", BITS)

    def run():
        sample = layer.sample(params.clone().requires_grad_())
        return sample.surrogate(FirstOrder.apply(sample.z).sum(-1))

    layer.requires_grad_(False)
    assert run().shape == (2,)
    layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        run()


def test_relax_reads_the_context():
    """The best control variate of a cost that depends on x alone needs x: it learns the mean cost of each x."""
    layer, params = build("relax", {**BITS, **SMALL, "context_features": 1}, batch=1)
    params = params.expand(2, -1)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    gradients = []
    for _ in range(400):
        leaf = params.expand(16, 2, 3).clone().requires_grad_()
        sample = layer.sample(leaf, x.expand(16, 2, 1))
        layer.zero_grad()
        sample.surrogate(10 * x.squeeze(-1).expand(1, 16, 2)).mean().backward()
        gradients.append(float(leaf.grad.norm()))
        optimizer.step()
    assert sum(gradients[-50:]) < 0.3 * sum(gradients[:50])
    for shape in ([2, 2], [3, 1], [2, 2, 1]):  # two examples of one feature; the last would count for other draws
        with pytest.raises(ValueError, match=r"context \[\*batch, 1\]"):
            layer.sample(params, torch.zeros(*shape))
