"""Sets of code vectors without state: grids, the corners of a cube, and sums of the codes of several stages."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stochastic_layers.options import check_positive_int

__all__ = [
    "CellCodes",
    "Codes",
    "GridCodes",
    "LevelCodes",
    "ResidualCodes",
    "SignCodes",
    "SphereCodes",
    "perplexity",
]


def perplexity(indices: Tensor) -> Tensor:
    """Effective number of codes in use: exp of the entropy of their frequencies, from 1 to the number of codes.

    Args:
        indices: Integer codes of any shape, at least one.

    Returns:
        A scalar.
    """
    counts: Tensor = indices.unique(return_counts=True)[1]  # type: ignore[no-untyped-call]
    entropy: Tensor = torch.special.entr(counts.double() / counts.sum()).sum()
    return entropy.exp()


class Codes(nn.Module, ABC):
    """A finite set of vectors, and the rule that picks one of them for a vector x.

    Attributes:
        code_dim: Size D of a code vector.
        num_codes: Number K of values that one index takes.
        index_shape: Shape of the indices of one code vector: ``()`` for one index.
    """

    code_dim: int
    num_codes: int
    index_shape: tuple[int, ...] = ()

    @abstractmethod
    def indices(self, x: Tensor) -> Tensor:
        """The indices ``[*batch, *index_shape]`` of the codes chosen for x ``[*batch, D]``."""

    @abstractmethod
    def decode(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The code vectors ``[*batch, D]`` of ``indices [*batch, *index_shape]``, computed in ``dtype``."""

    @property
    def log_num_codes(self) -> float:
        """Logarithm of the number of code vectors, in nats; exact also where the number itself is astronomical."""
        return math.prod(self.index_shape) * math.log(self.num_codes)

    def initialize(self, x: Tensor) -> None:
        """Adapt to the first vectors ``[N, D]`` of a training run, before they are quantised; here nothing."""

    def update(self, x: Tensor, indices: Tensor) -> None:
        """Adapt to the vectors ``[N, D]`` of a training step, after they were quantised; here nothing."""

    def check_indices(self, indices: Tensor) -> None:
        """Refuse what cannot be an index.

        Raises:
            ValueError: No integers, or a wrong trailing shape.
        """
        n = len(self.index_shape)
        integers = not indices.is_floating_point() and indices.dtype != torch.bool
        if not integers or tuple(indices.shape[indices.dim() - n :]) != self.index_shape:
            raise ValueError(
                f"needed integer indices [..., {', '.join(map(str, self.index_shape))}], got {indices.dtype} "
                f"{list(indices.shape)}; take them from layer.indices(params)."
            )

    def extra_repr(self) -> str:
        return f"code_dim={self.code_dim}, num_codes={self.num_codes}"


