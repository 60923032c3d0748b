"""Bayesian layers: moments and gradients against closed forms, and the order of their variances."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from stochastic_layers import bayesian
from stochastic_layers.bayesian import (
    FlipoutConv2d,
    FlipoutLinear,
    LocalReparameterizationConv2d,
    LocalReparameterizationLinear,
    LogUniformWeight,
    ReparameterizationConv2d,
    ReparameterizationLinear,
    VariationalDropoutLinear,
    kl_divergence,
)

LINEAR = [ReparameterizationLinear, LocalReparameterizationLinear, FlipoutLinear]
CONV = [ReparameterizationConv2d, LocalReparameterizationConv2d, FlipoutConv2d]
EVERY = [*LINEAR, VariationalDropoutLinear]


def spread(layer):
    """The layer in double, with scales that differ from weight to weight."""
    layer = layer.double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 - (0.3 if name.endswith("log_scale") else 0.0))
    return layer


def draws(layer, x, num):
    """Outputs of independent calls ``[num, *output]``."""
    return vmap(lambda _: layer(x), randomness="different")(torch.arange(num)).detach()


def gradients(layer, x, loss, num):
    """Gradients of independent calls, by name of the parameter: ``[num, *parameter]``."""
    parameters = {k: v.detach() for k, v in layer.named_parameters()}

    def once(_):
        return grad(lambda p: loss(functional_call(layer, p, (x,))))(parameters)

    return {k: v.detach() for k, v in vmap(once, randomness="different")(torch.arange(num)).items()}


def assert_mean(samples, expected, scale):
    """The mean over the first dimension is within 5 standard errors, which see 5 % of ``scale``."""
    error = samples.std(0) / len(samples) ** 0.5
    assert (8 * error < 0.05 * scale).all(), "too few draws for the power that is claimed"
    z = ((samples.mean(0) - expected) / (error + 1e-12)).detach().abs().max()
    assert z < 5, f"{float(z):.1f} standard errors off"


# Moments


def moments_are_right(layer, x, *, shared, num=100_000):
    y = draws(layer, x, num)
    mean = F.linear(x, *layer.means())
    weight_variance, bias_variance = layer.variances()
    bias_variance = torch.zeros(len(weight_variance)).double() if bias_variance is None else bias_variance
    variance = F.linear(x.square(), weight_variance, bias_variance)  # [B, out]
    centered = y - mean
    assert_mean(centered, torch.zeros_like(mean), variance.sqrt())
    assert_mean(centered.square(), variance, variance)
    assert_mean(centered.pow(4)[:, :, :1], 3 * variance.square()[:, :1], 3 * 2 * variance.square()[:, :1])  # Gaussian
    across = F.linear(x[:1] * x[1:], weight_variance, bias_variance)[0] if shared else torch.zeros_like(variance[0])
    assert_mean(centered[:, 0] * centered[:, 1], across, variance.prod(0).sqrt())  # two examples
    within = torch.zeros(len(x)).double()
    assert_mean(centered[..., 0] * centered[..., 1], within, variance[:, :2].prod(-1).sqrt())  # two outputs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", EVERY)
def test_outputs_have_the_mean_variance_and_covariances_of_the_closed_form(cls, bias):
    layer = spread(cls(3, 2, bias=bias))
    x = torch.tensor([[0.9, -1.1, 0.6], [1.2, 0.4, -0.5]], dtype=torch.float64)
    moments_are_right(layer, x, shared=cls is ReparameterizationLinear)


class BiasNotFlipped(FlipoutLinear):
    """The known mistake: the bias' perturbation is the same for all examples."""

    def draw(self, x):
        bias, self.bias = self.bias, None
        y = super().draw(x)
        self.bias = bias
        return y + bias.loc + bias.noise()


def test_a_bias_without_signs_of_its_own_is_caught():
    layer = spread(BiasNotFlipped(3, 2))
    x = torch.tensor([[0.9, -1.1, 0.6], [1.2, 0.4, -0.5]], dtype=torch.float64)
    with pytest.raises(AssertionError, match="standard errors off"):
        moments_are_right(layer, x, shared=False)


