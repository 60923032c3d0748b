"""RELAX: a learned network on a relaxation of the draw as control variate, with or without the cost itself."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochastic_layers.auxiliary import as_drawn
from stochastic_layers.baselines import broadcasts
from stochastic_layers.control_variates import (
    CostMoments,
    RelativeVariance,
    cost_gradient,
    differentiable_points,
    inject,
    joined,
    mean_point,
)
from stochastic_layers.layer import Sample, sum_rightmost
from stochastic_layers.options import check_positive_int
from stochastic_layers.rebar import Rebar, couple, pairs, pathwise_difference, relax, squared_norm
from stochastic_layers.registry import register
from stochastic_layers.relaxed import TemperedLayer

__all__ = ["Relax"]


@register("relax")
class Relax(TemperedLayer):
    r"""RELAX: REINFORCE with a learned network on relaxed draws as control variate; the cost may be a black box.

    .. math:: \nabla E_q[f(b)] \approx (f(b) - c(\tilde y)) \nabla \log q(b) + \nabla c(y) - \nabla c(\tilde y)

    .. math:: c(y) = m + v \, r_\phi(y, x) \quad \text{or} \quad c(y) = f(y) + v \, r_\phi(y, x)

    with b, y and :math:`\tilde y` as in ``rebar``, r a network, m and v the running mean and standard deviation of the
    cost. Approximates the gradient of E_q[f]; unbiased for every r.

    With ``control_variate="network"``, for any f: the cost is evaluated at the hard draws only. With ``"both"``, the
    paper's form where the cost is differentiable: the network corrects the relaxed cost, which is evaluated at two more
    points per draw; it starts as ``rebar`` with :math:`\eta = 1`, and where the cost does not depend on z through
    autograd it is the first form. The relaxed cost alone is ``rebar``.

    Network and temperature receive the gradient of the estimator's squared norm relative to its running mean,
    averaged as the loss is, and nothing else; encoder and decoder receive nothing from it. To compile with
    ``fullgraph=True``, set ``torch._dynamo.config.trace_autograd_ops = True``.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example; with ``control_variate="both"`` z has 3 S points.
        temperature: Temperature at the start.
        hidden_features: Width of the two hidden layers of r.
        context_features: Size of the context x that the user passes to ``layer.sample``; by default x is params.
        control_variate: ``"network"``, or ``"both"`` the relaxed cost and the network.

    Raises:
        ValueError: ``temperature`` out of range, a size that is not positive, unknown ``control_variate``; at sampling,
            a context of another size or batch.

    References:
        Backpropagation through the Void: Optimizing control variates for black-box gradient estimation (Will
        Grathwohl, Dami Choi, Yuhuai Wu, Geoffrey Roeder, David Duvenaud, 2017), https://arxiv.org/abs/1711.00123

    Example:
        >>> import torch, stochastic_layers as sl
        >>> sl.create("relax", latent_dim=3).sample(torch.zeros(5, 3)).z.shape
        torch.Size([1, 5, 3])
    """

    families = ("bernoulli", "categorical")
    unbiased = True
    needs: tuple[str, ...] = ("cost",)
    reference = (
        "Backpropagation through the Void: Optimizing control variates for black-box gradient estimation (Grathwohl, "
        "Choi, Wu, Roeder and Duvenaud, 2017). https://arxiv.org/abs/1711.00123"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        temperature: float = 0.5,
        hidden_features: int = 100,
        context_features: int | None = None,
        control_variate: Literal["network", "both"] = "network",
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
            learn_temperature=True,
        )
        if control_variate not in ("network", "both"):
            raise ValueError(
                f"needed control_variate 'network' or 'both', got {control_variate!r}; use 'rebar' for the cost alone."
            )
        self.control_variate = control_variate
        if control_variate == "both":
            self.needs, self.evaluations = Rebar.needs, Rebar.evaluations
        check_positive_int("hidden_features", hidden_features)
        self.context_features = self.in_features if context_features is None else context_features
        check_positive_int("context_features", self.context_features)
        last = nn.Linear(hidden_features, 1)
        nn.init.zeros_(last.weight)  # at the start c is the running mean of the cost, or the relaxed cost
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(
            nn.Linear(self.out_features + self.context_features, hidden_features),
            nn.Tanh(),
            nn.Linear(hidden_features, hidden_features),
            nn.Tanh(),
            last,
        )
        self.moments = CostMoments()
        self.variance = RelativeVariance()

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        family, draws = self.family, self.num_samples
        q = family.distribution(params)
        mean = mean_point(q, params)
        context = (params if context is None else context).detach()
        if context.shape[-1] != self.context_features:
            raise ValueError(
                f"needed a context [*batch, {self.context_features}], got {list(context.shape)}; build the layer with "
                f"context_features={context.shape[-1]}."
            )
        if not broadcasts(context.shape[:-1], params.shape[:-1]):
            raise ValueError(
                f"needed a context [*batch, {self.context_features}] for params {list(params.shape)}, got "
                f"{list(context.shape)}; give every example its features."
            )
        hard, scores, slope = couple(family, params, draws)
        tau = self.temperature.to(params.dtype)  # that of the points, whatever it is when their cost is known
        relaxed = relax(family, scores, tau)  # [2, S, *batch, features], with graph to tau
        if not relaxed.requires_grad:
            relaxed = differentiable_points(relaxed, params)
        both = self.control_variate == "both"
        level, spread, read = self.moments.mean, self.moments.std, as_drawn(hard)
        points = differentiable_points(torch.cat([hard, relaxed.flatten(0, 1)]), params) if both else hard

        def credit(cost: Tensor) -> Tensor:
            ndim = cost.dim()
            center = joined(mean, ndim - 1)
            score, slopes = joined(read(), ndim) - center, joined(slope, ndim)
            tuned = self.log_temperature.requires_grad
            gradient = cost_gradient(cost[draws:], points, create_graph=tuned) if both else None
            value, pulls = (spread.to(cost.dtype) * part for part in self._network_part(relaxed, context, ndim))
            difference = pathwise_difference(family, joined(relaxed, ndim + 1), pulls, tau, center, slopes)
            learned = (difference - value.unsqueeze(-1) * score).mean(0)  # with graph to network and temperature alone
            centred = cost[:draws].detach() - level.to(cost.dtype)
            if gradient is None:
                given = (centred.unsqueeze(-1) * score).mean(0)
            else:
                own_tau = tau.expand(*cost.shape[1:], 1)  # one copy per example, which keeps its own objective
                relaxed_points, pulls = (pairs(joined(t, ndim)[draws:]) for t in (points, gradient))
                difference = pathwise_difference(family, relaxed_points, pulls, own_tau, center, slopes)
                residual = cost[:draws].detach() - cost[2 * draws :]
                given = (difference + residual.unsqueeze(-1) * score).mean(0)  # with graph to points and own_tau
            self.moments.observe(cost[:draws])
            estimate = given + learned
            term, weight = inject(estimate, params), self.variance.slope(estimate, squared_norm(centred, score))
            if not estimate.requires_grad:
                return term
            # the objective to first order, so that each part is differentiated by itself
            term = term + (weight * learned).sum(-1)
            if gradient is not None and tuned:
                at_points, at_tau = torch.autograd.grad((weight * given).sum(), [points, own_tau], retain_graph=True)
                at_relaxed = (pairs(at_points[draws:]) * relaxed).sum(
                    (0, 1, -1)
                )  # through the points to the temperature
                term = term + sum_rightmost(at_relaxed, ndim - 1) + (own_tau * at_tau).sum(-1)
            return term

        if not both:
            return self._sample(q, hard, credit=credit)
        weights = torch.cat([hard.new_full((draws,), 1.0 / draws), hard.new_zeros(2 * draws)])
        return self._sample(q, points, weights=weights, credit=credit)

    def _network_part(self, points: Tensor, context: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """r at the relaxation anew ``[S, *lead]``, and the slopes of r at both ``[2, S, *lead, features]``."""
        first, *others = self.network
        assert isinstance(first, nn.Linear)
        weight = first.weight
        of_points, of_context = weight.split_with_sizes([points.shape[-1], context.shape[-1]], 1)
        # the context is the same for all points, and its part of the first layer is computed once
        value = F.linear(points.to(weight.dtype), of_points)
        value = value + F.linear(context.to(weight.dtype), of_context, first.bias)
        for module in others:
            value = module(value)
        value = value.squeeze(-1).to(points.dtype)  # [2, S, *batch]
        (slopes,) = torch.autograd.grad(value.sum(), points, create_graph=True)
        return sum_rightmost(value[1], ndim), joined(slopes, ndim + 1)
