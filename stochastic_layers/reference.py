"""What a gradient estimator is compared with: the exact gradient by enumeration, or a long unbiased average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stochastic_layers.layer import Sample, StochasticLayer, sum_rightmost
from stochastic_layers.options import in_few_digits
from stochastic_layers.point_mass import QuantizedFamily
from stochastic_layers.preserved import preserved, seed_generators
from stochastic_layers.redraws import MAX_BYTES, CostOfSample, Draw, SavedBytes, redraw

__all__ = ["Reference", "ReferenceKind", "gradient_reference"]

ReferenceKind = Literal["auto", "exact", "average"]

MAX_OUTCOMES = 4096
FIRST_OUTCOMES = 16  # outcomes of the pass that is measured
AVERAGED_DRAWS = 4  # draws in each redraw of the long average: each one's baseline is the mean of the others


@dataclass(frozen=True)
class Reference:
    """The gradient of E_q[cost], or an estimate of it.

    Attributes:
        gradient: ``[*batch, in_features]``, in float64.
        variance: Squared standard error of each coordinate; zero where the gradient is exact or given.
        groups: Means of independent groups of redraws ``[G, *batch, in_features]``, ``None`` likewise.
        kind: ``"exact"``, ``"average"`` or ``"given"``.
    """

    gradient: Tensor
    variance: Tensor
    groups: Tensor | None
    kind: Literal["exact", "average", "given"]

    @classmethod
    def given(cls, gradient: Tensor) -> Reference:
        """A gradient that the user knows, taken as exact."""
        gradient = gradient.detach().double()
        return cls(gradient, torch.zeros_like(gradient), None, "given")

    def in_groups(self, count: int) -> Tensor:
        """Means of ``count`` independent groups, or the one gradient where it has no error."""
        if self.groups is None:
            return self.gradient.unsqueeze(0)
        return torch.stack([part.mean(0) for part in self.groups.tensor_split(count)])


def gradient_reference(
    layer: StochasticLayer,
    params: Tensor,
    cost_of: CostOfSample,
    *,
    kind: ReferenceKind = "auto",
    num_draws: int = 1024,
    max_outcomes: int = MAX_OUTCOMES,
    max_bytes: int = MAX_BYTES,
    known: Tensor | None = None,
) -> Reference | None:
    """d E_q[cost] / d params, where q is the layer's own law and the cost is that of exact, hard draws.

    Args:
        layer: The layer whose law is q; its estimator is not used.
        params: ``[*batch, in_features]``; treated as a constant.
        cost_of: Maps a sample with z ``[S, R, *batch, out_features]`` to the cost ``[S, R, *leading batch]``.
        kind: ``"exact"`` sums over every outcome of a Bernoulli or categorical law. ``"average"`` averages
            ``num_draws`` estimates of 4 draws each: reparameterized where q and the cost allow it, else by the score
            function with a leave-one-out baseline. ``"auto"`` takes the first that fits ``max_outcomes``, and nothing
            for a point mass.
        num_draws: Length of the average.
        max_outcomes: Largest number of joint outcomes of one example (of those that the cost does not sum: its event).
        max_bytes: Memory of one pass.
        known: Gradient of further terms in closed form, added to the result.

    Returns:
        The reference; ``None`` for a point mass, whose draw is a step function of params.

    Raises:
        ValueError: The kind does not fit the layer.
    """
    if kind not in ("auto", "exact", "average"):
        raise ValueError(f"needed the reference 'auto', 'exact' or 'average', a tensor or None, got {kind!r}.")
    if isinstance(layer.family, QuantizedFamily):
        if kind == "auto":
            return None
        raise ValueError(
            f"needed a law with a gradient for reference={kind!r}, got the point mass of {layer.name!r}, whose draw is "
            "a step function of params; pass reference=None."
        )
    if num_draws < 2:
        raise ValueError(f"needed reference_draws >= 2, got {num_draws}.")
    with preserved(layer, devices=[params.device]), torch.enable_grad():
        if kind != "average":
            reason, positions = _enumerable(layer, params, cost_of, max_outcomes)
            if not reason:
                gradient = _exact_gradient(layer, params, cost_of, positions, max_bytes)
                gradient = gradient if known is None else gradient + known.detach().double()
                return Reference(gradient, torch.zeros_like(gradient), None, "exact")
            if kind == "exact":
                raise ValueError(f"{reason}; use reference='average', or 'auto'.")
        # other noise than the measurement draws from the same random state: the two errors are to be independent
        seed_generators(int(torch.randint(2**62, ())), params.device)
        return _average(layer, params, cost_of, num_draws, max_bytes, known)


def _enumerable(
    layer: StochasticLayer, params: Tensor, cost_of: CostOfSample, max_outcomes: int
) -> tuple[str, tuple[int, ...]]:
    """Why the outcomes cannot be enumerated, or nothing; and the batch dimensions that the cost sums."""
    radix = layer.family.num_outcomes
    if not radix:
        return f"needed a family with finitely many outcomes for an exact reference, got {layer.family.name!r}", ()
    batch = params.shape[:-1]
    with torch.no_grad():
        q = layer.distribution(params.unsqueeze(0))
        cost = cost_of(layer._sample(q, layer.family.mode(q).to(params.dtype).unsqueeze(0)))
    event = tuple(batch[max(cost.dim() - 2, 0) :])
    exponent = layer.latent_dim * math.prod(event)
    if exponent > max_outcomes.bit_length() or radix**exponent > max_outcomes:
        outcomes = f"{in_few_digits(radix)} ** {exponent}"
        return f"needed at most max_outcomes={max_outcomes} joint outcomes, got {outcomes}", event
    return "", event


def _sample_at(layer: StochasticLayer, params: Tensor, index: Tensor, event: tuple[int, ...]) -> Sample:
    """The sample of given outcomes: ``index`` ``[n, number of event positions]`` numbers those of one position."""
    family, radix = layer.family, layer.family.num_outcomes
    batch = params.shape[:-1]
    strides = radix ** torch.arange(layer.latent_dim - 1, -1, -1, device=index.device)
    digits = index.unsqueeze(-1) // strides % radix  # [n, positions, latent_dim]
    lead = len(batch) - len(event)
    z = family.outcome_values(digits, params.dtype)
    z = z.view(-1, 1, *[1] * lead, *event, family.out_features).to(params.device)
    z = z.expand(-1, 1, *batch, -1)  # [n, 1, *batch, out_features]
    q = layer.distribution(params.unsqueeze(0))
    weights = torch.full((len(z),), 1.0 / len(z), dtype=z.dtype, device=z.device)  # not used: the sum is weighted by q
    return Sample(z, weights, q, lambda: family.log_prob(q, z))


def _exact_gradient(
    layer: StochasticLayer, params: Tensor, cost_of: CostOfSample, event: tuple[int, ...], max_bytes: int
) -> Tensor:
    """sum_z of d (q(z) cost(z)), over all outcomes of the event, in float64."""
    # radix**latent_dim outcomes of one position are the digits of a joint outcome's number
    one, positions = layer.family.num_outcomes**layer.latent_dim, math.prod(event)
    strides = one ** torch.arange(positions - 1, -1, -1)
    number, total = one**positions, torch.zeros(params.shape, dtype=torch.float64, device=params.device)
    start, size, shift = 0, min(FIRST_OUTCOMES, number), None
    while start < number:
        stop = min(start + size, number)
        leaf = params.detach().clone().requires_grad_()
        index = torch.arange(start, stop).unsqueeze(-1) // strides % one
        with SavedBytes() as saved:
            sample = _sample_at(layer, leaf, index, event)
            cost = cost_of(sample)
            saved.add(sample.z)
            if shift is None:
                shift = cost.detach().mean(0)  # a constant does not change the sum, and rounding of large costs cancels
            value = (sum_rightmost(sample.log_prob, cost.dim()).exp() * (cost - shift)).sum()
            (gradient,) = torch.autograd.grad(value, leaf)
        if start == 0:
            size = max(1, int(max_bytes / (saved.total / size)))
        total = total + gradient.double()
        start = stop
    return total


def _average(
    layer: StochasticLayer,
    params: Tensor,
    cost_of: CostOfSample,
    num_draws: int,
    max_bytes: int,
    known: Tensor | None,
) -> Reference:
    def pathwise(leaf: Tensor, context: Tensor | None) -> Sample:
        q = layer.distribution(leaf)
        return layer._sample(q, layer.family.rsample(q, AVERAGED_DRAWS))

    def score_function(leaf: Tensor, context: Tensor | None) -> Sample:
        q = layer.distribution(leaf)
        z = layer.family.sample(q, AVERAGED_DRAWS)

        def credit(cost: Tensor) -> Tensor:
            advantage = (cost - cost.mean(0)).detach() / (AVERAGED_DRAWS - 1)  # the mean of the others, subtracted
            return (advantage * sum_rightmost(layer.family.log_prob(q, z), cost.dim())).sum(0)

        return layer._sample(q, z, credit=credit)

    q = layer.distribution(params.detach())
    draw: Draw = score_function
    if not layer.family.discrete and q.has_rsample:
        with torch.random.fork_rng(devices=[params.device] if params.is_cuda else []):
            leaf = params.detach().unsqueeze(0).clone().requires_grad_()
            cost = cost_of(pathwise(leaf, None))
            if cost.requires_grad and torch.autograd.grad(cost.sum(), leaf, allow_unused=True)[0] is not None:
                draw = pathwise
    moments = redraw(
        draw,
        params,
        cost_of,
        num_draws=num_draws,
        chunk_size=None,
        max_bytes=max_bytes,
        context=None,
        known=known,
        reference=None,
        modules=(layer,),
    )
    return Reference(moments.mean, moments.variance / num_draws, moments.groups, "average")
