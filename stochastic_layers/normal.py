"""The diagonal Gaussian in terms of its log-variance: one exponential and few passes, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence, register_kl
from torch.distributions.utils import lazy_property

from stochastic_layers.auxiliary import kernels_usable

__all__ = ["DiagonalNormal", "LogVarianceNormal", "StandardNormal"]

HALF_LOG2_E = 0.5 * math.log2(math.e)
LOG_2PI = math.log(2 * math.pi)


class _Draws(torch.autograd.Function):
    """``loc + scale * noise [S, ...]``, made in the memory of the noise; backward takes two passes."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_variance: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        distance = noise.mul_(scale)
        ctx.save_for_backward(log_variance, distance)
        return distance + loc

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        log_variance, distance = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will itself be differentiated
            distance = distance * (0.5 * (log_variance - log_variance.detach())).exp()
        slope = grad * distance
        loc, slope = (t.squeeze(0) if t.shape[0] == 1 else t.sum(0) for t in (grad, slope))
        return loc, (0.5 * slope if torch.is_grad_enabled() else slope.mul_(0.5)), None, None


class _LogDensity(torch.autograd.Function):
    """log q(value) of single variables; backward has their standardised distance at hand."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_variance: Tensor, scale: Tensor, value: Tensor) -> Tensor:
        distance = (value - loc).div_(scale)
        ctx.save_for_backward(loc, log_variance, value, scale, distance)
        return (distance * distance).add_(log_variance).add_(LOG_2PI).mul_(-0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        loc, log_variance, value, scale, distance = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will itself be differentiated
            scale = (0.5 * log_variance).exp()
            distance = (value - loc) / scale
        slope = grad * distance
        spread = 0.5 * (slope * distance - grad)
        slope = slope / scale
        at_value = -slope.sum_to_size(value.shape) if ctx.needs_input_grad[3] else None
        return slope.sum_to_size(loc.shape), spread.sum_to_size(loc.shape), None, at_value


class _KLToStandard(torch.autograd.Function):
    """KL of vectors to the standard normal, whose gradient is known without the steps of the sum."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_variance: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, log_variance, scale)
        excess = (loc * loc).sub_(log_variance).addcmul_(scale, scale)
        return excess.sum(-1).sub_(loc.shape[-1]).mul_(0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        loc, log_variance, scale = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        if torch.is_grad_enabled():  # this gradient will itself be differentiated
            return grad * loc, 0.5 * grad * log_variance.expm1(), None
        return grad * loc, (scale * scale).sub_(1).mul_(0.5 * grad), None


class LogVarianceNormal(Normal):
    """``Normal(loc, exp(log_variance / 2))`` whose exponential is taken once, for draws, densities and KL alike.

    Args:
        loc: Mean ``[...]``.
        log_variance: ``[...]``, of the same shape.
    """

    def __init__(self, loc: Tensor, log_variance: Tensor) -> None:
        self.loc, self.log_variance = loc, log_variance
        Distribution.__init__(self, loc.shape, validate_args=False)

    @lazy_property
    def scale(self) -> Tensor:
        return (HALF_LOG2_E * self.log_variance).exp2()  # exp takes up to three times as long on a CPU

    @lazy_property
    def deviation(self) -> Tensor:
        """The scale without its gradient, for functions that know theirs."""
        return (HALF_LOG2_E * self.log_variance.detach()).exp2_()

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogVarianceNormal:
        return LogVarianceNormal(self.loc.expand(batch_shape), self.log_variance.expand(batch_shape))

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        loc, lead = self.loc, torch.Size(sample_shape)
        # not randn_like, whose numbers follow the strides of loc
        noise = torch.randn((lead.numel(), *loc.shape), dtype=loc.dtype, device=loc.device)
        if kernels_usable():
            z: Tensor = _Draws.apply(loc, self.log_variance, self.deviation, noise)  # type: ignore[no-untyped-call]
        else:
            z = torch.addcmul(loc, self.scale, noise)
        return z if len(lead) == 1 else z.view(*lead, *loc.shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        loc, log_variance = self.loc, self.log_variance
        if kernels_usable():
            density: Tensor = _LogDensity.apply(loc, log_variance, self.deviation, value)  # type: ignore[no-untyped-call]
            return density
        return -0.5 * (((value - loc) / self.scale).square() + log_variance + LOG_2PI)

    def entropy(self) -> Tensor:
        return 0.5 * (self.log_variance + (1 + LOG_2PI))


class StandardNormal(Normal):
    """Independent standard normal variables: the KL to them needs neither loc nor scale."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        Distribution.__init__(self, loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StandardNormal:
        return StandardNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class DiagonalNormal(Independent):  # type: ignore[type-arg]
    """``Independent(base, 1)`` of normal variables: a type by which the KL is found that sums before it scales."""

    def __init__(self, base: Normal) -> None:
        self.base_dist, self.reinterpreted_batch_ndims = base, 1
        shape = base.batch_shape
        Distribution.__init__(self, shape[:-1], shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalNormal:
        return DiagonalNormal(self.base_dist.expand(torch.Size(batch_shape) + self.event_shape))


def _covers(q: Distribution, p: Distribution) -> bool:
    """Whether p has the shape of q or of its last dimensions, so that the KL has that of q."""
    return q.batch_shape[len(q.batch_shape) - len(p.batch_shape) :] == p.batch_shape


def _excess(q: LogVarianceNormal) -> Tensor:
    return torch.addcmul(q.loc * q.loc - q.log_variance, q.scale, q.scale)


@register_kl(LogVarianceNormal, StandardNormal)  # type: ignore[no-untyped-call,untyped-decorator]
def _kl_to_standard(q: LogVarianceNormal, p: StandardNormal) -> Tensor:
    if not _covers(q, p):
        return kl_divergence(Normal(q.loc, q.scale, validate_args=False), p)
    return _excess(q).sub_(1).mul_(0.5)


@register_kl(LogVarianceNormal, LogVarianceNormal)  # type: ignore[no-untyped-call,untyped-decorator]
def _kl_by_log_variances(q: LogVarianceNormal, p: LogVarianceNormal) -> Tensor:
    # torch's takes the logarithm of a ratio of variances, which underflows
    difference = q.log_variance - p.log_variance
    distance = ((q.loc - p.loc) * (-0.5 * p.log_variance).exp()).square()
    return 0.5 * (difference.expm1() - difference + distance)


@register_kl(DiagonalNormal, DiagonalNormal)  # type: ignore[no-untyped-call,untyped-decorator]
def _kl_of_vectors(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    base, prior = q.base_dist, p.base_dist
    if isinstance(base, LogVarianceNormal) and isinstance(prior, StandardNormal) and _covers(base, prior):
        if not kernels_usable():
            return _excess(base).sum(-1).sub(q.event_shape[0]).mul(0.5)
        kl: Tensor = _KLToStandard.apply(base.loc, base.log_variance, base.deviation)  # type: ignore[no-untyped-call]
        return kl
    return kl_divergence(base, prior).sum(-1)
