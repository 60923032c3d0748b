r"""Continuous families beyond the diagonal Gaussian, all with a differentiable draw.

Scales are exponentials of params (refused where they overflow), shapes are ``softplus(params) + 0.1``: below 0.1 a
share of the draws of a Gamma, Beta or Dirichlet variable is smaller than the smallest float32, and the law would be
another.

KL divergences to :meth:`Family.standard` are in closed form except for ``logistic``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Dirichlet,
    Distribution,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
    constraints,
)

from stochastic_layers.distributions import HypersphericalUniform, Kumaraswamy, Logistic, PowerSpherical
from stochastic_layers.families import MAX_LOG_VARIANCE, Family, gaussian_nodes, register_family
from stochastic_layers.quadrature import half_line, product_rule, sphere, unit_interval

__all__ = [
    "BetaFamily",
    "ContinuousFamily",
    "DirichletFamily",
    "FullGaussianFamily",
    "GammaFamily",
    "KumaraswamyFamily",
    "LaplaceFamily",
    "LogNormalFamily",
    "LogisticFamily",
    "LowRankGaussianFamily",
    "PowerSphericalFamily",
    "StudentTFamily",
]

MIN_CONCENTRATION = 0.1
MAX_CONCENTRATION = 1e5  # beyond it log-gamma functions in float32 are off by tenths of a nat
MAX_LOG_SCALE = MAX_LOG_VARIANCE / 2


def _positive(raw: Tensor) -> Tensor:
    return torch.nn.functional.softplus(raw) + MIN_CONCENTRATION


def _independent(base: Distribution) -> Distribution:
    return Independent(base, 1, validate_args=False)


def _standard_normal(dim: int) -> Distribution:
    return _independent(Normal(torch.zeros(dim), torch.ones(dim), validate_args=False))


def _base(q: Distribution) -> Any:
    """The law of one variable under ``Independent``."""
    assert isinstance(q, Independent)
    return q.base_dist


class ContinuousFamily(Family):
    """Base of continuous families: z is the event of q, flattened."""

    discrete = False
    limits: ClassVar[Mapping[str, float]] = {}  # largest magnitude of a part whose exponential is taken

    def split(self, params: Tensor) -> tuple[Tensor, ...]:
        """The parts of params."""
        return torch.split(params, list(self.part_sizes), -1)

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if not self.limits or max(-low, high) <= min(self.limits.values()):
            return  # cheap: the exact look is needed only for values that large
        for part, values in zip(self.parts, self.split(params), strict=True):
            limit = self.limits.get(part)
            # a concentration is a softplus: it overflows upwards only
            extreme = float((values if part.startswith("raw") else values.abs()).max()) if limit else 0.0
            if limit and extreme > limit:
                raise ValueError(
                    f"needed {part} of magnitude at most {limit:g} for family {self.name!r}, got {extreme:.3g}, whose "
                    "law or KL overflows in float32; clamp it or lower the learning rate."
                )

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        with torch.no_grad():
            return self.rsample(q, num_samples)

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        """Points that do not move with params: the gradient flows through the density, unlike that of a draw."""
        z, log_weight = self.grid(q, 0.08 / 2**refinement)
        batch = q.batch_shape
        z = z.to(q.mean.dtype).detach()
        if z.dim() == 2:
            z = z.view(-1, *[1] * len(batch), self.out_features).expand(-1, *batch, -1)
        if log_weight.dim() == 1:
            log_weight = log_weight.view(-1, *[1] * len(batch))
        return z, (self.log_prob(q, z) + log_weight.to(z.dtype).detach()).exp()

    def grid(self, q: Distribution, step: float) -> tuple[Tensor, Tensor]:
        """Points, and the logarithms of the volumes they stand for, ``[N, (*batch,) ...]``, of a step in their rule."""
        if not isinstance(q, Independent):
            raise ValueError(f"needed a family whose expectations can be computed, got {self.name!r}, without a rule.")
        base = q.base_dist
        support = base.support
        if support is constraints.unit_interval:
            return product_rule(*unit_interval(step), self.latent_dim, log=True)
        if support not in (constraints.real, constraints.positive, constraints.nonnegative):
            raise ValueError(f"needed a family on an interval, got {self.name!r} on {support}.")
        half, log_half = half_line(step)
        if support is constraints.real:
            half, log_half, center = torch.cat([half, -half]), torch.cat([log_half, log_half]), base.loc
            scale = base.scale
        else:
            center, scale = torch.zeros_like(base.mean), base.mean
        points, log_weight = product_rule(half, log_half, self.latent_dim, log=True)
        shape = (-1, *[1] * len(q.batch_shape))
        return center + scale * points.view(*shape, self.latent_dim), log_weight.view(shape) + scale.log().sum(-1)


class _LocationScale(ContinuousFamily):
    """Symmetric laws about their loc."""

    parts: ClassVar[tuple[str, ...]] = ("loc", "log_scale")
    limits: ClassVar[Mapping[str, float]] = {"log_scale": MAX_LOG_SCALE}

    def mode(self, q: Distribution) -> Tensor:
        loc: Tensor = _base(q).loc
        return loc


@register_family
class LaplaceFamily(_LocationScale):
    """Independent Laplace variables on the real line; params are the loc, then the log-scale."""

    name = "laplace"

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_scale = self.split(params)
        return _independent(Laplace(loc, log_scale.exp(), validate_args=False))

    def standard(self) -> Distribution:
        """Loc 0, scale 1."""
        return self.distribution(torch.zeros(self.in_features))


@register_family
class LogisticFamily(_LocationScale):
    """Independent logistic variables on the real line; params are the loc, then the log-scale.

    The KL divergence of two logistic laws has no closed form.
    """

    name = "logistic"

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_scale = self.split(params)
        return _independent(Logistic(loc, log_scale.exp(), validate_args=False))

    def standard(self) -> Distribution:
        """Loc 0, scale 1."""
        return self.distribution(torch.zeros(self.in_features))


@register_family
class StudentTFamily(_LocationScale):
    """Independent Student t variables on the real line; params are the loc, the log-scale and the raw tail weight.

    The degrees of freedom are ``2 + softplus(raw) + 0.1``, so that mean and variance exist. The standard prior is the
    standard normal, to which the KL has a closed form.
    """

    name = "student_t"
    parts = ("loc", "log_scale", "raw_concentration")
    limits: ClassVar[Mapping[str, float]] = {"log_scale": MAX_LOG_SCALE, "raw_concentration": MAX_CONCENTRATION}

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_scale, raw = self.split(params)
        return _independent(StudentT(2 + _positive(raw), loc, log_scale.exp(), validate_args=False))

    def standard(self) -> Distribution:
        """The standard normal."""
        return _standard_normal(self.latent_dim)


@register_family
class LogNormalFamily(ContinuousFamily):
    """Independent exponentials of normal variables, z > 0; params are loc, then log-variance, of log z."""

    name = "log_normal"
    parts = ("loc", "log_variance")

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if low < -40 or high > 4:  # cheap: the exact look is needed only then
            loc, log_variance = self.split(params)
            reach = float((loc.abs() + 8 * (0.5 * log_variance.clamp(max=MAX_LOG_VARIANCE)).exp()).max())
            if reach > MAX_LOG_VARIANCE or float(log_variance.min()) < -MAX_LOG_VARIANCE:
                raise ValueError(
                    f"needed |loc| + 8 standard deviations of log z below {MAX_LOG_VARIANCE:g} and log-variances above "
                    f"-{MAX_LOG_VARIANCE:g}, got {reach:.3g} and {float(log_variance.min()):.3g}: z overflows in "
                    "float32; clamp the params or lower the learning rate."
                )

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_variance = self.split(params)
        return _independent(LogNormal(loc, (0.5 * log_variance).exp(), validate_args=False))

    def mode(self, q: Distribution) -> Tensor:
        mode: Tensor = (_base(q).loc - _base(q).scale.square()).exp()
        return mode

    def standard(self) -> Distribution:
        """The exponential of a standard normal."""
        return self.distribution(torch.zeros(self.in_features))


@register_family
class GammaFamily(ContinuousFamily):
    """Independent Gamma variables, z > 0; params are the raw concentration, then the log-rate.

    The mode of a concentration below 1 is the smallest positive number, where the density is unbounded.
    """

    name = "gamma"
    parts = ("raw_concentration", "log_rate")
    limits: ClassVar[Mapping[str, float]] = {"raw_concentration": MAX_CONCENTRATION, "log_rate": MAX_LOG_SCALE}

    def distribution(self, params: Tensor) -> Distribution:
        raw, log_rate = self.split(params)
        return _independent(Gamma(_positive(raw), log_rate.exp(), validate_args=False))

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        # torch clamps draws before the division by the rate, which may take them to zero again
        return super().rsample(q, num_samples).clamp_min(torch.finfo(q.mean.dtype).tiny)

    def mode(self, q: Distribution) -> Tensor:
        law = _base(q)
        mode: Tensor = ((law.concentration - 1) / law.rate).clamp_min(torch.finfo(law.rate.dtype).tiny)
        return mode

    def standard(self) -> Distribution:
        """Concentration 1, rate 1: the exponential law."""
        ones = torch.ones(self.latent_dim)
        return _independent(Gamma(ones, ones, validate_args=False))


class _UnitInterval(ContinuousFamily):
    """Laws on (0, 1) with two concentrations: the first pushes z to 1, the second to 0."""

    parts = ("raw_concentration1", "raw_concentration0")
    limits: ClassVar[Mapping[str, float]] = {
        "raw_concentration1": MAX_CONCENTRATION,
        "raw_concentration0": MAX_CONCENTRATION,
    }

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        z = super().rsample(q, num_samples)
        return z.clamp(torch.finfo(z.dtype).tiny, 1 - torch.finfo(z.dtype).eps / 2)  # inside, where log q(z) is finite

    def _clamp_mode(self, inner: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The inner mode where both concentrations exceed 1, else the end of the interval where q is larger."""
        info = torch.finfo(a.dtype)
        ends = torch.where(a > b, 1 - info.eps / 2, torch.where(a < b, info.tiny, 0.5)).to(a.dtype)
        return torch.where((a > 1) & (b > 1), inner.clamp(info.tiny, 1 - info.eps / 2), ends)


