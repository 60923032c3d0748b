"""Moments of a layer's gradient over many draws against the exact one, and a test of its mean with stated power."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stochastic_layers.layer import StochasticLayer
from stochastic_layers.testing.exact import exact_value

__all__ = ["QUANTITIES", "Expectation", "Moments", "Reference", "check_mean", "measure", "measure_all", "references"]

QUANTITIES = ("encoder", "decoder", "value")
Expectation = Callable[[StochasticLayer, Tensor, nn.Module], Tensor]


@dataclass(frozen=True)
class Reference:
    """What a quantity is in truth.

    Attributes:
        value: The exact gradient, or value.
        error: Its estimated error per coordinate, where it is a numerical integral.
    """

    value: Tensor
    error: Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """Sample moments of a gradient estimator against the exact gradient, per coordinate.

    Attributes:
        mean: Mean of the draws.
        standard_error: Standard error of that mean.
        exact: The exact gradient.
        num_draws: Number of draws.
        projection: Mean and standard error of <draw, exact> / <exact, exact>, which is 1 for an unbiased estimator.
        exact_error: Estimated error of ``exact`` itself, where it is a numerical integral; it counts as noise.
    """

    mean: Tensor
    standard_error: Tensor
    exact: Tensor
    num_draws: int
    projection: tuple[float, float]
    exact_error: Tensor | None = None

    @property
    def largest_z(self) -> float:
        """Largest deviation from the exact gradient in standard errors, over the coordinates and the projection.

        Coordinates without any spread (exact up to rounding) are compared with the rounding error of float64.
        """
        rounding = 1e-12 * (1 + self.exact.abs())
        if self.exact_error is not None:
            rounding = rounding + self.exact_error
        z = float(((self.mean - self.exact) / (self.standard_error + rounding)).abs().max())
        value, error = self.projection
        return max(z, abs(value - 1) / (error + 1e-12 + self.relative_error)) if math.isfinite(value) else z

    @property
    def relative_error(self) -> float:
        """Norm of the error of the exact gradient over its own norm; 0 where it is exact, or zero."""
        norm = float(self.exact.norm())
        return 0.0 if self.exact_error is None or norm == 0 else float(self.exact_error.norm()) / norm

    @property
    def relative_bias(self) -> float:
        """Norm of the difference of the means over the norm of the exact gradient."""
        return float((self.mean - self.exact).norm() / self.exact.norm().clamp_min(1e-300))


def measure(
    layer: StochasticLayer,
    params: Tensor,
    cost_fn: nn.Module,
    *,
    num_draws: int,
    of: str = "encoder",
    context: Tensor | None = None,
    chunk_size: int = 20_000,
) -> Moments:
    """Draw a layer's gradient many times and compare it with the exact one.

    Args:
        layer: The layer, in training mode.
        params: ``[B, in_features]`` in float64.
        cost_fn: A module of z; its parameter ``theta`` plays the decoder.
        num_draws: Number of draws.
        of: ``"encoder"`` for d/d params, ``"decoder"`` for d/d theta, ``"value"`` for the reported estimate itself.
        context: Context for a learned baseline ``[B, F]``.
        chunk_size: Draws in one batched pass.
    """
    return measure_all(layer, params, cost_fn, num_draws=num_draws, of=(of,), context=context, chunk_size=chunk_size)[
        of
    ]


def measure_all(
    layer: StochasticLayer,
    params: Tensor,
    cost_fn: nn.Module,
    *,
    num_draws: int,
    of: Sequence[str] = QUANTITIES,
    context: Tensor | None = None,
    chunk_size: int = 20_000,
    exact: Mapping[str, Reference] | None = None,
) -> dict[str, Moments]:
    """As :func:`measure`, for several of ``"encoder"``, ``"decoder"`` and ``"value"`` from the same draws.

    Args:
        layer: The layer, in training mode.
        params: ``[*batch, in_features]`` in float64.
        cost_fn: A module of z; its parameter ``theta`` plays the decoder. It may sum trailing batch dimensions.
        num_draws: Number of draws.
        of: The quantities.
        context: Context for a learned baseline ``[*batch, F]``.
        chunk_size: Draws in one batched pass.
        exact: What to compare with, as :func:`references` computes it, which is also the default.
    """
    if exact is None:
        exact = references(layer, params, cost_fn, of=of)
    running = {name: _Running(exact[name].value, exact[name].error) for name in of}
    theta = next(cost_fn.parameters())
    count = 0
    while count < num_draws:
        draws = min(chunk_size, num_draws - count)
        expanded = params.detach().expand(draws, *params.shape).clone().requires_grad_()
        sample = layer.sample(expanded, None if context is None else context.expand(draws, *context.shape))
        # one copy of theta per draw, so that one backward gives every draw's gradient
        copies = theta.detach().expand(draws, *[1] * (params.dim() - 1), -1).clone().requires_grad_()
        loss = sample.surrogate(torch.func.functional_call(cost_fn, {"theta": copies}, (sample.z,)))
        sources = {"encoder": expanded, "decoder": copies}
        wanted = [name for name in of if name != "value"]
        grads: list[Tensor | None] = [None] * len(wanted)
        if wanted and loss.requires_grad:
            grads = list(torch.autograd.grad(loss.sum(), [sources[name] for name in wanted], allow_unused=True))
        found = {
            name: torch.zeros_like(sources[name]) if g is None else g for name, g in zip(wanted, grads, strict=True)
        }
        if "decoder" in found:
            found["decoder"] = found["decoder"].flatten(1)
        found["value"] = loss.detach()
        for name in of:
            running[name].update(found[name])
        count += draws
    return {name: running[name].moments() for name in of}


def references(
    layer: StochasticLayer,
    params: Tensor,
    cost_fn: nn.Module,
    *,
    of: Sequence[str] = QUANTITIES,
    expectation: Expectation = exact_value,
    coarse: Expectation | None = None,
) -> dict[str, Reference]:
    """What the mean of a layer's gradients and value should be; for :func:`measure_all`, as often as it is called.

    Args:
        layer: The layer.
        params: ``[*batch, in_features]`` in float64.
        cost_fn: A module of z; its parameter ``theta`` plays the decoder.
        of: The quantities.
        expectation: What computes E_q[cost], differentiable in params and theta.
        coarse: The same less exactly: what it differs by is taken for the error of the exact values.
    """
    exact = _exact(layer, params, cost_fn, of, expectation)
    if coarse is None:
        return {name: Reference(exact[name]) for name in of}
    rough = _exact(layer, params, cost_fn, of, coarse)
    return {name: Reference(exact[name], (exact[name] - rough[name]).abs()) for name in of}


def _exact(
    layer: StochasticLayer, params: Tensor, cost_fn: nn.Module, of: Sequence[str], expectation: Expectation
) -> dict[str, Tensor]:
    """The quantities that an expectation has."""
    leaf = params.detach().clone().requires_grad_()
    value = expectation(layer, leaf, cost_fn)
    targets = {"encoder": leaf, "decoder": next(cost_fn.parameters())}
    found = {}
    for name in of:
        if name == "value":
            found[name] = value.detach()
        else:
            (exact,) = torch.autograd.grad(value.sum(), targets[name], retain_graph=True, allow_unused=True)
            found[name] = torch.zeros_like(targets[name]) if exact is None else exact
    return found


class _Running:
    """Sums over draws of a quantity's deviation from the exact one, of its square, and of its projection."""

    def __init__(self, exact: Tensor, exact_error: Tensor | None = None) -> None:
        self.exact, self.exact_error = exact, exact_error
        self.norm = float(exact.square().sum())
        noise = 0.0 if exact_error is None else float(exact_error.square().sum())
        if self.norm < 1e-24 + 100 * noise:  # rounding of an exact zero, along which no projection means anything
            self.norm, self.exact = 0.0, torch.zeros_like(exact)
        self.total, self.squares = torch.zeros_like(exact), torch.zeros_like(exact)
        self.along, self.along_squares, self.count = 0.0, 0.0, 0

    def update(self, draws: Tensor) -> None:
        """Add draws ``[n, *shape]``."""
        draws = draws - self.exact  # what has no spread then has none in the sums either
        self.total += draws.sum(0)
        self.squares += draws.square().sum(0)
        self.count += draws.shape[0]
        if self.norm > 0:
            along = draws.flatten(1) @ self.exact.flatten() / self.norm
            self.along += float(along.sum())
            self.along_squares += float(along.square().sum())

    def moments(self) -> Moments:
        """The moments so far."""
        count = self.count
        deviation = self.total / count
        variance = (self.squares / count - deviation.square()).clamp_min(0) * count / (count - 1)
        center = self.along / count
        spread = math.sqrt(max(self.along_squares / count - center**2, 0.0) / count)
        return Moments(
            mean=self.exact + deviation,
            standard_error=(variance / count).sqrt(),
            exact=self.exact,
            num_draws=count,
            projection=(1 + center, spread) if self.norm > 0 else (math.nan, math.nan),
            exact_error=self.exact_error,
        )


