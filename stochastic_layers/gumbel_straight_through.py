"""Straight-through layers built on Gumbel noise: hard draws forward, the gradient of the perturbed softmax backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stochastic_layers.auxiliary import kernels_usable, with_value
from stochastic_layers.categorical import log_softmax, softmax
from stochastic_layers.families import CategoricalFamily
from stochastic_layers.layer import Sample
from stochastic_layers.noise import log_exponential
from stochastic_layers.options import check_not_negative, check_positive_int
from stochastic_layers.registry import register
from stochastic_layers.relaxed import GumbelSoftmax, TemperedLayer

__all__ = [
    "GappedStraightThrough",
    "GumbelRao",
    "StraightThroughGumbel",
    "Term",
    "conditional_gumbel",
    "conditional_logistic",
    "conditional_magnitude",
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
        ValueError: ``temperature <= 0``, or sizes that do not fit the family.

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


class Term(NamedTuple):
    r"""A part of a matrix by which the cost's slope is multiplied, symmetric and constant.

    Attributes:
        weight: ``[1]``.
        values: Points y ``[K, S, *batch, L, C]``, whose Jacobians :math:`\mathrm{diag}(y) - y y^\top` are added, or
            the sum itself ``[S, *batch, L, C, C]``.
        is_matrix: Which of the two.
    """

    weight: Tensor
    values: Tensor
    is_matrix: bool = False

    def times(self, vector: Tensor) -> Tensor:
        """The product with a vector ``[S, *batch, L, C]``."""
        if self.is_matrix:
            product = (self.values @ vector.unsqueeze(-1)).squeeze(-1)
        else:
            mean = (self.values * vector).sum(-1, keepdim=True)
            product = (vector - mean).mul_(self.values).sum(0)
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
    """The sum of the terms times a vector."""
    return torch.stack([term.times(vector) for term in terms]).sum(0)


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
        ValueError: ``temperature <= 0``, ``num_replicates < 1``, or sizes that do not fit the family.

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
            logits, one_hot = self.family.unflatten(params), self.family.unflatten(hard)
            terms = self._terms(log_softmax(logits.detach()), one_hot)
            return self._sample(q, with_slope(one_hot, logits, terms).flatten(-2))
        return self._sample(q, hard + self._bit_slope(params.detach(), hard) * (params - params.detach()))

    def _terms(self, log_probs: Tensor, one_hot: Tensor) -> list[Term]:
        """The estimator's matrix ``[S, *batch, L, C, C]`` as a sum of Jacobians."""
        replicates, categories = self.num_replicates, log_probs.shape[-1]
        weight = 1 / (replicates * self.temperature.to(log_probs.dtype))
        if replicates <= categories:  # R vectors are smaller than one matrix
            return [Term(weight, self._points(log_probs, one_hot, replicates))]
        matrix = one_hot.new_zeros(*one_hot.shape, categories)
        for start in range(0, replicates, categories):
            draws = self._points(log_probs, one_hot, min(categories, replicates - start))
            matrix.diagonal(dim1=-2, dim2=-1).add_(draws.sum(0))
            matrix -= torch.einsum("r...i,r...j->...ij", draws, draws)
        return [Term(weight, matrix, is_matrix=True)]

    def _bit_slope(self, logits: Tensor, bits: Tensor) -> Tensor:
        """The estimator's factor of the cost's slope: ``[S, *batch, L]``."""
        temperature = self.temperature.to(logits.dtype)
        soft = conditional_magnitude(logits, bits, self.num_replicates).div_(-temperature).sigmoid_()
        # the slope is even in the score: of a negative one the sigmoid is small, and 1 less it loses nothing
        return torch.addcmul(soft, soft, soft, value=-1).mean(0) / temperature

    def _points(self, log_probs: Tensor, one_hot: Tensor, count: int) -> Tensor:
        """Relaxed draws given z ``[count, S, *batch, L, C]`` at which the Jacobian of the softmax is taken."""
        return softmax(conditional_gumbel(log_probs, one_hot, count).div_(self.temperature.to(log_probs.dtype)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_replicates={self.num_replicates}"


def conditional_gumbel(log_probs: Tensor, one_hot: Tensor, count: int) -> Tensor:
    """Draws of ``log_probs + G`` given that their argmax is ``one_hot``: ``[count, *one_hot.shape]``.

    The largest value is Gumbel whatever its index, the others are Gumbel truncated to lie below it. Of a category whose
    probability underflows it is minus infinity.
    """
    noise = log_exponential((count, *one_hot.shape), one_hot)
    index = one_hot.argmax(-1, keepdim=True).expand(count, *one_hot.shape[:-1], 1)
    largest = noise.gather(-1, index)
    # -log(E_i / p_i + E_max); torch's logaddexp takes several times as long
    lower = noise.sub_(log_probs).exp_().add_(largest.exp()).log_()
    return lower.scatter_(-1, index, largest).neg_()


def conditional_logistic(logits: Tensor, bits: Tensor, count: int) -> Tensor:
    """Draws of ``logits`` plus logistic noise given their sign, ``bits``: ``[count, *bits.shape]``."""
    return conditional_magnitude(logits, bits, count).mul_(2 * bits - 1)


def conditional_magnitude(logits: Tensor, bits: Tensor, count: int) -> Tensor:
    """The absolute values of :func:`conditional_logistic`."""
    margin = (2 * bits - 1) * logits
    u = torch.rand(count, *bits.shape, dtype=bits.dtype, device=bits.device)
    # inversion: P(score > x | score > 0) = sigmoid(margin - x) / sigmoid(margin) = u, in log space
    log_tail = u.clamp_(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps / 2).log_().add_(logsigmoid(margin))
    return log_tail.expm1().neg_().log_().sub_(log_tail).add_(margin).clamp_min_(0)


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
        ValueError: ``temperature <= 0``, ``gap < 0``, or sizes that do not fit the family.

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
        self.gap = float(check_not_negative("gap", gap, "1 is usual"))

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        hard = self.family.sample(q, self.num_samples)
        temperature = self.temperature.to(params.dtype)
        if isinstance(self.family, CategoricalFamily):
            logits, one_hot = self.family.unflatten(params), self.family.unflatten(hard)
            values = logits.detach()
            top = values.amax(-1, keepdim=True)
            moved = torch.where(one_hot > 0, top, torch.minimum(values, top - self.gap))
            terms = [Term(1 / temperature, softmax(moved.div_(temperature)).unsqueeze(0))]
            return self._sample(q, with_slope(one_hot, logits, terms).flatten(-2))
        # the pair (logit, 0): its difference, with the sign of the draw, is at least the gap
        sign, zero = 2 * hard - 1, params - params.detach()
        soft = ((sign * (sign * params.detach()).clamp_min(self.gap) + zero) / temperature).sigmoid()
        return self._sample(q, with_value(hard, soft))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gap={self.gap:g}"
