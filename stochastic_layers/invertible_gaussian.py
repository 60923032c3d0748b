"""The invertible Gaussian law on the simplex: Gaussian noise pushed through an invertible softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, kl_divergence, register_kl
from torch.nn.functional import pad

from stochastic_layers.families import MAX_LOG_VARIANCE, Family, register_family
from stochastic_layers.gaussian_families import gaussian_nodes
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.noise import normal
from stochastic_layers.options import check_temperature
from stochastic_layers.registry import register

__all__ = ["InvertibleGaussian", "InvertibleGaussianDistribution", "InvertibleGaussianFamily"]


class InvertibleGaussianDistribution(Distribution):
    r"""Law of softmax++(y / temperature) for y normal with C - 1 independent coordinates.

    .. math:: z_i = \frac{e^{y_i / \tau}}{1 + \sum_{j < C} e^{y_j / \tau}}, \qquad z_C = 1 - \sum_{i < C} z_i

    Args:
        loc: ``[*batch, C - 1]``.
        scale: ``[*batch, C - 1]``.
        temperature: Temperature, positive.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.simplex
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, temperature: float) -> None:
        self.loc, self.scale, self.temperature = loc, scale, temperature
        super().__init__(loc.shape[:-1], torch.Size((loc.shape[-1] + 1,)), validate_args=False)

    @property
    def normal(self) -> Distribution:
        """The law of y."""
        return Independent(Normal(self.loc, self.scale, validate_args=False), 1, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InvertibleGaussianDistribution:
        """The same law with a larger batch shape."""
        shape = (*batch_shape, self.loc.shape[-1])
        return InvertibleGaussianDistribution(self.loc.expand(shape), self.scale.expand(shape), self.temperature)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.to_simplex(self.loc + self.scale * normal((*sample_shape, *self.loc.shape), self.loc))

    def log_prob(self, value: Tensor) -> Tensor:
        # a coordinate that has rounded to zero counts as the smallest positive number
        log_z = value.clamp_min(torch.finfo(value.dtype).tiny).log()
        y = self.temperature * (log_z[..., :-1] - log_z[..., -1:])
        return self._log_density((y - self.loc) / self.scale, log_z)

    def log_prob_of_noise(self, noise: Tensor) -> Tensor:
        """log q of what standard normal noise ``[..., C - 1]`` becomes; finite also where z has rounded to zero."""
        y = self.loc + self.scale * noise
        return self._log_density(noise, pad(y / self.temperature, (0, 1)).log_softmax(-1))

    def _log_density(self, noise: Tensor, log_z: Tensor) -> Tensor:
        # det dz/dy = temperature^-(C - 1) prod_i z_i, over all C coordinates
        density = -0.5 * noise.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)
        return density.sum(-1) + self.loc.shape[-1] * math.log(self.temperature) - log_z.sum(-1)

    def to_simplex(self, y: Tensor) -> Tensor:
        """softmax++ of y ``[..., C - 1]`` -> ``[..., C]``."""
        return pad(y / self.temperature, (0, 1)).softmax(-1)


@register_kl(InvertibleGaussianDistribution, InvertibleGaussianDistribution)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl(p: InvertibleGaussianDistribution, q: InvertibleGaussianDistribution) -> Tensor:
    """Invariant under the common invertible map, hence that of the two normals."""
    if p.temperature != q.temperature:
        raise NotImplementedError(
            f"needed two laws of one temperature, got {p.temperature:g} and {q.temperature:g}, between which the KL "
            "has no closed form; build both from the same family."
        )
    result: Tensor = kl_divergence(p.normal, q.normal)
    return result


