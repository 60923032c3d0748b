"""Quantisers without a codebook: each coordinate is rounded by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stochastic_layers.auxiliary import with_value
from stochastic_layers.codes import GridCodes, SignCodes
from stochastic_layers.quantized import QuantizedLayer, check_weight
from stochastic_layers.registry import register

__all__ = ["FiniteScalarQuantizer", "LookupFreeQuantizer"]

ENTROPY_BITS = 8  # bits whose joint usage is tracked exactly: 256 numbers for each vector of a batch


@register("fsq")
class FiniteScalarQuantizer(QuantizedLayer):
    r"""Finite scalar quantisation: squash each coordinate and round it to a few levels; no codebook to learn.

    .. math:: z_i = \mathrm{round}(b_i(x_i)) / \lfloor L_i / 2 \rfloor, \qquad \nabla_{x_i} \approx f'(z)_i \, b_i'(x_i)
        / \lfloor L_i / 2 \rfloor

    with a bound b built on tanh (see :class:`~stochastic_layers.codes.GridCodes`). Biased by the rounding; no
    auxiliary loss, no state, no collapse.

    Args:
        latent_dim: Number of code vectors of one example.
        levels: Number of levels of each coordinate of a code vector; ``code_dim`` is their number, their product the
            number of codes.
        family: ``"quantized"``.

    Raises:
        ValueError: No levels, or one below 2.

    References:
        Finite Scalar Quantization: VQ-VAE Made Simple (Fabian Mentzer, David Minnen, Eirikur Agustsson, Michael
        Tschannen, 2023), https://arxiv.org/abs/2309.15505

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("fsq", latent_dim=2, levels=(3, 5))
        >>> layer.in_features, layer.num_codes, layer(torch.tensor([-9.0, 0.0, 0.0, 9.0]))
        (4, 15, tensor([-1.,  0.,  0.,  1.]))
    """

    reference = (
        "Finite Scalar Quantization: VQ-VAE Made Simple (Mentzer, Minnen, Agustsson and Tschannen, 2023). "
        "https://arxiv.org/abs/2309.15505"
    )

    def __init__(self, latent_dim: int, *, levels: Sequence[int] = (8, 5, 5, 5), family: str = "quantized") -> None:
        super().__init__(latent_dim, GridCodes(levels), family=family)

    def pass_gradient(self, x: Tensor, hard: Tensor) -> Tensor:
        assert isinstance(self.codes, GridCodes)
        soft = self.codes.soften(x)
        return with_value(hard, soft)


@register("lfq")
class LookupFreeQuantizer(QuantizedLayer):
    r"""Lookup-free quantisation: the sign of each coordinate, with an entropy penalty that keeps all codes in use.

    .. math:: z = \mathrm{sign}(x), \qquad \text{aux} = \gamma (H[p(c \mid x)] - H[E\, p(c \mid x)]) + \beta |x - z|^2

    with the soft assignment :math:`p(c \mid x) \propto \exp(-|x - c|^2 / \tau)`, a product of bits. Straight-through
    gradient: biased. The first entropy makes each assignment sure, the second, of the assignment averaged over the
    batch and all ranks, spreads the batch over the codes; it is exact for up to 8 bits, and beyond that the sum over
    blocks of 8 bits, an upper bound.

    Args:
        latent_dim: Number of code vectors of one example.
        code_dim: Number of bits of each; there are ``2 ** code_dim`` codes.
        family: ``"quantized"``.
        commitment_weight: Weight :math:`\beta` of the squared distance, summed over an example's coordinates.
        entropy_weight: Weight :math:`\gamma` of the entropy penalty, in nats and summed over an example's vectors.
        temperature: Temperature :math:`\tau` of the soft assignment.

    Raises:
        ValueError: An option is out of range.

    References:
        Language Model Beats Diffusion - Tokenizer is Key to Visual Generation (Lijun Yu, Jose Lezama, Nitesh B.
        Gundavarapu, Luca Versari, Kihyuk Sohn, and others, 2023), https://arxiv.org/abs/2310.05737

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("lfq", latent_dim=1, code_dim=3)
        >>> layer.num_codes, layer.indices(torch.tensor([0.3, -2.0, 5.0])), layer.decode(torch.tensor([5]))
        (8, tensor([5]), tensor([ 1., -1.,  1.]))
    """

    reference = (
        "Language Model Beats Diffusion - Tokenizer is Key to Visual Generation (Yu, Lezama, Gundavarapu, Versari, "
        "Sohn and others, 2023). https://arxiv.org/abs/2310.05737"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        code_dim: int = 10,
        family: str = "quantized",
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(latent_dim, SignCodes(code_dim), family=family, commitment_weight=commitment_weight)
        self.entropy_weight = check_weight("entropy_weight", entropy_weight)
        if not 0 < temperature < math.inf:
            raise ValueError(f"needed temperature > 0, got {temperature}; 0.01 to 1 is usual.")
        self.temperature = temperature

    def penalties(self, x: Tensor, hard: Tensor, indices: Tensor) -> Mapping[str, Tensor]:
        losses = dict(super().penalties(x, hard, indices))
        if self.entropy_weight > 0:
            logits = x * (
                4 / self.temperature
            )  # of a bit: the difference of two squared distances over the temperature
            sure = _bit_entropy(logits).sum((-2, -1))  # [*batch]
            spread = _usage_entropy(logits.reshape(-1, self.code_dim))  # []
            losses["entropy"] = self.entropy_weight * (sure - self.latent_dim * spread)
        return losses

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, entropy_weight={self.entropy_weight}, temperature={self.temperature}"


def _bit_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of bits with these logits; exact to rounding however large the logits."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def _usage_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the codes averaged over the rows ``[N, bits]`` of all ranks; a scalar.

    The gradient is that of the joint entropy with respect to this rank's rows, times the number of ranks: averaged over
    ranks, as data-parallel training does, it is the gradient of the joint entropy.
    """
    count = logits.new_tensor([float(len(logits))])
    total = logits.new_zeros(())
    for start in range(0, logits.shape[-1], ENTROPY_BITS):
        block = logits[:, start : start + ENTROPY_BITS]
        halves = torch.stack([F.logsigmoid(-block), F.logsigmoid(block)], -1)  # [N, g, 2]
        joint = block.new_zeros(len(block), 1)
        for bit in halves.unbind(1):
            joint = (joint.unsqueeze(-1) + bit.unsqueeze(1)).flatten(1)  # [N, 2, 4, ... 2**g]
        usage = joint.exp().sum(0)
        share = usage / count.clamp_min(1)
        if dist.is_available() and dist.is_initialized():
            summed = torch.cat([usage.detach(), count])
            dist.all_reduce(summed)
            share = share + (summed[:-1] / summed[-1:].clamp_min(1) - share.detach())
        # the floor keeps the gradient of an unused code at 0 instead of inf * 0; it adds less than 1e-35 nats
        total = total - (share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum()
    return total
