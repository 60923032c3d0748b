"""The contract of objectives: what a VAE maximises, from the terms of one batch; and the evidence lower bound."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from stochastic_layers import Sample, StochasticLayer
from stochastic_layers.baselines import mean_over_all_ranks

__all__ = ["ELBO", "Objective", "Terms"]


@dataclass(frozen=True)
class Terms:
    """One batch through the model.

    Attributes:
        sample: The layer's sample, with batch shape ``[B]``.
        log_likelihood: log p(x | z) ``[S, B]``.
        log_prior: log p(z) ``[S, B]``, ``None`` where the KL is analytic and the objective does not ask for it.
        log_q: log q(z) ``[S, B]``, likewise.
        kl: Closed-form KL per latent variable ``[B, L]``, ``None`` where there is none.
        z: The points ``[S, B, ...]`` at which the other terms were taken, where they were cut from the layer's params
            (:attr:`Objective.detaches_draws`), else ``None``.
    """

    sample: Sample
    log_likelihood: Tensor
    log_prior: Tensor | None
    log_q: Tensor | None
    kl: Tensor | None
    z: Tensor | None = None

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z) ``[S, B]``, where the objective asked for it."""
        assert self.log_prior is not None
        return self.log_likelihood + self.log_prior

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z) ``[S, B]``, where the objective asked for it."""
        assert self.log_q is not None
        return self.log_joint - self.log_q


class Objective(ABC):
    """An objective maps :class:`Terms` to a loss; it states which layers it works with.

    Attributes:
        name: Its name in configurations and log keys.
        needs_log_weights: Whether it asks for ``log_prior`` and ``log_q``.
    """

    name: ClassVar[str]
    needs_log_weights: ClassVar[bool] = False

    @property
    def detaches_draws(self) -> bool:
        """Whether the terms are taken at draws cut from the layer's params, which get their gradient by ``loss``."""
        return False

    @property
    def stops_q(self) -> bool:
        """Whether ``log_q`` is taken at constant params."""
        return False

    def check(self, layer: StochasticLayer) -> None:
        """Refuse, at construction, a layer whose gradient this objective cannot use; by default accept all.

        Raises:
            ValueError: With a sentence that says what to use instead.
        """
        return

    @abstractmethod
    def loss(self, terms: Terms, step: int) -> Tensor:
        """The loss ``[B]`` at optimizer step ``step``."""


@dataclass(frozen=True)
class ELBO(Objective):
    """The evidence lower bound, E_q[log p(x | z)] - beta KL(q || p), with the usual changes of its KL term in training.

    The KL is taken in closed form where there is one; then only the likelihood is estimated by the layer.

    Args:
        beta: Weight of the KL.
        kl_warmup_steps: Number of optimizer steps over which the weight rises linearly from 0 to beta.
        free_bits: KL per latent variable, averaged over the batch of all ranks, below which it is not reduced further;
            in nats.

    Raises:
        ValueError: A negative option.

    References:
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Irina Higgins, Loic Matthey,
        Arka Pal, Christopher Burgess, Xavier Glorot, Matthew Botvinick, Shakir Mohamed, Alexander Lerchner, 2017),
        https://openreview.net/forum?id=Sy2fzU9gl; free bits: Improving Variational Inference with Inverse
        Autoregressive Flow (Kingma et al., 2016), https://arxiv.org/abs/1606.04934
    """

    name: ClassVar[str] = "elbo"
    beta: float = 1.0
    kl_warmup_steps: int = 0
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        for option in ("beta", "kl_warmup_steps", "free_bits"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ValueError(f"needed {option} >= 0, got {getattr(self, option)}.")

    def weight(self, step: int) -> float:
        """Weight of the KL at an optimizer step."""
        return self.beta * min(1.0, step / self.kl_warmup_steps) if self.kl_warmup_steps else self.beta

    def kl_term(self, kl: Tensor, weight: float) -> Tensor:
        """The weighted KL of the loss ``[B]`` of a closed-form KL ``[B, L]``."""
        if self.free_bits:  # a latent variable below them counts with them, and has no gradient
            mean, _ = mean_over_all_ranks(kl)
            kl = kl.where(mean >= self.free_bits, self.free_bits)
        return weight * kl.sum(-1)

    def loss(self, terms: Terms, step: int) -> Tensor:
        weight = self.weight(step)
        cost = -terms.log_likelihood
        if terms.kl is None:
            assert terms.log_q is not None and terms.log_prior is not None
            return terms.sample.surrogate(cost + weight * (terms.log_q - terms.log_prior))
        return terms.sample.surrogate(cost) + self.kl_term(terms.kl, weight)
