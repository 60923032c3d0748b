"""RODEO: leave-one-out REINFORCE with control variates from a discrete Stein operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochastic_layers.control_variates import (
    CostMoments,
    RelativeVariance,
    cost_gradient,
    differentiable_points,
    inject,
    joined,
    mean_point,
)
from stochastic_layers.double_cv import OptimalCoefficients, from_others
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.options import require_two
from stochastic_layers.registry import register

__all__ = ["Rodeo"]


@register("rodeo")
class Rodeo(StochasticLayer):
    r"""RODEO: leave-one-out REINFORCE with two control variates of the Gibbs Stein operator.

    .. math:: \nabla E_q[f] \approx \frac1S \sum_k \Big(f(z_k) - \frac1{S-1} \sum_{j \ne k}
        \big(f(z_j) + \alpha \, (A h_j)(z_j)\big)\Big) \nabla \log q(z_k) + \beta \, (A \tilde h_k)(z_k)

    .. math:: (A h)(z) = \sum_i q(\neg z_i) \, \big(h(\neg_i z) - h(z)\big), \qquad E_q[A h] = 0

    where :math:`\neg_i` flips bit i. :math:`h_k` and :math:`\tilde h_k = h'_k(y) \nabla \log q(y)` are averages over
    the other draws j of a surrogate of the cost at y, :math:`f(z_j) + f'(z_j)^\top (y - z_j)` minus the running mean of
    the cost, plus a learned correction, a network of the two summands. Approximates the gradient of E_q[f], unbiased
    for f differentiable at the draws. The cost is evaluated, and differentiated, at exact draws only: the neighbours
    are seen by the surrogate.

    Where this differs from the paper: there the surrogate is the network alone (``taylor=False``), of inputs that are
    not centred and scaled by the running moments of the cost; and there :math:`\alpha` and :math:`\beta` are learned by
    the network's gradient. Here they are the coefficients of least variance by running moments (see
    :class:`~stochastic_layers.double_cv.OptimalCoefficients`). The network receives the gradient of the estimator's
    squared norm relative to its running mean, averaged as the loss is, and nothing else does. A constant cost gives a
    zero gradient, since its coefficients are zero. Where the cost does not depend on z through autograd it is
    leave-one-out REINFORCE. To compile with ``fullgraph=True``, set
    ``torch._dynamo.config.trace_autograd_ops = True``.

    Memory: the slope gives the surrogate at all neighbours at once, so that nothing of size latent_dim squared is
    built; the largest tensor is the network's hidden layer ``[S (S - 1), *batch, latent_dim, hidden_features]``.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``.
        num_samples: Number S of draws per example, at least 2.
        hidden_features: Width of the network's hidden layer.
        decay: Weight of the past in the moments of the coefficients.
        taylor: Whether the surrogate is the Taylor expansion plus the network, or the network alone.

    Raises:
        ValueError: ``num_samples < 2``, or ``decay`` not in [0, 1).

    References:
        Gradient Estimation with Discrete Stein Operators (Jiaxin Shi, Yuhao Zhou, Jessica Hwang, Michalis K. Titsias,
        Lester Mackey, 2022), https://arxiv.org/abs/2202.09497

    Example:
        >>> import torch, stochastic_layers as sl
        >>> sl.create("rodeo", latent_dim=3).sample(torch.zeros(5, 3)).z.shape
        torch.Size([2, 5, 3])
    """

    families = ("bernoulli",)
    unbiased = True
    needs = ("cost", "cost_gradient")
    reference = (
        "Gradient Estimation with Discrete Stein Operators (Shi, Zhou, Hwang, Titsias and Mackey, 2022). "
        "https://arxiv.org/abs/2202.09497"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_samples: int = 2,
        hidden_features: int = 100,
        decay: float = 0.99,
        taylor: bool = True,
    ) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)
        require_two(num_samples)
        last = nn.Linear(hidden_features, 2)
        if taylor:  # at the start the surrogates are the Taylor expansion itself
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.taylor = taylor
        self.network = nn.Sequential(nn.Linear(2, hidden_features), nn.LeakyReLU(), last)
        self.coefficients = OptimalCoefficients(2, decay)
        self.moments = CostMoments(decay)
        self.variance = RelativeVariance()

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.family.distribution(params)
        mean = mean_point(self.family, params)
        points = differentiable_points(self.family.sample(q, self.num_samples), params)

        def credit(cost: Tensor) -> Tensor:
            ndim = cost.dim()
            gradient = cost_gradient(cost, points)
            cost = cost.detach()
            bits, center = joined(points.detach(), ndim), joined(mean, ndim - 1)
            score = bits - center  # [S, *lead, features]
            estimate = (from_others(cost).unsqueeze(-1) * score).mean(0)
            if gradient is None:
                return inject(estimate, params)
            first, second = self._stein(bits, center, cost, joined(gradient, ndim))
            self.moments.observe(cost)
            others = (first.sum(0) - first) / (self.num_samples - 1)
            controls = torch.stack([-(others.unsqueeze(-1) * score).mean(0), second.mean(0)])
            alpha, beta = self.coefficients(estimate, controls.detach()).to(cost.dtype)
            estimate = estimate + alpha * controls[0] + beta * controls[1]
            objective: Tensor = self.variance(estimate)  # all but the network is detached
            return inject(estimate, params) + objective

        return self._sample(q, points, credit=credit)

    def _stein(self, bits: Tensor, center: Tensor, cost: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """A h ``[S, *lead]`` and A h~ ``[S, *lead, features]`` at each draw."""
        score, sign = bits - center, 1 - 2 * bits
        flip = center * (1 - bits) + (1 - center) * bits  # probability that resampling a bit changes it

        def others(value: Tensor) -> Tensor:
            return torch.stack([value.roll(-shift, 0) for shift in range(1, self.num_samples)])  # [S - 1, S, ...]

        slopes = others(slope)
        level = others(cost)
        here = (slopes * (bits - others(bits))).sum(-1)  # f'(z_j) (z_k - z_j) [S - 1, S, *lead]
        near = here.unsqueeze(-1) + slopes * sign  # the same at every neighbour of z_k [..., features]
        at_here = self._surrogate(here, level).mean(0).unsqueeze(-2)  # [S, *lead, 1, 2]
        at_near = self._surrogate(near, level.unsqueeze(-1).expand_as(near)).mean(0)  # [S, *lead, features, 2]
        change = (flip.unsqueeze(-1) * (at_near - at_here)).sum(-2)  # [S, *lead, 2]
        return change[..., 0], change[..., 1:] * score + flip * sign * at_near[..., 1]

    def _surrogate(self, linear: Tensor, level: Tensor) -> Tensor:
        """The surrogates for h and h~ of the two terms of a Taylor expansion: ``[...]`` -> ``[..., 2]``."""
        mean, std = self.moments.mean.to(linear.dtype), self.moments.std.to(linear.dtype)
        dtype = next(self.network.parameters()).dtype
        level = level - mean
        correction = self.network((torch.stack([linear, level], -1) / std).to(dtype))
        result: Tensor = std * correction.to(linear.dtype)
        return result + (linear + level).unsqueeze(-1) if self.taylor else result
