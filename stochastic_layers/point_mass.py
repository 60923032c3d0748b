"""The law of a quantised vector: all mass on one code, against a uniform choice of codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl

from stochastic_layers.codes import Codes, SignCodes
from stochastic_layers.families import Family, register_family

__all__ = ["PointMass", "QuantizedFamily", "UniformCodes"]

MAX_MAGNITUDE = 1e15  # squared distances stay finite in float32


class PointMass(Distribution):
    """All probability on one vector: the law of a deterministic code.

    Args:
        value: ``[*batch, D]``; the event is the last dimension.
        validate_args: As in torch.
    """

    arg_constraints = {"value": constraints.real_vector}  # noqa: RUF012, as torch declares it
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, value: Tensor, validate_args: bool | None = False) -> None:
        self.value = value
        super().__init__(value.shape[:-1], value.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PointMass:
        return PointMass(self.value.expand(*batch_shape, *self.event_shape), validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        """The vector itself."""
        return self.value

    @property
    def mode(self) -> Tensor:
        """The vector itself."""
        return self.value

    @property
    def variance(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.value)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.value.expand(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """0 at the vector, minus infinity elsewhere: a probability, not a density."""
        hit = (value == self.value).all(-1)
        return torch.where(hit, 0.0, -torch.inf).to(self.value.dtype)

    def entropy(self) -> Tensor:
        return self.value.new_zeros(self.batch_shape)


class UniformCodes(Distribution):
    """A uniform choice of each of ``latent_dim`` code vectors, laid side by side: the customary prior of a quantiser.

    ``log_prob`` is ``-latent_dim * log(number of codes)`` for every vector: that it is made of codes is not checked,
    because a code that was rounded to a lower precision should count as one.

    Args:
        codes: The set of codes; the prior follows it as it learns.
        latent_dim: Number of code vectors.
        batch_shape: Shape of independent copies.
    """

    arg_constraints = {}  # noqa: RUF012, as torch declares it
    support = constraints.real_vector

    def __init__(self, codes: Codes, latent_dim: int, batch_shape: Any = ()) -> None:
        self.codes, self.latent_dim = codes, latent_dim
        super().__init__(torch.Size(batch_shape), torch.Size((latent_dim * codes.code_dim,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformCodes:
        return UniformCodes(self.codes, self.latent_dim, batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        codes = self.codes
        shape = (*sample_shape, *self.batch_shape, self.latent_dim, *codes.index_shape)
        return codes.decode(torch.randint(codes.num_codes, shape, device=self._device)).detach().flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # type: ignore[no-untyped-call]
        return value.new_full(shape, -self.latent_dim * self.codes.log_num_codes)

    def entropy(self) -> Tensor:
        return torch.full(self.batch_shape, self.latent_dim * self.codes.log_num_codes, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.codes.buffers()).device


@register_kl(PointMass, UniformCodes)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_point_mass_uniform(p: PointMass, q: UniformCodes) -> Tensor:
    return -q.log_prob(p.value)  # latent_dim * log K: the entropy of p is zero


@register_family
class QuantizedFamily(Family):
    """Deterministic codes; params are embeddings ``[*batch, latent_dim * code_dim]``, z the codes chosen for them.

    Args:
        latent_dim: Number of code vectors of one example.
        num_categories: None: the number of codes belongs to ``codes``.
        codes: The set of codes; by default one bit, -1 or 1, for each latent.
    """

    name = "quantized"
    discrete = True
    parts = ("embeddings",)

    def __init__(self, latent_dim: int, num_categories: int | None = None, *, codes: Codes | None = None) -> None:
        super().__init__(latent_dim, num_categories)
        self.codes: Codes = SignCodes(1) if codes is None else codes

    @property
    def in_features(self) -> int:
        return self.latent_dim * self.codes.code_dim

    @property
    def out_features(self) -> int:
        return self.in_features

    def check(self, params: Tensor, low: float, high: float) -> None:
        super().check(params, low, high)
        if max(-low, high) > MAX_MAGNITUDE:
            raise ValueError(
                f"needed embeddings of magnitude below {MAX_MAGNITUDE:g}, got {max(-low, high):.3g}, whose distance to "
                "a code overflows; normalise them or lower the learning rate."
            )

    def standard(self) -> Distribution:
        """Uniform over the codes."""
        return UniformCodes(self.codes, self.latent_dim)

    def distribution(self, params: Tensor) -> Distribution:
        params = params.detach()
        codes = self.codes.decode(self.codes.indices(self.unflatten(params)), params.dtype)
        return PointMass(codes.detach().flatten(-2))

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return q.sample(torch.Size((num_samples,)))

    def mode(self, q: Distribution) -> Tensor:
        return q.mode

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        z = q.mode.unsqueeze(0)  # all mass on one code
        return z, torch.ones_like(z[..., 0])

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        result: Tensor = q.log_prob(z)
        return result
