"""Straight-through layers: exact discrete draws forward, the gradient of a smooth stand-in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from stochastic_layers.families import CategoricalFamily
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.registry import register

__all__ = ["StraightThrough"]


@register("straight_through")
class StraightThrough(StochasticLayer):
    r"""Straight-through: the gradient passes the draw as if it were the vector of probabilities.

    .. math:: \nabla_l \approx J(p)^\top f'(z), \qquad J(p) = \mathrm{diag}(p) - p p^\top

    (for a bit, :math:`p(1-p) f'(z)`). Approximates the gradient of E_q[f] by a first-order expansion of f at the draw:
    exact for f linear in z, biased otherwise. The cost is evaluated at exact draws of q only.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation (Yoshua Bengio,
        Nicholas Leonard, Aaron Courville, 2013), https://arxiv.org/abs/1308.3432

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("straight_through", latent_dim=3, family="bernoulli")
        >>> logits = torch.zeros(5, 3, requires_grad=True)
        >>> z = layer(logits)
        >>> z.sum().backward()
        >>> z.shape, logits.grad[0, 0].item()
        (torch.Size([5, 3]), 0.25)
    """

    families = ("bernoulli", "categorical")
    unbiased = "when the cost is linear in z"
    needs = ("cost_gradient",)
    reference = (
        "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation (Bengio, Leonard "
        "and Courville, 2013). https://arxiv.org/abs/1308.3432"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        if isinstance(self.family, CategoricalFamily):
            probs = self.family.unflatten(params).softmax(-1).flatten(-2)
        else:
            probs = torch.sigmoid(params)
        hard = self.family.sample(q, self.num_samples)
        return self._sample(q, hard + (probs - probs.detach()))  # in this order the value is exactly hard