def check_mean(
    layer: StochasticLayer,
    params: Tensor,
    cost_fn: nn.Module,
    *,
    of: str = "encoder",
    context: Tensor | None = None,
    visible_bias: float = 0.05,
    max_draws: int = 4_000_000,
) -> Moments:
    """Assert that the mean of a layer's gradient (or value) is the exact one, with the power to see a small bias.

    Draws until a bias of ``visible_bias`` of the gradient's norm along the gradient would stand 8 standard errors out,
    then demands that no coordinate, nor the projection, is off by more than 5. False alarms: 6e-7 per coordinate. Power
    against such a bias: 0.998.

    Raises:
        AssertionError: The mean is off, or the power is not reached within ``max_draws``.
    """
    exact = references(layer, params, cost_fn, of=(of,))

    def run(num_draws: int) -> Moments:
        return measure_all(layer, params, cost_fn, num_draws=num_draws, of=(of,), context=context, exact=exact)[of]

    pilot = run(20_000)
    error = pilot.projection[1]
    if math.isfinite(error):
        needed = int(pilot.num_draws * (8 * error / visible_bias) ** 2 * 1.2) + 20_000
        assert needed <= max_draws, f"a bias of {visible_bias:g} would need {needed} draws, more than {max_draws}"
        result = run(needed)
    else:  # the exact gradient is zero: any mean counts
        result = pilot
    assert result.largest_z < 5, (
        f"{layer}: the mean of {of} is {result.largest_z:.1f} standard errors off after {result.num_draws} draws "
        f"(relative difference {result.relative_bias:.3g}): got {result.mean.tolist()}, exact {result.exact.tolist()}"
    )
    return result
