"""Vector quantisers: params are embeddings, z the nearest codes of a learned codebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from stochastic_layers.codebooks import Codebook
from stochastic_layers.codes import Codes, ResidualCodes, perplexity
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.options import check_positive, check_positive_int
from stochastic_layers.point_mass import PointMass, QuantizedFamily
from stochastic_layers.recomputation import Pass, Passes, may_be_recomputed, recomputing
from stochastic_layers.registry import register

__all__ = [
    "QuantizedLayer",
    "ResidualVectorQuantizer",
    "RotationTrick",
    "VectorQuantizer",
]


class QuantizedLayer(StochasticLayer):
    """Base of quantisers: ``latent_dim`` vectors of each example are replaced by codes.

    The law q is all mass on the chosen codes; its KL to a uniform choice of codes is ``latent_dim * log K`` nats
    whatever the encoder does. The draw is deterministic, so that one draw is all there is.

    Args:
        latent_dim: Number of code vectors of one example.
        codes: The set of codes.
        family: ``"quantized"``.
        commitment_weight: Weight of the squared distance between embeddings and codes, summed over an example's
            coordinates; it trains the encoder alone.

    Raises:
        ValueError: ``commitment_weight`` is negative.
    """

    default_latent_dim = 4
    families = ("quantized",)
    unbiased = False
    needs: tuple[str, ...] = ("cost_gradient",)
    evaluations = 1

    def __init__(self, latent_dim: int, codes: Codes, *, family: str, commitment_weight: float = 0.0) -> None:
        super().__init__(latent_dim, family=family)
        self.codes = codes
        self.family: QuantizedFamily = QuantizedFamily(latent_dim, codes=codes)
        self.commitment_weight = check_positive("commitment_weight", commitment_weight, or_zero=True)
        self.passes = Passes()
        self._adapts = type(codes).update is not Codes.update

    @property
    def code_dim(self) -> int:
        """Size of a code vector."""
        return self.codes.code_dim

    @property
    def num_codes(self) -> int:
        """Number of values of one index."""
        return self.codes.num_codes

    def indices(self, params: Tensor) -> Tensor:
        """The integer codes ``[*batch, latent_dim]`` (``[*batch, latent_dim, depth]`` of a residual quantiser)."""
        with torch.no_grad(), torch.autocast(params.device.type, enabled=False):
            return self.codes.indices(self.family.unflatten(self.family.prepare(params)))

    def decode(self, indices: Tensor) -> Tensor:
        """z ``[*batch, out_features]`` of integer codes ``[*batch, latent_dim]``, from a prior over codes say.

        Raises:
            ValueError: Not integers, a wrong number of them, or one that is no code's.
        """
        n = len(self.codes.index_shape)
        if indices.dim() <= n or indices.shape[indices.dim() - n - 1] != self.latent_dim:
            raise ValueError(
                f"needed indices [*batch, {', '.join(map(str, (self.latent_dim, *self.codes.index_shape)))}], got "
                f"{list(indices.shape)}; take them from layer.indices(params)."
            )
        if not torch.compiler.is_compiling() and indices.numel():
            low, high = (int(end) for end in torch.aminmax(indices))
            if low < 0 or high >= self.num_codes:
                raise ValueError(
                    f"needed indices from 0 to {self.num_codes - 1}, got {low} to {high}; a prior over the codes has "
                    "num_codes categories."
                )
        return self.codes.decode(indices).flatten(-2)

    def perplexity(self, params: Tensor) -> Tensor:
        """Effective number of codes that params use, between 1 and ``num_codes``; one for each stage where there are.

        Watch it: a value near 1 is a collapsed codebook. It cannot exceed the number of vectors it is computed from.
        """
        indices = self.indices(params)
        if not self.codes.index_shape:
            return perplexity(indices)
        return torch.stack([perplexity(index) for index in indices.unbind(-1)])

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        x = self.family.unflatten(params)  # [*batch, latent_dim, code_dim]
        if not (self._adapts and torch.is_grad_enabled()):
            return self._quantize(x, lambda indices: None)
        if recomputing():
            earlier = self.passes.find(x)
            with earlier.buffers_of_then(self.codes):
                return self._quantize(x, lambda indices: earlier.skip_update())
        return self._learn(x)

    def _learn(self, x: Tensor) -> Sample:
        """Quantise x and let the codes learn from it; the sample is made with the codes as they were before."""
        rows = x.detach().reshape(-1, self.code_dim)
        this = Pass(x) if may_be_recomputed() else None
        self.codes.initialize(rows)
        if this is not None:
            this.keep(self.codes)

        def update(indices: Tensor) -> None:
            self.codes.update(rows, indices.reshape(-1, *self.codes.index_shape))
            if this is not None:
                this.updated()

        sample = self._quantize(x, update)
        if this is not None:
            self.passes.add(this, sample.z)
        return sample

    def _quantize(self, x: Tensor, update: Callable[[Tensor], None]) -> Sample:
        indices = self.codes.indices(x.detach())
        hard = self.codes.decode(indices, x.dtype)
        aux = self.penalties(x, hard, indices)
        update(indices)
        z = self.pass_gradient(x, hard).flatten(-2)
        return self._sample(PointMass(hard.detach().flatten(-2)), z.unsqueeze(0), aux=aux)

    def pass_gradient(self, x: Tensor, hard: Tensor) -> Tensor:
        """The codes, with a gradient for the embeddings: straight through, as if they were the embeddings."""
        return hard.detach() + (x - x.detach())  # in this order the value is exactly the code

    def penalties(self, x: Tensor, hard: Tensor, indices: Tensor) -> Mapping[str, Tensor]:
        """Extra losses ``[*batch]`` of embeddings and codes ``[*batch, latent_dim, code_dim]``, weighted."""
        if self.commitment_weight == 0:
            return {}
        return {"commitment": self.commitment_weight * (x - hard.detach()).square().sum((-2, -1))}

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, commitment_weight={self.commitment_weight}"


@register("vq")
class VectorQuantizer(QuantizedLayer):
    r"""Vector quantisation: the nearest vector of a learned codebook, straight-through gradient.

    .. math:: z = c_k, \quad k = \arg\min_j |x - c_j|^2, \qquad \nabla_x \approx f'(z) + 2 \beta (x - z)

    Approximates the gradient of the cost at the embedding by the one at the code: biased. Codes are moving averages of
    the embeddings assigned to them, started by k-means on the first batch; those that fall out of use are moved to
    embeddings of the current batch. The codebook is state, not parameters: checkpointed, equal on all ranks, frozen in
    ``eval()`` and under ``torch.no_grad()``. The commitment loss is in ``Sample.aux``, trained by ``surrogate``; called
    as a plain module the layer adds its mean over the batch to the backward pass (see ``forward``).

    Args:
        latent_dim: Number of code vectors of one example.
        code_dim: Size of a code vector.
        num_codes: Number of codes.
        family: ``"quantized"``.
        commitment_weight: Weight :math:`\beta` of the squared distance, summed over an example's coordinates.
        decay: Weight of the past in the moving averages.
        revive_below: Share of the mean count below which a code is dead; 0 to keep dead codes.

    Raises:
        ValueError: An option is out of range.

    References:
        Neural Discrete Representation Learning (Aaron van den Oord, Oriol Vinyals, Koray Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("vq", latent_dim=3, code_dim=8, num_codes=16)
        >>> params = torch.randn(50, layer.in_features)
        >>> sample = layer.sample(params)
        >>> sample.z.shape, layer.indices(params).shape, sample.aux["commitment"].shape
        (torch.Size([1, 50, 24]), torch.Size([50, 3]), torch.Size([50]))
    """

    reference = (
        "Neural Discrete Representation Learning (van den Oord, Vinyals and Kavukcuoglu, 2017). "
        "https://arxiv.org/abs/1711.00937"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        code_dim: int = 64,
        num_codes: int = 512,
        family: str = "quantized",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        revive_below: float = 0.01,
    ) -> None:
        codes = Codebook(code_dim, num_codes, decay=decay, revive_below=revive_below)
        super().__init__(latent_dim, codes, family=family, commitment_weight=commitment_weight)


@register("rotation_trick")
class RotationTrick(VectorQuantizer):
    r"""Vector quantisation whose gradient is rotated and rescaled with the embedding.

    .. math:: \nabla_x \approx \frac{|z|}{|x|} R^\top f'(z), \qquad
        R = I - 2 r r^\top + 2 \hat z \hat x^\top, \quad r \propto \hat x + \hat z

    R turns the direction of x into that of z, and is held constant in the backward pass: the angle between gradient and
    code becomes that between gradient and embedding. Biased, like ``vq``, of which it is a variant with the same
    options; at x = 0, where there is no direction, it passes straight through.

    References:
        Restructuring Vector Quantization with the Rotation Trick (Christopher Fifty, Ronald G. Junkins, Dennis Duan,
        Aniketh Iyengar, Jerry W. Liu, Ehsan Amid, Sebastian Thrun, Christopher Re, 2024),
        https://arxiv.org/abs/2410.06424

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("rotation_trick", latent_dim=3, code_dim=8, num_codes=16)
        >>> layer(torch.randn(50, 24)).shape
        torch.Size([50, 24])
    """

    reference = (
        "Restructuring Vector Quantization with the Rotation Trick (Fifty, Junkins, Duan, Iyengar, Liu, Amid, Thrun "
        "and Re, 2024). https://arxiv.org/abs/2410.06424"
    )

    def pass_gradient(self, x: Tensor, hard: Tensor) -> Tensor:
        constant = x.detach()
        length = constant.norm(dim=-1, keepdim=True)
        tiny = torch.finfo(x.dtype).tiny ** 0.5  # a shorter x has no direction: its square underflows
        x_hat, z_hat = constant / length.clamp_min(tiny), F.normalize(hard, dim=-1, eps=tiny)
        r = F.normalize(x_hat + z_hat, dim=-1, eps=tiny)
        rotated = x - 2 * r * (r * x).sum(-1, keepdim=True) + 2 * z_hat * (x_hat * x).sum(-1, keepdim=True)
        rotated = rotated * (hard.norm(dim=-1, keepdim=True) / length.clamp_min(tiny))
        rotated = torch.where(length > tiny, rotated, x)
        return hard + (rotated - rotated.detach())


@register("residual_vq")
class ResidualVectorQuantizer(QuantizedLayer):
    r"""Residual vector quantisation: each codebook quantises what the ones before it left over.

    .. math:: z = \sum_d c^{(d)}, \qquad c^{(d)} \text{ nearest to } x - \sum_{e < d} c^{(e)}

    ``num_codes ** depth`` codes at the price of ``depth`` lookups. Straight-through gradient: biased. Codebooks as in
    ``vq``; the commitment loss is the sum over the stages.

    Args:
        latent_dim: Number of code vectors of one example.
        depth: Number of stages.
        code_dim: Size of a code vector.
        num_codes: Number of codes of each stage.
        family: ``"quantized"``.
        commitment_weight: Weight of each stage's squared distance, summed over an example's coordinates.
        decay: Weight of the past in the moving averages.
        revive_below: Share of the mean count below which a code is dead; 0 to keep dead codes.

    Raises:
        ValueError: An option is out of range.

    References:
        SoundStream: An End-to-End Neural Audio Codec (Neil Zeghidour, Alejandro Luebs, Ahmed Omran, Jan Skoglund, Marco
        Tagliasacchi, 2021), https://arxiv.org/abs/2107.03312

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("residual_vq", latent_dim=3, depth=2, code_dim=8, num_codes=16)
        >>> layer.indices(torch.randn(50, 24)).shape
        torch.Size([50, 3, 2])
    """

    reference = (
        "SoundStream: An End-to-End Neural Audio Codec (Zeghidour, Luebs, Omran, Skoglund and Tagliasacchi, 2021). "
        "https://arxiv.org/abs/2107.03312"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        depth: int = 4,
        code_dim: int = 64,
        num_codes: int = 512,
        family: str = "quantized",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        revive_below: float = 0.01,
    ) -> None:
        stages = [
            Codebook(code_dim, num_codes, decay=decay, revive_below=revive_below)
            for _ in range(check_positive_int("depth", depth))
        ]
        super().__init__(latent_dim, ResidualCodes(stages), family=family, commitment_weight=commitment_weight)

    def penalties(self, x: Tensor, hard: Tensor, indices: Tensor) -> Mapping[str, Tensor]:
        if self.commitment_weight == 0:
            return {}
        assert isinstance(self.codes, ResidualCodes)
        left = x.unsqueeze(-2) - self.codes.partial_sums(indices, x.dtype)  # [*batch, latent_dim, depth, code_dim]
        return {"commitment": self.commitment_weight * left.square().sum((-3, -2, -1))}
