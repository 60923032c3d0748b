"""Binary quantisers without a codebook: the sign of each coordinate, on a cube or on the sphere."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from stochastic_layers.codes import SignCodes, SphereCodes
from stochastic_layers.options import check_positive, check_temperature
from stochastic_layers.quantized import QuantizedLayer
from stochastic_layers.registry import register

__all__ = ["BinarySphericalQuantizer", "LookupFreeQuantizer"]

ENTROPY_BITS = 8  # bits whose joint usage is tracked exactly: 256 numbers for each vector of a batch


class BinaryQuantizer(QuantizedLayer):
    """Base of quantisers to signs, with an entropy penalty on the soft assignment of the bits.

    Args:
        latent_dim: Number of code vectors of one example.
        codes: The set of codes.
        family: ``"quantized"``.
        commitment_weight: Weight of the squared distance, summed over an example's coordinates.
        entropy_weight: Weight of the entropy penalty, in nats and summed over an example's vectors.
        temperature: Temperature of the soft assignment.

    Attributes:
        distance_slope: How much faster than x the difference of the squared distances to the two values of a bit grows.

    Raises:
        ValueError: An option is out of range.
    """

    distance_slope: float

    def __init__(
        self,
        latent_dim: int,
        codes: SignCodes,
        *,
        family: str,
        commitment_weight: float,
        entropy_weight: float,
        temperature: float,
    ) -> None:
        super().__init__(latent_dim, codes, family=family, commitment_weight=commitment_weight)
        self.entropy_weight = check_positive("entropy_weight", entropy_weight, or_zero=True)
        self.temperature = temperature

    @property
    def temperature(self) -> float:
        """Temperature of the soft assignment; assign a positive number to change it."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_temperature("temperature", value, "0.01 to 1 is usual")

    def penalties(self, x: Tensor, hard: Tensor, indices: Tensor) -> Mapping[str, Tensor]:
        losses = dict(super().penalties(x, hard, indices))
        if self.entropy_weight > 0:
            logits = x * (self.distance_slope / self.temperature)  # of the bits of the soft assignment
            sure = _bit_entropy(logits).sum((-2, -1))  # [*batch]
            spread = _usage_entropy(logits.reshape(-1, self.code_dim))  # []
            losses["entropy"] = self.entropy_weight * (sure - self.latent_dim * spread)
        return losses

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, entropy_weight={self.entropy_weight}, temperature={self.temperature}"


@register("lfq")
class LookupFreeQuantizer(BinaryQuantizer):
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
        super().__init__(
            latent_dim,
            SignCodes(code_dim),
            family=family,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            temperature=temperature,
        )
        self.distance_slope = 4.0  # (x + 1)^2 - (x - 1)^2 = 4 x


@register("bsq")
class BinarySphericalQuantizer(BinaryQuantizer):
    r"""Binary spherical quantisation: the vector is moved to the unit sphere, then to the sign of each coordinate.

    .. math:: u = x / |x|, \quad z = \mathrm{sign}(u) / \sqrt D, \qquad
        \nabla_x \approx \frac{1}{|x|} (I - u u^\top) f'(z)

    Straight-through to u, from there exact: biased. The length of x plays no role, so that the quantisation error is
    bounded (:math:`|u - z|^2 \leq 2 - 2 / \sqrt D`) and no commitment loss is needed; the default has none. The entropy
    penalty is that of ``lfq`` with the soft assignment of u. At x = 0, where there is no direction, the gradient passes
    straight through.

    Args:
        latent_dim: Number of code vectors of one example.
        code_dim: Number D of bits of each; there are ``2 ** code_dim`` codes.
        family: ``"quantized"``.
        commitment_weight: Weight of :math:`|u - z|^2`, summed over an example's vectors.
        entropy_weight: Weight of the entropy penalty, in nats and summed over an example's vectors.
        temperature: Temperature of the soft assignment; the coordinates of u are of size ``1 / sqrt(D)``.

    Raises:
        ValueError: An option is out of range.

    References:
        Image and Video Tokenization with Binary Spherical Quantization (Yue Zhao, Yuanjun Xiong, Philipp Kraehenbuehl,
        2024), https://arxiv.org/abs/2406.07548

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("bsq", latent_dim=1, code_dim=4)
        >>> layer(torch.tensor([0.3, -2.0, 5.0, 0.1]))
        tensor([ 0.5000, -0.5000,  0.5000,  0.5000])
    """

    reference = (
        "Image and Video Tokenization with Binary Spherical Quantization (Zhao, Xiong and Kraehenbuehl, 2024). "
        "https://arxiv.org/abs/2406.07548"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        code_dim: int = 10,
        family: str = "quantized",
        commitment_weight: float = 0.0,
        entropy_weight: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(
            latent_dim,
            SphereCodes(code_dim),
            family=family,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            temperature=temperature,
        )
        self.distance_slope = 4.0 / math.sqrt(code_dim)

    @staticmethod
    def direction(x: Tensor) -> Tensor:
        """u ``[..., D]``; x itself where it is too short to have a direction."""
        length = x.norm(dim=-1, keepdim=True)
        tiny = torch.finfo(x.dtype).tiny ** 0.5  # the square of a shorter x underflows
        return x / torch.where(length > tiny, length, 1.0)

    def pass_gradient(self, x: Tensor, hard: Tensor) -> Tensor:
        return super().pass_gradient(self.direction(x), hard)

    def penalties(self, x: Tensor, hard: Tensor, indices: Tensor) -> Mapping[str, Tensor]:
        return super().penalties(self.direction(x), hard, indices)


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
