"""Pathwise layers: the draw is a differentiable function of params and noise, and the gradient flows through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from stochastic_layers import constrained_families as _constrained_families  # noqa: F401 registers the families
from stochastic_layers import continuous_families as _continuous_families  # noqa: F401
from stochastic_layers import gaussian_families as _gaussian_families  # noqa: F401
from stochastic_layers.distributions import open_unit_interval
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.registry import register

__all__ = ["Antithetic", "Gaussian", "Pathwise", "QuasiMonteCarlo"]

SYMMETRIC = ("gaussian", "gaussian_full", "gaussian_low_rank", "laplace", "logistic", "student_t")
SOBOL_BITS = 30


@register("pathwise")
class Pathwise(StochasticLayer):
    r"""Reparameterization of any continuous family: the pathwise estimator, explicit or implicit.

    .. math:: \nabla_\phi E_q[f(z)] \approx \nabla_z f(z) \, \frac{\partial z}{\partial \phi}, \qquad
        \frac{\partial z}{\partial \phi} = -\frac{\partial_\phi F_\phi(z)}{q_\phi(z)}

    Approximates the gradient of E_q[f] for f differentiable almost everywhere and continuous; unbiased there. A jump of
    f is not seen: use ``measure_valued`` or ``reinforce`` for those. The laws of location and scale, ``log_normal``,
    ``kumaraswamy`` and ``power_spherical``'s direction are explicit functions of noise; ``gamma``, ``beta``,
    ``dirichlet`` and the tails of ``student_t`` are differentiated implicitly through the distribution function F, by
    torch's approximations to it.

    Args:
        latent_dim: Number of latent variables (of ``dirichlet``: of points of a simplex; of ``power_spherical``:
            dimension of the space around the sphere).
        family: Name of a continuous family, or ``{"name": "gaussian_low_rank", "rank": 4}``. See
            :mod:`stochastic_layers.continuous_families` for where the params of each are described.
        num_categories: Size of the simplex of ``dirichlet``.
        num_samples: Number S of draws per example.

    Raises:
        ValueError: Unknown family, or sizes that do not fit it.

    References:
        Auto-Encoding Variational Bayes (Diederik P. Kingma, Max Welling, 2013), https://arxiv.org/abs/1312.6114;
        Implicit Reparameterization Gradients (Michael Figurnov, Shakir Mohamed, Andriy Mnih, 2018),
        https://arxiv.org/abs/1805.08498

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("pathwise", latent_dim=3, family="gamma")
        >>> params = torch.zeros(5, layer.in_features, requires_grad=True)
        >>> layer(params).sum().backward()
        >>> params.shape, bool((params.grad != 0).all())
        (torch.Size([5, 6]), True)
    """

    families: ClassVar[tuple[str, ...]] = (
        "gaussian",
        "gaussian_full",
        "gaussian_low_rank",
        "laplace",
        "logistic",
        "student_t",
        "log_normal",
        "gamma",
        "beta",
        "kumaraswamy",
        "dirichlet",
        "power_spherical",
    )
    unbiased = True
    needs = ("cost_gradient",)
    independent_draws = True
    reference = (
        "Implicit Reparameterization Gradients (Figurnov, Mohamed and Mnih, 2018). https://arxiv.org/abs/1805.08498"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any] = "gaussian",
        num_categories: int | None = None,
        num_samples: int = 1,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        return self._sample(q, self.family.rsample(q, self.num_samples))


@register("gaussian")
class Gaussian(Pathwise):
    r"""Gaussian reparameterization: the pathwise estimator of a diagonal normal.

    .. math:: z = \mu + \exp(\tfrac12 \log\sigma^2) \, \epsilon, \qquad \epsilon \sim N(0, I)

    Approximates the gradient of E_q[f] for f differentiable almost everywhere and continuous; unbiased there. A jump of
    f is not seen: use ``reinforce`` with ``family="gaussian"`` for those.

    ``sample`` takes one tensor ``[*batch, 2 * latent_dim]``, loc then log-variance, or a tuple ``(loc, log_variance)``
    of tensors that broadcast.

    Args:
        latent_dim: Number of latent variables.
        family: ``"gaussian"``.
        num_samples: Number S of draws per example.

    References:
        Auto-Encoding Variational Bayes (Diederik P. Kingma, Max Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("gaussian", latent_dim=3)
        >>> layer(torch.zeros(5, 6)).shape, layer((torch.zeros(5, 3), torch.zeros(3))).shape
        (torch.Size([5, 3]), torch.Size([5, 3]))
    """

    families = ("gaussian",)
    reference = "Auto-Encoding Variational Bayes (Kingma and Welling, 2013). https://arxiv.org/abs/1312.6114"

    def __init__(self, latent_dim: int, *, family: str = "gaussian", num_samples: int = 1) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)


@register("antithetic")
class Antithetic(StochasticLayer):
    r"""Antithetic pairs: every pathwise draw comes with its mirror image about the loc.

    .. math:: z_k = \mu + \sigma \epsilon_k, \qquad z_{k + S/2} = \mu - \sigma \epsilon_k

    Approximates the gradient of E_q[f] for f continuous and differentiable almost everywhere; unbiased, because both
    halves follow q. The part of f that is odd about the loc cancels: for f linear the value has no variance, and for f
    quadratic neither has the gradient of the loc. The even part gains nothing: there the S draws are worth S / 2. The
    draws of a pair are dependent; a bound over several independent draws (IWAE) is looser with them or tighter, and
    still a bound.

    Args:
        latent_dim: Number of latent variables.
        family: A symmetric family: ``"gaussian"``, ``"gaussian_full"``, ``"gaussian_low_rank"``, ``"laplace"``,
            ``"logistic"`` or ``"student_t"``.
        num_samples: Number S of draws per example, even; the first S / 2, then their mirror images.

    Raises:
        ValueError: ``num_samples`` is odd, or the family is not symmetric.

    References:
        Differentiable Antithetic Sampling for Variance Reduction in Stochastic Variational Inference (Mike Wu, Noah
        Goodman, Stefano Ermon, 2018), https://arxiv.org/abs/1810.02555

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("antithetic", latent_dim=3)
        >>> z = layer(torch.zeros(5, 6))
        >>> z.shape, bool((z[0] == -z[1]).all())
        (torch.Size([2, 5, 3]), True)
    """

    families = SYMMETRIC
    unbiased = True
    needs = ("cost_gradient",)
    reference = (
        "Differentiable Antithetic Sampling for Variance Reduction in Stochastic Variational Inference (Wu, Goodman "
        "and Ermon, 2018). https://arxiv.org/abs/1810.02555"
    )

    def __init__(self, latent_dim: int, *, family: str | Mapping[str, Any] = "gaussian", num_samples: int = 2) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)

    def check_num_samples(self, num_samples: int) -> None:
        if num_samples % 2:
            raise ValueError(f"needed an even num_samples for antithetic pairs, got {num_samples}; pass 2, 4, ...")

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        z = self.family.rsample(q, self.num_samples // 2)
        return self._sample(q, torch.cat([z, 2 * self.family.mode(q) - z]))


@register("quasi_monte_carlo")
class QuasiMonteCarlo(StochasticLayer):
    r"""Randomized quasi-Monte Carlo: S pathwise draws from a Sobol net instead of independent noise.

    .. math:: z_k = F^{-1}(u_k), \qquad u_k = (s_k \oplus r + \text{jitter}) \in (0, 1)^D

    The S Sobol points :math:`s_k` are shifted digit by digit by one random :math:`r` per example, new in every call, so
    that each :math:`u_k` is uniform: unbiased for every S, for f continuous and differentiable almost everywhere. Two
    draws fall into different halves of every axis, four into different quarters, and so on; S a power of two is best.
    For smooth f of few effective dimensions the variance falls faster than 1 / S. Noise comes from torch's generator;
    under DDP the shifts of the ranks are independent, which is fine. In evaluation the draws are independent.

    Args:
        latent_dim: Number of latent variables, at most 21201.
        family: A family with a differentiable quantile function: ``"gaussian"``, ``"laplace"``, ``"logistic"``,
            ``"log_normal"`` or ``"kumaraswamy"``.
        num_samples: Number S of draws per example; a power of two is best.

    Raises:
        ValueError: ``latent_dim`` is larger than the Sobol sequence has dimensions.

    References:
        Quasi-Monte Carlo Variational Inference (Alexander Buchholz, Florian Wenzel, Stephan Mandt, 2018),
        https://arxiv.org/abs/1807.01604

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("quasi_monte_carlo", latent_dim=3, num_samples=2)
        >>> z = layer(torch.zeros(5, 6))
        >>> z.shape, bool((z[0] * z[1] < 0).all())
        (torch.Size([2, 5, 3]), True)
    """

    families = ("gaussian", "laplace", "logistic", "log_normal", "kumaraswamy")
    unbiased = True
    needs = ("cost_gradient",)
    reference = (
        "Quasi-Monte Carlo Variational Inference (Buchholz, Wenzel and Mandt, 2018). https://arxiv.org/abs/1807.01604"
    )

    points: Tensor

    def __init__(self, latent_dim: int, *, family: str = "gaussian", num_samples: int = 8) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)
        most = torch.quasirandom.SobolEngine.MAXDIM
        if latent_dim > most:
            raise ValueError(f"needed latent_dim <= {most}, got {latent_dim}; use 'antithetic' instead.")
        self.register_buffer("points", self._net(), persistent=False)

    def _net(self) -> Tensor:
        """The first S points of the Sobol sequence ``[S, D]``, as integers of 30 digits."""
        engine = torch.quasirandom.SobolEngine(self.latent_dim)  # type: ignore[no-untyped-call]
        points = engine.draw(self.num_samples, dtype=torch.float64)
        digits: Tensor = (points * 2**SOBOL_BITS).long()
        return digits

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        if len(self.points) != self.num_samples:  # it has been set since
            self.points = self._net().to(self.points.device)
        shape = (*params.shape[:-1], self.latent_dim)
        shift = torch.randint(2**SOBOL_BITS, shape, device=params.device)
        points = self.points.view(-1, *[1] * (params.dim() - 1), self.latent_dim)
        digits = points.bitwise_xor(shift)  # [S, *batch, D]
        # float64, as quantiles far in the tail need more digits of u than float32 has near 1
        u = (digits + torch.rand(digits.shape, dtype=torch.float64, device=params.device)) / 2**SOBOL_BITS
        u = u.clamp(torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float64).eps)
        return self._sample(q, _quantile(q, u, params.dtype))


def _quantile(q: Distribution, u: Tensor, dtype: torch.dtype) -> Tensor:
    assert isinstance(q, Independent)
    z: Tensor = q.base_dist.icdf(u).to(dtype)
    # rounding may reach the ends of an interval, where the density is infinite
    return open_unit_interval(z) if q.base_dist.support is constraints.unit_interval else z
