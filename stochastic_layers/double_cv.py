"""Double control variates: leave-one-out with the slopes of the other draws, and its optimal coefficient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stochastic_layers.baselines import RunningMean
from stochastic_layers.control_variates import (
    cost_gradient,
    covariance_product,
    differentiable_points,
    inject,
    joined,
    mean_point,
)
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.options import require_two
from stochastic_layers.registry import register

__all__ = ["DoubleControlVariate", "OptimalCoefficients"]


class OptimalCoefficients(RunningMean):
    r"""The coefficients that minimise the variance of g + sum_i a_i h_i for control variates h_i of mean zero.

    .. math:: a = -M^{-1} c, \qquad M_{ij} = E[h_i^\top h_j], \quad c_i = E[h_i^\top g]

    by running means of M and c over past steps, so that they depend on no draw of this step and the estimator stays
    unbiased. c is not corrected for start-up: the coefficients grow from 0 over the first steps. They are clamped to
    [-2, 2].

    Args:
        count: Number of control variates.
        decay: Weight of the past at each step, in [0, 1).
    """

    def __init__(self, count: int, decay: float = 0.99) -> None:
        super().__init__(decay, size=count * count + count)
        self.count = count

    def forward(self) -> Tensor:
        """The coefficients ``[count]`` of the past; take them when a sample is drawn, before its cost can be seen."""
        square = self.value[: -self.count].reshape(self.count, self.count)
        cross = self.total[-self.count :]
        size = square.diagonal().mean()
        # a ridge far below the moments: control variates that are zero or alike get small coefficients, not NaN
        ridge = 1e-5 * size + torch.finfo(size.dtype).tiny
        eye = torch.eye(self.count, dtype=square.dtype, device=square.device)
        coefficients: Tensor = torch.linalg.solve(square / ridge + eye, -cross / ridge)
        return coefficients.clamp(-2.0, 2.0)

    def observe(self, gradient: Tensor, controls: Tensor) -> None:
        """Count the moments of one step, in training with gradients on.

        Args:
            gradient: g ``[*leading, features]``, detached.
            controls: h ``[count, *leading, features]``, detached.
        """
        if not (self.training and torch.is_grad_enabled()):
            return
        gradient, controls = gradient.to(self.total.dtype), controls.to(self.total.dtype)
        products = torch.einsum("i...d,j...d->...ij", controls, controls).flatten(-2)
        self.update(torch.cat([products, torch.einsum("i...d,...d->...i", controls, gradient)], -1))


@register("double_cv")
class DoubleControlVariate(StochasticLayer):
    r"""Double control variates: leave-one-out REINFORCE, each cost corrected by the slopes at the other draws.

    .. math:: \nabla E_q[f] \approx \frac1S \sum_k \Big(B_k - \frac1{S-1} \sum_{j \ne k} B_j\Big)
        \nabla \log q(z_k) - \frac{a}{S} \sum_k J(\mu) f'(z_k), \qquad
        B_k = f(z_k) + a \, \bar f'_{-k}{}^\top (z_k - \mu), \quad \mu = E_q[z]

    with :math:`\bar f'_{-k}` the mean slope at the other draws and J the derivative of the mean. Approximates the
    gradient of E_q[f], unbiased for f differentiable at the draws, for every a. The cost is evaluated, and
    differentiated, at exact draws of q only. The estimator is linear in a, so that the a of least variance is a
    ratio of two moments, kept as running means: there is nothing to train and nothing that can explode (the paper
    learns a by the gradient of the same variance). A constant cost gives a zero gradient; for a cost linear in z,
    a = -1 removes all variance. Where the cost does not depend on z through autograd it is leave-one-out REINFORCE. To
    compile with ``fullgraph=True``, set
    ``torch._dynamo.config.trace_autograd_ops = True``.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"`` or ``"subset"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number S of draws per example, at least 2.
        decay: Weight of the past in the moments for a.

    Raises:
        ValueError: ``num_samples < 2``, or ``decay`` not in [0, 1).

    References:
        Double Control Variates for Gradient Estimation in Discrete Latent Variable Models (Michalis K. Titsias,
        Jiaxin Shi, 2021), https://arxiv.org/abs/2111.05300

    Example:
        >>> import torch, stochastic_layers as sl
        >>> sl.create("double_cv", latent_dim=3).sample(torch.zeros(5, 3)).z.shape
        torch.Size([2, 5, 3])
    """

    families = ("bernoulli", "categorical", "subset")
    unbiased = True
    needs = ("cost", "cost_gradient")
    reference = (
        "Double Control Variates for Gradient Estimation in Discrete Latent Variable Models (Titsias and Shi, 2021). "
        "https://arxiv.org/abs/2111.05300"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any] = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 2,
        decay: float = 0.99,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        self.coefficients = OptimalCoefficients(1, decay)

    def check_num_samples(self, num_samples: int) -> None:
        require_two(num_samples)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.family.distribution(params)
        mean = mean_point(q, params)
        points = differentiable_points(self.family.sample(q, self.num_samples), params)
        coefficients = self.coefficients()

        def credit(cost: Tensor) -> Tensor:
            ndim = cost.dim()
            slope = cost_gradient(cost, points)
            center = joined(mean, ndim - 1)
            score = joined(points.detach(), ndim) - center  # [S, *lead, features]
            estimate = (from_others(cost.detach()).unsqueeze(-1) * score).mean(0)
            if slope is None:
                return inject(estimate, params)
            slope = joined(slope, ndim)
            others = (slope.sum(0) - slope) / (len(slope) - 1)
            linear = from_others((others * score).sum(-1))
            control = (linear.unsqueeze(-1) * score).mean(0) - covariance_product(
                self.family, params, center, slope.mean(0)
            )
            self.coefficients.observe(estimate, control.unsqueeze(0))
            return inject(estimate + coefficients.to(control.dtype) * control, params)

        return self._sample(q, points, credit=credit)


def from_others(value: Tensor) -> Tensor:
    """Each draw's value minus the mean of the others' ``[S, *leading]``."""
    value = value - value[:1]  # so that equal values are exactly zero below, whatever their rounding
    return (value - value.mean(0)) * (value.shape[0] / (value.shape[0] - 1))