@register_family
class BetaFamily(_UnitInterval):
    """Independent Beta variables, 0 < z < 1; params are the two raw concentrations (of 1, then of 0)."""

    name = "beta"

    def distribution(self, params: Tensor) -> Distribution:
        one, zero = self.split(params)
        return _independent(Beta(_positive(one), _positive(zero), validate_args=False))

    def mode(self, q: Distribution) -> Tensor:
        a, b = _base(q).concentration1, _base(q).concentration0
        return self._clamp_mode((a - 1) / torch.where(a + b == 2, 1.0, a + b - 2), a, b)

    def standard(self) -> Distribution:
        """The uniform law, as a Beta law."""
        ones = torch.ones(self.latent_dim)
        return _independent(Beta(ones, ones, validate_args=False))


@register_family
class KumaraswamyFamily(_UnitInterval):
    """Independent Kumaraswamy variables, 0 < z < 1: like Beta, with an explicit draw; two raw concentrations."""

    name = "kumaraswamy"

    def distribution(self, params: Tensor) -> Distribution:
        one, zero = self.split(params)
        return _independent(Kumaraswamy(_positive(one), _positive(zero), validate_args=False))

    def mode(self, q: Distribution) -> Tensor:
        a, b = _base(q).concentration1, _base(q).concentration0
        inner = (a > 1) & (b > 1)
        ratio = torch.where(inner, (a - 1) / torch.where(inner, a * b - 1, 1.0), 1.0)
        return self._clamp_mode((ratio.log() / a).exp(), a, b)

    def standard(self) -> Distribution:
        """The uniform law."""
        zeros = torch.zeros(self.latent_dim)
        return _independent(Uniform(zeros, zeros + 1, validate_args=False))


