"""Bits and categories: the families of which most discrete layers are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Independent, register_kl
from torch.nn.functional import softplus

from stochastic_layers.categorical import draw_index, log_prob_of_index, one_hot, one_hot_categorical
from stochastic_layers.families import Family, register_family
from stochastic_layers.noise import below, double_uniform

__all__ = ["BernoulliFamily", "CategoricalFamily", "ChoiceFamily", "SigmoidBernoulli", "wide"]


def wide(tensor: Tensor) -> Tensor:
    """In float64, where the device has it: sums of noise, or of exponentials, with logits of any size."""
    return tensor if tensor.device.type == "mps" else tensor.double()


class SigmoidBernoulli(Bernoulli):
    """A law under which no bit is certain, also where its probability is 0 or 1 in float32: the KL is finite.

    torch's is infinite to a law of probability 1, which float32 has from a logit of 17 on.
    """


@register_kl(SigmoidBernoulli, SigmoidBernoulli)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_of_bits(q: SigmoidBernoulli, p: SigmoidBernoulli) -> Tensor:
    ours, theirs = q.logits, p.logits
    one = ours.sigmoid() * (softplus(-theirs) - softplus(-ours))
    zero = (-ours).sigmoid() * (softplus(theirs) - softplus(ours))
    return one + zero


def _base(q: Distribution) -> Any:
    """The law of one variable under ``Independent``."""
    assert isinstance(q, Independent)
    return q.base_dist


@register_family
class BernoulliFamily(Family):
    """Independent bits; params are logits ``[*batch, latent_dim]``, z is 0 or 1."""

    name = "bernoulli"
    discrete = True

    def standard(self) -> Distribution:
        """Fair coins."""
        return self.distribution(torch.zeros(self.in_features))

    def distribution(self, params: Tensor) -> Distribution:
        return Independent(SigmoidBernoulli(logits=params, validate_args=False), 1, validate_args=False)

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        logits = _base(q).logits.detach()
        if logits.device.type != "cpu":
            return torch.bernoulli(torch.sigmoid(logits).expand(num_samples, *logits.shape))
        # the same law, to the last of 53 bits: torch's own loop on a CPU takes up to 2.5 times as long
        u = double_uniform((num_samples, *logits.shape), logits.device)
        return below(u, logits.to(u.dtype).sigmoid()).to(logits.dtype)

    def mode(self, q: Distribution) -> Tensor:
        logits: Tensor = _base(q).logits
        return (logits > 0).to(logits.dtype)

    @property
    def num_outcomes(self) -> int:
        return 2

    def outcome_scores(self, params: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(params), params], -1)

    def outcome_values(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return index.to(dtype)


class ChoiceFamily(Family):
    """Base of families with a logit for each of ``num_categories`` items of a latent variable, and z as ones and zeros.

    Params are ``[*batch, latent_dim * num_categories]``, latent by latent, and so is z unless a family says otherwise.
    """

    discrete = True
    takes_categories = True

    def standard(self) -> Distribution:
        """The uniform choice."""
        return self.distribution(torch.zeros(self.in_features))


@register_family
class CategoricalFamily(ChoiceFamily):
    """Independent one-hot variables; params are logits ``[*batch, latent_dim * num_categories]``, latent by latent."""

    name = "categorical"

    def distribution(self, params: Tensor) -> Distribution:
        return Independent(one_hot_categorical(self.unflatten(params)), 1, validate_args=False)

    def sample(self, q: Distribution, num_samples: int) -> Tensor:
        return self.sample_with_log_prob(q, num_samples)[0]

    def sample_with_log_prob(self, q: Distribution, num_samples: int) -> tuple[Tensor, Callable[[], Tensor]]:
        law = _base(q)
        index = draw_index(law.probs, num_samples)
        return one_hot(index, law.probs).flatten(-2), lambda: log_prob_of_index(law, index).sum(-1)

    def log_prob(self, q: Distribution, z: Tensor) -> Tensor:
        # linear in z, so that it is also defined (as the multilinear extension) on the relaxed points of a simplex
        result: Tensor = (self.unflatten(z) * _base(q).logits).sum((-2, -1))
        return result

    def mode(self, q: Distribution) -> Tensor:
        logits: Tensor = _base(q).logits
        return one_hot(logits.argmax(-1, keepdim=True), logits).flatten(-2)

    @property
    def num_outcomes(self) -> int:
        assert self.num_categories is not None
        return self.num_categories

    def outcome_scores(self, params: Tensor) -> Tensor:
        return self.unflatten(params)

    def outcome_values(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        like = torch.empty(self.num_outcomes, dtype=dtype, device=index.device)
        return one_hot(index.unsqueeze(-1), like).flatten(-2)