# Gradients


@pytest.mark.parametrize("cls", LINEAR)
def test_the_gradient_is_unbiased_against_quadrature(cls):
    layer = spread(cls(1, 1, bias=False))
    with torch.no_grad():
        layer.weight.loc.fill_(0.6)
        layer.weight.log_scale.fill_(-0.4)
    x = torch.tensor([[0.8], [-1.3]], dtype=torch.float64)

    def cost(y):
        return (torch.tanh(y) + 0.4 * y.square()).sum()

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    w = layer.weight.loc + layer.weight.scale * nodes  # [1, 60]
    exact = (weights / math.sqrt(2 * math.pi) * torch.stack([cost(x * v) for v in w[0]])).sum()
    for name, expected in zip(
        ("weight.loc", "weight.log_scale"),
        torch.autograd.grad(exact, [layer.weight.loc, layer.weight.log_scale]),
        strict=True,
    ):
        got = gradients(layer, x, cost, 200_000)[name]
        assert_mean(got, expected, expected.abs())


def test_the_variance_of_a_minibatch_gradient_is_least_locally_then_with_flipout_then_with_shared_weights():
    x = torch.randn(64, 5, dtype=torch.float64)
    target = torch.randn(64, 3, dtype=torch.float64)
    reference = spread(ReparameterizationLinear(5, 3)).state_dict()
    totals = []
    for cls in (LocalReparameterizationLinear, FlipoutLinear, ReparameterizationLinear):
        layer = cls(5, 3).double()
        layer.load_state_dict(reference)
        samples = gradients(layer, x, lambda y: (torch.tanh(y) - target).square().mean(), 4000)
        flat = torch.cat([s.flatten(1) for s in samples.values()], 1)
        squares = (flat - flat.mean(0)).square().sum(1)
        totals.append((float(squares.mean()), float(squares.std() / len(squares) ** 0.5)))
    for (low, low_error), (high, high_error) in itertools.pairwise(totals):
        assert (high - low) / math.hypot(low_error, high_error) > 5, totals


# Convolutions


