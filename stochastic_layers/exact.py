"""Exact summation: the cost at every outcome, weighted by its probability; the gradient has no variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stochastic_layers.categorical import log_softmax
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.options import MAX_NUMBERS, check_positive_int, in_few_digits
from stochastic_layers.registry import register

__all__ = ["JOINT", "Enumeration", "JointLayer"]

JOINT = "(num_categories or 2) ** latent_dim"  # number of joint outcomes of bits and of categories


class JointLayer(StochasticLayer):
    """Base of layers that treat all latent variables as one variable with a category per joint outcome.

    The N outcomes, ``(num_categories or 2) ** latent_dim`` of bits and categories, are numbered with the first latent
    variable as the most significant digit.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"``, ``"subset"`` or ``"permutation"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number S of draws per example.
        max_outcomes: Largest number of joint outcomes that is accepted.

    Raises:
        ValueError: There are more than ``max_outcomes`` outcomes.
    """

    default_latent_dim = 3

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any],
        num_categories: int | None = None,
        num_samples: int = 1,
        max_outcomes: int,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, num_samples=num_samples)
        check_positive_int("max_outcomes", max_outcomes)
        radix = self.family.num_outcomes
        # the exponent is looked at first, so that no astronomical power is computed or printed
        if latent_dim > max_outcomes.bit_length() or radix**latent_dim > max_outcomes:
            count = f" = {radix**latent_dim}" if latent_dim * math.log10(radix) < 18 else ""
            per_category = self.family.name in ("bernoulli", "categorical")
            fits = per_category and latent_dim * radix * self.out_features <= MAX_NUMBERS
            local = "'local_expectation' (one evaluation per category) or " if fits else ""
            got = f"{in_few_digits(radix)} ** {latent_dim}{count}"
            raise ValueError(
                f"needed at most max_outcomes={max_outcomes} joint outcomes for {self.name or type(self).__name__!r}, "
                f"got {got}; use {local}'reinforce' (any size), fewer latent variables, or raise max_outcomes."
            )
        self.radix = radix
        self.num_outcomes: int = radix**latent_dim
        if radix != (num_categories or 2) and isinstance(self.evaluations, str):
            self.evaluations = self.evaluations.replace(JOINT, "num_outcomes")

    def joint_log_probs(self, params: Tensor) -> Tensor:
        """log q of every outcome ``[*batch, N]``, with gradient."""
        table = log_softmax(self.family.outcome_scores(params))
        joint = table[..., 0, :]
        for latent in range(
            1, self.latent_dim
        ):  # at most log2(max_outcomes) steps; N values instead of N * out_features
            joint = (joint.unsqueeze(-1) + table[..., latent, None, :]).flatten(-2)
        return joint

    def points(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """z ``[..., out_features]`` of outcome numbers ``[...]``."""
        strides = self.radix ** torch.arange(self.latent_dim - 1, -1, -1, device=index.device)
        digits = index.unsqueeze(-1) // strides % self.radix  # [..., latent_dim]
        return self.family.outcome_values(digits, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, outcomes={self.num_outcomes}"


@register("enumeration")
class Enumeration(JointLayer):
    r"""Enumeration: the exact expectation, by evaluating the cost at every outcome.

    .. math:: \nabla E_q[f] = \sum_z f(z) \nabla q(z) + q(z) \nabla f(z)

    Not an approximation: value, encoder and decoder gradients are exact for any f and have no variance. One decoder
    call evaluates all outcomes, ``(num_categories or 2) ** latent_dim`` of bits and categories; ``weights`` are q(z)
    ``[S, *batch]``, without gradient: the encoder's gradient is in the surrogate, as everywhere. The reference against
    which the bias and the variance of the other layers are measured, and the best choice for small latent spaces.

    The cost needs every batch dimension of params, because each example has weights of its own, and must be finite at
    every outcome: however unlikely one is, an infinite cost there makes loss and gradient NaN. Clamp it.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"``, ``"subset"`` or ``"permutation"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        max_outcomes: Largest number of outcomes that is accepted.

    Raises:
        ValueError: There are more than ``max_outcomes`` outcomes.

    References:
        Rao-Blackwellized Stochastic Gradients for Discrete Distributions (Runjing Liu, Jeffrey Regier, Nilesh
        Tripuraneni, Michael I. Jordan, Jon McAuliffe, 2018), https://arxiv.org/abs/1810.04777, equation 2

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("enumeration", latent_dim=2, family="categorical", num_categories=3)
        >>> logits = torch.zeros(5, 6, requires_grad=True)
        >>> sample = layer.sample(logits)
        >>> sample.z.shape, sample.weights.shape
        (torch.Size([9, 5, 6]), torch.Size([9, 5]))
        >>> sample.surrogate(sample.z[..., 0]).sum().backward()
        >>> logits.grad[0, 0].item()
        0.2222222238779068
    """

    families = ("bernoulli", "categorical", "subset", "permutation")
    unbiased = True
    needs = ("cost",)
    evaluations = JOINT
    reference = (
        "Rao-Blackwellized Stochastic Gradients for Discrete Distributions (Liu, Regier, Tripuraneni, Jordan and "
        "McAuliffe, 2018). https://arxiv.org/abs/1810.04777"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any] = "bernoulli",
        num_categories: int | None = None,
        max_outcomes: int = 4096,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, max_outcomes=max_outcomes)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        log_q = self.joint_log_probs(params).movedim(-1, 0)  # [N, *batch]
        weights = log_q.detach().exp()
        index = torch.arange(self.num_outcomes, device=params.device)
        z = self.points(index.view(-1, *[1] * (params.dim() - 1)).expand(log_q.shape), params.dtype)

        def credit(cost: Tensor) -> Tensor:
            cost = cost.detach()
            # a constant does not change the sum of f dq, and without it the rounding of large costs cancels
            centered = cost - (weights * cost).sum(0)
            return (weights * centered * log_q).sum(0)  # dq = q d log q stays finite where q underflows

        return self._sample(q, z, weights=weights, credit=credit)
