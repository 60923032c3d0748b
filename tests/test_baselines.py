"""Baselines: values from before the step, statistics at their fixed point, and none that contains the own draw."""

import pytest
import torch
from torch import nn

import stochastic_layers as sl
from stochastic_layers import baselines
from stochastic_layers.baselines import Baseline, LearnedBaseline, MovingAverage, RunningMean
from stochastic_layers.testing import PolynomialCost, check_mean, measure

NAMES = ["none", "moving_average", "learned", "leave_one_out"]


def reinforce(baseline, num_samples=2, latent_dim=3):
    layer = sl.create("reinforce", latent_dim=latent_dim, num_samples=num_samples, baseline=baseline).double()
    return layer, torch.tensor([[0.5, -0.8, 0.2], [-0.1, 0.9, -0.6]], dtype=torch.float64)[:, :latent_dim]


def step(layer, params, cost, context=None):
    leaf = params.clone().requires_grad_()
    sample = layer.sample(leaf, context)
    value = cost(sample.z) if callable(cost) else cost
    sample.surrogate(value).mean().backward()
    return leaf.grad


def test_moving_average_stays_at_its_fixed_point_over_many_steps():
    baseline = MovingAverage(0.9).double()
    cost, context = torch.full((2, 5), 7.25, dtype=torch.float64), torch.zeros(5, 1)
    assert float(baseline(cost, context)) == 0.0
    for _ in range(2000):
        assert float(baseline(cost, context)) == pytest.approx(7.25, rel=1e-12)


def test_moving_average_is_the_debiased_exponential_mean_of_the_steps_before():
    baseline = MovingAverage(0.8).double()
    seen = []
    for _ in range(30):
        cost = torch.randn(2, 4, dtype=torch.float64)
        weights = [0.8 ** (len(seen) - 1 - i) for i in range(len(seen))]
        expected = sum(w * c for w, c in zip(weights, seen, strict=True)) / sum(weights) if seen else 0.0
        assert float(baseline(cost, torch.zeros(4, 1))) == pytest.approx(expected, abs=1e-12)
        seen.append(float(cost.mean()))


def test_moving_average_of_a_constant_cost_leaves_no_gradient_after_the_first_step():
    layer, params = reinforce("moving_average", 1)
    cost = torch.full((1, 2), 3.0, dtype=torch.float64)
    first, *rest = [step(layer, params, cost) for _ in range(50)]
    assert float(first.abs().sum()) > 0.1  # the value from before the step is 0
    assert all(float(gradient.abs().max()) < 1e-12 for gradient in rest)


def test_a_moving_average_that_contains_the_current_cost_is_caught():
    """Updated before use, it shrinks the gradient by its decay."""

    class Late(MovingAverage):
        def as_of_now(self):
            return lambda cost, context: 0.1 * cost  # what one's own cost adds to a mean of decay .9

    _, params = reinforce("none")
    layer, _ = reinforce(Late(0.9))
    cost = PolynomialCost("linear", 3)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, cost)
    moments = measure(layer, params, cost, num_draws=40_000)
    assert moments.projection[0] == pytest.approx(0.9, abs=5 * moments.projection[1])


@pytest.mark.parametrize("num_samples", [2, 4])
def test_a_mean_that_contains_the_own_draw_shrinks_the_gradient_by_one_over_s_and_is_caught(num_samples):
    class OwnSample(Baseline):
        def forward(self, cost, context):
            return cost.mean(0, keepdim=True)

    layer, params = reinforce(OwnSample(), num_samples)
    cost = PolynomialCost("quadratic", 3)
    moments = measure(layer, params, cost, num_draws=200_000)
    assert moments.projection[0] == pytest.approx(1 - 1 / num_samples, abs=5 * moments.projection[1])
    assert moments.projection[1] < 0.004
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, cost)
    # and exactly, draw by draw, against leave-one-out
    found = []
    for baseline in (OwnSample(), "leave_one_out"):
        torch.manual_seed(0)
        found.append(step(reinforce(baseline, num_samples)[0], params, cost))
    assert torch.allclose(found[0], (1 - 1 / num_samples) * found[1], rtol=1e-12)


def test_an_empty_batch_changes_nothing():
    for baseline in ("moving_average", "learned"):
        layer, params = reinforce(baseline)
        step(layer, params, PolynomialCost("linear", 3))
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        module = layer.baseline
        module(torch.zeros(2, 0, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64))
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


