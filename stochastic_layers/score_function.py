"""Score-function layers: the gradient is the cost times the gradient of the log-probability of the draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stochastic_layers.baselines import create_baseline
from stochastic_layers.layer import Sample, StochasticLayer, sum_rightmost
from stochastic_layers.registry import register

__all__ = ["Reinforce"]


@register("reinforce")
class Reinforce(StochasticLayer):
    r"""REINFORCE: the score-function estimator, with a baseline.

    .. math:: \nabla E_q[f(z)] \approx \frac1S \sum_k (f(z_k) - b_k) \nabla \log q(z_k)

    Approximates the gradient of E_q[f] for any f, differentiable or not, discrete or continuous z. Unbiased, because no
    baseline depends on the draw that it is subtracted from. With ``baseline="leave_one_out"`` it is RLOO, also known as
    VarGrad.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"`` or ``"gaussian"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example.
        baseline: ``"none"``, ``"moving_average"``, ``"learned"``, ``"leave_one_out"``, a mapping such as
            ``{"name": "moving_average", "decay": 0.9}``, or a module (see :class:`~stochastic_layers.Baseline`).

    Raises:
        ValueError: Unknown baseline, or ``num_samples < 2`` with ``"leave_one_out"``.

    References:
        Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Ronald J. Williams,
        1992), https://doi.org/10.1007/BF00992696

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("reinforce", latent_dim=3, num_samples=4, baseline="leave_one_out")
        >>> logits = torch.zeros(5, 3, requires_grad=True)
        >>> sample = layer.sample(logits)
        >>> loss = sample.surrogate((sample.z.sum(-1) - 1) ** 2)
        >>> loss.mean().backward()
        >>> sample.z.shape, loss.shape, logits.grad.shape
        (torch.Size([4, 5, 3]), torch.Size([5]), torch.Size([5, 3]))
    """

    families = ("bernoulli", "categorical", "gaussian")
    unbiased = True
    needs = ("cost",)
    reference = (
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992). "
        "https://doi.org/10.1007/BF00992696"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        baseline: str | Mapping[str, Any] | nn.Module | None = "moving_average",
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        self.baseline = create_baseline(baseline, num_samples=num_samples, context_features=self.in_features)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        z = self.family.sample(q, self.num_samples)
        context = (params if context is None else context).detach()

        def credit(cost: Tensor) -> Tensor:
            log_prob = sum_rightmost(self.family.log_prob(q, z), cost.dim())  # [S, *lead]
            cost = cost.detach()
            if self.baseline is None:
                return (cost * log_prob).mean(0)
            prediction: Tensor = self.baseline(cost, context)
            term = ((cost - prediction.detach()) * log_prob).mean(0)
            if prediction.requires_grad:  # a learned baseline is fitted to the cost by least squares
                term = term + (prediction - cost).square().mean(0)
            return term

        return self._sample(q, z, credit=credit)
