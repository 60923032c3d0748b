"""Orders of n items: the Plackett-Luce law, exact in draws and density, and its family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from stochastic_layers.categorical import one_hot
from stochastic_layers.discrete_families import ChoiceFamily, wide
from stochastic_layers.families import register_family
from stochastic_layers.noise import log_exponential

__all__ = ["PermutationFamily", "PlackettLuce", "matrices"]

MAX_LOGIT = 1e9  # such a logit plus noise, in float64, still has six decimals


class _Permutation(constraints.Constraint):
    """Matrices of ones and zeros with a single one in each row and column."""

    is_discrete = True
    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        binary = ((value == 0) | (value == 1)).all(-1).all(-1)
        return binary & (value.sum(-1) == 1).all(-1) & (value.sum(-2) == 1).all(-1)


def matrices(order: Tensor, like: Tensor) -> Tensor:
    """Permutation matrices ``[..., n, n]`` of orders ``[..., n]``: in row i a one at the item that comes i-th."""
    return one_hot(order.unsqueeze(-1), like)


def _log_prob_of_sorted(logits: Tensor) -> Tensor:
    """log q of the order in which these are the logits of the items ``[..., n]``."""
    x = wide(logits)
    rest = x.flip(-1).logcumsumexp(-1).flip(-1)  # of the items that have not come yet
    return (x - rest).sum(-1).to(logits.dtype)


class PlackettLuce(Distribution):
    r"""An order of n items, as a permutation matrix: the next one is chosen among the rest in proportion to exp(l).

    .. math:: q(z) = \prod_{i=1}^{n} \frac{\exp l_{\pi_i}}{\sum_{j \ge i} \exp l_{\pi_j}}, \qquad
        z_{ij} = [\pi_i = j]

    Row i of z has a one at the item that comes i-th, so that ``z @ x`` are the rows of x in that order, and
    ``z.mT @ r`` the places' values r given to the items. A draw is the order of the logits with Gumbel noise added, the
    largest first. The first item has the categorical law; whether a comes before b has the probability
    ``sigmoid(l_a - l_b)``, whatever the others, and adds up to the expected places of items. There is no closed form of
    the mean of z, the entropy and the KL.

    Args:
        logits: ``[..., n]``.

    References:
        The Analysis of Permutations (Robin L. Plackett, 1975), https://doi.org/10.2307/2346567; The Relationship
        between Luce's Choice Axiom, Thurstone's Theory of Comparative Judgment, and the Double Exponential Distribution
        (John I. Yellott, 1977), https://doi.org/10.1016/0022-2496(77)90026-8

    Example:
        >>> import torch, stochastic_layers as sl
        >>> q = sl.PlackettLuce(torch.tensor([0.0, 2.0, 1.0]))
        >>> q.mode @ torch.tensor([10.0, 20.0, 30.0]), q.sample((7,)).shape
        (tensor([20., 30., 10.]), torch.Size([7, 3, 3]))
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012, as torch declares it
    support = _Permutation()

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], torch.Size((logits.shape[-1],) * 2), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PlackettLuce:
        return PlackettLuce(self.logits.expand(*batch_shape, -1))

    def log_prob(self, value: Tensor) -> Tensor:
        """That the value is a permutation matrix is not checked; between them it is defined by the formula."""
        return _log_prob_of_sorted((value * self.logits.unsqueeze(-2)).sum(-1))  # a product could be of short mantissas

    def log_prob_of_order(self, order: Tensor) -> Tensor:
        """log q of ``order [..., n]``, the items from the first to the last: without matrices."""
        return _log_prob_of_sorted(self.logits.expand(order.shape).gather(-1, order))

    @property
    def expected_places(self) -> Tensor:
        """The expected number of items that come before each ``[..., n]``, from 0 to n - 1."""
        before = torch.sigmoid(self.logits.unsqueeze(-2) - self.logits.unsqueeze(-1))  # [..., item, other]
        return before.sum(-1) - 0.5

    @property
    def mode(self) -> Tensor:
        """The items by falling logits, of equal ones the first first."""
        return matrices(self.logits.argsort(dim=-1, descending=True, stable=True), self.logits)

    def sample_order(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``[*sample_shape, ..., n]`` as items from the first to the last."""
        logits = self.logits.detach()
        noise = log_exponential((*sample_shape, *logits.shape), logits)
        return (wide(logits) - noise).argsort(dim=-1, descending=True)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return matrices(self.sample_order(sample_shape), self.logits)


@register_family
class PermutationFamily(ChoiceFamily):
    """Orders of the ``num_categories`` items of each latent variable; see :class:`PlackettLuce`.

    Params are logits ``[*batch, latent_dim * num_categories]``. z ``[..., latent_dim * num_categories ** 2]`` are
    permutation matrices, row by row; ``z.unflatten(-1, (latent_dim, n, n))`` has them as matrices.
    """

    name = "permutation"

    @property
    def out_features(self) -> int:
        assert self.num_categories is not None
        return self.in_features * self.num_categories

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if max(-low, high) > MAX_LOGIT:
            raise ValueError(
                f"needed logits of magnitude at most {MAX_LOGIT:g} for family {self.name!r}, got "
                f"{max(-low, high):.3g}, beside which the noise of a draw is lost; look at the network before it."
            )

    def distribution(self, params: Tensor) -> Distribution:
        return Independent(PlackettLuce(self.unflatten(params)), 1, validate_args=False)

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return self.sample_with_log_prob(q, num_samples)[0]

    def sample_with_log_prob(self, q: Distribution, num_samples: int) -> tuple[Tensor, Callable[[], Tensor]]:
        law = self._law(q)
        order = law.sample_order((num_samples,))
        return matrices(order, law.logits).flatten(-3), lambda: law.log_prob_of_order(order).sum(-1)

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        law = self._law(q)
        return law.log_prob(z.reshape(*z.shape[:-1], self.latent_dim, *law.event_shape)).sum(-1)

    def mode(self, q: Distribution) -> Tensor:
        return self._law(q).mode.flatten(-3)

    def center(self, q: Distribution) -> Tensor:
        """The expected places of the items ``[*batch, latent_dim, num_categories]``, in standard deviations of a place.

        The mode would vary over the data although every order is as probable as any other.
        """
        law = self._law(q)
        return law.expected_places * math.sqrt(12 / (law.event_shape[0] ** 2 - 1))

    def _law(self, q: Distribution) -> PlackettLuce:
        assert isinstance(q, Independent)
        law = q.base_dist
        assert isinstance(law, PlackettLuce)
        return law

    @property
    def num_outcomes(self) -> int:
        assert self.num_categories is not None
        return math.factorial(self.num_categories)

    def outcome_scores(self, params: Tensor) -> Tensor:
        every = self._orders(torch.arange(self.num_outcomes, device=params.device))
        return PlackettLuce(self.unflatten(params).unsqueeze(-2)).log_prob_of_order(
            every.expand(*params.shape[:-1], self.latent_dim, *every.shape)
        )

    def outcome_values(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        like = torch.empty(self.num_categories or 0, dtype=dtype, device=index.device)
        return matrices(self._orders(index), like).flatten(-3)

    def _orders(self, index: Tensor) -> Tensor:
        """The orders of numbers ``[...]``, as ``itertools.permutations`` has them: ``[..., n]``."""
        assert self.num_categories is not None
        later: list[Tensor] = []  # items by their places among those that have not come yet
        for place in range(self.num_categories - 1, -1, -1):
            count = math.factorial(self.num_categories - 1 - place)
            item = index // count % (self.num_categories - place)
            later = [item, *(other + (other >= item) for other in later)]
        return torch.stack(later, -1)
