"""Choices of exactly k of n items: independent bits given their number, exact in draws, density and means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints, register_kl
from torch.nn import functional

from stochastic_layers.auxiliary import kernels_usable
from stochastic_layers.categorical import draw_index
from stochastic_layers.discrete_families import ChoiceFamily, wide
from stochastic_layers.families import register_family
from stochastic_layers.noise import double_uniform
from stochastic_layers.options import check_positive_int
from stochastic_layers.run_tables import halves, outside, paired

__all__ = ["KSubset", "SubsetFamily"]

T = TypeVar("T")

# Halvings of the interval in which the shift of the logits is sought: the expected number of chosen items is then close
# enough to k for millions of items, so that it is k with a probability that is far from underflow.
HALVINGS = 12
# Subsets up to which, and numbers in all up to which, a list of all subsets takes less time than the tree, on a CPU.
FEW, SHORT = 64, 2**18


@lru_cache(maxsize=16)
def _listed(count: int, size: int) -> Any:
    """All subsets, and what each leaves out: booleans ``[N, 2 * count]``, an array, which has no device and no mode."""
    members = np.array(list(itertools.combinations(range(count), size)))
    chosen = np.zeros((len(members), count), dtype=bool)
    np.put_along_axis(chosen, members, True, axis=1)
    return np.concatenate([chosen, ~chosen], axis=1)


class _Lazy(Generic[T]):
    """A property that is computed once, with a graph where the logits have one, in whatever mode it is first asked for.

    ``lazy_property`` of torch turns gradients on in any case, and ``torch.export`` stumbles over that.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, instance: KSubset, owner: object = None) -> T:
        if instance is None:  # asked of the class
            return self
        with torch.enable_grad() if instance.logits.requires_grad else nullcontext():
            value = self.compute(instance)
        instance.__dict__[self.name] = value
        return value


class _Subset(constraints.Constraint):
    """Vectors of ones and zeros with a given number of ones."""

    is_discrete = True
    event_dim = 1

    def __init__(self, size: int) -> None:
        self.size = size

    def check(self, value: Tensor) -> Tensor:
        return ((value == 0) | (value == 1)).all(-1) & (value.sum(-1) == self.size)


