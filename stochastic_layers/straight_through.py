"""Straight-through layers: exact discrete draws forward, the gradient of a smooth stand-in backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from stochastic_layers.auxiliary import kernels_usable, with_value
from stochastic_layers.categorical import draw_index, one_hot, softmax, softmax_gradient
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.families import Family
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.options import check_temperature
from stochastic_layers.registry import register
from stochastic_layers.relaxed import TemperedLayer

__all__ = ["DecoupledStraightThrough", "ReinMax", "StraightThrough", "probabilities"]


def probabilities(family: Family, logits: Tensor) -> Tensor:
    """Sigmoid of the logits of bits, softmax of those of categories; ``[..., out_features]``."""
    if isinstance(family, CategoricalFamily):
        return softmax(family.unflatten(logits)).flatten(-2)
    return torch.sigmoid(logits)


@register("straight_through")
class StraightThrough(StochasticLayer):
    r"""Straight-through: the gradient passes the draw as if it were the vector of probabilities.

    .. math:: \nabla_l \approx J(p)^\top f'(z), \qquad J(p) = \mathrm{diag}(p) - p p^\top

    (for a bit, :math:`p(1-p) f'(z)`; for subsets p is the probability of each item and J the covariance of the items,
    both exact: the estimator known as SIMPLE). Approximates the gradient of E_q[f] by a first-order expansion of f at
    the draw: exact for f linear in z, biased otherwise. The cost is evaluated at exact draws of q only.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"`` or ``"subset"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number S of draws per example.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation (Yoshua Bengio,
        Nicholas Leonard, Aaron Courville, 2013), https://arxiv.org/abs/1308.3432; SIMPLE: A Gradient Estimator for
        k-Subset Sampling (Kareem Ahmed, Zhe Zeng, Mathias Niepert, Guy Van den Broeck, 2022),
        https://arxiv.org/abs/2210.01941

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("straight_through", latent_dim=3, family="bernoulli")
        >>> logits = torch.zeros(5, 3, requires_grad=True)
        >>> z = layer(logits)
        >>> z.sum().backward()
        >>> z.shape, logits.grad[0, 0].item()
        (torch.Size([5, 3]), 0.25)
    """

    families = ("bernoulli", "categorical", "subset")
    unbiased = "when the cost is linear in z"
    needs = ("cost_gradient",)
    independent_draws = True
    reference = (
        "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation (Bengio, Leonard "
        "and Courville, 2013). https://arxiv.org/abs/1308.3432"
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
        q = self.law(params)
        hard = self.family.sample(q, self.num_samples)
        return self._sample(q, with_value(hard, q.mean.flatten(params.dim() - 1)))


@register("decoupled_straight_through")
class DecoupledStraightThrough(TemperedLayer):
    r"""Decoupled straight-through: one temperature for the draw, another for the gradient.

    .. math:: z \sim q = \mathrm{softmax}(l / \tau_f), \qquad
        \nabla_l \approx \tfrac{1}{\tau_b} J(\mathrm{softmax}(l / \tau_b))^\top f'(z)

    Approximates the gradient of E_q[f] by a first-order expansion of f at the draw. ``sampling_temperature``
    :math:`\tau_f` is part of the model: it changes q, and ``distribution``, log-probabilities, KL and evaluation draws
    follow it. ``temperature`` :math:`\tau_b` only spreads the gradient over the categories. With both equal this is
    straight-through at the logits :math:`l / \tau_f`, and exact for f linear in z; otherwise biased.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example.
        temperature: Temperature of the backward pass; positive. It can be changed by assignment.
        sampling_temperature: Temperature of the law q; positive and fixed.

    Raises:
        ValueError: A temperature is out of range, or sizes that do not fit the family.

    References:
        Improving Discrete Optimisation Via Decoupled Straight-Through Estimator (Rushi Shah, Mingyuan Yan, Michael
        Curtis Mozer, Dianbo Liu, 2024), https://arxiv.org/abs/2410.13331

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("decoupled_straight_through", latent_dim=1, temperature=2.0, sampling_temperature=0.5)
        >>> layer.distribution(torch.ones(1)).base_dist.logits
        tensor([2.])
    """

    families = ("bernoulli", "categorical")
    unbiased = "when the cost is linear in z and both temperatures are equal"
    needs = ("cost_gradient",)
    reference = (
        "Improving Discrete Optimisation Via Decoupled Straight-Through Estimator (Shah, Yan, Mozer and Liu, 2024). "
        "https://arxiv.org/abs/2410.13331"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        temperature: float = 1.0,
        sampling_temperature: float = 1.0,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
        )
        check_temperature("sampling_temperature", sampling_temperature, "1 leaves the law alone")
        self.sampling_temperature = float(sampling_temperature)

    def law(self, params: Tensor) -> Distribution:
        return self.family.distribution(params / self.sampling_temperature)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        hard = self.family.sample(q, self.num_samples)
        soft = probabilities(self.family, params / self.temperature.to(params.dtype))
        return self._sample(q, with_value(hard, soft))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sampling_temperature={self.sampling_temperature:g}"


class _Heun(torch.autograd.Function):
    """One-hot draws with the gradient ``2 J(m) - J(p) / 2`` of the logits, which count as a constant.

    ``m = (t + z) / 2`` for the probabilities t at the temperature; they are p itself where it is 1.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor, tempered: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(probs, tempered, index)
        ctx.simple = tempered is probs
        return one_hot(index, probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probs, tempered, index = ctx.saved_tensors
        chosen = grad.gather(-1, index)
        if ctx.simple:
            # times g it is (p (g - z'g) + z (z'g - p'g)) / 2: few passes, since the terms in p p'g cancel
            slope = grad - chosen
            out = None if torch.is_grad_enabled() else slope
            slope = torch.addcmul(slope.new_zeros(()), slope, probs, value=0.5, out=out)
            return slope.scatter_add_(-1, index, -slope.sum(-1, keepdim=True)), None, None, None
        middle = 0.5 * (chosen + (tempered * grad).sum(-1, keepdim=True))  # m'g
        slope = (grad - middle).mul_(tempered).sub_(softmax_gradient(grad, probs), alpha=0.5)
        return slope.scatter_add_(-1, index, chosen - middle), None, None, None


@register("reinmax")
class ReinMax(TemperedLayer):
    r"""ReinMax: straight-through of second order, by Heun's rule.

    .. math:: \nabla_l \approx \left(2 J(\tfrac12 (p_\tau + z)) - \tfrac12 J(p)\right)^\top f'(z), \qquad
        p_\tau = \mathrm{softmax}(l / \tau), \; J(p) = \mathrm{diag}(p) - p p^\top

    Approximates the gradient of E_q[f]: exact for f quadratic in z at temperature 1, biased otherwise; on strongly
    cubic costs it is no better than ``straight_through``, and its variance is larger. A temperature above 1
    trades bias for variance. The cost is evaluated at exact draws of q only.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example.
        temperature: At least 1.

    Raises:
        ValueError: ``temperature < 1``, or sizes that do not fit the family.

    References:
        Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liyuan Liu, Chengyu Dong, Xiaodong Liu, Bin
        Yu, Jianfeng Gao, 2023), https://arxiv.org/abs/2304.08612

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("reinmax", latent_dim=3, family="categorical", num_categories=4)
        >>> z = layer(torch.zeros(5, 12))
        >>> z.shape, z.unique().tolist()
        (torch.Size([5, 12]), [0.0, 1.0])
    """

    families = ("bernoulli", "categorical")
    unbiased = "when the cost is quadratic in z and the temperature is 1"
    needs = ("cost_gradient",)
    reference = (
        "Bridging Discrete and Backpropagation: Straight-Through and Beyond (Liu, Dong, Liu, Yu and Gao, 2023). "
        "https://arxiv.org/abs/2304.08612"
    )
    lowest_temperature = 1.0
    usual_temperatures = "1 to 1.5"

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
        )

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q, temperature = self.law(params), self.temperature.to(params.dtype)
        if not isinstance(self.family, CategoricalFamily):
            hard = self.family.sample(q, self.num_samples)
            middle = hard + torch.sigmoid(params.detach() / temperature)
            heun = middle * (1 - 0.5 * middle) * (params - params.detach())
            return self._sample(q, with_value(hard, heun - 0.5 * q.mean))
        unflatten = self.family.unflatten
        logits, probs = unflatten(params), q.mean.detach()
        if kernels_usable():
            # one softmax less at temperature 1; on a GPU reading it would wait for the device
            simple = params.device.type == "cpu" and bool(temperature == 1)
            tempered = probs if simple else softmax(logits.detach() / temperature)
            index = draw_index(probs, self.num_samples)
            every = logits.unsqueeze(0).expand(*index.shape[:-1], -1)  # for S = 1 backward has nothing to sum
            z: Tensor = _Heun.apply(every, probs, tempered, index)  # type: ignore[no-untyped-call]
            return self._sample(q, z.flatten(-2))
        # 2 J(m) = 2 diag(m) - 2 m m' applied to a zero that carries the gradient of the logits; m = middle / 2
        hard = self.family.sample(q, self.num_samples)
        # divided in this shape: a compiler that divides in the flat one takes twice the time for all
        middle = unflatten(hard) + softmax(logits.detach() / temperature)
        zero = logits - logits.detach()
        heun = middle * (zero - 0.5 * (middle * zero).sum(-1, keepdim=True))
        return self._sample(q, with_value(hard, (heun - 0.5 * q.mean).flatten(-2)))