@register_family
class DirichletFamily(ContinuousFamily):
    """Independent points of the simplex; params are raw concentrations ``[*batch, latent_dim * num_categories]``.

    z is laid out as that of the categorical family: variable by variable, each of ``num_categories`` positive numbers
    of sum 1.
    """

    name = "dirichlet"
    takes_categories = True
    parts = ("raw_concentration",)
    limits: ClassVar[Mapping[str, float]] = {"raw_concentration": MAX_CONCENTRATION}

    @property
    def in_features(self) -> int:
        assert self.num_categories is not None
        return self.latent_dim * self.num_categories

    @property
    def out_features(self) -> int:
        return self.in_features

    def _unflatten(self, tensor: Tensor) -> Tensor:
        assert self.num_categories is not None
        return tensor.reshape(*tensor.shape[:-1], self.latent_dim, self.num_categories)

    def distribution(self, params: Tensor) -> Distribution:
        return _independent(Dirichlet(self._unflatten(_positive(params)), validate_args=False))

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        z = super().rsample(q, num_samples)
        return z.clamp_min(torch.finfo(z.dtype).tiny).flatten(-2)

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        return super().log_prob(q, self._unflatten(z))

    def mode(self, q: Distribution) -> Tensor:
        """The inner mode; where no concentration exceeds 1, the corner of the largest, or the centre for a tie of 1."""
        concentration: Tensor = _base(q).concentration
        above = (concentration - 1).clamp_min(0)
        corner = torch.zeros_like(above).scatter_(-1, concentration.argmax(-1, keepdim=True), 1.0)
        corner = torch.where((concentration == 1).all(-1, keepdim=True), torch.ones_like(above), corner)
        weight = torch.where((above > 0).any(-1, keepdim=True), above, corner)
        return (weight / weight.sum(-1, keepdim=True)).clamp_min(torch.finfo(above.dtype).tiny).flatten(-2)

    def grid(self, q: Distribution, step: float) -> tuple[Tensor, Tensor]:
        count = self.num_categories or 0
        sticks, log_weight = product_rule(*unit_interval(step), self.latent_dim * (count - 1), log=True)
        sticks = sticks.view(-1, self.latent_dim, count - 1)
        rest = (1 - sticks).cumprod(-1)
        ones = torch.ones_like(rest[..., :1])
        z = torch.cat([sticks, ones], -1) * torch.cat([ones, rest], -1)
        return z.flatten(1), log_weight + rest[..., :-1].log().sum((-2, -1))  # each stick is a share of what is left

    def standard(self) -> Distribution:
        """Uniform on the simplex."""
        return _independent(Dirichlet(torch.ones(self.latent_dim, self.num_categories or 0), validate_args=False))


