r"""Continuous families: their base, and independent laws on the real line.

All have a differentiable draw. Those with a covariance are in :mod:`stochastic_layers.gaussian_families`, positive
laws, those on intervals, the simplex and the sphere in :mod:`stochastic_layers.constrained_families`.

Scales are exponentials of params (refused where they overflow), shapes are ``softplus(params) + 0.1``: below 0.1 a
share of the draws of a Gamma, Beta or Dirichlet variable is smaller than the smallest float32, and the law would be
another.

KL divergences to :meth:`Family.standard` are in closed form except for ``logistic``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Chi2, Distribution, Independent, Laplace, Normal, StudentT, constraints

from stochastic_layers.distributions import Logistic
from stochastic_layers.families import MAX_LOG_VARIANCE, Family, register_family
from stochastic_layers.noise import laplace, normal
from stochastic_layers.quadrature import half_line, interval_nodes, product_rule

__all__ = [
    "MAX_CONCENTRATION",
    "MAX_LOG_SCALE",
    "STEP",
    "ContinuousFamily",
    "LaplaceFamily",
    "LogisticFamily",
    "StudentTFamily",
    "base_of",
    "independent",
    "positive",
    "standard_normal",
]

MIN_CONCENTRATION = 0.1
MAX_CONCENTRATION = 1e5  # beyond it log-gamma functions in float32 are off by tenths of a nat
MAX_LOG_SCALE = MAX_LOG_VARIANCE / 2
STEP = 0.08  # of the rules by which expectations are computed


def positive(raw: Tensor) -> Tensor:
    """A concentration, at least 0.1."""
    return torch.nn.functional.softplus(raw) + MIN_CONCENTRATION


def independent(base: Distribution) -> Distribution:
    """The law of the last dimension as one event."""
    return Independent(base, 1, validate_args=False)


def standard_normal(dim: int) -> Distribution:
    """The prior of families on the real line that have no other standard member."""
    return independent(Normal(torch.zeros(dim), torch.ones(dim), validate_args=False))


def base_of(q: Distribution) -> Any:
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
        step = STEP / 2**refinement
        if isinstance(q, Independent) and q.base_dist.support is constraints.unit_interval:
            return interval_nodes(q.base_dist, step)
        z, log_weight = self.grid(q, step)
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
        loc: Tensor = base_of(q).loc
        return loc


@register_family
class LaplaceFamily(_LocationScale):
    """Independent Laplace variables on the real line; params are the loc, then the log-scale."""

    name = "laplace"

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_scale = self.split(params)
        return independent(Laplace(loc, log_scale.exp(), validate_args=False))

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        law = base_of(q)
        z: Tensor = law.loc + law.scale * laplace((num_samples, *law.loc.shape), law.loc)
        return z

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
        return independent(Logistic(loc, log_scale.exp(), validate_args=False))

    def standard(self) -> Distribution:
        """Loc 0, scale 1."""
        return self.distribution(torch.zeros(self.in_features))


class _UncheckedStudentT(StudentT):
    """torch's law, whose inner chi-square law checks its values whatever it is told, which waits for the device."""

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = df, loc, scale
        self._chi2 = Chi2(df, validate_args=False)
        Distribution.__init__(self, df.shape, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = normal((*sample_shape, *self.loc.shape), self.loc)
        return self.loc + self.scale * noise * (self._chi2.rsample(sample_shape) / self.df).rsqrt()

    def expand(self, batch_shape: Any, _instance: Any = None) -> _UncheckedStudentT:
        return _UncheckedStudentT(*(part.expand(batch_shape) for part in (self.df, self.loc, self.scale)))


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
        return independent(_UncheckedStudentT(2 + positive(raw), loc, log_scale.exp()))

    def standard(self) -> Distribution:
        """The standard normal."""
        return standard_normal(self.latent_dim)
