"""Sparse laws: most categories have probability exactly zero, and the others are enumerated."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, OneHotCategorical

from stochastic_layers.categorical import one_hot_categorical
from stochastic_layers.discrete_families import CategoricalFamily
from stochastic_layers.exact import JointLayer
from stochastic_layers.layer import Sample
from stochastic_layers.registry import register
from stochastic_layers.simplex_maps import sparsemax

__all__ = ["SparsemaxMarginalization", "sparsemax"]


@register("sparsemax_marginalization")
class SparsemaxMarginalization(JointLayer):
    r"""Sparsemax marginalisation: a law with small support, enumerated exactly.

    .. math:: q_i = \mathrm{sparsemax}(s_i), \qquad
        \nabla E_q[f] = \sum_{z : q(z) > 0} f(z) \nabla q(z) + q(z) \nabla f(z)

    Exact and without variance, like ``enumeration``, but for another law: ``layer.distribution(params)``, ``log_prob``
    and the draws in ``eval()`` are those of the sparse q. Its KL divergence to a prior with full support is finite; the
    reverse one is infinite. A category that has left the support gets no gradient, and returns only through
    parameters that its score shares with the others: start from small scores, at which the support is full.

    S is the largest support in the batch, at most ``num_categories ** latent_dim``; where an example's support is
    smaller, its likeliest outcome fills up with weight 0. Under ``torch.compile`` S is always the maximum, because a
    graph has fixed shapes. The cost needs every batch dimension of params.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number of categories of each variable.
        family: ``"categorical"``.
        max_outcomes: Largest number of joint outcomes that is accepted.

    Raises:
        ValueError: There are more than ``max_outcomes`` outcomes.

    References:
        Efficient Marginalization of Discrete and Structured Latent Variables via Sparsity (Gonçalo M. Correia, Vlad
        Niculae, Wilker Aziz, André F. T. Martins, 2020), https://arxiv.org/abs/2007.01919

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("sparsemax_marginalization", latent_dim=1, num_categories=3)
        >>> sample = layer.sample(torch.tensor([[0.5, 0.0, -1.0], [3.0, 0.0, 0.0]]))
        >>> sample.weights.tolist()
        [[0.75, 1.0], [0.25, 0.0]]
    """

    default_latent_dim = 1  # the support is all there is at the start of training: every outcome, in every step
    families = ("categorical",)
    unbiased = True
    needs = ("cost",)
    evaluations = "size of the largest support, at most num_categories ** latent_dim"
    reference = (
        "Efficient Marginalization of Discrete and Structured Latent Variables via Sparsity (Correia, Niculae, Aziz "
        "and Martins, 2020). https://arxiv.org/abs/2007.01919"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        num_categories: int | None = None,
        family: str = "categorical",
        max_outcomes: int = 4096,
    ) -> None:
        super().__init__(latent_dim, family=family, num_categories=num_categories, max_outcomes=max_outcomes)

    def law(self, params: Tensor) -> Distribution:
        """Independent one-hot variables whose probabilities are the sparsemax of params, not the softmax.

        Off the support, log-probabilities are a large negative number instead of ``-inf``: their exponentials are 0
        exactly, and a KL divergence to a law with full support is finite and differentiable.
        """
        probs = self._probs(params)
        lowest = torch.finfo(probs.dtype).min / (4 * self.latent_dim)  # a sum over latents does not overflow
        on = probs > 0
        log_probs = torch.where(on, torch.where(on, probs, 1.0).log(), lowest)
        return Independent(one_hot_categorical(log_probs, law=OneHotCategorical), 1, validate_args=False)

    def _probs(self, params: Tensor) -> Tensor:
        assert isinstance(self.family, CategoricalFamily)
        return sparsemax(self.family.unflatten(params))  # [*batch, latent_dim, C]

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q, probs = self.law(params), self._probs(params)
        joint = probs[..., 0, :]
        for latent in range(1, self.latent_dim):  # at most log2(max_outcomes) steps
            joint = (joint.unsqueeze(-1) * probs[..., latent, None, :]).flatten(-2)
        size = self.num_outcomes
        if not torch.compiler.is_compiling() and joint.numel():
            size = int((joint > 0).sum(-1).max())
        weights, index = joint.detach().topk(size, -1)
        index = torch.where(weights > 0, index, index[..., :1]).movedim(-1, 0)  # [S, *batch]
        weights = weights.movedim(-1, 0)
        q_z = torch.where(weights > 0, joint.movedim(-1, 0).gather(0, index), 0.0)

        def credit(cost: Tensor) -> Tensor:
            cost = cost.detach()
            return ((cost - (weights * cost).sum(0)) * q_z).sum(0)  # as in enumeration, a shift cancels rounding

        return self._sample(q, self.points(index, params.dtype), weights=weights, credit=credit)
