"""Continuous families of constrained draws: positive, between 0 and 1, on the simplex, on the sphere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Beta, Dirichlet, Distribution, Gamma, LogNormal, Uniform

from stochastic_layers.continuous_families import (
    MAX_CONCENTRATION,
    MAX_LOG_SCALE,
    STEP,
    ContinuousFamily,
    base_of,
    independent,
    positive,
)
from stochastic_layers.distributions import HypersphericalUniform, Kumaraswamy, PowerSpherical
from stochastic_layers.families import MAX_LOG_VARIANCE, register_family
from stochastic_layers.noise import normal
from stochastic_layers.quadrature import interval_nodes, sphere

__all__ = [
    "BetaFamily",
    "DirichletFamily",
    "GammaFamily",
    "KumaraswamyFamily",
    "LogNormalFamily",
    "PowerSphericalFamily",
]


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
        return independent(LogNormal(loc, (0.5 * log_variance).exp(), validate_args=False))

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        law = base_of(q)
        z: Tensor = (law.loc + law.scale * normal((num_samples, *law.loc.shape), law.loc)).exp()
        return z

    def mode(self, q: Distribution) -> Tensor:
        mode: Tensor = (base_of(q).loc - base_of(q).scale.square()).exp()
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
        return independent(Gamma(positive(raw), log_rate.exp(), validate_args=False))

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        # torch clamps draws before the division by the rate, which may take them to zero again
        return super().rsample(q, num_samples).clamp_min(torch.finfo(q.mean.dtype).tiny)

    def mode(self, q: Distribution) -> Tensor:
        law = base_of(q)
        mode: Tensor = ((law.concentration - 1) / law.rate).clamp_min(torch.finfo(law.rate.dtype).tiny)
        return mode

    def standard(self) -> Distribution:
        """Concentration 1, rate 1: the exponential law."""
        ones = torch.ones(self.latent_dim)
        return independent(Gamma(ones, ones, validate_args=False))


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
        """The inner mode where both concentrations exceed 1, else the end of the interval where q is larger.

        Where the ends are alike it is the lower one, and the middle of the uniform law.
        """
        info = torch.finfo(a.dtype)
        ends = torch.where(a > b, 1 - info.eps / 2, torch.where((a < b) | (a < 1), info.tiny, 0.5)).to(a.dtype)
        return torch.where((a > 1) & (b > 1), inner.clamp(info.tiny, 1 - info.eps / 2), ends)


@register_family
class BetaFamily(_UnitInterval):
    """Independent Beta variables, 0 < z < 1; params are the two raw concentrations (of 1, then of 0)."""

    name = "beta"

    def distribution(self, params: Tensor) -> Distribution:
        one, zero = self.split(params)
        return independent(Beta(positive(one), positive(zero), validate_args=False))

    def mode(self, q: Distribution) -> Tensor:
        a, b = base_of(q).concentration1, base_of(q).concentration0
        return self._clamp_mode((a - 1) / torch.where(a + b == 2, 1.0, a + b - 2), a, b)

    def standard(self) -> Distribution:
        """The uniform law, as a Beta law."""
        ones = torch.ones(self.latent_dim)
        return independent(Beta(ones, ones, validate_args=False))


@register_family
class KumaraswamyFamily(_UnitInterval):
    """Independent Kumaraswamy variables, 0 < z < 1: like Beta, with an explicit draw; two raw concentrations."""

    name = "kumaraswamy"

    def distribution(self, params: Tensor) -> Distribution:
        one, zero = self.split(params)
        return independent(Kumaraswamy(positive(one), positive(zero), validate_args=False))

    def mode(self, q: Distribution) -> Tensor:
        a, b = base_of(q).concentration1, base_of(q).concentration0
        inner = (a > 1) & (b > 1)
        ratio = torch.where(inner, (a - 1) / torch.where(inner, a * b - 1, 1.0), 1.0)
        return self._clamp_mode((ratio.log() / a).exp(), a, b)

    def standard(self) -> Distribution:
        """The uniform law."""
        zeros = torch.zeros(self.latent_dim)
        return independent(Uniform(zeros, zeros + 1, validate_args=False))


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

    def distribution(self, params: Tensor) -> Distribution:
        return independent(Dirichlet(self.unflatten(positive(params)), validate_args=False))

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        z = super().rsample(q, num_samples)
        return z.clamp_min(torch.finfo(z.dtype).tiny).flatten(-2)

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        return super().log_prob(q, self.unflatten(z))

    def mode(self, q: Distribution) -> Tensor:
        """The inner mode; where no concentration exceeds 1, the corner of the largest, or the centre for a tie of 1."""
        concentration: Tensor = base_of(q).concentration
        above = (concentration - 1).clamp_min(0)
        corner = torch.zeros_like(above).scatter_(-1, concentration.argmax(-1, keepdim=True), 1.0)
        corner = torch.where((concentration == 1).all(-1, keepdim=True), torch.ones_like(above), corner)
        weight = torch.where((above > 0).any(-1, keepdim=True), above, corner)
        return (weight / weight.sum(-1, keepdim=True)).clamp_min(torch.finfo(above.dtype).tiny).flatten(-2)

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        concentration = base_of(q).concentration  # [*batch, latent_dim, num_categories]
        left = concentration.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        # each number's share of what those before it have left over is a Beta variable, independent of the others
        law = Beta(concentration[..., :-1].flatten(-2), left.flatten(-2), validate_args=False)
        shares, weights = interval_nodes(law, STEP / 2**refinement)
        shares = shares.reshape(*shares.shape[:-1], *left.shape[-2:])
        rest = (1 - shares).cumprod(-1)
        ones = torch.ones_like(rest[..., :1])
        return (torch.cat([shares, ones], -1) * torch.cat([ones, rest], -1)).flatten(-2), weights

    def standard(self) -> Distribution:
        """Uniform on the simplex."""
        return independent(Dirichlet(torch.ones(self.latent_dim, self.num_categories or 0), validate_args=False))


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
        return PowerSpherical(direction / direction.norm(dim=-1, keepdim=True), positive(raw).squeeze(-1))

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return q.sample(torch.Size((num_samples,)))  # the uniform law, the customary prior, is not reparameterized

    def mode(self, q: Distribution) -> Tensor:
        return q.mode

    def grid(self, q: Distribution, step: float) -> tuple[Tensor, Tensor]:
        return sphere(self.latent_dim, round(32 / step))

    def standard(self) -> Distribution:
        """Uniform on the sphere."""
        return HypersphericalUniform(self.latent_dim)
