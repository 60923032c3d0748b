"""Antithetic pairs of bits: two exact draws that disagree on purpose, so that their costs say more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stochastic_layers.binary_codes import decode_tree, ordered_sticks, tree_logits
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.layer import Sample, StochasticLayer, sum_rightmost
from stochastic_layers.noise import below, double_uniform
from stochastic_layers.registry import register

__all__ = ["ARM", "DisARM", "DisARMBase", "DisARMTree", "PairLayer"]


_Decoder = Callable[[Tensor], tuple[Tensor, "Tensor | None"]]


def _antithetic_bits(logits: Tensor, u: Tensor) -> Tensor:
    """Bits 1[u > 1 - p], then 1[u < p] ``[2 P, ...]``, each an exact draw: 1 - u is exact for u of even spacing.

    In the precision of u ``[P, ...]``, in which a bit of probability 1e-9 is still drawn, and one of 1 - 1e-9 missed.
    """
    return below(torch.cat([1 - u, u]), logits.detach().to(u.dtype).sigmoid()).to(logits.dtype)


def _pair_credit(logits: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Credit of the estimator ``(cost of the first - cost of the second) * weight``, averaged over the P pairs.

    Args:
        logits: ``[*batch, ...]`` with graph.
        weight: ``[P, *batch, ...]``.
    """

    def credit(cost: Tensor) -> Tensor:
        first, second = cost.detach().chunk(2)
        return ((first - second) * sum_rightmost(weight * logits.unsqueeze(0), cost.dim())).mean(0)

    return credit


class PairLayer(StochasticLayer):
    """Base of layers whose points come in antithetic pairs: point k and point S/2 + k.

    Args:
        latent_dim: Number of latent variables.
        family: Name of the distribution family.
        num_categories: Number of categories of each variable of a categorical family.
        num_samples: Number S of points, two for each pair.

    Raises:
        ValueError: ``num_samples`` is odd.
    """

    def __init__(
        self, latent_dim: int, *, family: str, num_categories: int | None = None, num_samples: int = 2
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)

    def check_num_samples(self, num_samples: int) -> None:
        if num_samples % 2:
            raise ValueError(
                f"needed an even num_samples, two points for each antithetic pair, got {num_samples}; pass "
                f"{num_samples + 1}, or use 'arms' or 'carms', which take any number from 2."
            )