class LevelCodes(Codes):
    """Base of codes whose coordinates take a few levels each, by themselves.

    Args:
        levels: Number L of levels of each coordinate, each at least 2; their product is the number of codes.

    Raises:
        ValueError: No levels, or one below 2.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        levels = tuple(levels)
        if not levels or any(not isinstance(n, int) or isinstance(n, bool) or n < 2 for n in levels):
            raise ValueError(f"needed levels of 2 or more, one for each coordinate, got {levels!r}; (8, 5, 5, 5) say.")
        self.code_dim, self.num_codes = len(levels), math.prod(levels)
        if self.num_codes >= 2**63:
            raise ValueError(f"needed fewer than 2**63 codes, got {self.num_codes}; split them over latent_dim.")
        steps = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(steps), persistent=False)

    @abstractmethod
    def digits(self, x: Tensor) -> Tensor:
        """The level ``[..., D]`` of each coordinate of x, from 0."""

    @abstractmethod
    def values(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        """The coordinates ``[..., D]`` of levels."""

    def indices(self, x: Tensor) -> Tensor:
        return (self.digits(x) * self.basis).sum(-1)

    def decode(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        self.check_indices(indices)
        digits = indices.unsqueeze(-1) // self.basis % self.levels
        return self.values(digits, dtype or torch.get_default_dtype())


class GridCodes(LevelCodes):
    r"""Finite scalar quantisation: each coordinate is squashed by a tanh and rounded to one of L levels.

    .. math:: \hat x = \mathrm{round}(h \tanh(x + s) - o), \qquad h = (L - 1)(1 - 10^{-3}) / 2

    with offset o = 1/2 and shift s = tan(o / h) for even L, and 0 for odd L; codes are divided by ``L // 2``. This is
    the published bound, letter for letter, so that models trained with it carry over.

    Args:
        levels: As in :class:`LevelCodes`.
    """

    def bound(self, x: Tensor) -> Tensor:
        """x squashed to within half a step of the outermost levels; rounding gives the level."""
        levels = self.levels.to(x.dtype)
        half = (levels - 1) * ((1 - 1e-3) / 2)
        offset = 0.5 * (1 - levels % 2)
        return torch.tanh(x + (offset / half).tan()) * half - offset

    def rounded(self, x: Tensor) -> Tensor:
        """The codes of x, with the gradient of what is rounded: ``decode(indices(x))`` without the indices."""
        bound = self.bound(x)
        level = bound.detach().round() + (bound - bound.detach())  # in this order the value is exactly the level
        return level / (self.levels // 2)

    def digits(self, x: Tensor) -> Tensor:
        return self.bound(x).round().long() + self.levels // 2

    def values(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.levels // 2
        return (digits - half) / half.to(dtype)


class CellCodes(LevelCodes):
    r"""The middles of L equal cells of (0, 1), to which a distribution function F maps each coordinate.

    .. math:: a = F(x), \quad z = \sqrt{12} \, \Big(\frac{\lfloor L a \rfloor + 1/2}{L} - \frac12\Big)

    The middles are the best codes of a coordinate that is uniform in its cell, and the factor gives a uniform
    coordinate unit variance.

    Args:
        levels: As in :class:`LevelCodes`.
        activation: F: ``"tanh"``, (tanh(x) + 1) / 2, or ``"normal"``, the standard normal distribution function.

    Raises:
        ValueError: Unknown activation, or bad levels.
    """

    def __init__(self, levels: Sequence[int], activation: str = "tanh") -> None:
        super().__init__(levels)
        if activation not in ("tanh", "normal"):
            raise ValueError(f"needed activation 'tanh' or 'normal', got {activation!r}.")
        self.activation = activation

    def share(self, x: Tensor) -> Tensor:
        """a = F(x), between 0 and 1."""
        return torch.sigmoid(2 * x) if self.activation == "tanh" else torch.special.ndtr(x)

    @staticmethod
    def scaled(share: Tensor) -> Tensor:
        """Shares on the scale of the codes."""
        return (share - 0.5) * math.sqrt(12)

    def digits(self, x: Tensor) -> Tensor:
        return torch.minimum((self.share(x) * self.levels).long(), self.levels - 1)

    def values(self, digits: Tensor, dtype: torch.dtype) -> Tensor:
        return self.scaled((digits.to(dtype) + 0.5) / self.levels)


class SignCodes(Codes):
    """Lookup-free codes: the sign of each coordinate; bit i of the index is set where coordinate i is positive.

    Args:
        code_dim: Number of bits, at most 62.

    Raises:
        ValueError: ``code_dim`` is out of range.
    """

    basis: Tensor

    def __init__(self, code_dim: int) -> None:
        super().__init__()
        if check_positive_int("code_dim", code_dim) > 62:
            raise ValueError(f"needed code_dim <= 62 so that an index is one integer, got {code_dim}; use latent_dim.")
        self.code_dim, self.num_codes = code_dim, 2**code_dim
        self.register_buffer("basis", 2 ** torch.arange(code_dim), persistent=False)

    def indices(self, x: Tensor) -> Tensor:
        return ((x > 0) * self.basis).sum(-1)

    def decode(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        self.check_indices(indices)
        bits = indices.unsqueeze(-1) // self.basis % 2
        return (2 * bits - 1).to(dtype or torch.get_default_dtype())


class SphereCodes(SignCodes):
    """Sign codes of length 1: every coordinate is ``-1 / sqrt(D)`` or ``1 / sqrt(D)``.

    Args:
        code_dim: Number D of bits, at most 62.
    """

    def decode(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return super().decode(indices, dtype) / math.sqrt(self.code_dim)


class ResidualCodes(Codes):
    """Sums of codes: every stage quantises what the stages before it left over.

    Args:
        stages: Codes of one size and number each.
    """

    def __init__(self, stages: Sequence[Codes]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.code_dim, self.num_codes = stages[0].code_dim, stages[0].num_codes
        self.index_shape = (len(stages),)

    def _stage(self, i: int) -> Codes:
        stage = self.stages[i]
        assert isinstance(stage, Codes)
        return stage

    def indices(self, x: Tensor) -> Tensor:
        chosen = []
        for i in range(len(self.stages)):
            chosen.append(self._stage(i).indices(x))
            x = x - self._stage(i).decode(chosen[-1], x.dtype)
        return torch.stack(chosen, -1)

    def partial_sums(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The sums of the first 1, 2, ... stages ``[*batch, stages, D]`` of ``indices [*batch, stages]``."""
        self.check_indices(indices)
        parts = [self._stage(i).decode(index, dtype) for i, index in enumerate(indices.unbind(-1))]
        return torch.stack(parts, -2).cumsum(-2)

    def decode(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.partial_sums(indices, dtype)[..., -1, :]

    def initialize(self, x: Tensor) -> None:
        for i in range(len(self.stages)):
            stage = self._stage(i)
            stage.initialize(x)
            x = x - stage.decode(stage.indices(x), x.dtype)

    def update(self, x: Tensor, indices: Tensor) -> None:
        # the residuals as they were quantised: computed for all stages before any stage moves
        before = self.partial_sums(indices, x.dtype)
        residuals = [x, *(x - done for done in before.unbind(-2))]
        for i, (residual, index) in enumerate(zip(residuals[:-1], indices.unbind(-1), strict=True)):
            self._stage(i).update(residual, index)
