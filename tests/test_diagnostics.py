"""Gradient statistics against brute force, exact references and averages, memory, summaries."""

import itertools
import math
import warnings

import pytest
import torch
from diagnosed_layers import BUILDABLE, DISCRETE, discrete_problem, problem
from torch import nn

import stochastic_layers as sl
from stochastic_layers import redraws
from stochastic_layers.diagnostics import GradientStatistics, Reference, gradient_statistics
from stochastic_layers.redraws import Moments
from stochastic_layers.testing import PolynomialCost, exact_value


def separate_passes(layer, params, cost_fn, num_draws):
    """One backward pass per draw, each from the layer's state as it was: ``[R, B, in_features]``."""
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    gradients = []
    for _ in range(num_draws):
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        gradients.append(torch.autograd.grad(sample.surrogate(cost_fn(sample.z)).sum(), leaf)[0])
        layer.load_state_dict(state)
    return torch.stack(gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILDABLE if name not in DISCRETE])  # those have a test of more
def test_statistics_agree_with_a_thousand_separate_backward_passes(name):
    layer, params, cost_fn = problem(name)
    statistics = gradient_statistics(layer, params, cost_fn, num_draws=20_000, chunk_size=8_000, reference=None)
    draws = separate_passes(layer, params, cost_fn, 1000)
    assert statistics.num_draws == 20_000 and statistics.mean.shape == statistics.variance.shape == params.shape
    rounding = 1e-9
    error = (draws.var(0) / 1000 + statistics.variance / 20_000).sqrt() + rounding
    assert bool(((statistics.mean - draws.mean(0)).abs() < 5 * error).all())
    squares = (draws - draws.mean(0)).square()
    error = (squares.var(0) * (1 / 1000 + 1 / 20_000)).sqrt() + rounding
    assert bool(((statistics.variance - draws.var(0)).abs() < 5 * error).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", DISCRETE)
def test_variance_bias_and_snr_agree_with_brute_force(name):
    """A thousand separate backward passes against one batched measurement of ten thousand redraws.

    All errors are those of the draws themselves; five of them are allowed, so that a coordinate fails by chance with
    probability 6e-7. Neither side knows the other's reference: here it is the sum over outcomes of the test kit.
    """
    layer, params, cost_fn, exact = discrete_problem(name)
    few, many = 1000, 10_000
    found = gradient_statistics(layer, params, cost_fn, num_draws=many)
    assert found.reference.kind == "exact"
    torch.testing.assert_close(found.reference.gradient, exact, rtol=1e-10, atol=1e-10)
    draws = separate_passes(layer, params, cost_fn, few)
    rounding = 1e-9 * (1 + exact.abs())
    # bias, coordinate by coordinate
    error = (draws.var(0) / few + found.bias_standard_error**2).sqrt() + rounding
    assert bool(((found.bias - (draws.mean(0) - exact)).abs() < 5 * error).all())
    # its norm: the debiased square, whose error contains that of the brute force, to which the rows are projected
    norm, norm_error = found.bias_norm
    deviation = draws.mean(0) - exact
    plain = float((deviation.square().sum() / 2).sqrt())
    noise = float((draws.var(0).sum() / few / 2).sqrt())
    assert abs(norm - plain) < 5 * (norm_error + noise)
    # total variance and mean squared error, per example
    for value, squares in (
        (found.total_variance, (draws - draws.mean(0)).square().sum((1, 2)) / 2),
        (found.mse, (draws - exact).square().sum((1, 2)) / 2),
    ):
        error = float(squares.std()) * (1 / few + 1 / many) ** 0.5
        assert abs(value - float(squares.mean())) < 5 * error + 1e-9 * (1 + value)
    # signal-to-noise ratio, by a jackknife of the brute force over groups
    spread = draws.flatten(1)
    if float(spread.var(0).sum()) < 1e-20:
        assert found.snr > 1e6
        return
    without = torch.stack([snr_of(spread[torch.arange(few) % 20 != group]) for group in range(20)])
    error = float((19 * without.var(correction=0)).sqrt())
    assert abs(found.snr - float(snr_of(spread))) < 5 * error * (1 + few / many) ** 0.5 + 1e-9
    cosines = (spread @ exact.flatten()) / (spread.norm(dim=1) * exact.norm()).clamp_min(1e-300)
    error = float(cosines.std()) * (1 / few + 1 / many) ** 0.5
    assert abs(found.cosine - float(cosines.mean())) < 5 * error + 1e-9


def snr_of(draws):
    """Root of the unbiased squared norm of the mean over the total variance, of draws ``[R, N]``."""
    noise = draws.var(0).sum()
    return ((draws.mean(0).square().sum() - noise / len(draws)).clamp_min(0) / noise).sqrt()


def test_an_exact_layer_is_as_far_off_as_the_reference_that_it_is_given():
    layer, params, cost_fn, exact = discrete_problem("enumeration")
    shift = torch.linspace(-1, 2, exact.numel(), dtype=torch.float64).view_as(exact)
    found = gradient_statistics(layer, params, cost_fn, num_draws=8, reference=exact + shift)
    torch.testing.assert_close(found.bias, -shift)
    norm, size = float(shift.norm()), float((exact + shift).norm())
    assert found.bias_norm[0] == pytest.approx(norm / 2**0.5)  # of one of two examples
    assert found.relative_bias[0] == pytest.approx(norm / size)
    assert found.mse == pytest.approx(norm**2 / 2)
    assert found.cosine == pytest.approx(float((exact * (exact + shift)).sum() / exact.norm()) / size)
    nothing = gradient_statistics(layer, params, cost_fn, num_draws=8, reference=torch.zeros_like(exact))
    assert nothing.relative_bias == (float("inf"), float("inf")) and nothing.cosine == 0.0


@pytest.mark.parametrize("name", ["disarm", "straight_through", "carms"])
def test_bias_has_the_stated_error(name):
    """Over many repetitions the error of the norm covers, and an unbiased layer is not called biased."""
    layer, params, cost_fn, exact = discrete_problem(name)
    truth = gradient_statistics(layer, params, cost_fn, num_draws=40_000).bias_norm[0]
    squares, covered = [], 0
    for seed in range(60):
        torch.manual_seed(seed)  # every measurement gives the random state back
        found = gradient_statistics(layer, params, cost_fn, num_draws=64, reference=exact, chunk_size=64)
        norm, error = found.bias_norm
        squares.append(found._squared_bias()[0])
        covered += abs(norm - truth) < 3 * error
    assert covered >= 54
    values = torch.tensor(squares)
    assert abs(float(values.mean()) - truth**2) < 5 * float(values.std()) / 60**0.5 + 1e-3


def test_norm_of_the_bias_is_debiased_and_its_error_that_of_a_jackknife():
    groups, gradient = torch.randn(7, 2, 3, dtype=torch.float64) + 1, torch.randn(2, 3, dtype=torch.float64)
    moments = Moments(groups.mean(0), groups.var(0), groups, 7, None, 1, 0.0, 1e-3)
    found = GradientStatistics(moments.mean, moments.variance, 7, Reference.given(gradient), moments)

    def square(rows):  # over all pairs of different groups, of one of two examples
        pairs = itertools.permutations((rows - gradient).flatten(1), 2)
        return torch.stack([a @ b for a, b in pairs]).mean() / 2

    without = torch.stack([square(torch.cat([groups[:g], groups[g + 1 :]])) for g in range(7)])
    error = (6 / 7 * (without - without.mean()).square().sum()).sqrt()
    norm = square(groups).sqrt()
    rounding = 16 * 1e-3 * gradient.norm() / 2**0.5
    assert found.bias_norm == pytest.approx((float(norm), float((norm**2 + error).sqrt() - norm + rounding)))


@pytest.mark.parametrize("name", ["disarm", "straight_through"])
def test_the_error_of_a_long_average_is_no_bias(name):
    """Squared bias, mean squared error and size of the reference, over many short averages: as with the exact one."""
    layer, params, cost_fn, exact = discrete_problem(name)
    truth, rows = gradient_statistics(layer, params, cost_fn, num_draws=40_000), []
    for seed in range(100):
        torch.manual_seed(seed)
        found = gradient_statistics(layer, params, cost_fn, num_draws=64, reference="average", reference_draws=8)
        size = (found.bias_norm[1] / found.relative_bias[1]) ** 2
        rows.append([found._squared_bias()[0], found.mse, size])
    values = torch.tensor(rows)
    noise = float(found.reference.variance.sum()) / 2  # what would be taken for a bias
    for value, true in zip(
        values.T, (truth.bias_norm[0] ** 2, truth.mse, float(exact.square().sum()) / 2), strict=True
    ):
        error = float(value.std()) / 10
        assert abs(float(value.mean()) - true) < 4 * error < 0.8 * noise


def test_an_example_is_a_row_of_the_first_batch_dimension():
    for shape, total in (((4,), 4.0), ((2, 4), 4.0), ((2, 3, 4), 12.0)):
        assert GradientStatistics(torch.ones(shape), torch.ones(shape), 10).total_variance == total


def test_two_redraws_know_no_error_of_their_bias():
    layer, params, cost_fn, exact = discrete_problem("reinforce")
    found = gradient_statistics(layer, params, cost_fn, num_draws=2, reference=exact)
    assert found.bias_norm[1] == math.inf


# ---- the reference --------------------------------------------------------------------------------------------------


# ---- memory, evaluations, time --------------------------------------------------------------------------------------


def test_passes_respect_the_memory_budget():
    layer = sl.create("reinforce", latent_dim=10)
    network = nn.Sequential(nn.Linear(10, 100), nn.Tanh())
    sizes = []

    def cost_fn(z):
        sizes.append(z.shape[1])
        return network(z).sum(-1)

    params = torch.zeros(4, 10)
    gradient_statistics(layer, params, cost_fn, num_draws=200, max_bytes=100_000, reference=None)
    # tanh saves [R, 4, 100] floats, 1600 bytes a redraw, and what else there is: less than twice as much
    assert sizes[0] == 8 and 100_000 / 3200 < max(sizes) <= 100_000 / 1600 and sum(sizes) == 200


def test_evaluations_and_time_are_counted():
    layer, params, cost_fn, _ = discrete_problem("enumeration")
    found = gradient_statistics(layer, params, cost_fn, num_draws=4)
    assert found.evaluations == 8 and found.seconds > 0 and found.variance_time == found.total_variance * found.seconds


def test_the_first_pass_warms_up_and_is_not_timed(monkeypatch):
    clock = iter([0, 100, 100, 108, 108, 112])  # passes of 4, 4 and 2 redraws
    monkeypatch.setattr(redraws, "_now", lambda params: next(clock))
    layer, params, cost_fn, _ = discrete_problem("reinforce")
    found = gradient_statistics(layer, params, cost_fn, num_draws=10, chunk_size=4, reference=None)
    assert found.seconds == 12 / 6


def test_saved_bytes_are_those_of_each_tensor_once_and_not_of_parameters():
    network, x = nn.Linear(100, 2), torch.randn(8, 100, requires_grad=True) + 0  # 3200 bytes, of no leaf
    with redraws.SavedBytes() as saved:
        _ = network(x), x * x
    assert saved.total == 3200


def planted_draws(monkeypatch, layer, seed=0):
    """Make the layer take its draws from a fixed table, in order, however the redraws are cut into chunks."""
    rows = torch.rand(1000, 2, layer.latent_dim, generator=torch.Generator().manual_seed(seed)).round().double()
    taken = 0

    def sample(q, num_samples):
        nonlocal taken
        count = q.batch_shape[0] if len(q.batch_shape) > 1 else 1
        chunk = rows[taken : taken + count]
        taken += count
        return chunk.unsqueeze(0) if len(q.batch_shape) > 1 else chunk

    monkeypatch.setattr(layer.family, "sample", sample)
    return rows


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 100, 1000])
def test_chunks_do_not_change_the_result(monkeypatch, chunk_size):
    layer = sl.create("reinforce", latent_dim=3, baseline="none")
    params = torch.tensor([[0.3, -0.4, 1.0], [0.0, 0.8, -2.0]], dtype=torch.float64)
    cost_fn = PolynomialCost("asymmetric", 3)
    rows = planted_draws(monkeypatch, layer)[:100]
    statistics = gradient_statistics(layer, params, cost_fn, num_draws=100, chunk_size=chunk_size)
    gradients = cost_fn(rows).detach().unsqueeze(-1) * (rows - params.sigmoid())
    torch.testing.assert_close(statistics.mean, gradients.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.variance, gradients.var(0), rtol=1e-12, atol=1e-12)
    groups = torch.stack([gradients[group::16].mean(0) for group in range(16)])
    torch.testing.assert_close(statistics.moments.groups, groups, rtol=1e-12, atol=1e-12)
    errors = (gradients - statistics.reference.gradient).square().sum((1, 2)) / 2  # of one of two examples
    assert statistics.mse == pytest.approx(float(errors.mean()), rel=1e-12)
    assert statistics.evaluations == 1


