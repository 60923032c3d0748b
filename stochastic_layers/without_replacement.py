"""Layers that never evaluate an outcome twice: the likeliest are summed, or draws are made without replacement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from stochastic_layers.auxiliary import as_drawn
from stochastic_layers.categorical import draw_index
from stochastic_layers.exact import JOINT, JointLayer
from stochastic_layers.layer import Sample
from stochastic_layers.noise import log_exponential
from stochastic_layers.options import check_positive_int
from stochastic_layers.registry import register

__all__ = ["SumAndSample", "UnorderedSet", "log_set_probs"]

MAX_SET = 10  # the subsets of a set of draws are enumerated


@register("sum_and_sample")
class SumAndSample(JointLayer):
    r"""Sum and sample: the k likeliest outcomes exactly, the rest by draws times the rest's probability.

    .. math:: \nabla E_q[f] \approx \sum_{z \in T} (f(z) - b) \nabla q(z)
        + \frac{1 - q(T)}{m} \sum_{j=1}^m (f(z_j) - b) \nabla \log q(z_j), \qquad z_j \sim q(\cdot \mid z \notin T)

    with T the k likeliest joint outcomes. Approximates the gradient of E_q[f] for any f; unbiased, and the better the
    more probability T holds. The baseline b is the mean cost over T: no draw enters it, so that the mean stays, and the
    gradient is exactly zero for a constant f. ``weights`` are q(z) on T and (1 - q(T)) / m on the rest.

    Treats the latent variables as one joint variable; its log-probabilities are tabulated, so that the number of
    outcomes is limited although few of them are evaluated. The cost needs every batch dimension of params.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"``, ``"subset"`` or ``"permutation"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_exact: Number k of outcomes summed exactly.
        num_samples: Number m of draws from the rest. With k + m outcomes or fewer in all, all are summed: exact.
        baseline: ``"exact_part"`` (see above) or ``"none"``.
        max_outcomes: Largest number of joint outcomes that is accepted.

    Raises:
        ValueError: ``num_exact < 1``, an unknown baseline, or more than ``max_outcomes`` outcomes.

    References:
        Rao-Blackwellized Stochastic Gradients for Discrete Distributions (Runjing Liu, Jeffrey Regier, Nilesh
        Tripuraneni, Michael I. Jordan, Jon McAuliffe, 2018), https://arxiv.org/abs/1810.04777

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("sum_and_sample", latent_dim=1, family="categorical", num_categories=16, num_exact=3)
        >>> sample = layer.sample(torch.zeros(5, 16))
        >>> sample.z.shape, [round(w, 4) for w in sample.weights[:, 0].tolist()]
        (torch.Size([4, 5, 16]), [0.0625, 0.0625, 0.0625, 0.8125])
    """

    families = ("bernoulli", "categorical", "subset", "permutation")
    unbiased = True
    needs = ("cost",)
    evaluations = f"min(num_exact + num_samples, {JOINT})"
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
        num_exact: int = 3,
        num_samples: int = 1,
        baseline: Literal["exact_part", "none"] = "exact_part",
        max_outcomes: int = 65_536,
    ) -> None:
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            max_outcomes=max_outcomes,
        )
        self.num_exact = check_positive_int("num_exact", num_exact, "'reinforce' sums nothing exactly")
        if baseline not in ("exact_part", "none"):
            raise ValueError(f"needed baseline 'exact_part' or 'none', got {baseline!r}.")
        self.baseline = baseline

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        joint = self.joint_log_probs(params.detach())  # [*batch, N]
        everything = self.num_exact + self.num_samples >= self.num_outcomes
        num_exact = self.num_outcomes if everything else self.num_exact
        log_top, top = joint.topk(num_exact, -1)
        index = top.movedim(-1, 0)
        exact = log_top.movedim(-1, 0).exp()
        weights = exact
        if not everything:
            log_rest = joint.scatter(-1, top, -torch.inf)
            index = torch.cat([index, self._draw_rest(log_rest)])
            rest = log_rest.logsumexp(-1).exp() / self.num_samples
            weights = torch.cat([exact, rest.expand(self.num_samples, *rest.shape)])
        z = self.points(index, params.dtype)  # [S, *batch, out_features]
        read = as_drawn(z)

        def credit(cost: Tensor) -> Tensor:
            cost = cost.detach()
            if self.baseline == "exact_part":
                cost = cost - cost[:1]  # the likeliest outcome is always there: no draw enters
                cost = cost - (exact * cost[:num_exact]).sum(0) / exact.sum(0)
            return (weights * cost * self.family.log_prob(q, read())).sum(0)

        return self._sample(q, z, weights=weights, credit=credit)

    def _draw_rest(self, rest: Tensor) -> Tensor:
        """Outcome numbers ``[m, *batch]`` drawn from log-weights ``[*batch, N]`` of the rest."""
        return draw_index(rest.softmax(-1), self.num_samples).squeeze(-1)


def log_set_probs(log_p: Tensor, log_rest: Tensor) -> Tensor:
    r"""Log-probabilities with which sequential draws without replacement exhaust the subsets of a set.

    For a subset A of the k given outcomes, h(A) is the probability that, of the outcomes in A and those outside the
    set, the first ``|A|`` draws are A in any order. Every sum has positive terms only:

    .. math:: h(A) = \sum_{t \in A} \frac{p_t}{p(A) + p_\text{rest}} h(A \setminus t), \qquad h(\emptyset) = 1

    Args:
        log_p: ``[k, *batch]``, log-probabilities of the outcomes of the set.
        log_rest: ``[*batch]``, log of the probability of all others; ``-inf`` where there are none.

    Returns:
        ``[2**k, *batch]``: log h of the subset whose members are the bits of the position.
    """
    k = log_p.shape[0]
    subset = torch.arange(2**k, device=log_p.device).unsqueeze(-1)
    bit = 2 ** torch.arange(k, device=log_p.device)
    member = (subset // bit % 2 > 0).view(2**k, k, *[1] * log_rest.dim())
    without = (subset - bit).clamp_min(0)  # read where t is a member only
    members = torch.where(member, log_p, -torch.inf)  # [2**k, k, *batch]
    log_mass = torch.logaddexp(members.logsumexp(1), log_rest)[1:]
    empty = torch.zeros_like(log_mass[:1])
    log_h = torch.cat([empty, torch.full_like(log_mass, -torch.inf)])
    for _ in range(k):  # after r rounds, subsets of up to r members are final
        log_h = torch.cat([empty, (members + log_h[without])[1:].logsumexp(1) - log_mass])
    return log_h


@register("unordered_set")
class UnorderedSet(JointLayer):
    r"""Unordered set estimator: k distinct outcomes drawn without replacement, with its built-in baseline.

    .. math:: \nabla E_q[f] \approx \sum_{s \in S} \nabla q(s) \, R(S, s) \Big( f(s) -
        \sum_{s' \in S} q(s') \, R^{\setminus s}(S, s') \, f(s') \Big)

    with :math:`R(S, s)` the probability of drawing the rest of S without s, divided by that of drawing S;
    :math:`R^{\setminus s}` the same with s removed from the domain, and 1 for s' = s. Approximates the gradient of
    E_q[f] for any f; unbiased. It is the mean of the one-draw estimator over the orders in which S could have been
    drawn, so that no evaluation is spent on an outcome twice. Exactly zero for a constant f; exact, without variance,
    when k is the number of outcomes. ``weights`` are q(s) R(S, s), which sum to 1 in every set.

    The ratios are computed over the subsets of S by a sum of positive terms, in log space. Treats the latent variables
    as one joint variable, whose log-probabilities are tabulated. The cost needs every batch dimension of params.

    Args:
        latent_dim: Number of latent variables.
        family: ``"bernoulli"``, ``"categorical"``, ``"subset"`` or ``"permutation"``.
        num_categories: Number of categories of a categorical variable, or of items to choose from.
        num_samples: Number k of distinct outcomes, at most 10; where there are fewer in all, all are taken.
        baseline: ``"built_in"`` or ``"none"``.
        max_outcomes: Largest number of joint outcomes that is accepted.

    Raises:
        ValueError: ``num_samples`` is over 10, or 1 with the built-in baseline; an unknown baseline; or more than
            ``max_outcomes`` outcomes.

    References:
        Estimating Gradients for Discrete Random Variables by Sampling without Replacement (Wouter Kool, Herke van Hoof,
        Max Welling, 2020), https://arxiv.org/abs/2002.06043

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("unordered_set", latent_dim=2, family="categorical", num_categories=5, num_samples=3)
        >>> sample = layer.sample(torch.zeros(7, 10))
        >>> sample.z.shape, sample.weights.sum(0).allclose(torch.ones(7))
        (torch.Size([3, 7, 10]), True)
    """

    families = ("bernoulli", "categorical", "subset", "permutation")
    unbiased = True
    needs = ("cost",)
    evaluations = f"min(num_samples, {JOINT})"
    reference = (
        "Estimating Gradients for Discrete Random Variables by Sampling without Replacement (Kool, van Hoof and "
        "Welling, 2020). https://arxiv.org/abs/2002.06043"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any] = "bernoulli",
        num_categories: int | None = None,
        num_samples: int = 4,
        baseline: Literal["built_in", "none"] = "built_in",
        max_outcomes: int = 65_536,
    ) -> None:
        if baseline not in ("built_in", "none"):
            raise ValueError(f"needed baseline 'built_in' or 'none', got {baseline!r}.")
        self.baseline = baseline  # first, as the number of draws that will do depends on it
        super().__init__(
            latent_dim,
            family=family,
            num_categories=num_categories,
            num_samples=num_samples,
            max_outcomes=max_outcomes,
        )

    def check_num_samples(self, num_samples: int) -> None:
        if num_samples > MAX_SET:
            raise ValueError(
                f"needed num_samples <= {MAX_SET}, because all subsets of the set are enumerated, got {num_samples}; "
                "use 'sum_and_sample' or 'enumeration' for more points."
            )
        if num_samples == 1 and self.baseline == "built_in":
            raise ValueError(
                "needed num_samples >= 2 for baseline 'built_in', which compares the draws, got 1; use baseline='none'."
            )

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        joint = self.joint_log_probs(params.detach())  # [*batch, N]
        k = min(self.num_samples, self.num_outcomes)
        index = self._draw_set(joint, k)
        z = self.points(index, params.dtype)
        read = as_drawn(z)
        log_p = joint.movedim(-1, 0).gather(0, index)  # [k, *batch]
        log_rest = joint.scatter(-1, index.movedim(0, -1), -torch.inf).logsumexp(-1)
        log_h = log_set_probs(log_p, log_rest)
        bit = 2 ** torch.arange(k, device=params.device)
        full = 2**k - 1
        log_without = log_h[full - bit]  # [k, *batch]
        weights = (log_p + log_without - log_h[full]).exp()

        def credit(cost: Tensor) -> Tensor:
            cost = cost.detach()
            if self.baseline == "built_in":
                cost = cost - cost[:1]  # the rows of ratios sum to 1: a shift changes nothing but the rounding
                pair = bit + bit.unsqueeze(-1)
                same = torch.eye(k, dtype=torch.bool, device=bit.device)
                log_ratio = log_h[full - pair.masked_fill(same, 0)] - log_without.unsqueeze(1)  # [s, s', *batch]
                log_ratio = log_ratio.masked_fill(same.view(k, k, *[1] * (cost.dim() - 1)), 0.0)
                cost = cost - ((log_p + log_ratio).exp() * cost).sum(1)
            return (weights * cost * self.family.log_prob(q, read())).sum(0)

        return self._sample(q, z, weights=weights, credit=credit)

    def _draw_set(self, joint: Tensor, k: int) -> Tensor:
        """Outcome numbers ``[k, *batch]`` in the order of sequential draws without replacement (Gumbel top-k)."""
        return (joint - log_exponential(joint.shape, joint)).topk(k, -1).indices.movedim(-1, 0)
