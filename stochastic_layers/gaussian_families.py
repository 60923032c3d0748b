"""Gaussian families: diagonal, with any covariance, and with one that is diagonal plus low rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal

from stochastic_layers.continuous_families import ContinuousFamily, standard_normal
from stochastic_layers.families import MAX_LOG_VARIANCE, Family, register_family
from stochastic_layers.noise import normal
from stochastic_layers.normal import DiagonalNormal, LogVarianceNormal, StandardNormal
from stochastic_layers.options import check_positive_int
from stochastic_layers.quadrature import gauss_hermite, product_rule

__all__ = ["FullGaussianFamily", "GaussianFamily", "LowRankGaussianFamily", "gaussian_nodes"]


@register_family
class GaussianFamily(Family):
    """Diagonal Gaussian; params are the loc, then the log-variance: ``[*batch, 2 * latent_dim]``."""

    name = "gaussian"
    discrete = False
    parts = ("loc", "log_variance")

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if max(-low, high) > MAX_LOG_VARIANCE:  # cheap: the exact look is needed only then
            extreme = float(params[..., self.latent_dim :].abs().max())
            if extreme > MAX_LOG_VARIANCE:
                raise ValueError(
                    f"needed log-variances between -{MAX_LOG_VARIANCE:g} and {MAX_LOG_VARIANCE:g}, got one of "
                    f"magnitude {extreme:.3g}, whose variance or KL overflows; the second half of params is the "
                    "log-variance, not the scale. Clamp it or lower the learning rate."
                )

    def standard(self) -> Distribution:
        """The standard normal."""
        return DiagonalNormal(StandardNormal(torch.zeros(self.latent_dim), torch.ones(self.latent_dim)))

    def distribution(self, params: Tensor) -> Distribution:
        return DiagonalNormal(LogVarianceNormal(*params.chunk(2, -1)))

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return q.sample(torch.Size((num_samples,)))

    def mode(self, q: Distribution) -> Tensor:
        return q.mean

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        assert isinstance(q, Independent)
        law: Any = q.base_dist
        x, weights = gaussian_nodes(law.loc, 6 + 4 * refinement)  # exact for polynomials of degree up to 11
        return law.loc + law.scale * x, weights


def gaussian_nodes(like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Standard normal nodes ``[N, *batch, D]`` and their weights ``[N, *batch]`` for a tensor ``[*batch, D]``."""
    points, weights = product_rule(*gauss_hermite(count), like.shape[-1])
    batch = like.shape[:-1]
    shape = (-1, *[1] * len(batch))
    x = points.to(like.dtype).view(*shape, like.shape[-1]).expand(-1, *like.shape)
    return x, weights.to(like.dtype).view(shape).expand(-1, *batch)


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
        return standard_normal(self.latent_dim)


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

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        if not isinstance(q, MultivariateNormal):  # the prior
            return super().rsample(q, num_samples)
        noise = normal((num_samples, *q.loc.shape, 1), q.loc)
        return q.loc + (q.scale_tril @ noise).squeeze(-1)


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
        self.rank = check_positive_int("rank", rank, "1 to 10 is usual, 'gaussian_full' has no limit")

    @property
    def spec(self) -> Mapping[str, Any]:
        return {"name": self.name, "rank": self.rank}

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if low < -30 or high > 1000:  # cheap: the exact look is needed only then
            _, log_variance, factor = self.split(params)
            least, largest = log_variance.amin(-1), factor.abs().amax(-1).log()  # of each example
            inverse = 2 * largest - least + math.log(self.latent_dim)
            slope = torch.maximum(largest, 0.5 * least) - 2 * least  # of draws over variances, by the log-variance
            reach = float(torch.maximum(inverse, slope).max())
            if reach > MAX_LOG_VARIANCE:
                raise ValueError(
                    f"needed factor^2 / variance and factor / variance^2 below exp({MAX_LOG_VARIANCE:g}) for family "
                    f"{self.name!r}, got exp({reach:.3g}): the inverse covariance overflows in float32, or its "
                    "derivative; clamp the log-variance."
                )

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return self.latent_dim, self.latent_dim, self.latent_dim * self.rank

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_variance, factor = self.split(params)
        factor = factor.reshape(*factor.shape[:-1], self.latent_dim, self.rank)
        return LowRankMultivariateNormal(loc, factor, log_variance.exp(), validate_args=False)

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        if not isinstance(q, LowRankMultivariateNormal) or not z.numel():  # the prior, or an empty batch
            return super().log_prob(q, z)
        # x^T (D + W W^T)^-1 x = min_y |(x - W y) / sqrt(D)|^2 + |y|^2: squares, where torch takes the difference of two
        # numbers of the size of W^2 / D, which in float32 leaves nothing of log q at 1e7
        factor, diagonal, tril, x = q.cov_factor, q.cov_diag, q._capacitance_tril, (z - q.loc).unsqueeze(-1)
        y = torch.cholesky_solve(factor.mT @ (x / diagonal.unsqueeze(-1)), tril.expand(*x.shape[:-2], -1, -1))
        distance = ((x - factor @ y).squeeze(-1).square() / diagonal).sum(-1) + y.square().sum((-2, -1))
        log_det = diagonal.log().sum(-1) + 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        result: Tensor = -0.5 * (distance + log_det + self.latent_dim * math.log(2 * math.pi))
        return result

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        if not isinstance(q, LowRankMultivariateNormal):  # the prior
            return super().rsample(q, num_samples)
        shared = normal((num_samples, *q.loc.shape[:-1], self.rank, 1), q.loc)
        own = normal((num_samples, *q.loc.shape), q.loc)
        z: Tensor = q.loc + (q.cov_factor @ shared).squeeze(-1) + q.cov_diag.sqrt() * own
        return z