def test_enumeration_has_no_variance_and_the_exact_mean():
    layer, params, cost_fn = problem("enumeration")
    statistics = gradient_statistics(layer, params, cost_fn, num_draws=10, chunk_size=4)
    leaf = params.clone().requires_grad_()
    (exact,) = torch.autograd.grad(exact_value(layer, leaf, cost_fn).sum(), leaf)
    torch.testing.assert_close(statistics.mean, exact, rtol=1e-12, atol=1e-12)
    assert statistics.total_variance < 1e-28 and statistics.snr > 1e12


def test_a_coupled_draw_is_told_from_a_noisy_one():
    _, params, cost_fn = problem("reinforce")
    one, four = (
        gradient_statistics(
            sl.create("reinforce", latent_dim=2, num_samples=n, baseline="none").double(),
            params,
            cost_fn,
            num_draws=20_000,
        )
        for n in (1, 4)
    )
    assert one.total_variance / four.total_variance == pytest.approx(4, rel=0.1)  # the variance of a mean of four
    assert four.snr / one.snr == pytest.approx(2, rel=0.1)


def test_learned_baselines_receive_the_context():
    layer = sl.create("reinforce", latent_dim=3, baseline={"name": "learned", "context_features": 5}).double()
    params, context = torch.zeros(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    statistics = gradient_statistics(layer, params, lambda z: z.sum(-1), num_draws=8, context=context)
    assert statistics.mean.shape == (4, 3)


# ---- the summaries --------------------------------------------------------------------------------------------------


def test_summaries_are_per_example_and_free_of_the_bias_of_a_squared_mean():
    generator = torch.Generator().manual_seed(0)
    center, scale = torch.tensor([[1.0, 2.0], [0.0, 3.0]]).double(), torch.tensor([[1.0, 0.5], [2.0, 1.0]]).double()
    norms, totals = [], []
    for _ in range(2000):
        draws = center + scale * torch.randn(8, 2, 2, generator=generator, dtype=torch.float64)
        statistics = GradientStatistics(draws.mean(0), draws.var(0), 8)
        norms.append(statistics.squared_norm)
        totals.append(statistics.total_variance)
        assert statistics.snr == pytest.approx((norms[-1] / totals[-1]) ** 0.5)
    for values, expected in ((norms, 14 / 2), (totals, 6.25 / 2)):
        values = torch.tensor(values)
        assert abs(float(values.mean()) - expected) < 5 * float(values.std()) / 2000**0.5
        assert float(values.std()) / 2000**0.5 < 0.02 * expected  # sees the bias of 6.25 / 8 / 2 of a plain square


def test_snr_of_an_exact_gradient_is_infinite_and_of_none_is_zero():
    zero = torch.zeros(2, 3)
    assert GradientStatistics(torch.ones(2, 3), zero, 8).snr == float("inf")
    assert GradientStatistics(zero, zero, 8).snr == 0
    assert GradientStatistics(0.01 * torch.ones(2, 3), torch.ones(2, 3), 8).squared_norm == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 1}, "num_draws >= 2"),
        ({"num_draws": 2.5}, "num_draws >= 2"),
        ({"chunk_size": 0}, "chunk_size >= 1"),
        ({"max_bytes": 0}, "max_bytes >= 1"),
    ],
    ids=str,
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_statistics(sl.create("reinforce", latent_dim=3), torch.zeros(2, 3), lambda z: z.sum(-1), **options)


