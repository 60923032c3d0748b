"""Vector quantisers whose codebook is trained by gradients: SimVQ and DiVeQ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from stochastic_layers.codebooks import LearnedCodebook, ProjectedCodebook
from stochastic_layers.options import check_positive
from stochastic_layers.quantized import QuantizedLayer
from stochastic_layers.registry import register

__all__ = ["DiVeQ", "SimVQ"]


@register("simvq")
class SimVQ(QuantizedLayer):
    r"""SimVQ: a codebook of fixed random vectors times one learned matrix, which moves all codes at once.

    .. math:: z = c_k W, \quad k = \arg\min_j |x - c_j W|^2, \qquad
        \text{aux} = \beta |x - \mathrm{sg}(z)|^2 + |\mathrm{sg}(x) - z|^2

    with sg for stop-gradient. Straight-through gradient for the embeddings: biased. The second term trains W, and W
    alone; codes that nothing was assigned to move with the others, so that they do not die. W starts as the identity.

    Args:
        latent_dim: Number of code vectors of one example.
        code_dim: Size of a code vector.
        num_codes: Number of codes.
        family: ``"quantized"``.
        commitment_weight: Weight :math:`\beta` of the squared distance, summed over an example's coordinates.

    Raises:
        ValueError: An option is out of range.

    References:
        Addressing Representation Collapse in Vector Quantized Models with One Linear Layer (Yongxin Zhu, Bocheng Li,
        Yifei Xin, Zhihua Xia, Linli Xu, 2024), https://arxiv.org/abs/2411.02038

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("simvq", latent_dim=3, code_dim=8, num_codes=16)
        >>> sample = layer.sample(torch.randn(50, 24))
        >>> sample.z.shape, sorted(sample.aux)
        (torch.Size([1, 50, 24]), ['codebook', 'commitment'])
    """

    reference = (
        "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer (Zhu, Li, Xin, Xia and "
        "Xu, 2024). https://arxiv.org/abs/2411.02038"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        code_dim: int = 64,
        num_codes: int = 512,
        family: str = "quantized",
        commitment_weight: float = 0.25,
    ) -> None:
        codes = ProjectedCodebook(code_dim, num_codes)
        super().__init__(latent_dim, codes, family=family, commitment_weight=commitment_weight)

    def penalties(self, x: Tensor, hard: Tensor, indices: Tensor) -> Mapping[str, Tensor]:
        fit = (x.detach() - hard).square().sum((-2, -1))
        return {**super().penalties(x, hard, indices), "codebook": fit}


@register("diveq")
class DiVeQ(QuantizedLayer):
    r"""DiVeQ: the quantisation error as a reparameterized vector, through which embeddings and codes both learn.

    .. math:: z = x + |c_k - x| \, n, \qquad n = \mathrm{sg}\Big(\frac{c_k - x + \sigma \epsilon}
        {|c_k - x + \sigma \epsilon|}\Big), \quad \epsilon \sim N(0, I)

    with sg for stop-gradient and c_k the nearest code. The cost's gradient g reaches the code as
    :math:`(n^\top g) e`, with e the unit vector from x to the code, and the embedding as what is left of g: biased, and
    without any auxiliary loss. Here the value of z is the code itself (the limit :math:`\sigma \to 0`), so that
    training and evaluation see the same codes; the noise is in the gradient alone.

    k-means on the first batch starts the codes, and dead ones are replaced as in ``vq``.

    Args:
        latent_dim: Number of code vectors of one example.
        code_dim: Size of a code vector.
        num_codes: Number of codes.
        family: ``"quantized"``.
        noise_scale: Standard deviation :math:`\sigma` of the noise of the direction.
        decay: Weight of the past in the moving averages of the codes' counts.
        revive_below: Share of the mean count below which a code is dead; 0 to keep dead codes.

    Raises:
        ValueError: An option is out of range.

    References:
        DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick (Mohammad Hassan Vali, Tom
        Baeckstroem, Arno Solin, 2025), https://arxiv.org/abs/2509.26469

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("diveq", latent_dim=3, code_dim=8, num_codes=16)
        >>> sample = layer.sample(torch.randn(50, 24))
        >>> sample.surrogate(sample.z.sum(-1)).mean().backward()
        >>> bool(layer.codes.shift.grad.any())
        True
    """

    reference = (
        "DiVeQ: Differentiable Vector Quantization Using the Reparameterization Trick (Vali, Baeckstroem and Solin, "
        "2025). https://arxiv.org/abs/2509.26469"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        code_dim: int = 64,
        num_codes: int = 512,
        family: str = "quantized",
        noise_scale: float = 0.001,
        decay: float = 0.99,
        revive_below: float = 0.01,
    ) -> None:
        codes = LearnedCodebook(code_dim, num_codes, decay=decay, revive_below=revive_below)
        super().__init__(latent_dim, codes, family=family)
        self.noise_scale = check_positive("noise_scale", noise_scale, or_zero=True)

    def pass_gradient(self, x: Tensor, hard: Tensor) -> Tensor:
        error = hard - x
        tiny = torch.finfo(x.dtype).tiny ** 0.5  # of a shorter error the square underflows
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device)
        direction = F.normalize(error.detach() + self.noise_scale * noise, dim=-1, eps=tiny)
        z: Tensor = x + error.norm(dim=-1, keepdim=True) * direction
        return hard.detach() + (z - z.detach())

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, noise_scale={self.noise_scale}"