class _MultivariateGaussian(ContinuousFamily):
    """Gaussians with a covariance."""

    limits: ClassVar[Mapping[str, float]] = {"log_variance": MAX_LOG_VARIANCE}

    @property
    def in_features(self) -> int:
        return sum(self.part_sizes)

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        if not z.numel():  # torch divides by the size of the batch
            return (z - q.mean).sum(-1)
        return super().log_prob(q, z)

    def mode(self, q: Distribution) -> Tensor:
        return q.mean

    def grid(self, q: Distribution, step: float) -> tuple[Tensor, Tensor]:
        """Nodes of the present law, exact for polynomials; volumes are relative to its density."""
        mean = q.mean.detach()
        x, weights = gaussian_nodes(mean, 8 if step > 0.05 else 12)
        factor = torch.linalg.cholesky(getattr(q, "covariance_matrix").detach())  # noqa: B009 of both kinds of law
        z = mean + torch.einsum("...ij,n...j->n...i", factor, x)
        return z, weights.log() - self.log_prob(q, z)

    def standard(self) -> Distribution:
        """The standard normal."""
        return _standard_normal(self.latent_dim)


@register_family
class FullGaussianFamily(_MultivariateGaussian):
    r"""Gaussian with any covariance; with zeros in the last part it is the diagonal Gaussian of the first two.

    Params are the loc, the log-variance :math:`v` and the strict lower triangle of the Cholesky factor L, row by row;
    the diagonal of L is :math:`e^{v/2}`. With a loc of D numbers they are ``2 D + D (D - 1) / 2`` in all. Where the
    triangle is many orders of magnitude above the diagonal, L cannot be inverted in float32 and log q is infinite; the
    draws and their gradient are not touched by that.
    """

    name = "gaussian_full"
    parts = ("loc", "log_variance", "lower_triangle")

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return self.latent_dim, self.latent_dim, self.latent_dim * (self.latent_dim - 1) // 2

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_variance, lower = self.split(params)
        factor = torch.diag_embed((0.5 * log_variance).exp())
        rows, columns = torch.tril_indices(self.latent_dim, self.latent_dim, -1, device=params.device)
        index = (rows * self.latent_dim + columns).expand(lower.shape)
        factor = factor.flatten(-2).scatter(-1, index, lower).reshape(factor.shape)
        return MultivariateNormal(loc, scale_tril=factor, validate_args=False)


