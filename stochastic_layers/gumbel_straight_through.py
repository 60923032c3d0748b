"""Straight-through layers built on Gumbel noise: hard draws forward, the gradient of the perturbed softmax backward."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stochastic_layers.auxiliary import kernels_usable, with_value
from stochastic_layers.categorical import draw_index, one_hot, put, tempered_softmax
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.layer import Sample
from stochastic_layers.noise import exponential, uniform
from stochastic_layers.options import check_positive, check_positive_int
from stochastic_layers.registry import register
from stochastic_layers.relaxed import GumbelSoftmax, TemperedLayer

__all__ = [
    "GappedStraightThrough",
    "GumbelRao",
    "StraightThroughGumbel",
    "Term",
    "conditional_magnitude",
    "conditional_ratios",
    "with_slope",
]


@register("straight_through_gumbel")
class StraightThroughGumbel(GumbelSoftmax):
    r"""Straight-through Gumbel: exact draws by the Gumbel-max trick, the gradient of the Gumbel-softmax.

    .. math:: z = \mathrm{onehot} \arg\max (l + G), \qquad
        \nabla_l \approx \tfrac1\tau J(\mathrm{softmax}((l + G) / \tau))^\top f'(z)

    Approximates the gradient of E_q[f], with a bias that is not monotone in the temperature and a variance that grows
    as :math:`1 / \tau`. The same as ``gumbel_softmax`` with ``hard=True``, under a name that says that the cost is
    evaluated at exact draws of q only; ``gumbel_rao`` has the same mean and less variance.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number of categories of each variable.
        family: ``"categorical"`` or ``"bernoulli"``.
        num_samples: Number S of draws per example.
        temperature: Temperature, positive.
        learn_temperature: Whether the temperature is a parameter.

    Raises:
        ValueError: ``temperature`` out of range, or sizes that do not fit the family.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Eric Jang, Shixiang Gu, Ben Poole, 2016),
        https://arxiv.org/abs/1611.01144

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("straight_through_gumbel", latent_dim=3, num_categories=4)
        >>> layer(torch.zeros(5, 12)).view(5, 3, 4).sum(-1).unique()
        tensor([1.])
    """

    needs = ("cost_gradient",)
    exact_draws = True

    def __init__(
        self,
        latent_dim: int,
        *,
        num_categories: int | None = None,
        family: str = "categorical",
        num_samples: int = 1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
            learn_temperature=learn_temperature,
            hard=True,
        )


def _categories_first(tensor: Tensor) -> Tensor:
    """``[S, *batch, L, C]`` -> ``[C, S, *batch, L]``, without gradient."""
    return tensor.detach().movedim(-1, 0).contiguous()


class Term(NamedTuple):
    r"""A part of a matrix by which the cost's slope is multiplied, symmetric and constant.

    Points and vectors have the category as their first dimension, along which sums take a tenth of the time.

    Attributes:
        weight: ``[1]``.
        values: Points y ``[C, K, S, *batch, L]``, whose Jacobians :math:`\mathrm{diag}(y) - y y^\top` are added, or
            the sum itself ``[S, *batch, L, C, C]``.
        is_matrix: Which of the two.
    """

    weight: Tensor
    values: Tensor
    is_matrix: bool = False

    def times(self, vector: Tensor) -> Tensor:
        """The product with a vector ``[C, S, *batch, L]``."""
        if self.is_matrix:
            product = (self.values @ vector.movedim(0, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, 0)
        else:
            vector = vector.unsqueeze(1)
            mean = (self.values * vector).sum(0)
            product = (vector - mean).mul_(self.values).sum(1)
        return self.weight * product


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, hard: Tensor, are_matrices: list[bool], *tensors: Tensor) -> Tensor:
        ctx.are_matrices = are_matrices
        ctx.save_for_backward(*tensors)
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        terms = map(Term, tensors[::2], tensors[1::2], ctx.are_matrices)
        return sum_of_products(terms, grad), None, None, *[None] * len(tensors)


def sum_of_products(terms: Iterable[Term], vector: Tensor) -> Tensor:
    """The sum of the terms times a vector ``[S, *batch, L, C]``."""
    vector = vector.movedim(-1, 0).contiguous()
    return functools.reduce(torch.add, [term.times(vector) for term in terms]).movedim(0, -1)


def with_slope(hard: Tensor, logits: Tensor, terms: Sequence[Term]) -> Tensor:
    """The value of ``hard``, and the sum of the terms as its derivative.

    Args:
        hard: ``[S, *batch, L, C]``, without gradient.
        logits: ``[*batch, L, C]``, which receive the gradient.
        terms: What the gradient is multiplied by; not differentiated.
    """
    logits = logits.unsqueeze(0)  # for S = 1 nothing is left to expand, and backward to sum
    if not kernels_usable():
        return hard + sum_of_products(terms, (logits - logits.detach()).expand_as(hard))
    tensors = [tensor for term in terms for tensor in (term.weight, term.values)]
    are_matrices = [term.is_matrix for term in terms]
    result: Tensor = _WithSlope.apply(logits.expand_as(hard), hard, are_matrices, *tensors)  # type: ignore[no-untyped-call]
    return result


@register("gumbel_rao")
class GumbelRao(TemperedLayer):
    r"""Gumbel-Rao: straight-through Gumbel, averaged over R conditional redraws of the noise.

    .. math:: \nabla_l \approx \frac1R \sum_r \tfrac1\tau J(\mathrm{softmax}(\theta_r / \tau))^\top f'(z),
        \qquad \theta_r \sim (l + G \mid \arg\max (l + G) = z)

    Approximates the gradient of E_q[f] with the bias of ``straight_through_gumbel`` at the same temperature and less
    variance, by Rao-Blackwell; R = 1 is that estimator. One evaluation of the cost whatever R. The perturbed logits
    :math:`\theta_r` count as constants plus l: the gradient does not flow through their conditional law, which would
    change the mean. Memory grows as min(R, num_categories) times that of the draw; bits need R redraws of one number.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example.
        temperature: Temperature, positive.
        num_replicates: Number R of redraws of the noise for each draw.

    Raises:
        ValueError: ``temperature`` out of range, ``num_replicates < 1``, or sizes that do not fit the family.

    References:
        Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator (Max B. Paulus, Chris J. Maddison,
        Andreas Krause, 2020), https://arxiv.org/abs/2010.04838

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("gumbel_rao", latent_dim=3, family="categorical", num_categories=4, temperature=0.5)
        >>> layer(torch.zeros(5, 12)).view(5, 3, 4).sum(-1).unique()
        tensor([1.])
    """

    families = ("bernoulli", "categorical")
    unbiased = False
    needs = ("cost_gradient",)
    reference = (
        "Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator (Paulus, Maddison and Krause, "
        "2020). https://arxiv.org/abs/2010.04838"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        temperature: float = 1.0,
        num_replicates: int = 10,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
        )
        self.num_replicates = check_positive_int("num_replicates", num_replicates, "10 is usual")

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        hard = self.family.sample(q, self.num_samples)
        if isinstance(self.family, CategoricalFamily):
            one_hot = self.family.unflatten(hard)
            probs, hot = (_categories_first(t) for t in (q.mean.unsqueeze(0), one_hot))
            terms = self._terms(probs, hot)
            return self._sample(q, with_slope(one_hot, self.family.unflatten(params), terms).flatten(-2))
        slope = self._bit_slope(((1 - 2 * hard) * params.detach()).sigmoid())
        return self._sample(q, hard + slope * (params - params.detach()))

    def _terms(self, probs: Tensor, one_hot: Tensor) -> list[Term]:
        """The estimator's matrix as a sum of Jacobians.

        Args:
            probs: ``[C, 1, *batch, L]``.
            one_hot: ``[C, S, *batch, L]``.
        """
        replicates, categories = self.num_replicates, len(probs)
        weight = 1 / (replicates * self.temperature.to(probs.dtype))
        if replicates <= categories:  # R vectors are smaller than one matrix
            return [Term(weight, self._tempered(conditional_ratios(probs, one_hot, replicates)))]
        matrix = one_hot.new_zeros(*one_hot.shape[1:], categories, categories)
        for start in range(0, replicates, categories):
            draws = self._tempered(conditional_ratios(probs, one_hot, min(categories, replicates - start)))
            matrix.diagonal(dim1=-2, dim2=-1).add_(draws.sum(1).movedim(0, -1))
            matrix -= torch.einsum("ir...,jr...->...ij", draws, draws)
        return [Term(weight, matrix, is_matrix=True)]

    def _tempered(self, ratios: Tensor) -> Tensor:
        """The tempered softmax of scores, of which the ratios are the exponentials ``[C, ...]``; in their memory."""
        # on a CPU powers of two take a third of the time of exp
        powers = ratios.log2_().div_(self.temperature.to(ratios.dtype)).exp2_()
        return powers.div_(powers.sum(0))

    def _bit_slope(self, rest: Tensor) -> Tensor:
        """The estimator's factor of the cost's slope; argument and result ``[S, *batch, L]``.

        Args:
            rest: Probability of the value that was not drawn.
        """
        return self._tempered_slope(conditional_magnitude(rest, self.num_replicates)).mean(0)

    def _tempered_slope(self, magnitude: Tensor) -> Tensor:
        """The derivative of the tempered sigmoid at a score of that magnitude; in its memory."""
        temperature = self.temperature.to(magnitude.dtype)
        # it is even in the score: of a negative one the sigmoid is small, and 1 less it loses nothing
        soft = magnitude.div_(-temperature).sigmoid_()
        return torch.addcmul(soft, soft, soft, value=-1).div_(temperature)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_replicates={self.num_replicates}"


def conditional_ratios(probs: Tensor, one_hot: Tensor, count: int) -> Tensor:
    """Draws of ``exp(s - max(s))``, s = log p + G given that its argmax is ``one_hot``: ``[C, count, S, *batch, L]``.

    The largest value is Gumbel whatever its index, the others are Gumbel truncated to lie below it. With exponential
    variables E, ``exp(-s)`` is E of the largest, and that plus ``E / p`` of the others.

    Args:
        probs: ``[C, S, *batch, L]``, or the same for every draw ``[C, 1, *batch, L]``.
        one_hot: ``[C, S, *batch, L]``.
        count: Number of draws for each one-hot vector.
    """
    noise = exponential((len(one_hot), count, *one_hot.shape[1:]), one_hot)
    least = (noise * one_hot.unsqueeze(1)).sum(0)
    others = (1 - one_hot) / probs.clamp_min(torch.finfo(probs.dtype).tiny)
    return noise.mul_(others.unsqueeze(1)).add_(least).reciprocal_().mul_(least)  # in place: no memory to fetch


def conditional_magnitude(rest: Tensor, count: int) -> Tensor:
    """Draws of the absolute value of a logit plus logistic noise given its sign: ``[count, *rest.shape]``.

    Args:
        rest: Probability of the other sign.
        count: Number of draws for each.
    """
    u = uniform((count, *rest.shape), rest)
    # by inversion: P(magnitude > x) = 1 / (1 + rest * (exp(x) - 1)) = 1 - u
    return u.div_(1 - u).div_(rest.clamp_min(torch.finfo(rest.dtype).tiny)).log1p_()


@register("gapped_straight_through")
class GappedStraightThrough(TemperedLayer):
    r"""Gapped straight-through: the logits are moved, without noise, until the draw leads by a gap.

    .. math:: \theta_i = \begin{cases} \max l & z_i = 1 \\ \min(l_i, \max l - g) & z_i = 0 \end{cases}, \qquad
        \nabla_l \approx \tfrac1\tau J(\mathrm{softmax}(\theta / \tau))^\top f'(z)

    Approximates the gradient of E_q[f] as ``straight_through_gumbel`` does, with the noise replaced by the smallest
    deterministic shift that makes the draw win by g; the shift counts as a constant. Biased. For given z there is no
    noise left, so that the variance is lower, at the cost of one softmax.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of draws per example.
        temperature: Temperature, positive.
        gap: Least distance g of the draw's logit from the others; at least 0.

    Raises:
        ValueError: ``temperature`` out of range, ``gap < 0``, or sizes that do not fit the family.

    References:
        Training Discrete Deep Generative Models via Gapped Straight-Through Estimator (Ting-Han Fan, Ta-Chung Chi,
        Alexander I. Rudnicky, Peter J. Ramadge, 2022), https://arxiv.org/abs/2206.07235

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("gapped_straight_through", latent_dim=3, family="categorical", num_categories=4)
        >>> layer(torch.zeros(5, 12)).view(5, 3, 4).sum(-1).unique()
        tensor([1.])
    """

    families = ("bernoulli", "categorical")
    unbiased = False
    needs = ("cost_gradient",)
    reference = (
        "Training Discrete Deep Generative Models via Gapped Straight-Through Estimator (Fan, Chi, Rudnicky and "
        "Ramadge, 2022). https://arxiv.org/abs/2206.07235"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 1,
        temperature: float = 1.0,
        gap: float = 1.0,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
        )
        self.gap = float(check_positive("gap", gap, "1 is usual", or_zero=True))

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q, temperature = self.law(params), self.temperature.to(params.dtype)
        if isinstance(self.family, CategoricalFamily):
            logits, index = self.family.unflatten(params), draw_index(q.mean, self.num_samples)
            values = logits.detach()
            top = values.amax(-1, keepdim=True)
            moved = torch.minimum(values.expand(*index.shape[:-1], -1), top - self.gap)
            moved = put(moved, index, top.expand(index.shape))
            soft = tempered_softmax(logits.unsqueeze(0), moved, temperature)
            return self._sample(q, with_value(one_hot(index, values), soft).flatten(-2))
        hard = self.family.sample(q, self.num_samples)
        # the pair (logit, 0): its difference, with the sign of the draw, is at least the gap
        sign, zero = 2 * hard - 1, params - params.detach()
        soft = ((sign * (sign * params.detach()).clamp_min(self.gap) + zero) / temperature).sigmoid()
        return self._sample(q, with_value(hard, soft))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gap={self.gap:g}"
