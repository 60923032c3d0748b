"""Relaxed layers: a continuous law close to the discrete one, through which the gradient flows."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from stochastic_layers.auxiliary import kernels_usable, with_value
from stochastic_layers.categorical import one_hot, softmax, tempered_softmax
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.families import Family
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.noise import log_exponential, logistic
from stochastic_layers.options import check_temperature
from stochastic_layers.registry import register
from stochastic_layers.simplex_maps import entmax15, sparsemax

__all__ = ["EntmaxGumbel", "GumbelSoftmax", "TemperedLayer", "perturbed"]


def perturbed(family: Family, params: Tensor, num_samples: int) -> Tensor:
    """Logits plus noise, whose argmax (or sign) is an exact draw: ``[S, *batch, latent_dim(, num_categories)]``.

    Gumbel noise for a categorical family; its difference, which is logistic, for bits.
    """
    shape = (num_samples, *params.shape)
    params = params.unsqueeze(0)  # for one sample nothing is expanded, and nothing to be summed in backward
    if isinstance(family, CategoricalFamily):
        return family.unflatten(log_exponential(shape, params).neg_().add_(params))
    return logistic(shape, params).add_(params)


class TemperedLayer(StochasticLayer):
    """Base of layers with a temperature, which is checkpointed, can be scheduled, and can be learned.

    Assign ``layer.temperature = 0.5`` to change it. It is kept as its logarithm ``[1]``, so that a learned temperature
    stays positive.

    Args:
        latent_dim: Number of latent variables.
        family: Name of the distribution family.
        num_categories: Number of categories of each variable of a categorical family.
        num_samples: Number S of draws per example.
        temperature: The temperature at the start, from ``lowest_temperature`` to ``highest_temperature``.
        learn_temperature: Whether the temperature is a parameter.

    Raises:
        ValueError: ``temperature`` is out of range.
    """

    log_temperature: Tensor
    lowest_temperature: ClassVar[float] = 1e-6
    highest_temperature: ClassVar[float] = 1e6
    usual_temperatures: ClassVar[str] = "0.1 to 1"

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str,
        num_categories: int | None = None,
        num_samples: int = 1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        value = torch.tensor([self._log_of(temperature)])
        if learn_temperature:
            self.log_temperature = nn.Parameter(value)
        else:
            self.register_buffer("log_temperature", value)

    @property
    def temperature(self) -> Tensor:
        """The temperature ``[1]``; assign a positive number to change it."""
        return self.log_temperature.exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        with torch.no_grad():
            self.log_temperature.fill_(self._log_of(value))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={float(self.temperature.detach()):.4g}"

    def _log_of(self, temperature: float) -> float:
        limits = {"least": self.lowest_temperature, "most": self.highest_temperature}
        check_temperature("temperature", temperature, f"{self.usual_temperatures} is usual", **limits)
        return math.log(temperature)


@register("gumbel_softmax")
class GumbelSoftmax(TemperedLayer):
    r"""Gumbel-softmax, also known as the Concrete relaxation; binary Concrete for ``family="bernoulli"``.

    .. math:: z = \mathrm{softmax}((l + G) / \tau), \qquad G_i = -\log E_i, \; E_i \sim \mathrm{Exp}(1)

    Approximates the gradient of E_q[f] by that of the relaxed objective E[f(z)], which is another function: biased,
    the less so the lower the temperature, while the variance grows. The cost must accept points inside the simplex, or
    be given hard ones by ``hard=True``: then the forward value is the one-hot ``argmax`` (an exact draw of q) and the
    backward pass that of the relaxed draw, the straight-through Gumbel estimator.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number of categories of each variable.
        family: ``"categorical"`` or ``"bernoulli"``.
        num_samples: Number S of draws per example.
        temperature: Temperature, positive; the limit 0 is the discrete law.
        learn_temperature: Whether the temperature is a parameter.
        hard: Whether the forward value is discrete.

    Raises:
        ValueError: ``temperature`` out of range, or sizes that do not fit the family.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Eric Jang, Shixiang Gu, Ben Poole, 2016),
        https://arxiv.org/abs/1611.01144; The Concrete Distribution: A Continuous Relaxation of Discrete Random
        Variables (Chris J. Maddison, Andriy Mnih, Yee Whye Teh, 2016), https://arxiv.org/abs/1611.00712

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("gumbel_softmax", latent_dim=3, num_categories=4, temperature=0.5)
        >>> z = layer(torch.zeros(5, 12))
        >>> z.shape, bool(torch.allclose(z.view(5, 3, 4).sum(-1), torch.ones(5, 3)))
        (torch.Size([5, 12]), True)
    """

    families = ("categorical", "bernoulli")
    unbiased = False
    needs: tuple[str, ...] = ("cost_gradient", "relaxable_cost")
    exact_draws = False
    reference = "Categorical Reparameterization with Gumbel-Softmax (Jang, Gu and Poole, 2016). https://arxiv.org/abs/1611.01144"

    def __init__(
        self,
        latent_dim: int,
        *,
        num_categories: int | None = None,
        family: str = "categorical",
        num_samples: int = 1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        hard: bool = False,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
            learn_temperature=learn_temperature,
        )
        self.hard = hard
        if hard:
            self.needs = ("cost_gradient",)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q, family, temperature = self.law(params), self.family, self.temperature.to(params.dtype)
        fused = kernels_usable() and not temperature.requires_grad
        if isinstance(family, CategoricalFamily):
            scores = perturbed(family, params.detach() if fused else params, self.num_samples)
            # hard draws are those of the scores: of the soft draw the largest entries may tie after rounding
            hard = one_hot(scores.detach().argmax(-1, keepdim=True), scores).flatten(-2) if self.hard else None
            if fused:
                z = tempered_softmax(family.unflatten(params.unsqueeze(0)), scores, temperature).flatten(-2)
            else:
                z = softmax(scores / temperature).flatten(-2)
        else:
            scores = perturbed(family, params, self.num_samples)
            hard = (scores.detach() > 0).to(scores.dtype) if self.hard else None
            # in their own memory where no gradient asks for them
            z = (scores.div_(temperature) if fused else scores / temperature).sigmoid()
        return self._sample(q, z if hard is None else with_value(hard, z))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hard={self.hard}"


@register("entmax_gumbel")
class EntmaxGumbel(TemperedLayer):
    r"""Gumbel-entmax: Gumbel-softmax with a map onto the simplex that reaches its corners and edges.

    .. math:: z = \alpha\text{-entmax}((l + G) / \tau), \qquad G_i = -\log E_i, \; E_i \sim \mathrm{Exp}(1)

    Approximates the gradient of E_q[f] by that of the relaxed objective E[f(z)]: biased, the less so the lower the
    temperature. Many draws are exactly one-hot already at moderate temperatures; those have no gradient. The cost must
    accept points on the edges and inside of the simplex.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number of categories of each variable.
        family: ``"categorical"`` or ``"bernoulli"``.
        num_samples: Number S of draws per example.
        temperature: Temperature, positive; the limit 0 is the discrete law.
        learn_temperature: Whether the temperature is a parameter.
        alpha: 1.5 for entmax with a smooth boundary, 2 for sparsemax.

    Raises:
        ValueError: ``alpha`` is neither 1.5 nor 2, ``temperature`` out of range, or sizes that do not fit the family.

    References:
        Gradient Estimation with Stochastic Softmax Tricks (Max B. Paulus, Dami Choi, Daniel Tarlow, Andreas Krause,
        Chris J. Maddison, 2020), https://arxiv.org/abs/2006.08063; Sparse Sequence-to-Sequence Models (Ben Peters, Vlad
        Niculae, Andre F. T. Martins, 2019), https://arxiv.org/abs/1905.05702

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("entmax_gumbel", latent_dim=3, num_categories=4, alpha=2)
        >>> z = layer(torch.zeros(5, 12))
        >>> z.shape, bool((z == 0).any())
        (torch.Size([5, 12]), True)
    """

    families = ("categorical", "bernoulli")
    unbiased = False
    needs = ("cost_gradient", "relaxable_cost")
    exact_draws = False
    reference = (
        "Gradient Estimation with Stochastic Softmax Tricks (Paulus, Choi, Tarlow, Krause and Maddison, 2020). "
        "https://arxiv.org/abs/2006.08063"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        num_categories: int | None = None,
        family: str = "categorical",
        num_samples: int = 1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        alpha: float = 1.5,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
            learn_temperature=learn_temperature,
        )
        if alpha not in (1.5, 2):
            raise ValueError(f"needed alpha 1.5 (entmax) or 2 (sparsemax), got {alpha!r}; for 1 use 'gumbel_softmax'.")
        self.alpha = float(alpha)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        scores = perturbed(self.family, params, self.num_samples) / self.temperature.to(params.dtype)
        if isinstance(self.family, CategoricalFamily):
            return self._sample(q, (entmax15(scores) if self.alpha == 1.5 else sparsemax(scores)).flatten(-2))
        # the first coordinate of the map at (score, 0), in closed form; flat beyond the clamp as the map is
        if self.alpha == 2:
            return self._sample(q, (0.5 + 0.5 * scores).clamp(0, 1))
        bounded = scores.clamp(-2, 2)
        return self._sample(q, (bounded + (8 - bounded.square()).sqrt()).square() / 16)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:g}"
