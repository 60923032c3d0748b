"""Diagnostics: variance, bias, signal-to-noise ratio and cost of a layer's gradient, measured without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stochastic_layers.layer import StochasticLayer
from stochastic_layers.options import check_positive_int
from stochastic_layers.preserved import preserved
from stochastic_layers.redraws import MAX_BYTES, CostOfSample, Moments, redraw
from stochastic_layers.reference import MAX_OUTCOMES, Reference, ReferenceKind, fewer_groups, gradient_reference

__all__ = [
    "GradientStatistics",
    "Reference",
    "gradient_reference",
    "gradient_statistics",
    "preserved",
    "sample_gradient_statistics",
]


@dataclass(frozen=True, repr=False)
class GradientStatistics:
    r"""Moments of the estimator g of d E[cost] / d params at fixed params and data, over redrawn noise.

    All scalars are those of one example: sums over its coordinates, averaged over the first batch dimension. With
    the mean m of g, the reference r and the bias b = E g - r,

    .. math:: \mathrm{mse} = E |g - r|^2 = \mathrm{tr\,Cov}(g) + |b|^2, \qquad \mathrm{snr} = |E g| / \sqrt{\mathrm{tr
        \,Cov}(g)}.

    Attributes:
        mean: Mean of the gradient ``[*batch, in_features]``.
        variance: Unbiased variance of each coordinate ``[*batch, in_features]``.
        num_draws: Number R of redraws.
        reference: What the gradient is compared with; ``None`` where nothing was asked for, or for a point mass.
        moments: All that was kept of the redraws, ``None`` where only the two moments were.
    """

    mean: Tensor
    variance: Tensor
    num_draws: int
    reference: Reference | None = None
    moments: Moments | None = None

    @property
    def total_variance(self) -> float:
        """Trace of the covariance of one example's gradient, averaged over the first batch dimension."""
        return float(self.variance.sum() / self._examples)

    @property
    def squared_norm(self) -> float:
        """Unbiased estimate of the squared norm of one example's expected gradient, averaged likewise; at least 0."""
        estimate = self.mean.square().sum() - self.variance.sum() / self.num_draws
        return max(float(estimate / self._examples), 0.0)

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio: norm of the expected gradient over the root of the total variance."""
        variance = self.total_variance
        if variance == 0.0:
            return float("inf") if self.squared_norm > 0 else 0.0
        return float((self.squared_norm / variance) ** 0.5)

    def __repr__(self) -> str:
        """The numbers of one example: the tensors behind them would fill pages."""
        values = {"total_variance": f"{self.total_variance:.4g}", "snr": f"{self.snr:.4g}"}
        if self.reference is not None and self.moments is not None:
            bias, error = self.bias_norm
            values |= {"bias_norm": f"{bias:.4g} +- {error:.2g}", "mse": f"{self.mse:.4g}"}
            values |= {"cosine": f"{self.cosine:.4g}", "reference": self.reference.kind}
        if self.moments is not None:
            values |= {"evaluations": f"{self.evaluations}", "seconds": f"{self.seconds:.3g}"}
        numbers = ", ".join(f"{name}={value}" for name, value in values.items())
        return f"GradientStatistics(shape={list(self.mean.shape)}, num_draws={self.num_draws}, {numbers})"

    # ---- against the reference --------------------------------------------------------------------------------------

    @property
    def bias(self) -> Tensor:
        """Mean less reference, of each coordinate ``[*batch, in_features]``."""
        return self.mean - self._reference.gradient

    @property
    def bias_standard_error(self) -> Tensor:
        """Standard error of each coordinate of the bias, the reference's own included."""
        return (self.variance / self.num_draws + self._reference.variance).sqrt()

    @property
    def bias_norm(self) -> tuple[float, float]:
        """Norm of one example's bias (root mean square over the examples) and its standard error.

        The square is estimated without bias, by products of independent groups of redraws: of an unbiased estimator
        it is zero on average, not the noise of the mean. Its error is that of a jackknife over the groups, which does
        not take the coordinates to be independent. The error of the norm is the way to the root of the square one
        standard error further up, and 16 units of rounding of the reference, so that an exact layer does not look
        biased. It is infinite for fewer than three redraws.
        """
        square, error = self._squared_bias()
        norm = math.sqrt(max(square, 0.0))
        size = float(self._reference.gradient.norm()) / math.sqrt(self._examples)
        return norm, math.sqrt(max(square, 0.0) + error) - norm + 16 * self._measured.precision * size

    @property
    def relative_bias(self) -> tuple[float, float]:
        """Norm of the bias over that of the reference, and its standard error; infinite where the reference is zero."""
        size = float((self._reference.gradient.square().sum() - self._reference.variance.sum()) / self._examples)
        if size <= 0:
            return math.inf, math.inf
        norm, error = self.bias_norm
        return norm / math.sqrt(size), error / math.sqrt(size)

    @property
    def mse(self) -> float:
        """Mean squared error E |g - r|^2 of one example's gradient, free of the reference's own error."""
        squares = self.variance * (1 - 1 / self.num_draws) + self.bias.square() - self._reference.variance
        return max(float(squares.sum() / self._examples), 0.0)

    @property
    def cosine(self) -> float:
        """Mean cosine between one gradient and the reference, the examples laid end to end; 0 for a zero gradient."""
        cosine = self._measured.cosine
        assert cosine is not None, self._reference
        return cosine

    # ---- what it costs ----------------------------------------------------------------------------------------------

    @property
    def evaluations(self) -> int:
        """Points at which the cost was evaluated for one gradient of one example."""
        return self._measured.evaluations

    @property
    def seconds(self) -> float:
        """Wall time of one gradient of the batch, forwards and backwards, in a batched pass of many."""
        return self._measured.seconds

    @property
    def variance_time(self) -> float:
        """Total variance times seconds: what is left when cheap estimators are averaged for the same time."""
        return self.total_variance * self.seconds

    def _squared_bias(self) -> tuple[float, float]:
        groups, reference = self._measured.groups, self._reference
        count = len(groups) if reference.groups is None else min(len(groups), len(reference.groups))
        deviations = (fewer_groups(groups, count) - reference.in_groups(count)).flatten(1)
        products = deviations @ deviations.T  # of different groups: the expectation is |bias|^2
        own, rows = products.diagonal(), products.sum(1)
        total = products.sum()
        square = (total - own.sum()) / (count * (count - 1))
        if count < 3:
            return float(square / self._examples), math.inf
        without = (total - 2 * rows + own - (own.sum() - own)) / ((count - 1) * (count - 2))
        error = ((count - 1) * without.var(correction=0)).sqrt()
        return float(square / self._examples), float(error / self._examples)

    @property
    def _reference(self) -> Reference:
        if self.reference is None:
            raise ValueError(
                "needed a reference to speak of bias, mse and cosine, got none; pass reference='auto', or a tensor. A "
                "point mass has none, because its draw is a step function of params."
            )
        return self.reference

    @property
    def _measured(self) -> Moments:
        if self.moments is None:
            raise ValueError(
                "needed the redraws themselves for this number, got their mean and variance only; use "
                "gradient_statistics()."
            )
        return self.moments

    @property
    def _examples(self) -> int:
        return self.mean.shape[0] if self.mean.dim() > 1 else 1


