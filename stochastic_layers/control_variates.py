"""Control variates: NVIL and MuProp, and what their relatives share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from stochastic_layers.baselines import RunningMean, as_of_now, create_baseline, mean_over_all_ranks
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.families import Family
from stochastic_layers.layer import Sample, StochasticLayer, sum_rightmost
from stochastic_layers.registry import register
from stochastic_layers.subsets import SubsetFamily

__all__ = ["NVIL", "CostMoments", "MuProp", "RelativeVariance"]


def mean_point(q: Distribution, params: Tensor) -> Tensor:
    """E_q[z] ``[*batch, out_features]`` of the discrete law of params, detached: the probabilities."""
    return q.mean.detach().flatten(params.dim() - 1)


def covariance_product(family: Family, params: Tensor, mean: Tensor, vector: Tensor) -> Tensor:
    """The covariance of z times a vector ``[*leading, features]``: the derivative of the mean, which is symmetric."""
    if not isinstance(family, SubsetFamily):
        return jacobian_product(family, mean, vector)
    with torch.enable_grad():
        leaf = differentiable_points(params, params)
        point = family.distribution(leaf).mean.flatten(params.dim() - 1)
        (product,) = torch.autograd.grad(point, leaf, vector.reshape(point.shape))
    return product.reshape(vector.shape)


def jacobian_product(family: Family, point: Tensor, vector: Tensor) -> Tensor:
    """J(y) v for y the sigmoid (softmax) of logits and J(y) its symmetric Jacobian ``[..., features]``.

    At the mean of q, J is also the covariance of z.
    """
    if not isinstance(family, CategoricalFamily):
        return point * vector * (1 - point)
    point, vector = by_category(family, point), by_category(family, vector)
    product = point * vector
    return torch.addcmul(product, point, product.sum(-1, keepdim=True), value=-1).flatten(-2)


def by_category(family: CategoricalFamily, tensor: Tensor) -> Tensor:
    """``[..., features]`` -> ``[..., variables, C]``: those of trailing batch dimensions may be among the variables."""
    assert family.num_categories is not None
    return tensor.reshape(*tensor.shape[:-1], tensor.shape[-1] // family.num_categories, family.num_categories)


def differentiable_points(z: Tensor, params: Tensor) -> Tensor:
    """z as a point at which the cost can be differentiated; nothing flows from it into params."""
    if torch.compiler.is_compiling():  # a graph cannot return what requires_grad_() was called on; 0 * params can
        return z.detach() + 0.0 * params
    return z.detach().requires_grad_()


def cost_gradient(cost: Tensor, points: Tensor, *, create_graph: bool = False) -> Tensor | None:
    """The gradient of the summed cost at the points, ``None`` where autograd sees no dependence on them."""
    if not (cost.requires_grad and points.requires_grad):
        return None
    (gradient,) = torch.autograd.grad(
        cost.sum(), points, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    result: Tensor | None = gradient
    return result


def joined(tensor: Tensor, ndim: int) -> Tensor:
    """Merge the latents of trailing batch dimensions that the cost has summed: ``[*ndim leading, features]``.

    They share one cost, so that for a control variate they are one longer vector of latents.
    """
    return tensor.flatten(ndim)


def inject(gradient: Tensor, params: Tensor) -> Tensor:
    """A term ``[*leading]`` whose gradient with respect to params is the given one ``[*leading, features]``."""
    return (gradient.detach() * joined(params, gradient.dim() - 1)).sum(-1)


class CostMoments(RunningMean):
    """Running mean and standard deviation of a cost, as they stood before the current step."""

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__(decay, size=2)

    @property
    def mean(self) -> Tensor:
        """``[1]``; 0 before the first step."""
        return self.value[:1]

    @property
    def std(self) -> Tensor:
        """``[1]``; 1 before the first step, and where the cost has not varied yet."""
        variance = self.value[1:]
        return torch.where(variance > 0, variance, 1.0).sqrt()

    def observe(self, cost: Tensor) -> None:
        """Count the costs of one step, in training with gradients on."""
        if not (self.training and torch.is_grad_enabled()):
            return
        cost = cost.detach()
        batch, rows = mean_over_all_ranks(cost.reshape(-1, 1))
        center = torch.where(self.weight > 0, self.mean, batch)  # large means do not cancel in the variance
        square, _ = mean_over_all_ranks((cost - center).square().reshape(-1, 1))
        self.accumulate(torch.cat([batch, square]), rows)


class RelativeVariance(RunningMean):
    """What the parameters of a control variate minimise: the squared norm of the gradient over its running mean.

    An unbiased estimator's mean does not depend on its control variate, so that the expected squared norm of its
    gradient is its variance plus a constant. Dividing by the running mean makes the objective, and the learning rate
    for it, independent of the units of the cost. Averaged over the batch by the user, as the loss is.

    A control variate that takes away all variance, as a relaxation at a low temperature does for most batches, would
    divide zero by zero: the derivative grows as the inverse of the gradient, without bound. A millionth of the squared
    norm without the control variate in the divisor bounds it, and is not felt before the variance is that small.
    """

    def forward(self, gradient: Tensor, without: Tensor) -> Tensor:
        """The objective ``[*leading]``; see :meth:`observe` for the arguments."""
        return gradient.square().sum(-1) / self.observe(gradient, without)

    def slope(self, gradient: Tensor, without: Tensor) -> Tensor:
        """The derivative of the objective ``[*leading, features]``, without gradient, in place of the objective."""
        return 2 * gradient.detach() / self.observe(gradient, without)

    def observe(self, gradient: Tensor, without: Tensor) -> Tensor:
        """What the squared norms of this step are divided by, a number; and count them.

        Args:
            gradient: ``[*leading, features]``.
            without: The squared norm ``[*leading]`` of the gradient without the control variate.
        """
        energy = gradient.detach().square().sum(-1) + 1e-6 * without.detach()
        batch, rows = mean_over_all_ranks(energy.reshape(-1, 1))
        scale = torch.maximum(self.value, 0.01 * batch)  # one outlier counts at most a hundredfold
        scale = torch.where(self.weight > 0, scale, batch).clamp_min(torch.finfo(torch.float32).tiny).squeeze(0)
        if self.training and torch.is_grad_enabled():
            self.accumulate(batch, rows)
        return scale


@register("nvil")
class NVIL(StochasticLayer):
    r"""NVIL: REINFORCE with a context-dependent baseline, a running mean, and division by a running deviation.

    .. math:: \nabla E_q[f(z)] \approx \frac{f(z) - C(x) - c}{\max(1, v)} \nabla \log q(z)

    with C a network, c and v the running mean and standard deviation of :math:`f - C(x)` as they stood before the
    step. Approximates the gradient of E_q[f] for any f. With ``normalize=True`` its mean is the exact gradient divided
    by max(1, v): the direction is unbiased and the length, in effect the learning rate, adapts. With
    ``normalize=False`` it is unbiased. C is fitted to the cost by least squares, in the same backward pass.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"``, ``"subset"``, ``"permutation"`` or ``"gaussian"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number S of draws per example.
        baseline: C; see :class:`~stochastic_layers.Reinforce`.
        normalize: Whether to divide by max(1, v).
        decay: Weight of the past in c and v at each step.

    Raises:
        ValueError: Unknown baseline, or ``decay`` not in [0, 1).

    References:
        Neural Variational Inference and Learning in Belief Networks (Andriy Mnih, Karol Gregor, 2014),
        https://arxiv.org/abs/1402.0030

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("nvil", latent_dim=3)
        >>> sample = layer.sample(torch.zeros(5, 3, requires_grad=True))
        >>> sample.surrogate(sample.z.sum(-1)).shape
        torch.Size([5])
    """

    families = ("bernoulli", "categorical", "subset", "permutation", "gaussian")
    unbiased = (
        "when normalize=False; otherwise its mean is the exact gradient divided by max(1, running standard deviation)"
    )
    needs = ("cost",)
    reference = (
        "Neural Variational Inference and Learning in Belief Networks (Mnih and Gregor, 2014). "
        "https://arxiv.org/abs/1402.0030"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any] = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        baseline: str | Mapping[str, Any] | nn.Module | None = "learned",
        normalize: bool = True,
        decay: float = 0.99,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        self.baseline = create_baseline(baseline, num_samples=num_samples, context_features=self.in_features)
        self.normalize = normalize
        self.moments = CostMoments(decay)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.family.distribution(params)
        z, log_density = self.family.sample_with_log_prob(q, self.num_samples)
        context = (params if context is None else context).detach()
        baseline, before = as_of_now(self.baseline), self.moments.value

        def credit(cost: Tensor) -> Tensor:
            log_prob = sum_rightmost(log_density(), cost.dim())  # [S, *lead]
            cost = cost.detach()
            residual = cost if baseline is None else cost - baseline(cost, context)
            mean, variance = before.to(cost.dtype).chunk(2)
            self.moments.observe(residual)
            deviation: Tensor = residual - mean
            weight = deviation.detach()
            if self.normalize:
                weight = weight / variance.clamp_min(1.0).sqrt()
            # C is fitted by least squares, scaled alike, as in the paper: the slope of deviation ** 2 / 2
            return (weight * (log_prob + deviation)).mean(0)

        return self._sample(q, z, credit=credit, log_density=log_density)


@register("muprop")
class MuProp(StochasticLayer):
    r"""MuProp: REINFORCE with the cost's first-order expansion about the mean as control variate.

    .. math:: \nabla E_q[f] \approx (f(z) - f(\mu) - f'(\mu)^\top (z - \mu)) \nabla \log q(z) + J(\mu) f'(\mu),
        \qquad \mu = E_q[z]

    with J the derivative of the mean. Approximates the gradient of E_q[f], unbiased for f differentiable at the mean,
    which is a point inside the cube or simplex: there the cost is evaluated once more. Exact, without variance, for f
    linear in z. Where the cost does not depend on z through autograd, f(mean) alone is the baseline.

    To compile it with ``fullgraph=True``, set ``torch._dynamo.config.trace_autograd_ops = True``: the cost is
    differentiated inside the graph.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"`` or ``"subset"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number S of draws per example; the last of the S + 1 points is the mean, of weight 0.

    References:
        MuProp: Unbiased Backpropagation for Stochastic Neural Networks (Shixiang Gu, Sergey Levine, Ilya Sutskever,
        Andriy Mnih, 2015), https://arxiv.org/abs/1511.05176

    Example:
        >>> import torch, stochastic_layers as sl
        >>> sl.create("muprop", latent_dim=3).sample(torch.zeros(5, 3)).weights
        tensor([1., 0.])
    """

    families = ("bernoulli", "categorical", "subset")
    unbiased = True
    needs = ("cost", "cost_gradient", "relaxable_cost")
    evaluations = "num_samples + 1"
    reference = (
        "MuProp: Unbiased Backpropagation for Stochastic Neural Networks (Gu, Levine, Sutskever and Mnih, 2015). "
        "https://arxiv.org/abs/1511.05176"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any] = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.family.distribution(params)
        mean, draws = mean_point(q, params), self.num_samples
        hard = self.family.sample(q, draws)
        points = differentiable_points(torch.cat([hard, mean.unsqueeze(0)]), params)

        def credit(cost: Tensor) -> Tensor:
            gradient = cost_gradient(cost[draws], points)
            slope = joined((torch.zeros_like(points) if gradient is None else gradient)[draws], cost.dim() - 1)
            center = joined(mean, cost.dim() - 1)
            score = joined(hard, cost.dim()) - center  # [S, *lead, features]
            linear = (slope * score).sum(-1)
            residual = (cost[:draws] - cost[draws]).detach() - linear
            estimate = (residual.unsqueeze(-1) * score).mean(0) + covariance_product(self.family, params, center, slope)
            return inject(estimate, params)

        weights = torch.cat([hard.new_full((draws,), 1.0 / draws), hard.new_zeros(1)])
        return self._sample(q, points, weights=weights, credit=credit)