@register("arm")
class ARM(PairLayer):
    r"""ARM: augment-REINFORCE-merge, the antithetic pair of a bit with its uniform noise; kept for reference.

    .. math:: \nabla_\phi E_q[f] \approx (f(1[u > 1-\theta]) - f(1[u < \theta])) (u - \tfrac12), \quad u \sim U(0, 1)

    Unbiased for any cost. :class:`DisARM` is its conditional expectation given the two points: same cost, never more
    variance. Both points are exact draws of q, and both enter the value and the decoder's gradient.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``.
        num_samples: Number S of points, even: S/2 pairs, averaged.

    Raises:
        ValueError: ``num_samples`` is odd.

    References:
        ARM: Augment-REINFORCE-Merge Gradient for Stochastic Binary Networks (Mingzhang Yin, Mingyuan Zhou, 2018),
        https://arxiv.org/abs/1807.11143

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("arm", latent_dim=3)
        >>> layer.sample(torch.zeros(5, 3)).z.shape
        torch.Size([2, 5, 3])
    """

    families = ("bernoulli",)
    unbiased = True
    needs = ("cost",)
    reference = (
        "ARM: Augment-REINFORCE-Merge Gradient for Stochastic Binary Networks (Yin and Zhou, 2018). "
        "https://arxiv.org/abs/1807.11143"
    )

    def __init__(self, latent_dim: int, *, family: str = "bernoulli", num_samples: int = 2) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        u = double_uniform((self.num_samples // 2, *params.shape), params.device)
        weight = (u - 0.5).to(params.dtype)
        return self._sample(self.law(params), _antithetic_bits(params, u), credit=_pair_credit(params, weight))


class DisARMBase(PairLayer):
    """Base of DisARM layers: a subclass says by which bits its variables are written."""

    @abstractmethod
    def code(self, params: Tensor) -> tuple[Tensor, _Decoder]:
        """Bit logits ``[*batch, ...]`` with graph, the function from bits to z and what it looked at (None: all)."""

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        logits, decode = self.code(params)
        bits = _antithetic_bits(logits, double_uniform((self.num_samples // 2, *logits.shape), logits.device))
        z, reached = decode(bits)
        b, b_tilde = bits.chunk(2)
        weight = (b - b_tilde).mul_(0.5 * logits.detach().abs().sigmoid())
        # a bit that neither point looked at is a fair sign: its conditional expectation is zero
        if reached is not None:
            weight.mul_(torch.maximum(*reached.chunk(2)))
        if isinstance(self.family, CategoricalFamily):
            z = z.flatten(-2)
        return self._sample(self.law(params), z, credit=_pair_credit(logits, weight))


@register("disarm")
class DisARM(DisARMBase):
    r"""DisARM, also known as U2G: antithetic pairs of bits, the noise integrated out.

    .. math:: \nabla_\phi E_q[f] \approx \tfrac12 (f(b) - f(\tilde b)) (-1)^{\tilde b} 1[b \ne \tilde b] \sigma(|\phi|)

    Unbiased for any cost, with two evaluations for each pair; both points are exact draws of q, and both enter the
    value and the decoder's gradient. A categorical variable is written as stick-breaking bits (its first 1 names the
    category), whose gradient is carried to the logits by the chain rule.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"`` or ``"categorical"``.
        num_categories: Number of categories of a categorical variable.
        num_samples: Number S of points, even: S/2 pairs, averaged.
        order: Order in which the sticks are broken: ``"ascending"`` in probability (the least variance in most cases),
            ``"descending"``, or the ``"given"`` order of the categories. Bits have no order and ignore it.

    Raises:
        ValueError: ``num_samples`` is odd, or unknown ``order``.

    References:
        DisARM: An Antithetic Gradient Estimator for Binary Latent Variables (Zhe Dong, Andriy Mnih, George Tucker,
        2020), https://arxiv.org/abs/2006.10680; Probabilistic Best Subset Selection via Gradient-Based Optimization
        (Mingzhang Yin, Nhat Ho, Bowei Yan, Xiaoning Qian, Mingyuan Zhou, 2020), https://arxiv.org/abs/2006.06448;
        Coupled Gradient Estimators for Discrete Latent Variables (Zhe Dong, Andriy Mnih, George Tucker, 2021),
        https://arxiv.org/abs/2106.08056

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("disarm", latent_dim=200)
        >>> sample = layer.sample(torch.zeros(5, 200))
        >>> sample.z.shape, sample.surrogate(sample.z.sum(-1)).shape
        (torch.Size([2, 5, 200]), torch.Size([5]))
        >>> layer = sl.create("disarm", latent_dim=4, family="categorical", num_categories=3, num_samples=6)
        >>> layer.sample(torch.zeros(5, 12)).z.shape
        torch.Size([6, 5, 12])
    """

    families = ("bernoulli", "categorical")
    unbiased = True
    needs = ("cost",)
    reference = (
        "DisARM: An Antithetic Gradient Estimator for Binary Latent Variables (Dong, Mnih and Tucker, 2020). "
        "https://arxiv.org/abs/2006.10680"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 2,
        order: Literal["ascending", "descending", "given"] = "ascending",
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        if order not in ("ascending", "descending", "given"):
            raise ValueError(f"needed order 'ascending', 'descending' or 'given', got {order!r}.")
        self.order = order

    def code(self, params: Tensor) -> tuple[Tensor, _Decoder]:
        if isinstance(self.family, CategoricalFamily):
            return ordered_sticks(self.family.unflatten(params), self.order)
        return params, lambda bits: (bits, None)


@register("disarm_tree")
class DisARMTree(DisARMBase):
    r"""DisARM for categorical variables that are the leaves of a balanced binary tree.

    The category is written as :math:`\lceil \log_2 C \rceil` bits, one at each node on the way from the root to its
    leaf; each carries the DisARM estimator, and the chain rule carries their gradients to the logits. Unbiased for any
    cost, with two evaluations for each pair. In its favour: the gradient of every category flows through few bits; an
    order of the categories in which neighbours have similar costs lowers the variance.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number of categories of each variable.
        family: ``"categorical"``.
        num_samples: Number S of points, even: S/2 pairs, averaged.

    Raises:
        ValueError: ``num_samples`` is odd.

    References:
        Coupled Gradient Estimators for Discrete Latent Variables (Zhe Dong, Andriy Mnih, George Tucker, 2021),
        https://arxiv.org/abs/2106.08056

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("disarm_tree", latent_dim=3, num_categories=5)
        >>> layer.sample(torch.zeros(7, 15)).z.shape
        torch.Size([2, 7, 15])
    """

    families = ("categorical",)
    unbiased = True
    needs = ("cost",)
    reference = (
        "Coupled Gradient Estimators for Discrete Latent Variables (Dong, Mnih and Tucker, 2021). "
        "https://arxiv.org/abs/2106.08056"
    )

    def __init__(
        self, latent_dim: int, *, num_categories: int | None = None, family: str = "categorical", num_samples: int = 2
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)

    def code(self, params: Tensor) -> tuple[Tensor, _Decoder]:
        assert isinstance(self.family, CategoricalFamily)
        logits = self.family.unflatten(params)
        return tree_logits(logits), lambda bits: decode_tree(bits, logits.shape[-1])