def gradient_statistics(
    layer: StochasticLayer,
    params: Tensor,
    cost_fn: Callable[[Tensor], Tensor],
    *,
    num_draws: int = 64,
    reference: Literal["auto", "exact", "average"] | Tensor | Reference | None = "auto",
    reference_draws: int = 1024,
    max_outcomes: int = MAX_OUTCOMES,
    chunk_size: int | None = None,
    max_bytes: int = MAX_BYTES,
    context: Tensor | None = None,
) -> GradientStatistics:
    """Redraw the noise of a layer at fixed params and measure its gradient estimator.

    The redraws of a pass run as one batch: params are repeated along a new leading dimension. Random state, buffers
    and gradients are left as they were, so that a run with and without the measurement is the same. Every pass starts
    from the layer's state as it is now: a moving average does not learn from the redraws.

    The reference is the gradient of E_q[cost] under the layer's own law q, with the cost at exact, hard draws. A
    relaxed layer, which descends another function, is held to that as well: the difference is its bias.

    Memory: without ``chunk_size``, the first pass takes up to 8 redraws and counts the bytes of z and of all that
    autograd saves (parameters apart); the later ones take as many redraws as fit into ``max_bytes`` at that price.

    Args:
        layer: The layer, in training mode.
        params: ``[*batch, in_features]``; treated as a constant.
        cost_fn: Maps z ``[S, R, *batch, out_features]`` to the cost ``[S, R, *leading batch]``.
        num_draws: Number R of redraws, at least 2.
        reference: ``"exact"`` sums over every outcome (Bernoulli and categorical laws); ``"average"`` averages
            ``reference_draws`` unbiased estimates of 4 draws each under the same law; ``"auto"`` enumerates up to
            ``max_outcomes`` and averages beyond. A tensor ``[*batch, in_features]`` is taken as exact; ``None`` leaves
            bias, mse and cosine out.
        reference_draws: Length of the average.
        max_outcomes: Largest number of joint outcomes that is enumerated.
        chunk_size: Largest number of redraws in one pass; by default as many as ``max_bytes`` allow.
        max_bytes: Memory of one pass, where ``chunk_size`` is None.
        context: Context ``[*batch, F]`` for a learned baseline.

    Raises:
        ValueError: ``num_draws < 2``, ``chunk_size < 1``, no examples, a reference that does not fit, or a layer in
            evaluation mode.

    Example:
        >>> import torch, stochastic_layers as sl
        >>> from stochastic_layers.diagnostics import gradient_statistics
        >>> layer, params = sl.create("straight_through", latent_dim=4), torch.linspace(-1, 1, 12).view(3, 4)
        >>> statistics = gradient_statistics(layer, params, lambda z: z.sum(-1) ** 3, num_draws=2000)
        >>> norm, error = statistics.bias_norm
        >>> norm > 5 * error, statistics.reference.kind, statistics.evaluations
        (True, 'exact', 1)
    """
    return sample_gradient_statistics(
        layer,
        params,
        lambda sample: cost_fn(sample.z),
        num_draws=num_draws,
        reference=reference,
        reference_draws=reference_draws,
        max_outcomes=max_outcomes,
        chunk_size=chunk_size,
        max_bytes=max_bytes,
        context=context,
    )