class KSubset(Distribution):
    r"""A choice of exactly k of n items, as a vector of ones and zeros: independent bits, given that k of them are 1.

    .. math:: q(z) = \frac{\exp(l^\top z)}{e_k(\exp l)}, \qquad |z| = k, \qquad
        e_k(w) = \sum_{|S| = k} \prod_{i \in S} w_i

    Known as the conditional Bernoulli law, and as conditional Poisson sampling. It is not the law of the k largest of
    perturbed logits (Gumbel top-k), which are drawn one after another without replacement; for k = 1 the two agree, and
    are the categorical law.

    A shift of all logits changes nothing. It is chosen such that k independent bits are expected to be 1; then the
    number of ones among runs of 1, 2, 4, ... items has a law that is made of those of their halves by products of
    polynomials with positive coefficients, in float64: no logarithm, no cancellation, and nothing underflows whose
    probability is above 1e-300. Work and memory are of the order of n k, in log2(n) steps. A draw goes down the same
    tree, and splits the number of chosen items of each run between its halves. Where few subsets exist, all of them are
    listed instead, as the categories of a law: tens of operations instead of hundreds.

    Args:
        logits: ``[..., n]``.
        size: k, from 1 to n.

    Raises:
        ValueError: ``size`` is not from 1 to n.

    References:
        Weighted Finite Population Sampling to Maximize Entropy (Xiang-Hui Chen, Arthur P. Dempster, Jun S. Liu, 1994),
        https://doi.org/10.1093/biomet/81.3.457

    Example:
        >>> import torch, stochastic_layers as sl
        >>> q = sl.KSubset(torch.zeros(4), 2)
        >>> q.sample().sum(), q.mean
        (tensor(2.), tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012, as torch declares it

    def __init__(self, logits: Tensor, size: int) -> None:
        if not 1 <= size <= logits.shape[-1]:
            raise ValueError(f"needed a size from 1 to the number of items, {logits.shape[-1]}, got {size}.")
        self.logits, self.size = logits, size
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KSubset:
        return KSubset(self.logits.expand(*batch_shape, -1), self.size)

    @property
    def support(self) -> constraints.Constraint:
        """Vectors of ones and zeros with k ones."""
        return _Subset(self.size)

    @property
    def _short(self) -> bool:
        """Whether all subsets are listed."""
        if not kernels_usable():  # a compiled graph has no branch on the size of the batch
            return False
        items = self.logits.shape[-1]
        count = math.comb(items, self.size)
        return count <= FEW or count * (items + self.batch_shape.numel()) <= SHORT

    @_Lazy
    def _every(self) -> Tensor:
        """All subsets, and what each leaves out: ones and zeros ``[N, 2 n]``, in float64."""
        listed = torch.as_tensor(_listed(self.logits.shape[-1], self.size), device=self.logits.device)
        return wide(listed.to(self.logits.dtype))

    @_Lazy
    def _centered(self) -> Tensor:
        """Logits ``[..., n]`` less the k-th largest, near which lies what is uncertain, in float64."""
        logits = wide(self.logits)
        return logits - logits.detach().topk(self.size, -1).values[..., -1:]

    @_Lazy
    def _losses(self) -> Tensor:
        """What each item adds to log q if chosen, and if left out ``[..., 2 n]``: one of the two is zero."""
        above = functional.relu(self._centered)
        return torch.cat([self._centered - above, -above], -1)

    @_Lazy
    def _scores(self) -> Tensor:
        """log q of every subset ``[..., N]``, up to a constant: near 0 where a subset is likely."""
        return self._losses @ self._every.T

    @_Lazy
    def _chances(self) -> Tensor:
        """The probability of every subset ``[..., N]``."""
        return self._scores.softmax(-1)

    @_Lazy
    def _shifted(self) -> Tensor:
        """Logits ``[n, ...]`` of independent bits of which about k are expected to be 1, in float64."""
        x = self._centered
        constant, zero = x.detach(), torch.zeros_like(x[..., :1])
        low, high = zero - math.log(x.shape[-1]), zero + 40.0
        for _ in range(HALVINGS):
            shift = 0.5 * (low + high)
            many = (constant + shift).sigmoid().sum(-1, keepdim=True) > self.size
            low, high = torch.where(many, low, shift), torch.where(many, shift, high)
        return (x + shift).movedim(-1, 0)

    @_Lazy
    def _tables(self) -> list[Tensor]:
        """Probabilities of 0, 1, ..., k ones among each run of 1, 2, 4, ... bits: ``[min(bits, k) + 1, runs, ...]``."""
        x = self._shifted
        tables = [torch.stack([(-x).sigmoid(), x.sigmoid()])]
        empty = 2 ** (len(x) - 1).bit_length() - len(x)
        if empty:  # bits that are 0
            zero = torch.zeros_like(x[:1]).expand(empty, *x.shape[1:])
            tables = [torch.cat([tables[0], torch.stack([zero + 1, zero])], 1)]
        while tables[-1].shape[1] > 1:
            table = tables[-1]
            tables.append(paired(table, min(2 * len(table) - 1, self.size + 1)))
        return tables

    @property
    def _log_chance(self) -> Tensor:
        """log of the probability that k of the independent bits are 1."""
        return self._tables[-1][self.size, 0].log()

    def log_prob(self, value: Tensor) -> Tensor:
        """Linear in the value, so that it is defined between the subsets too; that k are chosen is not checked."""
        if self._short:
            value = value.to(self.logits.dtype)
            score = (torch.cat([value, 1 - value], -1) * self._losses).sum(-1)
            return (score - self._scores.logsumexp(-1)).to(self.logits.dtype)
        x = self._shifted.movedim(0, -1)
        return (value * x - functional.softplus(x)).sum(-1).sub(self._log_chance).to(self.logits.dtype)

    @_Lazy
    def mean(self) -> Tensor:
        """The probability of each item ``[..., n]``, which adds up to k."""
        if self._short:
            return (self._chances @ self._every[:, : self.logits.shape[-1]]).to(self.logits.dtype)
        tables = self._tables
        root = tables[-1]
        # the probability of what is outside a run, by the number that is chosen inside, over that of k in all
        certain = torch.zeros_like(root)
        certain[self.size] = 1.0
        around = certain / root[self.size]
        for table in reversed(tables[:-1]):
            around = outside(around, table)
        inside = around[1] * tables[0][1]
        return inside[: len(self._shifted)].movedim(0, -1).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:
        """Of each item ``[..., n]``."""
        return self.mean * (1 - self.mean)

    @property
    def mode(self) -> Tensor:
        """The k items of the largest logits."""
        best = self.logits.topk(self.size, -1).indices
        return torch.zeros_like(self.logits).scatter(-1, best, 1.0)

    def entropy(self) -> Tensor:
        return -self.log_prob(self.mean)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        draws = shape.numel()
        if self._short:
            index = draw_index(self._chances, draws).squeeze(-1)
            z = self._every[:, : self.logits.shape[-1]][index].to(self.logits.dtype)
            return z.reshape(*shape, *self.logits.shape)
        tables = [table.detach() for table in self._tables]
        chosen = torch.full((draws, *tables[-1].shape[1:]), self.size, device=self.logits.device)  # [S, runs, ...]
        for table in reversed(tables[:-1]):
            left, right = halves(table)
            number = torch.arange(len(table), device=chosen.device).view(-1, *[1] * right.dim())
            rest = (chosen - number).movedim(0, 1)  # in the right half, where the left one has that number: [S, a, ...]
            possible = (rest >= 0) & (rest < len(table))
            weights = right.expand(draws, *right.shape).gather(1, rest.clamp(0, len(table) - 1))
            weights = (weights * left).where(possible, 0.0)
            u = double_uniform(chosen.shape, chosen.device)
            cumulative = weights.cumsum(1, dtype=u.dtype)
            # below the total, as u <= 1 - eps / 2: the count stops at a weight that is not zero
            u = u.mul_(cumulative[:, -1])
            first = (cumulative <= u.unsqueeze(1)).sum(1)
            chosen = torch.stack([first, chosen - first], 2).flatten(1, 2)
        z = chosen[:, : self.logits.shape[-1]].movedim(1, -1).to(self.logits.dtype)
        return z.reshape(*shape, *self.logits.shape)


@register_kl(KSubset, KSubset)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_of_subsets(q: KSubset, p: KSubset) -> Tensor:
    if q.size != p.size:
        raise ValueError(f"needed subsets of one size, got {q.size} and {p.size}; the KL between them is infinite.")
    mean = q.mean
    return q.log_prob(mean) - p.log_prob(mean)  # densities are linear in z


@register_family
class SubsetFamily(ChoiceFamily):
    """Exactly ``size`` of the ``num_categories`` items of each latent variable; see :class:`KSubset`.

    z has ``size`` ones among the ``num_categories`` numbers of each latent variable. Choose the size by
    ``family={"name": "subset", "size": 3}``; with 1 it is the categorical family.

    Args:
        latent_dim: Number of latent variables.
        num_categories: Number of items of each.
        size: Number of items that are chosen, less than ``num_categories``.

    Raises:
        ValueError: ``size`` is less than 1, or not less than ``num_categories``.
    """

    name = "subset"

    def __init__(self, latent_dim: int, num_categories: int | None = None, *, size: int = 2) -> None:
        super().__init__(latent_dim, num_categories)
        assert self.num_categories is not None
        self.size = check_positive_int("size", size, "it is the number of items that are chosen")
        if size >= self.num_categories:
            raise ValueError(
                f"needed size < num_categories, which is {self.num_categories}, got {size}; choosing all is no choice."
            )

    @property
    def spec(self) -> Mapping[str, Any]:
        return {"name": self.name, "size": self.size}

    def distribution(self, params: Tensor) -> Distribution:
        return Independent(KSubset(self.unflatten(params), self.size), 1, validate_args=False)

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return q.sample(torch.Size((num_samples,))).flatten(-2)

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        assert isinstance(q, Independent)
        result: Tensor = q.base_dist.log_prob(self.unflatten(z)).sum(-1)
        return result

    def mode(self, q: Distribution) -> Tensor:
        assert isinstance(q, Independent)
        law: Any = q.base_dist
        best: Tensor = law.mode
        return best.flatten(-2)

    @property
    def num_outcomes(self) -> int:
        assert self.num_categories is not None
        return math.comb(self.num_categories, self.size)

    def outcome_scores(self, params: Tensor) -> Tensor:
        every = self._members(torch.arange(self.num_outcomes, device=params.device))
        # no shortened mantissa on a GPU
        return (wide(self.unflatten(params)) @ wide(every.to(params.dtype)).T).to(params.dtype)

    def outcome_values(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._members(index).to(dtype).flatten(-2)

    def _members(self, index: Tensor) -> Tensor:
        """The subsets of numbers ``[...]``, in the order of ``itertools.combinations``: booleans ``[..., n]``."""
        assert self.num_categories is not None
        left, bits = torch.full_like(index, self.size), []
        for item in range(self.num_categories):
            after = self.num_categories - 1 - item
            # subsets that have this item come first; so many there are, by the number of items that are yet to come
            counts = [math.comb(after, n - 1) if n else 0 for n in range(self.size + 1)]
            having = index.new_tensor([min(count, self.num_outcomes) for count in counts])[left]
            chosen = index < having
            bits.append(chosen)
            index, left = torch.where(chosen, index, index - having), left - chosen.long()
        return torch.stack(bits, -1)
