"""Hard concrete gates: numbers between 0 and 1 that are exactly 0 or 1 with positive probability."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints
from torch.nn.functional import logsigmoid, softplus

from stochastic_layers.families import Family, register_family
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.noise import logistic
from stochastic_layers.options import check_temperature
from stochastic_layers.quadrature import gauss_legendre, product_rule
from stochastic_layers.registry import register

__all__ = ["HardConcrete", "HardConcreteDistribution", "HardConcreteFamily"]


class HardConcreteDistribution(Distribution):
    r"""Law of a binary Concrete variable, stretched to [low, high] and cut off at 0 and 1.

    Its log-probability is mixed: a probability at 0 and 1, a density in between. Two of these laws can be compared by
    it, because the atoms of all are the same two points.

    Args:
        logits: Location ``[*batch]``.
        temperature: Temperature of the Concrete variable.
        stretch: (low, high) with low < 0 and high > 1.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float, stretch: tuple[float, float]) -> None:
        self.logits, self.temperature, self.stretch = logits, temperature, stretch
        super().__init__(logits.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HardConcreteDistribution:
        """The same law with a larger batch shape."""
        return HardConcreteDistribution(self.logits.expand(batch_shape), self.temperature, self.stretch)

    @property
    def log_prob_zero(self) -> Tensor:
        """log P(z = 0)."""
        low, high = self.stretch
        return logsigmoid(self.temperature * math.log(-low / high) - self.logits)

    @property
    def log_prob_one(self) -> Tensor:
        """log P(z = 1)."""
        low, high = self.stretch
        return logsigmoid(self.logits - self.temperature * math.log((1 - low) / (high - 1)))

    @property
    def gate(self) -> Tensor:
        """The z of the logits without noise."""
        return self._cut(torch.sigmoid(self.logits))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self._cut(((self.logits + logistic(shape, self.logits)) / self.temperature).sigmoid())

    def log_prob(self, value: Tensor) -> Tensor:
        low, high = self.stretch
        inside = (value > 0) & (value < 1)
        s = (torch.where(inside, value, 0.5) - low) / (high - low)  # the Concrete variable; a dummy where unused
        noise = self.temperature * s.logit() - self.logits  # logistic
        density = -noise - 2 * softplus(-noise) - s.log() - (-s).log1p() + math.log(self.temperature / (high - low))
        return torch.where(inside, density, torch.where(value <= 0, self.log_prob_zero, self.log_prob_one))

    def _cut(self, s: Tensor) -> Tensor:
        low, high = self.stretch
        return (s * (high - low) + low).clamp(0, 1)


@register_family
class HardConcreteFamily(Family):
    """Independent hard concrete gates; params are logits ``[*batch, latent_dim]``, z is in [0, 1].

    The mode of a law with both atoms and a density is a matter of definition; here it is the gate without noise, by
    which hard concrete gates are commonly evaluated.
    """

    name = "hard_concrete"
    discrete = False

    def __init__(
        self,
        latent_dim: int,
        num_categories: int | None = None,
        temperature: float = 2 / 3,
        stretch: tuple[float, float] = (-0.1, 1.1),
    ) -> None:
        super().__init__(latent_dim, num_categories)
        self.temperature, self.stretch = temperature, stretch

    def standard(self) -> Distribution:
        """The symmetric law, of logits 0."""
        return self.distribution(torch.zeros(self.in_features))

    def distribution(self, params: Tensor) -> Distribution:
        return Independent(HardConcreteDistribution(params, self.temperature, self.stretch), 1, validate_args=False)

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return q.sample(torch.Size((num_samples,)))

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        x, w = gauss_legendre(60 * 2**refinement)  # between the atoms, which count with their probability
        grid, weights = product_rule(
            torch.cat([x.new_zeros(1), x, x.new_ones(1)]), torch.cat([w.new_ones(1), w, w.new_ones(1)]), self.latent_dim
        )
        batch, dtype = q.batch_shape, gates(q).logits.dtype
        shape = (-1, *[1] * len(batch))
        z = grid.to(dtype).view(*shape, self.latent_dim).expand(-1, *batch, -1)
        return z, weights.to(dtype).view(shape) * self.log_prob(q, z).exp()

    def mode(self, q: Distribution) -> Tensor:
        return gates(q).gate


def gates(q: Distribution) -> HardConcreteDistribution:
    """The law of one gate under ``Independent``."""
    assert isinstance(q, Independent) and isinstance(q.base_dist, HardConcreteDistribution)
    return q.base_dist


@register("hard_concrete")
class HardConcrete(StochasticLayer):
    r"""Hard concrete gates, for sparse networks: reparameterized draws that are often exactly 0 or 1.

    .. math:: s = \sigma((l + \log u - \log(1 - u)) / \beta), \qquad
        z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \qquad
        P(z \neq 0) = \sigma(l - \beta \log(-\gamma / \zeta))

    The law q is the hard concrete law itself, not the Bernoulli law it stands for: draws in ``train()`` and ``eval()``
    follow it exactly, and the gradient of E_q[f] is unbiased for f continuous and differentiable almost everywhere. The
    penalty that makes gates close is :meth:`nonzero_probability`, to be added to the loss. There is no closed form of
    the KL between two of these laws; ``log_prob`` serves Monte Carlo estimates.

    Args:
        latent_dim: Number of gates.
        family: ``"hard_concrete"``.
        num_samples: Number S of draws per example.
        temperature: Temperature beta of the law; positive and fixed.
        stretch: The interval (gamma, zeta) before the cut; gamma < 0 and zeta > 1.

    Raises:
        ValueError: ``temperature`` or ``stretch`` out of range.

    References:
        Learning Sparse Neural Networks through L0 Regularization (Christos Louizos, Max Welling, Diederik P. Kingma,
        2017), https://arxiv.org/abs/1712.01312

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("hard_concrete", latent_dim=3)
        >>> logits = torch.zeros(5, 3, requires_grad=True)
        >>> loss = layer(logits).sum(-1) + 0.1 * layer.nonzero_probability(logits).sum(-1)
        >>> loss.shape
        torch.Size([5])
    """

    families = ("hard_concrete",)
    unbiased = True
    needs = ("cost_gradient",)
    reference = (
        "Learning Sparse Neural Networks through L0 Regularization (Louizos, Welling and Kingma, 2017). "
        "https://arxiv.org/abs/1712.01312"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "hard_concrete",
        num_samples: int = 1,
        temperature: float = 2 / 3,
        stretch: tuple[float, float] = (-0.1, 1.1),
    ) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)
        check_temperature("temperature", temperature, "2/3 is usual")
        low, high = (float(end) for end in stretch)
        if not -math.inf < low < 0 < 1 < high < math.inf:
            raise ValueError(
                f"needed stretch (low, high) with low < 0 and high > 1, got {stretch}; -0.1, 1.1 is usual."
            )
        self.family = HardConcreteFamily(latent_dim, None, float(temperature), (low, high))

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        return self._sample(q, q.rsample(torch.Size((self.num_samples,))))

    @property
    def temperature(self) -> float:
        """Temperature of the law; it cannot be set."""
        return self._law.temperature

    @property
    def _law(self) -> HardConcreteFamily:
        assert isinstance(self.family, HardConcreteFamily)
        return self.family

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:.4g}, stretch={self._law.stretch}"

    def nonzero_probability(self, params: Tensor) -> Tensor:
        """P(z != 0) of each gate ``[*batch, latent_dim]``, differentiable; its sum is the expected L0 norm."""
        return -torch.expm1(gates(self.distribution(params)).log_prob_zero)