def sample_gradient_statistics(
    layer: StochasticLayer,
    params: Tensor,
    cost_of: CostOfSample,
    *,
    num_draws: int = 64,
    reference: ReferenceKind | Tensor | Reference | None = "auto",
    reference_draws: int = 1024,
    max_outcomes: int = MAX_OUTCOMES,
    chunk_size: int | None = None,
    max_bytes: int = MAX_BYTES,
    context: Tensor | None = None,
    known: Tensor | None = None,
) -> GradientStatistics:
    """As :func:`gradient_statistics`, of a cost that may depend on log q(z), and with terms in closed form.

    Args:
        layer: See :func:`gradient_statistics`.
        params: See :func:`gradient_statistics`.
        cost_of: Maps a :class:`~stochastic_layers.Sample` with z ``[S, R, *batch, out_features]`` to the cost
            ``[S, R, *leading batch]``; it may use ``sample.log_prob``, with its gradient.
        num_draws: See :func:`gradient_statistics`.
        reference: See :func:`gradient_statistics`.
        reference_draws: See :func:`gradient_statistics`.
        max_outcomes: See :func:`gradient_statistics`.
        chunk_size: See :func:`gradient_statistics`.
        max_bytes: See :func:`gradient_statistics`.
        context: See :func:`gradient_statistics`.
        known: Gradient ``[*batch, in_features]`` of further terms in closed form, such as a KL divergence: it has no
            variance, and belongs to the signal.

    Raises:
        ValueError: See :func:`gradient_statistics`.
    """
    check_positive_int("num_draws", num_draws, "a variance takes two", least=2)
    if chunk_size is not None:
        check_positive_int("chunk_size", chunk_size)
    check_positive_int("max_bytes", max_bytes)
    if not params.numel():
        raise ValueError(f"needed at least one example, got params {list(params.shape)}; leave empty batches out.")
    if not layer.training:
        raise ValueError(
            "needed a layer in training mode, got one in eval(), which has no estimator; call layer.train()."
        )
    if isinstance(reference, Tensor):
        if reference.shape != params.shape:
            raise ValueError(
                f"needed a reference of the shape of params, {list(params.shape)}, got {list(reference.shape)}."
            )
        reference = Reference.given(reference.to(params.device))
    elif reference is not None and not isinstance(reference, Reference):
        reference = gradient_reference(
            layer,
            params,
            cost_of,
            kind=reference,
            num_draws=reference_draws,
            max_outcomes=max_outcomes,
            max_bytes=max_bytes,
            known=known,
        )
    with preserved(layer, devices=[params.device]), torch.enable_grad():
        moments = redraw(
            layer.sample,
            params,
            cost_of,
            num_draws=num_draws,
            chunk_size=chunk_size,
            max_bytes=max_bytes,
            context=context,
            known=known,
            reference=None if reference is None else reference.gradient,
            modules=(layer,),
        )
    return GradientStatistics(moments.mean, moments.variance, num_draws, reference, moments)
