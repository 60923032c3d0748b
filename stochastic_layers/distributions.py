"""Laws that torch does not have, or not in a form that survives float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Dirichlet,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
    constraints,
    kl,
)
from torch.distributions import Kumaraswamy as TorchKumaraswamy
from torch.distributions.utils import broadcast_all

from stochastic_layers.noise import exponential, logistic

__all__ = ["HypersphericalUniform", "Kumaraswamy", "Logistic", "PowerSpherical", "open_unit_interval"]

_EMPTY = torch.Size()


def open_unit_interval(tensor: Tensor) -> Tensor:
    """Move 0 and 1 to the nearest numbers inside, so that logarithms stay finite."""
    info = torch.finfo(tensor.dtype)
    return tensor.clamp(info.tiny, 1 - info.eps / 2)


class Logistic(Distribution):
    """The logistic law: a bell with tails like Laplace's and a closed-form quantile function.

    Args:
        loc: Mean, median and mode.
        scale: Scale; the standard deviation is ``pi / sqrt(3)`` of it.
        validate_args: As everywhere in torch.

    Example:
        >>> import torch
        >>> Logistic(torch.zeros(3), torch.ones(3)).entropy()
        tensor([2., 2., 2.])
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012 torch's own protocol
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Logistic:
        return Logistic(self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return (math.pi * self.scale).square() / 3

    def rsample(self, sample_shape: Any = _EMPTY) -> Tensor:
        return self.loc + self.scale * logistic(self._extended_shape(sample_shape), self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        x = ((value - self.loc) / self.scale).abs()  # the density is even: of |x| no exponential overflows
        return -x - 2 * torch.nn.functional.softplus(-x) - self.scale.log()

    def cdf(self, value: Tensor) -> Tensor:
        return torch.sigmoid((value - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        return self.loc + self.scale * open_unit_interval(value).logit()

    def entropy(self) -> Tensor:
        return self.scale.log() + 2


class Kumaraswamy(TorchKumaraswamy):
    """Torch's Kumaraswamy law, drawn and evaluated in log space: finite also for extreme concentrations."""

    def rsample(self, sample_shape: Any = _EMPTY) -> Tensor:
        shape, like = self._extended_shape(sample_shape), self.concentration1
        return self._of(exponential(shape, like))

    def _of(self, minus_log_u: Tensor) -> Tensor:
        """The point above which the mass u lies: ``(1 - u^(1/b))^(1/a)``."""
        log_power = (-torch.expm1(-minus_log_u / self.concentration0)).clamp_min(torch.finfo(minus_log_u.dtype).tiny)
        return open_unit_interval((log_power.log() / self.concentration1).exp())

    def icdf(self, value: Tensor) -> Tensor:
        return self._of(-torch.log1p(-open_unit_interval(value)))

    def cdf(self, value: Tensor) -> Tensor:
        return -torch.expm1(self.concentration0 * self._log_rest(value))

    def log_prob(self, value: Tensor) -> Tensor:
        a, b = self.concentration1, self.concentration0
        return a.log() + b.log() + (a - 1) * value.log() + (b - 1) * self._log_rest(value)

    def _log_rest(self, value: Tensor) -> Tensor:
        """``log(1 - value^a)``."""
        return (-torch.expm1(self.concentration1 * value.log())).log()


class HypersphericalUniform(Distribution):
    """The uniform law on the unit sphere of ``dim`` dimensions.

    Args:
        dim: Dimension of the space around the sphere, at least 2.
        like: A tensor whose dtype and device the draws have; the default ones without.
        batch_shape: Shape of the batch.

    Example:
        >>> HypersphericalUniform(3).sample().shape
        torch.Size([3])
    """

    arg_constraints = {}  # noqa: RUF012 torch's own protocol

    def __init__(self, dim: int, like: Tensor | None = None, batch_shape: torch.Size = _EMPTY) -> None:
        self.dim = dim
        self.like = torch.zeros(()) if like is None else like
        super().__init__(batch_shape, torch.Size((dim,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HypersphericalUniform:
        return HypersphericalUniform(self.dim, self.like, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = _EMPTY) -> Tensor:
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.like.dtype, device=self.like.device)
        return torch.nn.functional.normalize(noise, dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_full(value.shape[:-1], -self.log_area)

    def entropy(self) -> Tensor:
        return self.like.new_full(self.batch_shape, self.log_area)

    @property
    def log_area(self) -> float:
        """Logarithm of the area of the sphere."""
        half = self.dim / 2
        return math.log(2) + half * math.log(math.pi) - math.lgamma(half)


class PowerSpherical(Distribution):
    r"""The power spherical law on the unit sphere: like von Mises-Fisher, but drawn exactly and without rejection.

    .. math:: q(z) \propto (1 + \mu^\top z)^\kappa

    The cosine :math:`t = \mu^\top z` is an affine function of a Beta variable; the rest of z is uniform on the circle
    of that latitude, and a Householder reflection turns the pole into :math:`\mu`.

    Args:
        loc: Unit vectors ``[*batch, d]``, the modes.
        concentration: :math:`\kappa` ``[*batch]``, positive; 0 is the uniform law.

    References:
        The Power Spherical distribution (Nicola De Cao, Wilker Aziz, 2020), https://arxiv.org/abs/2006.04437

    Example:
        >>> import torch
        >>> q = PowerSpherical(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(4.0))
        >>> q.rsample().shape, q.mean
        (torch.Size([3]), tensor([0.0000, 0.6667, 0.0000]))
    """

    arg_constraints = {"concentration": constraints.positive}  # noqa: RUF012 torch's own protocol
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor) -> None:
        self.loc, self.concentration = loc, concentration
        self.half = (loc.shape[-1] - 1) / 2
        super().__init__(concentration.shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PowerSpherical:
        shape = torch.Size(batch_shape)
        return PowerSpherical(self.loc.expand(*shape, -1), self.concentration.expand(shape))

    @property
    def mean(self) -> Tensor:
        return self.loc * (self.concentration / (self.concentration + 2 * self.half)).unsqueeze(-1)

    @property
    def mode(self) -> Tensor:
        return self.loc

    def rsample(self, sample_shape: Any = _EMPTY) -> Tensor:
        shape, like = self._extended_shape(sample_shape), self.loc
        alpha = self.half + self.concentration
        beta = torch.full_like(alpha, self.half)
        both = Dirichlet(torch.stack([alpha, beta], -1), validate_args=False).rsample(torch.Size(sample_shape))
        up, down = both.clamp_min(torch.finfo(like.dtype).tiny).unbind(-1)  # (1 + t) / 2 and (1 - t) / 2, both accurate
        noise = torch.randn(*shape[:-1], shape[-1] - 1, dtype=like.dtype, device=like.device)
        around = torch.nn.functional.normalize(noise, dim=-1) * 2 * (up.log() + down.log()).mul(0.5).exp().unsqueeze(-1)
        # reflect the pole that is farther from loc: the normal of the mirror never cancels
        sign = torch.where(like[..., :1] < 0, -1.0, 1.0).to(like.dtype)
        point = torch.cat([-sign * (up - down).unsqueeze(-1), around], -1)
        normal = torch.cat([like[..., :1] + sign, like[..., 1:]], -1)
        return point - normal * (2 * (normal * point).sum(-1, keepdim=True) / normal.square().sum(-1, keepdim=True))

    def log_prob(self, value: Tensor) -> Tensor:
        cosine = (self.loc * value).sum(-1).clamp_min(torch.finfo(value.dtype).eps - 1)
        return self.concentration * torch.log1p(cosine) - self._log_normalizer()

    def entropy(self) -> Tensor:
        alpha = self.half + self.concentration
        mean_log = math.log(2) + torch.digamma(alpha) - torch.digamma(alpha + self.half)  # E[log(1 + t)]
        return self._log_normalizer() - self.concentration * mean_log

    def _log_normalizer(self) -> Tensor:
        alpha = self.half + self.concentration
        log_gammas = torch.lgamma(alpha) - torch.lgamma(alpha + self.half)
        return (alpha + self.half) * math.log(2) + self.half * math.log(math.pi) + log_gammas


@kl.register_kl(PowerSpherical, HypersphericalUniform)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_power_spherical_uniform(p: PowerSpherical, q: HypersphericalUniform) -> Tensor:
    return q.log_area - p.entropy()


@kl.register_kl(TorchKumaraswamy, Uniform)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_kumaraswamy_uniform(p: TorchKumaraswamy, q: Uniform) -> Tensor:
    inside = (q.low <= 0) & (q.high >= 1)
    entropy: Tensor = p.entropy()  # type: ignore[no-untyped-call]
    return torch.where(inside, (q.high - q.low).log() - entropy, math.inf)


@kl.register_kl(StudentT, Normal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_student_t_normal(p: StudentT, q: Normal) -> Tensor:
    # infinite for df <= 2; the entropy of Student's t is known
    entropy: Tensor = p.entropy()  # type: ignore[no-untyped-call]
    variance = torch.where(p.df > 2, p.scale.square() * p.df / (p.df - 2), math.inf)
    second_moment = (variance + (p.loc - q.loc).square()) / q.scale.square()
    result: Tensor = 0.5 * (math.log(2 * math.pi) + second_moment) + q.scale.log() - entropy
    return result


@kl.register_kl(LowRankMultivariateNormal, Independent)  # type: ignore[no-untyped-call, untyped-decorator]
@kl.register_kl(MultivariateNormal, Independent)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_gaussian_factorised(p: MultivariateNormal | LowRankMultivariateNormal, q: Independent[Distribution]) -> Tensor:
    base = q.base_dist
    if not isinstance(base, Normal) or len(q.event_shape) != 1:
        raise NotImplementedError("the KL divergence of a Gaussian is known to factorised laws that are normal")
    entropy: Tensor = p.entropy()  # type: ignore[no-untyped-call]
    cross = 0.5 * (p.variance + (p.mean - base.loc).square()) / base.scale.square() + base.scale.log()
    return (cross + 0.5 * math.log(2 * math.pi)).sum(-1) - entropy