@pytest.mark.parametrize("name", ["disarm", "vq"])
def test_printed_statistics_are_numbers_in_one_line(name):
    layer = sl.create(name, latent_dim=3)
    params = torch.randn(4, layer.in_features)
    full = gradient_statistics(layer, params, lambda z: z.sum(-1) ** 2, num_draws=8)
    for statistics in (full, GradientStatistics(full.mean, full.variance, 8)):
        text = repr(statistics)
        assert "\n" not in text and "tensor" not in text and len(text) < 300
        assert f"num_draws=8, total_variance={statistics.total_variance:.4g}" in text
    assert ("bias_norm" in repr(full)) == (name == "disarm")  # a point mass has no reference


def test_a_layer_in_evaluation_mode_is_refused():
    layer = sl.create("reinforce", latent_dim=3).eval()
    with pytest.raises(ValueError, match=r"layer\.train\(\)"):
        gradient_statistics(layer, torch.zeros(2, 3), lambda z: z.sum(-1))


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match=r"needed at least one example, got params \[0, 3\]"):
        gradient_statistics(sl.create("reinforce", latent_dim=3), torch.zeros(0, 3), lambda z: z.sum(-1))


@pytest.mark.parametrize("weight", [torch.ones(()), torch.ones((), requires_grad=True)])
def test_a_pathwise_layer_on_a_black_box_is_measured_to_have_no_gradient(weight):
    """Whether the cost has parameters of its own or not: the estimate is zero, and all of the gradient is bias."""
    layer, params = sl.create("gaussian", latent_dim=2), torch.zeros(3, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the cost does not depend on z through autograd")
        statistics = gradient_statistics(layer, params, lambda z: weight * (z > 0).float().sum(-1), num_draws=16)
    assert statistics.total_variance == 0 and not bool(statistics.mean.any())
    norm, error = statistics.relative_bias
    assert abs(norm - 1) < 5 * error < 0.5
