"""Priors p(z): what the KL of the ELBO compares q with, and where new samples come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, kl_divergence

from stochastic_layers.families import Family
from stochastic_layers.point_mass import QuantizedFamily

__all__ = ["LearnedPrior", "Prior", "StandardPrior", "kl_is_known", "kl_per_latent"]


class Prior(nn.Module, ABC):
    """A law of z with batch shape ``[]`` and the event shape of q."""

    name: ClassVar[str]

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    @abstractmethod
    def forward(self, device: torch.device) -> Distribution:
        """The distribution, on ``device``."""


class StandardPrior(Prior):
    """The customary prior of the family: standard normal, fair coins, uniform categories, ..."""

    name = "standard"

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._cache: dict[torch.device, Distribution] = {}

    def forward(self, device: torch.device) -> Distribution:
        if device not in self._cache:
            with torch.device(device):
                self._cache[device] = self.family.standard()
        return self._cache[device]


class LearnedPrior(Prior):
    """A member of the family whose params are learned, starting at zero.

    Raises:
        ValueError: The family is that of quantizers, whose members are points.
    """

    name = "learned"

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        if isinstance(family, QuantizedFamily):
            raise ValueError(
                "needed a layer with a density for the prior 'learned', got a quantizer: a law of its family is one "
                "code, and the KL from it infinite; use prior='standard', a uniform choice of codes."
            )
        self.params = nn.Parameter(torch.zeros(family.in_features))

    def forward(self, device: torch.device) -> Distribution:
        return self.family.distribution(self.family.prepare(self.params))


def kl_per_latent(q: Distribution, prior: Distribution) -> Tensor:
    """KL(q || prior) in nats, in closed form.

    Returns:
        ``[*batch, L]`` with one column per latent variable where they are independent under both laws, else
        ``[*batch, 1]``.

    Raises:
        NotImplementedError: torch knows no closed form for this pair of laws.
    """
    prior = prior.expand(q.batch_shape)  # torch's closed forms do not all broadcast
    if isinstance(q, Independent) and isinstance(prior, Independent):
        return kl_divergence(q.base_dist, prior.base_dist)
    return kl_divergence(q, prior).unsqueeze(-1)


def kl_is_known(q: Distribution, prior: Distribution) -> bool:
    """Whether :func:`kl_per_latent` has a closed form for this pair of laws."""
    try:
        kl_per_latent(q, prior)
    except NotImplementedError:
        return False
    return True
