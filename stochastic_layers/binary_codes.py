"""Binary codes of a categorical variable: its logits as those of bits, and bits back to a one-hot vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from stochastic_layers.categorical import one_hot, put

__all__ = ["Decoder", "decode_sticks", "decode_tree", "ordered_sticks", "stick_logits", "tree_logits"]

Decoder = Callable[[Tensor], tuple[Tensor, Tensor]]


def stick_logits(logits: Tensor) -> Tensor:
    r"""Logits ``[..., C - 1]`` of the stick-breaking bits of a softmax ``[..., C]``.

    .. math:: \phi_i = l_i - \log \sum_{j > i} e^{l_j}
    """
    rest = logits[..., 1:].flip(-1).logcumsumexp(-1).flip(-1)
    return logits[..., :-1] - rest


def ascending_stick_logits(logits: Tensor) -> Tensor:
    """:func:`stick_logits` of logits in ascending order, where a plain sum does: it holds its largest term, which is 1.

    torch's ``logcumsumexp`` and its backward pass take several times as long.
    """
    shifted = logits - logits[..., -1:].detach()
    rest = shifted[..., 1:].exp().flip(-1).cumsum(-1).flip(-1)
    return shifted[..., :-1] - rest.log()


def decode_sticks(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The position of the first 1 among bits ``[..., C - 1]``, the last category if there is none.

    Returns:
        One-hot vectors ``[..., C]``, and ``[..., C - 1]`` with 1 at the bits that were looked at.
    """
    earlier = bits.cumsum(-1) - bits
    reached = (earlier == 0).to(bits.dtype)
    hit = bits * reached
    return torch.cat([hit, 1 - hit.sum(-1, keepdim=True)], -1), reached


def ordered_sticks(logits: Tensor, order: str) -> tuple[Tensor, Decoder]:
    """Stick-breaking of the categories in an order that may depend on the logits.

    Args:
        logits: ``[..., C]``.
        order: ``"ascending"``, ``"descending"`` or ``"given"``.

    Returns:
        The bit logits ``[..., C - 1]`` and the decoder of bits ``[S, ..., C - 1]``.
    """
    if order == "given":
        return stick_logits(logits), decode_sticks
    ordered, permutation = logits.sort(-1, descending=order == "descending")

    def decode(bits: Tensor) -> tuple[Tensor, Tensor]:
        z, reached = decode_sticks(bits)
        return put(torch.zeros_like(z), permutation.expand_as(z), z), reached

    return (stick_logits if order == "descending" else ascending_stick_logits)(ordered), decode


def tree_logits(logits: Tensor) -> Tensor:
    r"""Logits ``[..., 2^D - 1]`` of the bits of a balanced binary tree with C leaves, root first, level by level.

    A node's bit is 1 for the right half: :math:`\phi = \log\sum_{right} e^{l_j} - \log\sum_{left} e^{l_j}`. Where C is
    not a power of 2 the leaves on the right are filled up with categories of probability zero.
    """
    size = logits.shape[-1]
    depth = (size - 1).bit_length()
    # finite, unlike -inf, whose difference from itself is not a number; four of them still add up
    level = pad(logits, (0, 2**depth - size), value=torch.finfo(logits.dtype).min / 4)
    nodes: list[Tensor] = []
    for _ in range(depth):
        left, right = level[..., 0::2], level[..., 1::2]
        nodes.insert(0, right - left)
        # log(e^left + e^right) in a tenth of the time of logaddexp; the line from 40 on is within rounding
        level = left + softplus(nodes[0], threshold=40.0)
    return torch.cat(nodes, -1)


def decode_tree(bits: Tensor, num_categories: int) -> tuple[Tensor, Tensor]:
    """The leaf that bits ``[..., 2^D - 1]`` lead to, which is none of those that the tree was filled up with.

    Returns:
        One-hot vectors ``[..., num_categories]``, and ``[..., 2^D - 1]`` with 1 at the bits on the path.
    """
    size, flat = bits.shape[-1], bits.flatten()
    start = torch.arange(0, flat.numel(), size, device=bits.device)
    node, shift, reached = start, 1 - start, torch.zeros_like(flat)
    for _ in range(size.bit_length()):
        reached.index_fill_(0, node, 1.0)
        # numbered level by level, the children of n are 2n + 1 and 2n + 2
        node = flat.index_select(0, node).long().add_(node, alpha=2).add_(shift)
    leaf = (node - start - size).view(*bits.shape[:-1], 1)
    return one_hot(leaf, bits.new_empty(num_categories)), reached.view(bits.shape)