OPTIONS = [{}, {"stride": 2, "padding": 1}, {"padding": (1, 2), "dilation": (1, 2), "bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cls", CONV[:2])
def test_a_convolution_is_the_linear_layer_on_unfolded_patches(cls, options, monkeypatch):
    conv = spread(cls(2, 4, 3, **options))
    linear = LINEAR[CONV.index(cls)](18, 4, bias=conv.bias is not None).double()
    linear.load_state_dict({k: v.view(4, -1) if "weight" in k else v for k, v in conv.state_dict().items()})
    x = torch.randn(5, 2, 7, 8, dtype=torch.float64)
    unfold = {k: v for k, v in options.items() if k != "bias"}
    patches = F.unfold(x, 3, **unfold).movedim(1, 2)  # [B, positions, 18]
    monkeypatch.setattr(torch, "randn_like", lambda t: torch.full_like(t, 0.7))  # one deviation everywhere
    y = conv(x)
    torch.testing.assert_close(y.flatten(2), linear(patches).movedim(1, 2))
    assert y.shape == nn.Conv2d(2, 4, 3, **options).double()(x).shape
    assert float((y - conv.affine(x, *conv.means())).detach().abs().max()) > 0.1


@pytest.mark.parametrize("options", [*OPTIONS, {"groups": 2}], ids=str)
def test_flipout_convolves_each_example_with_one_flipped_draw_of_the_weights(options, monkeypatch):
    conv = spread(FlipoutConv2d(2, 4, 3, **options))
    signs = []
    make = conv._signs
    monkeypatch.setattr(conv, "_signs", lambda like: signs.append(make(like)) or signs[-1])
    noise = {name: getattr(conv, name).noise().detach() for name in ("weight", "bias") if getattr(conv, name)}
    for name, value in noise.items():
        monkeypatch.setattr(getattr(conv, name), "noise", lambda value=value: value)
    x = torch.randn(6, 2, 7, 8, dtype=torch.float64)
    y = conv(x)
    r, t = (s.flatten(1) for s in signs[:2])
    group = torch.arange(4) // 2 if "groups" in options else torch.zeros(4).long()
    for n in range(6):
        flips = r[n].view(2, -1)[group] if "groups" in options else r[n].expand(4, 2)
        weight = conv.weight.loc + noise["weight"] * t[n].view(4, 1, 1, 1) * flips.view(4, -1, 1, 1)
        bias = conv.bias and conv.bias.loc + noise["bias"] * signs[2][n].flatten()
        torch.testing.assert_close(y[n], conv.affine(x[n : n + 1], weight, bias)[0])
    for s in signs:
        assert s.shape[2:] == (1, 1) and len(s.flatten(1).unique(dim=0)) > 1 and set(s.unique().tolist()) == {-1, 1}


# KL


@pytest.mark.parametrize("cls", [FlipoutLinear, ReparameterizationConv2d])
def test_kl_is_that_of_torch(cls):
    layer = spread(cls(3, 2, prior_scale=0.7) if cls is FlipoutLinear else cls(3, 2, 3, prior_scale=0.7))
    expected = sum(
        torch_kl(Normal(w.loc, w.scale), Normal(torch.zeros_like(w.loc), 0.7)).sum() for w in (layer.weight, layer.bias)
    )
    torch.testing.assert_close(layer.kl_divergence(), expected)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(spread(FlipoutLinear(2, 2, bias=False))))
    torch.testing.assert_close(kl_divergence(model), expected + model[3][0].kl_divergence())  # a shared layer once
    with torch.no_grad():
        layer.weight.log_scale.fill_(-1e4)  # the scale underflows, its logarithm does not
    assert layer.kl_divergence().isfinite()
    with pytest.raises(ValueError, match="Bayesian layers"):
        kl_divergence(nn.Linear(2, 2))


def test_the_fit_of_the_log_uniform_kl_is_within_a_hundredth_of_quadrature():
    log_alpha = torch.linspace(-8, 8, 33, dtype=torch.float64)
    weight = LogUniformWeight(torch.ones(1).double(), 1.0, 1.0)
    # KL = E log|w| - log scale + const with w ~ N(1, alpha); E log|w| by a fine grid that straddles zero
    e = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    density = torch.exp(-0.5 * e.square()) / math.sqrt(2 * math.pi) * (e[1] - e[0])
    limit = -0.5 * (0.5772156649015329 + math.log(2))  # E log|n| of a standard normal: the value for large alpha
    errors = []
    for value in log_alpha:
        exact = (density * (1 + (0.5 * value).exp() * e).abs().clamp_min(1e-9).log()).sum() - 0.5 * value - limit
        with torch.no_grad():
            weight.log_scale.fill_(0.5 * value)
        errors.append(float((weight.kl_divergence() - exact).detach().abs()))
    assert max(errors) < 0.01, max(errors)


def test_zero_means_and_extreme_scales_keep_the_log_uniform_kl_finite():
    weight = LogUniformWeight(torch.tensor([0.0, 1e-30, 1.0, 1.0]), 1.0, 1.0)
    with torch.no_grad():
        weight.log_scale[2:] = torch.tensor([-1e4, 1e4])
    kl = weight.kl_divergence()
    kl.backward()
    assert kl.isfinite() and weight.loc.grad.isfinite().all() and weight.log_scale.grad.isfinite().all()


