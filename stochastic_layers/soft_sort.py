"""Relaxed orders: the argsort of perturbed logits as a matrix of softmaxes, through which the gradient flows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stochastic_layers.auxiliary import with_value
from stochastic_layers.categorical import softmax
from stochastic_layers.layer import Sample
from stochastic_layers.noise import log_exponential
from stochastic_layers.permutations import PermutationFamily, matrices
from stochastic_layers.registry import register
from stochastic_layers.relaxed import TemperedLayer

__all__ = ["SoftSort"]


def soft_sorted(scores: Tensor, order: Tensor) -> Tensor:
    """SoftSort: at each place minus the distances to the score that belongs there, ``[..., n]`` -> ``[..., n, n]``."""
    return (scores.gather(-1, order).unsqueeze(-1) - scores.unsqueeze(-2)).abs().neg()


def neural_sorted(scores: Tensor) -> Tensor:
    """NeuralSort: at each place what is largest for the item that belongs there, ``[..., n]`` -> ``[..., n, n]``."""
    n = scores.shape[-1]
    distances = (scores.unsqueeze(-1) - scores.unsqueeze(-2)).abs().sum(-1, keepdim=True).mT
    factors = torch.arange(n - 1, -n, -2, dtype=scores.dtype, device=scores.device).unsqueeze(-1)
    return factors * scores.unsqueeze(-2) - distances


@register("soft_sort")
class SoftSort(TemperedLayer):
    r"""SoftSort, or NeuralSort: orders whose rows are softmaxes, as Gumbel-softmax relaxes a category.

    .. math:: z_{ij} \propto \exp(-|s_{[i]} - s_j| / \tau), \qquad s = l + G, \; s_{[1]} \ge \dots \ge s_{[n]}

    or, with ``relaxation="neural_sort"``, :math:`z_{ij} \propto \exp(((n + 1 - 2i) s_j - \sum_k |s_j - s_k|) / \tau)`.
    The largest entry of each row is at the item that comes i-th in an exact draw of the Plackett-Luce law; rows add up
    to 1, columns do not. Approximates the gradient of E_q[f] by that of the relaxed objective: biased, the less so the
    lower the temperature, while the variance grows. The cost must accept such matrices, or be given permutation
    matrices by ``hard=True``, with the backward pass of the relaxed ones.

    Args:
        latent_dim: Number of latent variables, each an order.
        num_categories: Number n of items of each.
        family: ``"permutation"``.
        num_samples: Number S of draws per example.
        temperature: Temperature, positive; the limit 0 is the discrete law.
        learn_temperature: Whether the temperature is a parameter.
        relaxation: ``"soft_sort"`` or ``"neural_sort"``.
        hard: Whether the forward value is an order.

    Raises:
        ValueError: Unknown ``relaxation``, ``temperature`` out of range, or sizes that do not fit the family.

    References:
        SoftSort: A Continuous Relaxation for the argsort Operator (Sebastian Prillo, Julian Martin Eisenschlos, 2020),
        https://arxiv.org/abs/2006.16038; Stochastic Optimization of Sorting Networks via Continuous Relaxations (Aditya
        Grover, Eric Wang, Aaron Zweig, Stefano Ermon, 2019), https://arxiv.org/abs/1903.08850

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("soft_sort", latent_dim=1, num_categories=4, hard=True)
        >>> z = layer(torch.zeros(5, 4))
        >>> order = z.view(5, 4, 4).argmax(-1)  # [5, 4], items from the first to the last
        >>> order.sort(-1).values[0]
        tensor([0, 1, 2, 3])
    """

    families = ("permutation",)
    unbiased = False
    needs: tuple[str, ...] = ("cost_gradient", "relaxable_cost")
    exact_draws = False
    reference = "SoftSort: A Continuous Relaxation for the argsort Operator (Prillo and Eisenschlos, 2020). https://arxiv.org/abs/2006.16038"

    def __init__(
        self,
        latent_dim: int,
        *,
        num_categories: int | None = None,
        family: str = "permutation",
        num_samples: int = 1,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        relaxation: Literal["soft_sort", "neural_sort"] = "soft_sort",
        hard: bool = False,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            temperature=temperature,
            learn_temperature=learn_temperature,
        )
        if relaxation not in ("soft_sort", "neural_sort"):
            raise ValueError(f"needed relaxation 'soft_sort' or 'neural_sort', got {relaxation!r}.")
        self.relaxation, self.hard = relaxation, hard
        if hard:
            self.needs = ("cost_gradient",)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        family = self.family
        assert isinstance(family, PermutationFamily)
        logits = family.unflatten(params)
        scores = logits - log_exponential((self.num_samples, *logits.shape), logits)
        order = scores.detach().argsort(dim=-1, descending=True)
        scores = scores / self.temperature.to(params.dtype)
        z = softmax(soft_sorted(scores, order) if self.relaxation == "soft_sort" else neural_sorted(scores)).flatten(-3)
        return self._sample(self.law(params), with_value(matrices(order, scores).flatten(-3), z) if self.hard else z)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relaxation={self.relaxation!r}, hard={self.hard}"
