"""RODEO: leave-one-out REINFORCE with control variates from a discrete Stein operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from stochastic_layers.auxiliary import kernels_usable
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
from stochastic_layers.options import check_positive_int, require_two
from stochastic_layers.registry import register

__all__ = ["Rodeo"]


CHUNK = 2048  # points of the network at once: their hidden layer stays in the cache


def evaluate(inputs: Tensor, weight: Tensor, bias: Tensor, last_weight: Tensor, last_bias: Tensor) -> Tensor:
    """The network at the columns of ``[2, N]``: rows of two numbers would take several times as long."""
    hidden = leaky_relu(torch.addmm(bias.unsqueeze(-1), weight, inputs), inplace=True)
    return torch.addmm(last_bias.unsqueeze(-1), last_weight, hidden)


class _InChunks(torch.autograd.Function):
    """:func:`evaluate`, whose hidden layer, by far the largest tensor of all, is held for one chunk of points only."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, *weights)
        return torch.cat([evaluate(chunk, *weights) for chunk in torch.split(inputs, CHUNK, 1)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *weights = ctx.saved_tensors
        trained = [weight for weight, asked in zip(weights, ctx.needs_input_grad[1:], strict=True) if asked]
        again = torch.is_grad_enabled()  # this gradient will itself be differentiated
        total = [torch.zeros_like(weight) for weight in trained]
        for chunk, slope in zip(torch.split(inputs, CHUNK, 1), torch.split(grad, CHUNK, 1), strict=True):
            with torch.enable_grad():
                parts = torch.autograd.grad(evaluate(chunk, *weights), trained, slope, create_graph=again)
            total = [a + b for a, b in zip(total, parts, strict=True)]
        given = iter(total)
        return (None, *(next(given) if asked else None for asked in ctx.needs_input_grad[1:]))


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
    built; the largest tensors are the network's inputs ``[2, S (S - 1), *batch, latent_dim]``. Its hidden layer is
    computed for some thousand points at a time, and once more in the backward pass.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``.
        num_samples: Number S of draws per example, at least 2.
        hidden_features: Width of the network's hidden layer.
        decay: Weight of the past in the moments of the coefficients.
        taylor: Whether the surrogate is the Taylor expansion plus the network, or the network alone.

    Raises:
        ValueError: ``num_samples < 2``, ``hidden_features < 1``, or ``decay`` not in [0, 1).

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
        check_positive_int("hidden_features", hidden_features)
        last = nn.Linear(hidden_features, 2)
        if taylor:  # at the start the surrogates are the Taylor expansion itself
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.taylor = taylor
        self.network = nn.Sequential(nn.Linear(2, hidden_features), nn.LeakyReLU(), last)
        self.coefficients = OptimalCoefficients(2, decay)
        self.moments = CostMoments(decay)
        self.variance = RelativeVariance()

    def check_num_samples(self, num_samples: int) -> None:
        require_two(num_samples)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.family.distribution(params)
        mean = mean_point(q, params)
        points = differentiable_points(self.family.sample(q, self.num_samples), params)
        coefficients, level, spread = self.coefficients(), self.moments.mean, self.moments.std

        def credit(cost: Tensor) -> Tensor:
            ndim = cost.dim()
            gradient = cost_gradient(cost, points)
            cost = cost.detach()
            bits, center = joined(points.detach(), ndim), joined(mean, ndim - 1)
            score = bits - center  # [S, *lead, features]
            estimate = (from_others(cost).unsqueeze(-1) * score).mean(0)
            if gradient is None:
                return inject(estimate, params)
            # in units of the running deviation, so that the network sees numbers of size one
            unit = spread.to(cost.dtype)
            standard, slope = (cost - level.to(cost.dtype)) / unit, joined(gradient, ndim) / unit
            first, second = (unit * part for part in self._stein(bits, center, standard, slope))
            self.moments.observe(cost)
            others = (first.sum(0) - first) / (len(first) - 1)
            controls = torch.stack([-(others.unsqueeze(-1) * score).mean(0), second.mean(0)])
            self.coefficients.observe(estimate, controls.detach())
            alpha, beta = coefficients.to(cost.dtype)
            without = estimate.square().sum(-1)
            estimate = estimate + alpha * controls[0] + beta * controls[1]
            objective: Tensor = self.variance(estimate, without)  # all but the network is detached
            return inject(estimate, params) + objective

        return self._sample(q, points, credit=credit)

    def _stein(self, bits: Tensor, center: Tensor, cost: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """A h ``[S, *lead]`` and A h~ ``[S, *lead, features]`` at each draw, in the units of the cost."""
        score, sign = bits - center, 1 - 2 * bits
        flip = center * (1 - bits) + (1 - center) * bits  # probability that resampling a bit changes it

        def others(value: Tensor) -> Tensor:
            return torch.stack([value.roll(-shift, 0) for shift in range(1, len(value))])  # [S - 1, S, ...]

        slopes = others(slope)
        level = others(cost)
        here = (slopes * (bits - others(bits))).sum(-1)  # f'(z_j) (z_k - z_j) [S - 1, S, *lead]
        near = here.unsqueeze(-1) + slopes * sign  # the same at every neighbour of z_k [..., features]
        at_here = self._surrogate(here, level).mean(1).unsqueeze(-1)  # [2, S, *lead, 1]
        at_near = self._surrogate(near, level.unsqueeze(-1).expand_as(near)).mean(1)  # [2, S, *lead, features]
        change = (flip * (at_near - at_here)).sum(-1, keepdim=True)  # [2, S, *lead, 1]
        return change[0].squeeze(-1), change[1] * score + flip * sign * at_near[1]

    def _surrogate(self, linear: Tensor, level: Tensor) -> Tensor:
        """The surrogates for h and h~ of the two terms of a Taylor expansion: ``[...]`` -> ``[2, ...]``."""
        dtype = next(self.network.parameters()).dtype
        inputs = torch.stack([linear, level]).to(dtype).flatten(1)
        weights = tuple(self.network.parameters())
        run = _InChunks.apply if kernels_usable() else evaluate
        result: Tensor = run(inputs, *weights).to(linear.dtype).reshape(2, *linear.shape)
        return result + (linear + level) if self.taylor else result