@register_family
class LowRankGaussianFamily(_MultivariateGaussian):
    """Gaussian whose covariance is diagonal plus low rank: ``diag(exp(log_variance)) + W W^T``.

    Params are the loc, the log-variance and W ``[latent_dim, rank]``, row by row. Choose the rank by
    ``family={"name": "gaussian_low_rank", "rank": 4}``.

    Args:
        latent_dim: Number of latent variables.
        num_categories: None.
        rank: Number of columns of W.
    """

    name = "gaussian_low_rank"
    parts = ("loc", "log_variance", "factor")

    def __init__(self, latent_dim: int, num_categories: int | None = None, *, rank: int = 1) -> None:
        super().__init__(latent_dim, num_categories)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"needed rank >= 1, got {rank!r}; 1 to 10 is usual, 'gaussian_full' has no limit.")
        self.rank = rank

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if low < -30 or high > 1000:  # cheap: the exact look is needed only then
            _, log_variance, factor = self.split(params)
            reach = 2 * float(factor.abs().max().log()) - float(log_variance.min()) + math.log(self.latent_dim)
            if reach > MAX_LOG_VARIANCE:
                raise ValueError(
                    f"needed factor^2 / variance below exp({MAX_LOG_VARIANCE:g}) for family {self.name!r}, got "
                    f"exp({reach:.3g}): the inverse covariance overflows in float32; clamp the log-variance."
                )

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return self.latent_dim, self.latent_dim, self.latent_dim * self.rank

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_variance, factor = self.split(params)
        factor = factor.reshape(*factor.shape[:-1], self.latent_dim, self.rank)
        return LowRankMultivariateNormal(loc, factor, log_variance.exp(), validate_args=False)


@register_family
class PowerSphericalFamily(ContinuousFamily):
    """One point z of the unit sphere in ``latent_dim`` dimensions; params are a direction and a raw concentration.

    The direction ``[*batch, latent_dim]`` need not be normalised; where it is zero the first axis is taken. The raw
    concentration ``[*batch, 1]`` is that of :class:`~stochastic_layers.distributions.PowerSpherical`.
    """

    name = "power_spherical"
    parts = ("direction", "raw_concentration")
    limits: ClassVar[Mapping[str, float]] = {"raw_concentration": MAX_CONCENTRATION}

    def __init__(self, latent_dim: int, num_categories: int | None = None) -> None:
        super().__init__(latent_dim, num_categories)
        if latent_dim < 2:
            raise ValueError(f"needed latent_dim >= 2 for family 'power_spherical', got {latent_dim}; 2 is the circle.")

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return self.latent_dim, 1

    @property
    def in_features(self) -> int:
        return self.latent_dim + 1

    def distribution(self, params: Tensor) -> Distribution:
        direction, raw = self.split(params)
        size = direction.abs().amax(-1, keepdim=True)  # divided out first, so that squares neither over- nor underflow
        axis = torch.zeros_like(direction)
        axis[..., 0] = 1.0
        direction = torch.where(size > 0, direction / torch.where(size > 0, size, 1.0), axis)
        return PowerSpherical(direction / direction.norm(dim=-1, keepdim=True), _positive(raw).squeeze(-1))

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return q.sample(torch.Size((num_samples,)))  # the uniform law, the customary prior, is not reparameterized

    def mode(self, q: Distribution) -> Tensor:
        return q.mode

    def grid(self, q: Distribution, step: float) -> tuple[Tensor, Tensor]:
        return sphere(self.latent_dim, round(32 / step))

    def standard(self) -> Distribution:
        """Uniform on the sphere."""
        return HypersphericalUniform(self.latent_dim)
