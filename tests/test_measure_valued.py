"""The measure-valued layer: exact in the mean for smooth costs and for steps, from values of the cost alone."""

import math

import pytest
import torch
from small_problems import asymmetric_params

import stochastic_layers as sl
from stochastic_layers.diagnostics import gradient_statistics
from stochastic_layers.testing import COSTS, PolynomialCost, check_mean


def build(cls=sl.MeasureValued, seed=1, **options):
    layer = cls(**{"latent_dim": 2, **options}).double()
    params = asymmetric_params(layer, seed=seed)
    if layer.family.name == "log_normal":
        params[:, layer.latent_dim :] -= 1.5
    return layer, params


@pytest.mark.parametrize("kind", [k for k in COSTS if k != "constant"])
@pytest.mark.parametrize("options", [{}, {"family": "log_normal"}, {"num_samples": 2}], ids=str)
def test_gradient_of_the_encoder_is_exact_in_the_mean(options, kind):
    if options.get("family") == "log_normal" and kind == "asymmetric":
        kind = "cubic"  # fourth powers of it have moments that no sample of this size shows
    layer, params = build(**options)
    check_mean(layer, params, PolynomialCost(kind, 2))


@pytest.mark.parametrize("of", ["decoder", "value"])
@pytest.mark.parametrize("family", sl.MeasureValued.families)
def test_auxiliary_points_touch_neither_the_decoder_nor_the_value(family, of):
    layer, params = build(family=family)
    check_mean(layer, params, PolynomialCost("quadratic", 2), of=of)


def test_constant_cost_gives_exactly_no_gradient():
    layer, params = build(latent_dim=3)
    params.requires_grad_()
    sample = layer.sample(params)
    sample.surrogate(3 + 0 * sample.z.sum(-1)).sum().backward()
    assert bool((params.grad == 0).all())


@pytest.mark.parametrize("family", sl.MeasureValued.families)
def test_a_cost_that_overflows_at_an_auxiliary_point_is_seen_in_the_loss_as_in_the_gradient(family):
    layer = sl.create("measure_valued", latent_dim=2, family=family)
    params = torch.zeros(500, 4, dtype=torch.float16, requires_grad=True)
    sample = layer.sample(params)
    cost = (sample.z.square() * (9000 if family == "gaussian" else 900)).sum(-1)
    drawn, auxiliary = cost[:1].isfinite().all(0), cost[1:].isfinite().all(0)
    assert bool((drawn & ~auxiliary).any()) and bool(auxiliary.any())
    loss = sample.surrogate(cost)
    loss.sum().backward()
    assert torch.equal(loss.isfinite(), drawn & auxiliary)
    assert torch.equal(params.grad.isfinite().all(-1), auxiliary)


class WrongConstant(sl.MeasureValued):
    def _offsets(self, like):
        return super()._offsets(like) * torch.tensor([1.1, 1.1, 1, 1], dtype=like.dtype).view(4, 1, 1, 1, 1)


class NormalInsteadOfMaxwell(sl.MeasureValued):
    def _offsets(self, like):
        w, minus_w, _, near = super()._offsets(like)
        return torch.stack([w, minus_w, 1.2 * torch.randn_like(like), near])


class SwappedHalves(sl.MeasureValued):
    def _offsets(self, like):
        return super()._offsets(like)[[0, 1, 3, 2]]


@pytest.mark.parametrize("cls", [WrongConstant, NormalInsteadOfMaxwell, SwappedHalves])
def test_a_wrong_law_of_the_auxiliary_points_is_seen(cls):
    layer, params = build(cls)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(layer, params, PolynomialCost("quadratic", 2))


def step(z):
    """A black box with a jump: no gradient with respect to z anywhere."""
    return (z @ torch.tensor([1.0, -2.0], dtype=z.dtype) > 0.4).to(z.dtype)


def exact_step_gradient(params):
    """E[step] = Phi((w mu - c) / sqrt(sum w^2 sigma^2)), differentiated."""
    leaf = params.clone().requires_grad_()
    loc, log_variance = leaf.chunk(2, -1)
    w = torch.tensor([1.0, -2.0], dtype=leaf.dtype)
    spread = (w.square() * log_variance.exp()).sum(-1).sqrt()
    value = torch.special.ndtr((loc @ w - 0.4) / spread)
    return torch.autograd.grad(value.sum(), leaf)[0]


def test_gradient_of_a_step_is_exact_in_the_mean():
    layer, params = build()
    exact = exact_step_gradient(params)
    statistics = gradient_statistics(layer, params, step, num_draws=200_000, chunk_size=50_000)
    error = (statistics.variance / statistics.num_draws).sqrt()
    assert float(error.norm(dim=-1).max()) < 0.05 * float(exact.norm(dim=-1).min()) / 5  # a bias of 5 % would be seen
    assert float(((statistics.mean - exact) / error).abs().max()) < 5


