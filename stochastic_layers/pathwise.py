"""Pathwise layers: the draw is a differentiable function of params and noise, and the gradient flows through it."""

from __future__ import annotations

import torch
from torch import Tensor

from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.registry import register

__all__ = ["Gaussian"]


@register("gaussian")
class Gaussian(StochasticLayer):
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
    unbiased = True
    needs = ("cost_gradient",)
    reference = "Auto-Encoding Variational Bayes (Kingma and Welling, 2013). https://arxiv.org/abs/1312.6114"

    def __init__(self, latent_dim: int, *, family: str = "gaussian", num_samples: int = 1) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        loc, scale = q.mean, q.stddev
        noise = torch.randn(self.num_samples, *loc.shape, dtype=loc.dtype, device=loc.device)
        return self._sample(q, torch.addcmul(loc, scale, noise))