@register_family
class InvertibleGaussianFamily(Family):
    """Independent variables on the simplex; params are the loc, then the log-variance, of C - 1 normals each.

    Params ``[*batch, 2 * latent_dim * (num_categories - 1)]``, z ``[*batch, latent_dim * num_categories]``.
    """

    name = "invertible_gaussian"
    discrete = False
    takes_categories = True
    parts = ("loc", "log_variance")

    def __init__(self, latent_dim: int, num_categories: int | None = None, temperature: float = 0.5) -> None:
        super().__init__(latent_dim, num_categories)
        self.temperature = temperature

    @property
    def in_features(self) -> int:
        assert self.num_categories is not None
        return 2 * self.latent_dim * (self.num_categories - 1)

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if max(-low, high) > MAX_LOG_VARIANCE:
            extreme = float(params.chunk(2, -1)[1].abs().max())
            if extreme > MAX_LOG_VARIANCE:
                raise ValueError(
                    f"needed log-variances between -{MAX_LOG_VARIANCE:g} and {MAX_LOG_VARIANCE:g}, got one of "
                    f"magnitude {extreme:.3g}; clamp the second half of params or lower the learning rate."
                )

    def standard(self) -> Distribution:
        """Standard normals before the map."""
        return self.distribution(torch.zeros(self.in_features))

    def distribution(self, params: Tensor) -> Distribution:
        assert self.num_categories is not None
        shape = (*params.shape[:-1], 2, self.latent_dim, self.num_categories - 1)
        loc, log_variance = params.reshape(shape).unbind(-3)
        law = InvertibleGaussianDistribution(loc, (0.5 * log_variance).exp(), self.temperature)
        return Independent(law, 1, validate_args=False)

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return q.sample(torch.Size((num_samples,))).flatten(-2)

    def rsample(self, q: Distribution, num_samples: int) -> Tensor:
        return super().rsample(q, num_samples).flatten(-2)

    def mode(self, q: Distribution) -> Tensor:
        """The image of the loc: the mode before the map."""
        assert isinstance(q, Independent) and isinstance(q.base_dist, InvertibleGaussianDistribution)
        return q.base_dist.to_simplex(q.base_dist.loc).flatten(-2)

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        assert isinstance(q, Independent) and isinstance(q.base_dist, InvertibleGaussianDistribution)
        law = q.base_dist
        x, weights = gaussian_nodes(law.loc.flatten(-2), 16 + 6 * refinement)
        return law.to_simplex(law.loc + law.scale * x.reshape(*x.shape[:-1], *law.loc.shape[-2:])).flatten(-2), weights

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        return super().log_prob(q, self.unflatten(z))


@register("invertible_gaussian")
class InvertibleGaussian(StochasticLayer):
    r"""Invertible Gaussian reparameterization: nearly one-hot draws whose law has a closed-form KL.

    .. math:: z = \mathrm{softmax}\!\left((\mu + \sigma \epsilon, 0) / \tau\right), \qquad
        \epsilon \sim N(0, I_{C - 1})

    The law q is this one on the simplex, not a categorical law: draws in ``train()`` and ``eval()`` follow it exactly
    and the gradient of E_q[f] is unbiased for f continuous and differentiable almost everywhere. What is approximate is
    the model: z is only nearly one-hot, the more so the lower the temperature. The KL between two laws of the same
    temperature is that of the Gaussians before the map.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number C of categories of each variable.
        family: ``"invertible_gaussian"``; params are loc then log-variance, C - 1 of each for every variable.
        num_samples: Number S of draws per example.
        temperature: Temperature of the law; positive and fixed.

    Raises:
        ValueError: ``temperature`` out of range, or sizes that do not fit.

    References:
        Invertible Gaussian Reparameterization: Revisiting the Gumbel-Softmax (Andres Potapczynski, Gabriel
        Loaiza-Ganem, John P. Cunningham, 2019), https://arxiv.org/abs/1912.09588

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("invertible_gaussian", latent_dim=3, num_categories=4)
        >>> layer.in_features, layer(torch.zeros(5, 18)).shape
        (18, torch.Size([5, 12]))
    """

    families = ("invertible_gaussian",)
    unbiased = True
    needs = ("cost_gradient",)
    reference = (
        "Invertible Gaussian Reparameterization: Revisiting the Gumbel-Softmax (Potapczynski, Loaiza-Ganem and "
        "Cunningham, 2019). https://arxiv.org/abs/1912.09588"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        num_categories: int | None = None,
        family: str = "invertible_gaussian",
        num_samples: int = 1,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        check_temperature("temperature", temperature, "0.1 to 1 is usual")
        self.family = InvertibleGaussianFamily(latent_dim, num_categories, float(temperature))

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        assert isinstance(q, Independent) and isinstance(q.base_dist, InvertibleGaussianDistribution)
        law = q.base_dist
        noise = normal((self.num_samples, *law.loc.shape), law.loc)
        z = law.to_simplex(law.loc + law.scale * noise).flatten(-2)
        return self._sample(q, z, log_density=lambda: law.log_prob_of_noise(noise).sum(-1))

    @property
    def temperature(self) -> float:
        """Temperature of the law; it cannot be set."""
        assert isinstance(self.family, InvertibleGaussianFamily)
        return self.family.temperature

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:.4g}"