def test_the_elbo_with_the_kl_over_the_dataset_size_ends_at_the_exact_posterior():
    x = torch.randn(40, 1, dtype=torch.float64)
    y = 0.8 * x + 0.5 * torch.randn(40, 1, dtype=torch.float64)
    precision = 1 / 0.3**2 + float(x.square().sum()) / 0.5**2  # conjugate: Gaussian prior and likelihood
    loc, scale = float((x * y).sum()) / 0.5**2 / precision, precision**-0.5
    layer = LocalReparameterizationLinear(1, 1, bias=False, prior_scale=0.3, initial_scale=0.2).double()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    many = x.repeat(100, 1), y.repeat(100, 1)  # 100 draws for each example: little noise in the gradient
    for _ in range(400):
        optimizer.zero_grad()
        loss = -Normal(layer(many[0]), 0.5).log_prob(many[1]).mean() + kl_divergence(layer) / 40
        loss.backward()
        optimizer.step()
        schedule.step()
    assert float(layer.weight.loc.detach()) == pytest.approx(loc, rel=0.02)
    assert float(layer.weight.scale.detach()) == pytest.approx(scale, rel=0.02)


# Modes, options, plumbing


@pytest.mark.parametrize("cls", [*EVERY, *CONV])
def test_evaluation_draws_weights_unless_told_otherwise(cls):
    layer = spread(cls(3, 2, 1) if cls in CONV else cls(3, 2))
    x = torch.randn(4, 3, 5, 5) if cls in CONV else torch.randn(4, 3)
    x = x.double()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert not torch.equal(layer(x), layer(x))
    layer.sample_in_eval = False
    assert torch.equal(layer(x), layer(x)) and torch.equal(layer(x), layer.affine(x, *layer.means()))
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize("cls", [*EVERY, *CONV])
def test_layers_compile_into_one_graph_and_survive_copies(cls):
    layer = cls(3, 2, 3, padding=1) if cls in CONV else cls(3, 2)
    x = torch.randn(4, 3, 5, 5) if cls in CONV else torch.randn(4, 6, 3)
    compiled = torch.compile(
        lambda x: layer(x).square().mean() + layer.kl_divergence(), fullgraph=True, backend="aot_eager"
    )
    compiled(x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    layer.eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("cls", EVERY)
def test_silent_inputs_and_half_precision_stay_finite(cls):
    layer = cls(3, 2, bias=False)
    x = torch.zeros(4, 3, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.full((4, 3), 300.0))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert layer(torch.zeros(0, 3)).shape == (0, 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FlipoutLinear(2, 2, prior_scale=0.0),
        lambda: FlipoutLinear(2, 2, initial_scale=math.inf),
        lambda: FlipoutConv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        lambda: VariationalDropoutLinear(2, 2, threshold=math.nan),
    ],
)
def test_bad_options_are_refused_at_construction(build):
    with pytest.raises(ValueError, match="needed"):
        build()


def test_variational_dropout_drops_inputs_that_do_not_matter_and_keeps_the_others():
    # columns of variance 1 that are orthogonal: six inputs have no correlation with y, not even by chance
    x, noise = (20 * torch.linalg.qr(torch.randn(400, 9)).Q).split([8, 1], 1)
    y = x[:, :2] @ torch.tensor([[1.0], [-1.5]]) + 0.1 * noise
    layer = VariationalDropoutLinear(8, 1, initial_scale=0.05)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=1200)  # weights come to rest at 0
    for step in range(1200):
        optimizer.zero_grad()
        nll = -Normal(layer(x), 0.1).log_prob(y).mean()
        (nll + min(step / 300, 1.0) * kl_divergence(layer) / 400).backward()
        optimizer.step()
        schedule.step()
    dropped = (layer.weight.log_alpha > layer.threshold)[0]
    assert not dropped[:2].any() and bool(dropped[2:].all()) and layer.sparsity == dropped.double().mean()
    layer.eval()
    layer.sample_in_eval = False
    assert float((layer(x) - y).detach().square().mean()) < 0.02
    torch.testing.assert_close(layer(x + 100 * dropped), layer(x))  # dropped inputs have no say, nor noise


def test_the_module_has_the_names_it_promises():
    assert all(hasattr(bayesian, name) for name in bayesian.__all__)