WITH_RUNNING_MEANS = {
    "reinforce": {"baseline": "moving_average"},
    "nvil": {"baseline": "moving_average"},
    "rebar": {},
    "relax": {"control_variate": "both"},
    "double_cv": {},
    "rodeo": {},
}


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", WITH_RUNNING_MEANS)
def test_an_infinite_cost_is_seen_in_its_own_step_and_in_no_later_one(name, bad):
    layer = sl.create(name, latent_dim=3, **WITH_RUNNING_MEANS[name])
    means = [m for m in layer.modules() if isinstance(m, RunningMean)]

    def train(shift):
        params = torch.zeros(4, 3, requires_grad=True)
        sample = layer.sample(params)
        loss = sample.surrogate((sample.z - torch.tensor([0.2, 0.5, 0.9])).square().sum(-1) + shift)
        loss.sum().backward()
        return loss.detach(), params.grad, [m.value for m in means]

    for _ in range(3):
        *_, before = train(0.0)
    loss, gradient, after = train(torch.tensor([0.0, bad, 0.0, 0.0]))
    assert means and not bool(loss.isfinite().all()) and not bool(gradient.isfinite().all())
    torch.testing.assert_close(after, before)
    loss, gradient, later = train(0.0)
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    assert all(not torch.equal(new, old) for new, old in zip(later, before, strict=True))  # they go on


@pytest.mark.parametrize(("name", "options"), [("reinforce", {"baseline": "learned"}), ("nvil", {}), ("relax", {})])
def test_a_context_that_is_not_finite_is_seen_in_the_loss_of_its_step_and_in_no_later_one(name, options):
    """The value that the loss adds its gradient to is finite; what the gradient comes from is not."""
    layer, context = sl.create(name, latent_dim=3, **options), torch.randn(4, 3)
    for bad in (float("nan"), float("inf"), 0.5):
        context[1, 0] = bad
        params = torch.zeros(4, 3, requires_grad=True)
        sample = layer.sample(params, context)
        loss = sample.surrogate(sample.z.sum(-1))
        loss.sum().backward()
        wrong = not bool(params.grad.isfinite().all())
        assert wrong == (not bool(loss.isfinite().all()))
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_a_smaller_last_batch_is_no_trouble(name):
    layer, params = reinforce(name)
    cost = PolynomialCost("cubic", 3)
    for batch in (8, 8, 3, 1, 8):
        gradient = step(layer, params[:1].expand(batch, 3), cost)
        assert gradient.shape == (batch, 3)
        assert bool(torch.isfinite(gradient).all())


def test_learned_baseline_converges_to_the_expected_cost_of_each_x():
    layer, params = reinforce({"name": "learned", "context_features": 1, "hidden_features": 16}, 1)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    bits = PolynomialCost("linear", 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(600):
        leaf = params[:1].expand(32, 2, 3)
        sample = layer.sample(leaf.clone().requires_grad_(), x.expand(32, 2, 1))
        layer.zero_grad()
        sample.surrogate(bits(sample.z).detach() + 5 * x.squeeze(-1)).mean().backward()
        optimizer.step()
    expected = (params[0].sigmoid() * bits.theta).sum().detach() + 5 * x.squeeze(-1)
    prediction = layer.baseline(torch.zeros(1, 2, dtype=torch.float64), x).detach()
    assert torch.allclose(prediction, expected, atol=0.25)


def test_learned_baseline_is_fitted_to_the_cost_and_trains_nothing_else():
    """Its gradient is that of the mean squared error; the encoder's is that of a baseline held fixed."""
    layer, params = reinforce("learned")
    cost = PolynomialCost("quadratic", 3)
    leaf = params.clone().requires_grad_()
    sample = layer.sample(leaf)
    value = cost(sample.z)
    (plain,) = torch.autograd.grad(value.mean(), cost.theta, retain_graph=True)
    sample.surrogate(value).mean().backward()
    prediction = layer.baseline(value.detach(), params)
    expected = torch.autograd.grad((prediction - value.detach()).square().mean(), list(layer.parameters()))
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient)
    score = sample.z - params.sigmoid()
    by_hand = ((value - prediction).detach().unsqueeze(-1) * score).mean(0) / 2
    assert torch.allclose(leaf.grad, by_hand)
    assert torch.allclose(cost.theta.grad, plain)


def test_a_learned_baseline_predicts_a_summed_cost_by_the_sum_of_its_predictions():
    baseline = LearnedBaseline(2)
    context = torch.randn(5, 3, 2)
    each = baseline(torch.zeros(4, 5, 3), context)
    assert each.shape == (5, 3)
    torch.testing.assert_close(baseline(torch.zeros(4, 5), context), each.sum(-1))


@pytest.mark.parametrize("name", ["reinforce", "nvil"])
def test_a_baseline_that_would_mix_examples_is_refused(name):
    class Column(nn.Module):
        def forward(self, cost, context):
            return context[:, :1]  # [B, 1] instead of [B]: with a cost [1, B], a matrix of all pairs of examples

    layer = sl.create(name, latent_dim=3, baseline=Column())
    sample = layer.sample(torch.zeros(5, 3, requires_grad=True))
    with pytest.raises(ValueError, match=r"broadcasts to the cost \[1, 5\], got \[5, 1\] from the baseline Column"):
        sample.surrogate(sample.z.sum(-1))


