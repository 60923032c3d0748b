"""Quantisers without a codebook: each coordinate is rounded to a few levels, or moved about within a level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stochastic_layers.codes import CellCodes, GridCodes
from stochastic_layers.layer import Sample
from stochastic_layers.point_mass import PointMass
from stochastic_layers.quantized import QuantizedLayer
from stochastic_layers.registry import register

__all__ = ["FiniteScalarPerturbation", "FiniteScalarQuantizer"]


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

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        assert isinstance(self.codes, GridCodes)
        z = self.codes.rounded(self.family.unflatten(params)).flatten(-2)
        return self._sample(PointMass(z.detach()), z.unsqueeze(0))


@register("fsp")
class FiniteScalarPerturbation(QuantizedLayer):
    r"""Finite scalar perturbation: trained with noise of the size of a level, quantised to levels in evaluation.

    .. math:: a = F(x), \qquad z = \sqrt{12} \, (a + \epsilon - \tfrac12), \quad
        \epsilon_i \sim U\big(-\tfrac{1}{2 L_i}, \tfrac{1}{2 L_i}\big)

    with F a distribution function, which spreads the coordinates over (0, 1); noise that would leave (0, 1) is not
    added. To the decoder, quantising looks like noise of this size, so that nothing has to be passed straight through:
    the gradient is that of the cost of the noisy points, exact by the pathwise derivative. In ``eval()`` z is the
    middle of the cell, a code (see :class:`~stochastic_layers.codes.CellCodes`). Biased as far as noise and rounding
    differ; the cost must take points between the codes. No auxiliary loss, no state.

    ``Sample.q`` and ``Sample.log_prob`` are those of the code that a point stands for.

    Args:
        latent_dim: Number of code vectors of one example.
        levels: Number of levels of each coordinate of a code vector; ``code_dim`` is their number, their product the
            number of codes.
        family: ``"quantized"``.
        activation: F: ``"tanh"``, (tanh(x) + 1) / 2, or ``"normal"``, the standard normal distribution function.

    Raises:
        ValueError: No levels, one below 2, or an unknown activation.

    References:
        VP-VAE: Rethinking Vector Quantization via Adaptive Vector Perturbation (Linwei Zhai, Han Ding, Mingzhi Lin, Cui
        Zhao, Fei Wang, Ge Wang, Zhi Wang, Wei Xi, 2026), https://arxiv.org/abs/2602.17133

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("fsp", latent_dim=2, levels=(3, 5))
        >>> layer.in_features, layer.num_codes, layer.eval()(torch.tensor([-9.0, 0.0, 0.0, 9.0]))
        (4, 15, tensor([-1.1547,  0.0000,  0.0000,  1.3856]))
    """

    needs = ("cost_gradient", "relaxable_cost")
    exact_draws = False
    reference = (
        "VP-VAE: Rethinking Vector Quantization via Adaptive Vector Perturbation (Zhai, Ding, Lin, Zhao, Wang, Wang, "
        "Wang and Xi, 2026). https://arxiv.org/abs/2602.17133"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        levels: Sequence[int] = (8, 5, 5, 5),
        family: str = "quantized",
        activation: Literal["tanh", "normal"] = "tanh",
    ) -> None:
        super().__init__(latent_dim, CellCodes(levels, activation), family=family)

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        sample = super().draw(params, context)
        return replace(sample, log_density=lambda: sample.q.log_prob(sample.q.mode).unsqueeze(0))

    def pass_gradient(self, x: Tensor, hard: Tensor) -> Tensor:
        codes = self.codes
        assert isinstance(codes, CellCodes)
        share = codes.share(x)
        moved = share.detach() + (torch.rand(share.shape, dtype=share.dtype, device=share.device) - 0.5) / codes.levels
        noise = torch.where((moved > 0) & (moved < 1), moved - share.detach(), 0.0)
        return codes.scaled(share + noise)
