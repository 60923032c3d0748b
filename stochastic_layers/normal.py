"""The diagonal Gaussian in terms of its log-variance: one exponential and few passes, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence, register_kl
from torch.distributions.utils import lazy_property

__all__ = ["DiagonalNormal", "LogVarianceNormal", "StandardNormal"]

HALF_LOG2_E = 0.5 * math.log2(math.e)


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

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogVarianceNormal:
        return LogVarianceNormal(self.loc.expand(batch_shape), self.log_variance.expand(batch_shape))

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        loc, scale = self.loc, self.scale
        one = tuple(sample_shape) == (1,)  # then nothing is expanded, and nothing summed in backward
        shape = loc.shape if one else (*sample_shape, *loc.shape)
        # not randn_like, whose numbers follow the strides of loc
        z = torch.addcmul(loc, scale, torch.randn(shape, dtype=loc.dtype, device=loc.device))
        return z.unsqueeze(0) if one else z

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        distance = (value - self.loc).square() / self.variance
        return (distance + self.log_variance).add_(math.log(2 * math.pi)).mul_(-0.5)

    def entropy(self) -> Tensor:
        return 0.5 * (self.log_variance + (1 + math.log(2 * math.pi)))


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


def _excess(q: LogVarianceNormal) -> Tensor:
    return torch.addcmul(q.loc * q.loc - q.log_variance, q.scale, q.scale)


@register_kl(LogVarianceNormal, StandardNormal)  # type: ignore[no-untyped-call,untyped-decorator]
def _kl_to_standard(q: LogVarianceNormal, p: StandardNormal) -> Tensor:
    return _excess(q).sub_(1).mul_(0.5)


@register_kl(DiagonalNormal, DiagonalNormal)  # type: ignore[no-untyped-call,untyped-decorator]
def _kl_of_vectors(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    base, prior = q.base_dist, p.base_dist
    if isinstance(base, LogVarianceNormal) and isinstance(prior, StandardNormal):
        return _excess(base).sum(-1).sub_(q.event_shape[0]).mul_(0.5)
    return kl_divergence(base, prior).sum(-1)