@pytest.mark.filterwarnings("ignore:the cost does not depend on z:UserWarning")
def test_the_pathwise_gradient_of_the_same_step_is_zero():
    _, params = build()
    sample = sl.create("gaussian", latent_dim=2).sample(params.requires_grad_())
    assert not sample.surrogate(step(sample.z)).requires_grad


def test_coupling_the_halves_lowers_the_variance():
    class Uncoupled(sl.MeasureValued):
        def _offsets(self, like):
            first, second = super()._offsets(like), super()._offsets(like)
            return torch.stack([first[0], second[1], first[2], second[3]])

    totals = []
    for cls in (sl.MeasureValued, Uncoupled):
        layer, params = build(cls)
        check_mean(layer, params, PolynomialCost("quadratic", 2))  # both are right
        totals.append(gradient_statistics(layer, params, step, num_draws=20_000, chunk_size=20_000).total_variance)
    assert totals[0] < totals[1] / 1.6  # about one half


def test_on_a_step_it_is_worth_as_much_as_leave_one_out_with_as_many_evaluations():
    layer, params = build()
    reinforce = sl.create(
        "reinforce", latent_dim=2, family="gaussian", num_samples=9, baseline="leave_one_out"
    ).double()
    ours, theirs = (
        gradient_statistics(one, params, step, num_draws=20_000, chunk_size=20_000).total_variance
        for one in (layer, reinforce)
    )
    assert 0.8 < ours / theirs < 1.4  # nine evaluations each; the variances are 0.133 and 0.124


@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)], ids=str)
def test_shapes_and_weights(batch):
    layer = sl.create("measure_valued", latent_dim=3, num_samples=2)
    params = torch.randn(*batch, 6, requires_grad=True)
    sample = layer.sample(params)
    assert sample.z.shape == (2 * 13, *batch, 3) and not sample.z.requires_grad
    assert sample.weights.tolist() == [0.5, 0.5] + [0.0] * 24 and not sample.equally_weighted
    cost = sample.z.square().sum(-1)
    torch.testing.assert_close(sample.surrogate(cost), cost[:2].mean(0))
    sample.surrogate(cost).sum().backward()
    assert params.grad.shape == params.shape and bool(torch.isfinite(params.grad).all())
    assert layer.eval().sample(params).z.shape == (2, *batch, 3)


def test_every_auxiliary_point_moves_one_coordinate_of_its_draw():
    layer, params = build(latent_dim=3, num_samples=2)
    z = layer.sample(params).z
    moved = (z[2:].view(4, 3, 2, 2, 3) != z[:2]).sum((0, 2, 3))  # [coordinate moved, coordinate]
    assert torch.equal(moved, 16 * torch.eye(3, dtype=torch.long))


def test_summed_batch_dimensions_are_refused_in_words():
    layer = sl.create("measure_valued", latent_dim=3)
    sample = layer.sample(torch.randn(4, 5, 6, requires_grad=True))
    with pytest.raises(ValueError, match="batch dimensions cannot be summed"):
        sample.surrogate(sample.z.sum((-1, -2)))


def test_extreme_params_are_finite():
    layer = sl.create("measure_valued", latent_dim=2)
    for loc, log_variance in ((1e4, -79.0), (-1e4, 79.0), (0.0, 0.0)):
        params = torch.tensor([[loc, loc, log_variance, log_variance]], requires_grad=True)
        sample = layer.sample(params)
        sample.surrogate(torch.tanh(sample.z).sum(-1)).sum().backward()
        assert bool(torch.isfinite(sample.z).all() and torch.isfinite(params.grad).all())


def test_layer_compiles_to_one_graph():
    torch._dynamo.reset()
    layer, params = build()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(params):
        sample = layer.sample(params)
        return sample.surrogate(sample.z.square().sum(-1)).sum()

    params.requires_grad_()
    loss(params).backward()
    assert bool((params.grad != 0).all() and torch.isfinite(params.grad).all())


def test_maxwell_times_uniform_is_normal():
    """The moments of M and U M that the formula needs: E[M^2] = 3, E[M^4] = 15, E[(U M)^2] = 1, E[(U M)^4] = 3."""
    layer = sl.create("measure_valued", latent_dim=1)
    w, minus_w, far, near = layer._offsets(torch.empty(400_000, dtype=torch.float64))
    assert torch.equal(w, -minus_w)
    assert bool((far * near >= 0).all() and (near.abs() <= far.abs()).all())
    for values, moments in ((w, (2.0, 8.0)), (far, (3.0, 15.0)), (near, (1.0, 3.0))):
        for power, moment in zip((2, 4), moments, strict=True):
            sample = values**power
            error = float(sample.std()) / math.sqrt(len(sample))
            assert error < 0.01 * moment and abs(float(sample.mean()) - moment) < 5 * error