@pytest.mark.parametrize(("name", "options"), [("reinforce", {"baseline": "learned"}), ("nvil", {}), ("relax", {})])
@pytest.mark.parametrize("context", [torch.tensor(1.0), 1.0])
def test_a_number_is_no_context(name, options, context):
    with pytest.raises(ValueError, match=r"needed a tensor \[\*batch, F\] as context, got"):
        sl.create(name, latent_dim=3, **options).sample(torch.zeros(5, 3), context)


def test_a_module_of_the_user_is_a_baseline():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, cost, context):
            return self.value

    layer, params = reinforce(Table(), 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(100):
        layer.zero_grad()
        step(layer, params, torch.tensor([[2.0, -4.0]], dtype=torch.float64))
        optimizer.step()
    assert torch.allclose(layer.baseline.value, torch.tensor([2.0, -4.0], dtype=torch.float64), atol=1e-6)
    check_mean(layer, params, PolynomialCost("linear", 3))


@pytest.mark.parametrize("name", NAMES[1:])
def test_baselines_are_frozen_in_evaluation_and_without_gradients(name):
    layer, params = reinforce(name)
    cost = PolynomialCost("cubic", 3)
    step(layer, params, cost)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        sample = layer.sample(params)
        sample.surrogate(cost(sample.z))
    layer.eval()
    sample = layer.sample(params)
    sample.surrogate(cost(sample.z))
    if name == "moving_average":
        layer.baseline(torch.ones(2, 2), params)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_round_trip(name):
    cost = PolynomialCost("cubic", 3)
    layer, params = reinforce(name)
    for _ in range(5):
        step(layer, params, cost)
    other, _ = reinforce(name)
    other.load_state_dict(layer.state_dict())
    found = []
    for each in (layer, other):
        torch.manual_seed(0)
        found.append(step(each, params, cost))
    assert torch.equal(*found)
    assert ("baseline.total" in layer.state_dict()) == (name == "moving_average")


def test_running_mean_of_several_statistics_counts_rows():
    mean = RunningMean(0.5, size=2)
    mean.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    assert torch.allclose(mean.value, torch.tensor([2.0, 20.0]))
    mean.update(torch.tensor([[5.0, 50.0]]))
    assert torch.allclose(mean.value, torch.tensor([4.0, 40.0]))  # weights 1/4 and 1/2 of 3/4
    mean.update(torch.zeros(0, 2))
    assert torch.allclose(mean.value, torch.tensor([4.0, 40.0]))


@pytest.mark.parametrize("on_cpu", [True, False], ids=["looked at", "by a tensor"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_statistics_that_are_not_finite_change_nothing(on_cpu, bad, monkeypatch):
    monkeypatch.setattr(baselines, "eager_on_cpu", lambda tensor: on_cpu)
    mean = RunningMean(0.5, size=2)
    mean.update(torch.tensor([[1.0, 2.0]]))
    mean.update(torch.tensor([[1.0, bad]]))
    assert mean.total.tolist() == [0.5, 1.0] and mean.weight.tolist() == [0.5]
    mean.accumulate(torch.tensor([3.0, 6.0]), torch.tensor([2.0]))  # as all ranks do
    assert torch.allclose(mean.value, torch.tensor([7.0, 14.0]) / 3)


def test_a_single_draw_has_no_others_to_be_compared_with():
    with pytest.raises(ValueError, match=r"num_samples >= 2 .* LeaveOneOut, got 1"):
        sl.create("reinforce", latent_dim=3, baseline="leave_one_out")
    with pytest.raises(ValueError, match="'reinforce' with baseline='moving_average'"):  # this one has no such option
        sl.create("leave_one_out", latent_dim=3, num_samples=1)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("moving_avrage", "moving_average"),
        ({"name": "mean"}, "name of a baseline"),
        ({"decay": 0.9}, "name of a baseline"),
        ({"name": "moving_average", "rate": 0.9}, "needed options"),
        ({"name": "learned", "hidden_features": 0}, "hidden_features >= 1"),
        ({"name": "learned", "context_features": -1}, "context_features >= 1"),
        ({"name": "moving_average", "decay": 1.0}, "decay < 1"),
        ({"name": "moving_average", "decay": -0.1}, "0 <= decay"),
        (3, "baseline"),
    ],
    ids=str,
)
def test_wrong_names_and_options_are_refused(baseline, message):
    with pytest.raises(ValueError, match=message):
        sl.create("reinforce", latent_dim=3, baseline=baseline)


def test_a_context_of_the_wrong_size_is_refused():
    layer, params = reinforce("learned")
    sample = layer.sample(params, torch.zeros(2, 7))
    with pytest.raises(ValueError, match="'context_features': 7"):
        sample.surrogate(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"a context \[\*batch, 3\] .* got \[5, 3\]"):
        layer.sample(params, torch.zeros(5, 3)).surrogate(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="as context, got list"):
        layer.sample(params, [[0.0] * 3])
    assert LearnedBaseline(3).context_features == 3
