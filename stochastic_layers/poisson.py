"""Counts: a relaxation of the Poisson law by arrival times, and straight-through weights of finite order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import Poisson as PoissonDistribution

from stochastic_layers.families import Family, register_family
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.options import check_positive_int
from stochastic_layers.quadrature import product_rule
from stochastic_layers.registry import register
from stochastic_layers.relaxed import TemperedLayer

__all__ = ["Poisson", "PoissonFamily", "PoissonStraightThrough"]

MAX_LOG_RATE = 16.0  # counts stay below 2^24, up to which float32 holds every integer
MIN_LOG_RATE = -80.0  # exp(-80) is a normal float32, and its counts are zero


@register_family
class PoissonFamily(Family):
    """Independent counts; params are log-rates ``[*batch, latent_dim]``, z is 0, 1, 2, ...

    Rates below exp(-80) count as exp(-80).
    """

    name = "poisson"
    discrete = True
    parts = ("log_rate",)

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if high > MAX_LOG_RATE:
            raise ValueError(
                f"needed log-rates up to {MAX_LOG_RATE:g}, got {high:.3g}, whose counts are not exact in float32; "
                "params are logarithms of rates: clamp them or lower the learning rate."
            )

    def standard(self) -> Distribution:
        """Rate 1."""
        return self.distribution(torch.zeros(self.in_features))

    def distribution(self, params: Tensor) -> Distribution:
        rate = params.clamp_min(MIN_LOG_RATE).exp()
        return Independent(PoissonDistribution(rate, validate_args=False), 1, validate_args=False)

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        rate = q.mean.detach()
        return torch.poisson(rate.expand(num_samples, *rate.shape))

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        rate = q.mean
        # defined for real z >= 0 too, so that it can be read at relaxed counts
        return (z * rate.log() - rate - torch.lgamma(z + 1)).sum(-1)

    def mode(self, q: Distribution) -> Tensor:
        return q.mean.floor()

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        highest = float(q.mean.detach().max())  # twelve deviations further up, nothing is left
        counts = torch.arange(float(int(highest + (12 + refinement) * highest**0.5 + 25)), dtype=q.mean.dtype)
        z = product_rule(counts, counts, self.latent_dim)[0]
        z = z.view(-1, *[1] * len(q.batch_shape), self.latent_dim).expand(-1, *q.batch_shape, -1)
        return z, self.log_prob(q, z).exp()


@register("poisson")
class Poisson(TemperedLayer):
    r"""Poisson counts relaxed through arrival times: each arrival counts by how clearly it comes before time 1.

    .. math:: z = \sum_n h(t_n), \qquad h(t) = 3 s^2 - 2 s^3, \quad
        s = \min(1, \max(0, \tfrac{1 + \tau - t}{2 \tau})), \qquad
        \frac{\partial z}{\partial \log \lambda} = -\sum_n h'(t_n) \, t_n

    where :math:`t_n` are the arrivals of a Poisson process of rate :math:`\lambda`, which move as :math:`1 / \lambda`.
    Approximates the gradient of E_q[f] by that of the relaxed objective E[f(z)]; biased, but exact for f linear in z at
    every temperature, because h has integral 1 (Campbell): the mean of z is :math:`\lambda`. Its variance is
    :math:`\lambda (1 - \tfrac{9}{35} \tau)` instead of :math:`\lambda`. The cost must accept real counts.

    Only arrivals within the temperature of time 1 are random in h; the earlier ones are drawn as one count. Of those
    ``max_arrivals`` are tracked; further ones count as hard 0 or 1 and the slope is scaled up for them, which keeps the
    mean and its gradient exact.

    Args:
        latent_dim: Number of latent variables.
        family: ``"poisson"``; params are log-rates.
        num_samples: Number S of draws per example.
        temperature: Half-width of the soft threshold, in (0, 1].
        max_arrivals: Largest number of arrivals near time 1 that are tracked; memory grows with it.

    Raises:
        ValueError: ``temperature`` outside (0, 1] or ``max_arrivals < 1``.

    References:
        Poisson Variational Autoencoder (Hadi Vafaii, Dekel Galor, Jacob L. Yates, 2024),
        https://arxiv.org/abs/2405.14473; A Hitchhiker's Guide to Poisson Gradient Estimation (Michael Ibrahim, Hanqi
        Zhao, Eli Sennesh, Zhi Li, Anqi Wu, Jacob L. Yates, Chengrui Li, Hadi Vafaii, 2026),
        https://arxiv.org/abs/2602.03896

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("poisson", latent_dim=3)
        >>> layer(torch.zeros(5, 3)).shape, layer.eval()(torch.ones(100, 3)).frac().unique()
        (torch.Size([5, 3]), tensor([0.]))
    """

    families = ("poisson",)
    unbiased = "when the cost is linear in z"
    needs = ("cost_gradient", "relaxable_cost")
    exact_draws = False
    reference = (
        "A Hitchhiker's Guide to Poisson Gradient Estimation (Ibrahim, Zhao, Sennesh, Li, Wu, Yates, Li and Vafaii, "
        "2026). https://arxiv.org/abs/2602.03896"
    )
    highest_temperature = 1.0

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "poisson",
        num_samples: int = 1,
        temperature: float = 0.5,
        max_arrivals: int = 16,
    ) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples, temperature=temperature)
        self.max_arrivals = check_positive_int("max_arrivals", max_arrivals, "16 is usual")

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        rate = q.mean.detach().expand(self.num_samples, *params.shape)
        width = self.temperature.to(params.dtype).clamp(max=1.0)
        early = torch.poisson((1 - width) * rate)
        near = torch.poisson(2 * width * rate)
        tracked = near.clamp(max=self.max_arrivals)
        s = torch.rand(self.max_arrivals, *rate.shape, dtype=rate.dtype, device=rate.device)  # uniform, as arrivals are
        ranks = torch.arange(self.max_arrivals, dtype=rate.dtype, device=rate.device)
        counts = ranks.view(-1, *[1] * rate.dim()) < tracked
        soft = (counts * s.square() * (3 - 2 * s)).sum(0)
        # -h'(t) t with t = 1 + width - 2 width s, averaged over the tracked arrivals and multiplied by all of them
        slope = (counts * (3 / width) * s * (1 - s) * (1 + width - 2 * width * s)).sum(0)
        slope = slope * (near / tracked.clamp_min(1))
        rest = torch.binomial(near - tracked, torch.full_like(near, 0.5))
        return self._sample(q, early + soft + rest + slope * (params - params.detach()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_arrivals={self.max_arrivals}"


@register("poisson_straight_through")
class PoissonStraightThrough(StochasticLayer):
    r"""Straight-through for Poisson counts, with weights that make it exact for polynomials up to a given degree.

    .. math:: \nabla_{\log \lambda} \approx w_k(z) f'(z), \qquad w_1 = \lambda, \quad
        w_2 = \tfrac12 (z + \lambda), \quad
        w_3 = \tfrac{5}{12} \lambda + \tfrac{8}{12} z + \tfrac{1}{12 \lambda} z (1 - z)

    Approximates :math:`\nabla_{\log \lambda} E_q[f] = \lambda E_q[f(z + 1) - f(z)]`. The weight of order k satisfies
    :math:`E[w_k(z) f'(z)] = \lambda E[f(z + 1) - f(z)]` for all polynomials of degree up to k in each count, by the
    recursion :math:`E[z g(z)] = \lambda E[g(z + 1)]`; for other costs it is biased. Evaluated at exact draws. At
    order 3 and a low rate the rare counts above 1 have large negative weights: prefer order 2 there.

    Args:
        latent_dim: Number of latent variables.
        family: ``"poisson"``; params are log-rates.
        num_samples: Number S of draws per example.
        order: Degree 1, 2 or 3.

    Raises:
        ValueError: ``order`` is not 1, 2 or 3.

    References:
        Straight-Through Estimator as Projected Wasserstein Gradient Flow (Pengyu Cheng, Chang Liu, Chunyuan Li, Dinghan
        Shen, Ricardo Henao, Lawrence Carin, 2019), https://arxiv.org/abs/1910.02176; the weights are derived above.

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("poisson_straight_through", latent_dim=3, order=2)
        >>> layer(torch.zeros(5, 3)).frac().unique()
        tensor([0.])
    """

    families = ("poisson",)
    unbiased = "when the cost is a polynomial of degree up to `order` in each count"
    needs = ("cost_gradient",)
    reference = (
        "Straight-Through Estimator as Projected Wasserstein Gradient Flow (Cheng, Liu, Li, Shen, Henao and Carin, "
        "2019). https://arxiv.org/abs/1910.02176"
    )

    def __init__(self, latent_dim: int, *, family: str = "poisson", num_samples: int = 1, order: int = 2) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)
        if order not in (1, 2, 3):
            raise ValueError(f"needed order 1, 2 or 3, got {order!r}; 2 is usual.")
        self.order = order

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        counts = self.family.sample(q, self.num_samples)
        weight = rate = q.mean.detach()
        if self.order == 2:
            weight = 0.5 * (counts + rate)
        elif self.order == 3:
            weight = (5 * rate + 8 * counts + counts * (1 - counts) / rate) / 12
        return self._sample(q, counts + weight * (params - params.detach()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}"
