"""Learned codebooks: nearest neighbours, moving averages or gradients, k-means at the start, revival of dead codes."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stochastic_layers.codes import Codes
from stochastic_layers.options import check_positive_int
from stochastic_layers.recomputation import refuse_recomputation
from stochastic_layers.running_state import RunningState

__all__ = ["Codebook", "LearnedCodebook", "NearestCodes", "ProjectedCodebook"]

ROWS_PER_CODE = 256  # k-means looks at no more rows than this for each code; more do not move centroids visibly
KMEANS_STEPS = 10


class NearestCodes(Codes):
    """Base of codebooks: a vector is given the code nearest to it.

    Args:
        code_dim: Size D of a code vector.
        num_codes: Number K of codes, at least 2.

    Raises:
        ValueError: A size is out of range.
    """

    def __init__(self, code_dim: int, num_codes: int) -> None:
        super().__init__()
        self.code_dim = check_positive_int("code_dim", code_dim)
        self.num_codes = check_positive_int("num_codes", num_codes, least=2)

    @abstractmethod
    def table(self) -> Tensor:
        """The code vectors ``[K, D]``."""

    def indices(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, self.code_dim)
        return _nearest(rows, self.table().detach().to(x.dtype)).view(x.shape[:-1])

    def decode(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        self.check_indices(indices)
        table = self.table()
        return table[indices].to(dtype or table.dtype)


class ProjectedCodebook(NearestCodes):
    """Fixed random vectors times one learned matrix: moving a code moves them all.

    Args:
        code_dim: Size D of a code vector.
        num_codes: Number K of codes.
    """

    basis: Tensor

    def __init__(self, code_dim: int, num_codes: int) -> None:
        super().__init__(code_dim, num_codes)
        self.register_buffer("basis", torch.randn(num_codes, code_dim) / code_dim**0.5)
        self.projection = nn.Parameter(torch.eye(code_dim))

    def table(self) -> Tensor:
        return self.basis @ self.projection


def _check_rates(decay: float, revive_below: float) -> None:
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"needed 0 <= decay < 1, got {decay}.")
    if not 0.0 <= revive_below < 1.0:
        raise ValueError(f"needed 0 <= revive_below < 1, got {revive_below}; 1 is the count of an average code.")


class LearnedCodebook(RunningState, NearestCodes):
    """Code vectors trained by the gradient of the cost; start and revival as in :class:`Codebook`.

    A code is an anchor, a buffer that k-means and revival set, plus a shift, the parameter: what a forward pass changes
    is in buffers, which diagnostics put back, and parameters change in the optimizer alone.

    Args:
        code_dim: Size D of a code vector.
        num_codes: Number K of codes.
        decay: Weight of the past in the moving averages of the counts, in [0, 1).
        revive_below: As in :class:`Codebook`.

    Raises:
        ValueError: An option is out of range.
    """

    anchors: Tensor
    counts: Tensor
    initialized: Tensor

    def __init__(self, code_dim: int, num_codes: int, *, decay: float = 0.99, revive_below: float = 0.01) -> None:
        super().__init__(code_dim, num_codes)
        _check_rates(decay, revive_below)
        self.decay, self.revive_below = decay, revive_below
        self.shift = nn.Parameter(torch.zeros(num_codes, code_dim))
        self.register_buffer("anchors", torch.randn(num_codes, code_dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("initialized", torch.zeros(1, dtype=torch.bool))

    def table(self) -> Tensor:
        return self.anchors + self.shift

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """k-means on the first batch ``[N, D]``; later calls return at once."""
        _initialize(self.anchors, self.counts, torch.zeros_like(self.anchors), self.initialized, x.detach())

    @torch.no_grad()
    def update(self, x: Tensor, indices: Tensor) -> None:
        """Moving averages of the counts of ``indices [N]``, then revival of dead codes by rows of ``x [N, D]``."""
        before, rates = self.table(), (self.decay, self.revive_below)
        after = before.clone()
        _update(after, self.counts, torch.zeros_like(before), self.initialized, x.detach(), indices, *rates, False)
        self.anchors.copy_(torch.where(after != before, after - self.shift, self.anchors))


class Codebook(RunningState, NearestCodes):
    """Code vectors that follow the vectors assigned to them by moving averages; state in buffers, no parameters.

    All ranks of ``torch.distributed`` hold the same codebook: sums and counts are added over the ranks, the rows that
    start or revive codes are drawn by rank 0 out of the joined batch, in the order of the ranks. Nothing changes in
    ``eval()`` or under ``torch.no_grad()``.

    Args:
        code_dim: Size D of a code vector.
        num_codes: Number K of codes.
        decay: Weight of the past in the moving averages, in [0, 1).
        revive_below: A code is dead, and is replaced by a random row of the batch, when the moving average of its
            count falls below this fraction of the mean over all codes; 0 for never.

    Raises:
        ValueError: An option is out of range.
    """

    vectors: Tensor
    counts: Tensor
    sums: Tensor
    initialized: Tensor

    def __init__(self, code_dim: int, num_codes: int, *, decay: float = 0.99, revive_below: float = 0.01) -> None:
        super().__init__(code_dim, num_codes)
        _check_rates(decay, revive_below)
        self.decay, self.revive_below = decay, revive_below
        vectors = torch.randn(num_codes, code_dim)
        self.register_buffer("vectors", vectors)
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", vectors.clone())
        self.register_buffer("initialized", torch.zeros(1, dtype=torch.bool))

    def table(self) -> Tensor:
        return self.vectors

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """k-means on the first batch ``[N, D]``; later calls return at once."""
        _initialize(self.vectors, self.counts, self.sums, self.initialized, x.detach())

    @torch.no_grad()
    def update(self, x: Tensor, indices: Tensor) -> None:
        """Moving averages of the vectors ``[N, D]`` that were assigned to each code ``[N]``, then revival."""
        rates = (self.decay, self.revive_below)
        _update(self.vectors, self.counts, self.sums, self.initialized, x.detach(), indices, *rates, True)


# The two updates branch on values and may talk to other ranks. As operators they are opaque to torch.compile, so that
# a layer with a codebook still compiles into one graph.


@torch.library.custom_op(
    "stochastic_layers::initialize_codebook",
    mutates_args=("vectors", "counts", "sums", "initialized"),
    schema="(Tensor(a!) vectors, Tensor(b!) counts, Tensor(c!) sums, Tensor(d!) initialized, Tensor x) -> ()",
)
def _initialize(vectors: Tensor, counts: Tensor, sums: Tensor, initialized: Tensor, x: Tensor) -> None:
    # Compiled code does not see that a region around it is computed again, and would quantise with codes of after the
    # update; this code runs then. Where Python runs, a recomputation does not come here.
    refuse_recomputation("a codebook under torch.compile")
    if bool(initialized):
        return
    rows = _joined(x.to(vectors.dtype))
    if len(rows) == 0:
        return
    order = _random_order(rows)
    rows = rows[order[: ROWS_PER_CODE * len(vectors)]]
    centers = rows[torch.arange(len(vectors), device=rows.device) % len(rows)]
    totals, sizes = _totals(centers, rows, _nearest(rows, centers))
    for _ in range(KMEANS_STEPS):
        centers = torch.where(sizes[:, None] > 0, totals / sizes[:, None].clamp_min(1), centers)
        totals, sizes = _totals(centers, rows, _nearest(rows, centers))
    # an empty cluster has count 0 and is revived in the first update
    vectors.copy_(_from_rank_zero(centers))
    counts.copy_(_from_rank_zero(sizes))
    sums.copy_(vectors * counts[:, None])
    initialized.fill_(True)


@torch.library.custom_op(
    "stochastic_layers::update_codebook",
    mutates_args=("vectors", "counts", "sums"),
    schema=(
        "(Tensor(a!) vectors, Tensor(b!) counts, Tensor(c!) sums, Tensor initialized, Tensor x, Tensor indices, "
        "float decay, float revive_below, bool follow) -> ()"
    ),
)
def _update(
    vectors: Tensor,
    counts: Tensor,
    sums: Tensor,
    initialized: Tensor,
    x: Tensor,
    indices: Tensor,
    decay: float,
    revive_below: float,
    follow: bool,  # whether the vectors become the moving averages, or are trained by a gradient
) -> None:
    x = x.to(vectors.dtype)
    totals, sizes = _totals(vectors, x, indices)
    if _distributed():
        joined = torch.cat([totals, sizes[:, None]], 1)
        dist.all_reduce(joined)
        totals, sizes = joined[:, :-1], joined[:, -1]
    if not bool(initialized) or not bool(sizes.sum() > 0):  # an empty batch changes nothing
        return
    counts.mul_(decay).add_(sizes, alpha=1 - decay)
    sums.mul_(decay).add_(totals, alpha=1 - decay)
    if follow:  # a code that nothing was assigned to stays exactly where it is: its sum and count shrink alike
        vectors.copy_(torch.where(sizes[:, None] > 0, sums / counts[:, None].clamp_min(1e-30), vectors))
    if revive_below == 0:
        return
    mean = counts.mean()
    dead = counts < revive_below * mean  # the same on every rank, so that all of them meet in the collectives below
    if not bool(dead.any()):
        return
    rows = _joined(x)
    order = _random_order(rows)
    picked = rows[order[torch.arange(int(dead.sum()), device=rows.device) % len(rows)]]
    vectors[dead] = picked
    counts[dead] = mean
    sums[dead] = picked * mean


def _nearest(rows: Tensor, centers: Tensor) -> Tensor:
    # |x - c|^2 less |x|^2, which is the same for all codes; about their middle, as the square of a common offset would
    # swallow the distances
    middle = centers.mean(0)
    rows, centers = rows - middle, centers - middle
    return torch.addmm(centers.square().sum(-1), rows, centers.t(), alpha=-2).argmin(-1)


def _totals(centers: Tensor, rows: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the rows of each code ``[K, D]``, and their number ``[K]``."""
    totals = torch.zeros_like(centers).index_add_(0, indices, rows)
    return totals, torch.bincount(indices, minlength=len(centers)).to(centers.dtype)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _joined(x: Tensor) -> Tensor:
    """The rows of all ranks, rank by rank; the ranks may hold different numbers of rows."""
    if not _distributed():
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    lengths = [int(size) for size in sizes]
    padded = x.new_zeros(max(lengths), x.shape[1])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


def _random_order(rows: Tensor) -> Tensor:
    return _from_rank_zero(torch.randperm(len(rows), device=rows.device))


def _from_rank_zero(tensor: Tensor) -> Tensor:
    if _distributed():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor
