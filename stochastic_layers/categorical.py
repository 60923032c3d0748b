"""The categorical law: exact draws by inversion, and a one-hot law that is normalised only when it is asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, OneHotCategorical, register_kl
from torch.distributions.utils import lazy_property

from stochastic_layers.auxiliary import eager_on_cpu, kernels_usable
from stochastic_layers.noise import double_uniform

__all__ = [
    "SoftmaxOneHot",
    "draw_categorical",
    "draw_index",
    "log_prob_of_index",
    "log_softmax",
    "one_hot",
    "one_hot_categorical",
    "put",
    "softmax",
    "softmax_gradient",
    "tempered_softmax",
]

# sizes measured on a CPU, where a call costs as much as thousands of numbers
ONE_LEVEL = 24  # categories up to which the cumulative sum runs over all of them at once,
SMALL = 2**17  # and numbers in all
FEW = 2048  # rows up to which a call for each is cheaper than a pass over all of their numbers
BISECTED = 1024, 64  # draws up to which, and weights from which, bisection is cheaper than to look at all of them
VECTOR = 16  # numbers that a CPU works on at once


def _few(scores: Tensor) -> bool:
    """Whether torch's softmax would work on one number at a time: a row is shorter than a vector, on a CPU."""
    return scores.shape[-1] < VECTOR and eager_on_cpu(scores)


def softmax(scores: Tensor) -> Tensor:
    """``scores.softmax(-1)``; of few categories along another dimension, which takes a fifth of the time or less."""
    return scores.movedim(-1, 0).softmax(0).movedim(0, -1).contiguous() if _few(scores) else scores.softmax(-1)


def log_softmax(scores: Tensor) -> Tensor:
    """``scores.log_softmax(-1)``; see :func:`softmax`."""
    return scores.movedim(-1, 0).log_softmax(0).movedim(0, -1).contiguous() if _few(scores) else scores.log_softmax(-1)


def softmax_gradient(grad: Tensor, probs: Tensor) -> Tensor:
    """What ``grad``, the gradient at ``softmax(scores) = probs``, is at the scores."""
    if torch.is_grad_enabled() or _few(probs):  # this gradient will itself be differentiated, or rows are short
        return probs * (grad - (grad * probs).sum(-1, keepdim=True))
    probs = probs.expand_as(grad).contiguous()  # torch 2.4 reads past one row that stands for many
    return torch._softmax_backward_data(grad, probs, -1, probs.dtype)


class _TemperedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, scores: Tensor, temperature: Tensor) -> Tensor:
        z = softmax(scores.div_(temperature))
        ctx.save_for_backward(z, temperature)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, temperature = ctx.saved_tensors
        return softmax_gradient(grad, z).div_(temperature), None, None


def tempered_softmax(logits: Tensor, scores: Tensor, temperature: Tensor) -> Tensor:
    """``(scores / temperature).softmax(-1)`` in three passes, two of them in the memory of others.

    Args:
        logits: ``[1, *batch, C]`` that the scores are made of by adding noise; they receive the gradient.
        scores: ``[S, *batch, C]`` without gradient; overwritten.
        temperature: ``[1]`` without gradient.
    """
    if not kernels_usable():
        return softmax((scores + (logits - logits.detach())) / temperature)
    z: Tensor = _TemperedSoftmax.apply(logits.expand(scores.shape), scores, temperature)  # type: ignore[no-untyped-call]
    return z


def draw_categorical(probs: Tensor, num_samples: int) -> Tensor:
    """Exact one-hot draws: one or two uniforms per row instead of one Gumbel variable per category.

    Args:
        probs: Probabilities ``[..., C]``; rows need not be normalised.
        num_samples: Number S of independent draws.

    Returns:
        One-hot vectors ``[S, ..., C]`` of the dtype of ``probs``. A category of probability zero is never drawn.
    """
    return one_hot(draw_index(probs, num_samples), probs)


def draw_index(probs: Tensor, num_samples: int) -> Tensor:
    """Exact draws of a category by inversion, in two levels where there are many numbers: ``[S, ..., 1]``.

    First a block of about sqrt(C) categories is drawn by its total, then a category of the block. So the cumulative
    sums are short. They run in float64: a category keeps the relative accuracy of its probability, however small that
    is and however many others there are. The work is one pass over ``probs``, and S times what a row needs.
    """
    probs = probs.detach()
    count = probs.shape[-1]
    small = probs.device.type == "cpu" and not torch.compiler.is_compiling() and probs.numel() <= SMALL
    if small or count <= ONE_LEVEL:
        return _invert(probs, num_samples).movedim(-1, 0).unsqueeze(-1)
    width = math.isqrt(count)
    # a divisor near the root leaves the blocks a view; else empty categories are appended
    width = next((n for n in range(width, width // 4, -1) if count % n == 0), width)
    if count % width:
        probs = torch.nn.functional.pad(probs, (0, -count % width))
    blocks = probs.reshape(-1, width)
    totals = _row_sums(blocks).view(*probs.shape[:-1], probs.shape[-1] // width)
    block = _invert(totals, num_samples)  # [..., S]
    first = torch.arange(0, blocks.shape[0], totals.shape[-1], device=probs.device).view(*probs.shape[:-1], 1)
    members = blocks.index_select(0, (block + first).flatten()).view(*block.shape, width)
    return (_invert(members, 1) + width * block.unsqueeze(-1)).movedim(-2, 0)


def _row_sums(rows: Tensor) -> Tensor:
    """``rows.sum(-1)`` of short rows ``[N, C]``; on a CPU as a product with ones, which takes half the time."""
    # the precision is asked last, and never in a graph, where it cannot be
    if not eager_on_cpu(rows) or torch.get_float32_matmul_precision() != "highest":
        return rows.sum(-1)
    return rows @ torch.ones(rows.shape[-1], dtype=rows.dtype)


def _invert(weights: Tensor, num_samples: int) -> Tensor:
    """Draws in proportion to ``weights [..., C]`` by inversion of the cumulative sum: ``[..., S]``."""
    u = double_uniform((*weights.shape[:-1], num_samples), weights.device)
    cdf = weights.cumsum(-1, dtype=u.dtype)
    # u <= 1 - eps / 2, so that u * total rounds to less than total: the count stops at a weight that is not zero
    u = u.mul_(cdf[..., -1:])
    if not eager_on_cpu(cdf):
        return (cdf.unsqueeze(-2) <= u.unsqueeze(-1)).sum(-1)
    if u.numel() <= BISECTED[0] or cdf.shape[-1] > BISECTED[1]:
        return torch.searchsorted(cdf, u, right=True)
    # marks as ones and zeros in float64, and their sums as a product: half the time of booleans and of their sums
    marks = torch.le(cdf.unsqueeze(-2), u.unsqueeze(-1), out=cdf.new_empty(*u.shape, cdf.shape[-1]))
    return (marks @ cdf.new_ones(cdf.shape[-1])).long()


def one_hot(index: Tensor, like: Tensor) -> Tensor:
    """Vectors ``[..., C]`` of ones at ``index [..., N]`` and zeros, with C, dtype and device of ``like [..., C]``."""
    count = like.shape[-1]
    zeros = torch.zeros(*index.shape[:-1], count, dtype=like.dtype, device=like.device)
    if not eager_on_cpu(like) or index.numel() <= FEW:
        return put(zeros, index, 1.0)
    start = torch.arange(0, zeros.numel(), count).view(*index.shape[:-1], 1)
    zeros.view(-1).index_fill_(0, (start + index).flatten(), 1.0)  # two thirds of the time of scatter_
    return zeros


def put(tensor: Tensor, index: Tensor, values: Tensor | float) -> Tensor:
    """``tensor.scatter_(-1, index, values)``; ``torch.func`` has no such, and gets a copy."""
    result: Tensor = (tensor.scatter_ if kernels_usable() else tensor.scatter)(-1, index, values)
    return result


class _LazyCategorical(Categorical):
    """``Categorical(logits=scores)`` that takes the softmax, or its logarithm, when it is asked for."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = self._param = scores
        self._num_events = scores.shape[-1]
        Distribution.__init__(self, scores.shape[:-1], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _LazyCategorical:
        return _LazyCategorical(self.scores.expand(*batch_shape, -1))

    @lazy_property
    def logits(self) -> Tensor:
        return log_softmax(self.scores)

    @lazy_property
    def probs(self) -> Tensor:
        return softmax(self.scores)


class _LogProbOfIndex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, probs: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(scores, probs, index)
        return probs.gather(-1, index).log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scores, probs, index = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will itself be differentiated
            probs = softmax(scores)
        return (probs * -grad.sum(-1, keepdim=True)).scatter_add_(-1, index, grad), None, None


def log_prob_of_index(q: OneHotCategorical, index: Tensor) -> Tensor:
    r"""log q of categories that were drawn, ``[S, ...]``, with its gradient :math:`z - p`.

    Its cost is that of rows, whatever S and C; backward takes one pass over the categories. What was drawn has a
    probability far above the smallest number, so that its logarithm is finite.

    Args:
        q: A law that :func:`one_hot_categorical` made.
        index: ``[S, ..., 1]``.
    """
    law = q._categorical
    assert isinstance(law, _LazyCategorical)
    scores, index = law.scores, index.squeeze(-1).movedim(0, -1)  # [..., S]
    if not kernels_usable():
        return q.logits.gather(-1, index).movedim(-1, 0)
    result: Tensor = _LogProbOfIndex.apply(scores, q.probs.detach(), index)  # type: ignore[no-untyped-call]
    return result.movedim(-1, 0)


class SoftmaxOneHot(OneHotCategorical):
    """A law under which no category is impossible, also where its probability is 0 in float32: the KL is finite."""


@register_kl(SoftmaxOneHot, SoftmaxOneHot)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_of_softmaxes(q: SoftmaxOneHot, p: SoftmaxOneHot) -> Tensor:
    return (q.probs * (q.logits - p.logits)).sum(-1)


def one_hot_categorical(logits: Tensor, *, law: type[OneHotCategorical] = SoftmaxOneHot) -> OneHotCategorical:
    """``OneHotCategorical(logits=logits)`` without torch's validation, and normalised only when it is asked for.

    The validation costs a synchronisation with the device, fails on an empty batch, and has been done on params.

    Args:
        logits: ``[*batch, C]``, finite.
        law: Of its type; that of torch has an infinite KL to where a probability is 0.
    """
    q = law.__new__(law)
    q._categorical = _LazyCategorical(logits)
    Distribution.__init__(q, logits.shape[:-1], logits.shape[-1:], validate_args=False)
    return q
