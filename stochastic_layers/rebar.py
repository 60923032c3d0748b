"""REBAR: the cost of a relaxation of the draw as control variate, tuned online to lower the variance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_layers.categorical import log_softmax, one_hot, softmax
from stochastic_layers.control_variates import (
    RelativeVariance,
    by_category,
    cost_gradient,
    differentiable_points,
    inject,
    jacobian_product,
    joined,
    mean_point,
)
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.families import Family
from stochastic_layers.layer import Sample, sum_rightmost
from stochastic_layers.noise import log_exponential, logistic
from stochastic_layers.registry import register
from stochastic_layers.relaxed import TemperedLayer

__all__ = ["Rebar", "couple", "pairs", "pathwise_difference", "relax", "squared_norm", "through_conditional"]


def couple(family: Family, params: Tensor, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the noise of a hard draw, and fresh noise given that draw.

    Args:
        family: The Bernoulli or the categorical family.
        params: Logits ``[*batch, features]``.
        num_samples: Number S of draws.

    Returns:
        Hard draws ``[S, *batch, features]``; perturbed logits ``[2, S, *batch, features]`` of which they are the sign
        or argmax, with their own noise and with noise drawn anew; the derivative of the latter by (log-softmax) logits.
    """
    params = params.detach()
    shape = (2, num_samples, *params.shape)
    if isinstance(family, CategoricalFamily):
        logits = log_softmax(family.unflatten(params))
        noise = family.unflatten(log_exponential(shape, params))
        scores = logits - noise[0]  # plus Gumbel noise
        index = scores.argmax(-1, keepdim=True)
        # given its argmax, the maximum is a Gumbel variable of location logsumexp = 0 and the others stay below it
        top = noise[1].gather(-1, index)
        above = noise[1] - logits - top
        # logaddexp(noise - logits, top) in a quarter of its time; the line from 40 on is within rounding
        anew = F.softplus(above, threshold=40.0).add_(top).scatter_(-1, index, top).neg_()
        slope = above.sigmoid_().scatter_(-1, index, 0.0)
        return one_hot(index, scores).flatten(-2), torch.stack([scores, anew]).flatten(-2), slope.flatten(-2)
    noise = logistic(shape, params)
    scores = params + noise[0]
    hard = (scores > 0).to(params.dtype)
    sign = 2 * hard - 1
    # theta v + 1 - theta (or v (1 - theta)) in log space: finite for every logit
    shifted = noise[1] + F.softplus(sign * params)
    return hard, torch.stack([scores, sign * F.softplus(shifted)]), shifted.sigmoid() * torch.sigmoid(sign * params)


def relax(family: Family, scores: Tensor, temperature: Tensor) -> Tensor:
    """Points inside the cube or the simplex: the tempered sigmoid or softmax of perturbed logits."""
    if isinstance(family, CategoricalFamily):
        return softmax(family.unflatten(scores / temperature)).flatten(-2)
    return torch.sigmoid(scores / temperature)


def through_conditional(family: Family, mean: Tensor, slope: Tensor, vector: Tensor) -> Tensor:
    """Pull a vector from the conditional perturbed logits back to the logits, through the conditioning as well."""
    vector = slope * vector
    if not isinstance(family, CategoricalFamily):
        return vector
    mean, vector = by_category(family, mean), by_category(family, vector)
    return torch.addcmul(vector, mean, vector.sum(-1, keepdim=True), value=-1).flatten(-2)


def pairs(tensor: Tensor) -> Tensor:
    """``[2 S, ...]`` -> ``[2, S, ...]``."""
    return tensor.reshape(2, tensor.shape[0] // 2, *tensor.shape[1:])


def squared_norm(cost: Tensor, score: Tensor) -> Tensor:
    """``[*lead]`` of the terms of REINFORCE, from the cost ``[S, *lead]`` and the score ``[S, *lead, features]``."""
    norm: Tensor = cost.detach() * torch.linalg.vector_norm(score, dim=-1)
    return norm.square().mean(0)


def pathwise_difference(
    family: Family, points: Tensor, pulls: Tensor, temperature: Tensor, center: Tensor, slope: Tensor
) -> Tensor:
    """The reparameterized gradient of c(y) less that of c of y anew, with respect to the logits.

    Args:
        family: The Bernoulli or the categorical family.
        points: y and the relaxation anew ``[2, S, *lead, features]``.
        pulls: The slopes of c there, of the same shape.
        temperature: Broadcastable to ``[*lead, 1]``.
        center: The mean of q ``[*lead, features]``.
        slope: The derivative that :func:`couple` returns, ``[S, *lead, features]``.

    Returns:
        ``[S, *lead, features]``.
    """
    first, second = (jacobian_product(family, points, pulls) / temperature).unbind(0)
    return first - through_conditional(family, center, slope, second)


@register("rebar")
class Rebar(TemperedLayer):
    r"""REBAR: REINFORCE with the relaxed cost as control variate, whose own gradient is reparameterized.

    .. math:: \nabla E_q[f(b)] \approx (f(b) - \eta f(\tilde y)) \nabla \log q(b)
        + \eta \nabla f(y) - \eta \nabla f(\tilde y)

    with b the hard threshold (or argmax) of perturbed logits, y their relaxation at temperature :math:`\tau`, and
    :math:`\tilde y` a relaxation of noise drawn anew given b. The last gradient goes through the conditioning on b,
    too; without that it is biased. Approximates the gradient of E_q[f]; unbiased for f differentiable, for every
    :math:`\eta` and :math:`\tau`. The cost is evaluated at three points per draw: b (weight 1/S), y and
    :math:`\tilde y` (weight 0). Where the cost does not depend on z through autograd it is REINFORCE.

    The parameters ``eta`` and ``log_temperature`` receive the gradient of the estimator's squared norm relative to its
    running mean, averaged as the loss is, and nothing else; encoder and decoder receive nothing from it. It needs
    second derivatives of the cost: freeze them by ``layer.requires_grad_(False)`` where those do not exist or cost too
    much. To compile with ``fullgraph=True``, set ``torch._dynamo.config.trace_autograd_ops = True``.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example; z has 3 S points.
        temperature: Temperature at the start.

    Raises:
        ValueError: ``temperature`` out of range.

    References:
        REBAR: Low-variance, unbiased gradient estimates for discrete latent variable models (George Tucker, Andriy
        Mnih, Chris J. Maddison, Dieterich Lawson, Jascha Sohl-Dickstein, 2017), https://arxiv.org/abs/1703.07370

    Example:
        >>> import torch, stochastic_layers as sl
        >>> sample = sl.create("rebar", latent_dim=3).sample(torch.zeros(5, 3))
        >>> sample.z.shape, sample.weights
        (torch.Size([3, 5, 3]), tensor([1., 0., 0.]))
    """

    families = ("bernoulli", "categorical")
    unbiased = True
    needs = ("cost", "cost_gradient", "relaxable_cost")
    evaluations = "3 * num_samples"
    reference = (
        "REBAR: Low-variance, unbiased gradient estimates for discrete latent variable models (Tucker, Mnih, Maddison, "
        "Lawson and Sohl-Dickstein, 2017). https://arxiv.org/abs/1703.07370"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
            learn_temperature=True,
        )
        self.eta = nn.Parameter(torch.ones(1))
        self.variance = RelativeVariance()

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        family, draws = self.family, self.num_samples
        q = family.distribution(params)
        mean = mean_point(q, params)
        hard, scores, slope = couple(family, params, draws)
        temperature = self.temperature.to(params.dtype)  # that of the points, whatever it is when their cost is known
        relaxed = relax(family, scores.flatten(0, 1), temperature)  # [2S, ...], with graph to tau
        points = differentiable_points(torch.cat([hard, relaxed]), params)

        def credit(cost: Tensor) -> Tensor:
            ndim = cost.dim()
            tuned = self.eta.requires_grad or self.log_temperature.requires_grad
            gradient = cost_gradient(cost[draws:], points, create_graph=tuned)
            center = joined(mean, ndim - 1)
            score = joined(hard, ndim) - center  # [S, *lead, features]
            if gradient is None:
                return inject((cost[:draws].detach().unsqueeze(-1) * score).mean(0), params)
            # one copy of eta and tau per example, so that each example keeps its own objective
            tau = temperature.expand(*cost.shape[1:], 1)
            eta = self.eta.to(params.dtype).expand(*cost.shape[1:], 1)
            relaxed_points, pulls = (pairs(joined(t, ndim)[draws:]) for t in (points, gradient))
            difference = pathwise_difference(family, relaxed_points, pulls, tau, center, joined(slope, ndim))
            residual = cost[:draws].detach().unsqueeze(-1) - eta * cost[2 * draws :].unsqueeze(-1)
            estimate = (residual * score + eta * difference).mean(0)  # [*lead, features]
            term = inject(estimate, params)
            if not tuned:
                return term
            own = [t for t in (tau, eta) if t.requires_grad]
            objective = self.variance(estimate, squared_norm(cost[:draws], score)).sum()
            at_points, *at_own = torch.autograd.grad(objective, [points, *own], retain_graph=True)
            term = term + sum_rightmost((at_points[draws:] * relaxed).sum((0, -1)), ndim - 1)  # by y, through tau
            for value, slope_of in zip(own, at_own, strict=True):
                term = term + (value * slope_of).sum(-1)
            return term

        weights = torch.cat([hard.new_full((draws,), 1.0 / draws), hard.new_zeros(2 * draws)])
        return self._sample(q, points, weights=weights, credit=credit)
