"""Relaxed layers: a continuous law close to the discrete one, through which the gradient flows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stochastic_layers.families import CategoricalFamily
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.registry import register

__all__ = ["GumbelSoftmax", "TemperedLayer"]


class TemperedLayer(StochasticLayer):
    """Base of layers with a temperature, which is checkpointed, can be scheduled, and can be learned.

    Assign ``layer.temperature = 0.5`` to change it. It is kept as its logarithm ``[1]``, so that a learned temperature
    stays positive.

    Args:
        latent_dim: Number of latent variables.
        family: Name of the distribution family.
        num_categories: Number of categories of each variable of a categorical family.
        num_samples: Number S of draws per example.
        temperature: The temperature at the start; positive.
        learn_temperature: Whether the temperature is a parameter.

    Raises:
        ValueError: ``temperature`` is not positive and finite.
    """

    log_temperature: Tensor

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
        value = torch.tensor([_log_of(temperature)])
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
            self.log_temperature.fill_(_log_of(value))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={float(self.temperature.detach()):.4g}"


def _log_of(temperature: float) -> float:
    if not 0 < float(temperature) < math.inf:
        raise ValueError(f"needed temperature > 0, got {temperature}; 0.1 to 1 is usual.")
    return math.log(float(temperature))


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
        ValueError: ``temperature <= 0``, or sizes that do not fit the family.

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
    needs = ("cost_gradient", "relaxable_cost")
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

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        temperature = self.temperature.to(params.dtype)
        shape = (self.num_samples, *params.shape)
        if isinstance(self.family, CategoricalFamily):
            noise = torch.empty(shape, dtype=params.dtype, device=params.device).exponential_().log_()
            soft = (self.family.unflatten((params - noise) / temperature)).softmax(-1)
            if self.hard:
                index = soft.detach().argmax(-1, keepdim=True)
                hard = torch.zeros_like(soft).scatter_(-1, index, 1.0)
                soft = hard + (soft - soft.detach())  # in this order the value is exactly one-hot
            return self._sample(q, soft.flatten(-2))
        u = torch.rand(shape, dtype=params.dtype, device=params.device)
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps / 2)
        score = (params + u.logit()) / temperature
        soft = score.sigmoid()
        if self.hard:
            soft = (score.detach() > 0).to(soft.dtype) + (soft - soft.detach())
        return self._sample(q, soft)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hard={self.hard}"
