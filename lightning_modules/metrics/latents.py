"""Use of the latent variables: KL of each, active units, and perplexity of codes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.metrics.means import some
from stochastic_layers.options import check_positive_int

__all__ = ["ActiveUnits", "CodePerplexity", "KLPerDimension"]


class KLPerDimension(Metric):
    r"""KL of each latent variable from its prior, in nats, averaged over examples.

    .. math:: \frac1N \sum_n KL(q(z_l \mid x_n) \| p(z_l)) \quad \text{for every } l

    Variables with a KL near 0 carry nothing about x.

    Args:
        num_latents: Number L of columns.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``num_latents`` < 1; in ``update``, another shape than ``[B, L]``.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import KLPerDimension
        >>> metric = KLPerDimension(num_latents=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> metric.compute().tolist()
        [2.0, 0.0]
    """

    full_state_update = False
    is_differentiable = False

    totals: Tensor
    count: Tensor

    def __init__(self, num_latents: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_latents = check_positive_int("num_latents", num_latents)
        self.add_state("totals", torch.zeros(num_latents, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, kl: Tensor) -> None:
        """Add the KL ``[B, L]`` of a batch."""
        if kl.dim() != 2 or kl.shape[1] != self.num_latents:
            raise ValueError(f"needed the KL per latent variable [B, {self.num_latents}], got {list(kl.shape)}.")
        self.totals = self.totals.double() + kl.detach().double().sum(0)
        self.count = self.count.double() + len(kl)

    def compute(self) -> Tensor:
        """The means ``[L]`` in nats."""
        return self.totals / some(self.count)


class ActiveUnits(Metric):
    r"""Number of latent units whose posterior mean varies over the data.

    .. math:: \#\{u : \mathrm{Var}_x(E_{q(u \mid x)}[u]) > \text{threshold}\}

    A unit is one latent variable (at one position); for a unit of several coordinates (a one-hot or code vector) the
    variances of its coordinates are added. An inactive unit tells the decoder the same of every example.

    The state is count, mean and sum of squared deviations of each coordinate in double precision, merged over batches
    and ranks by the formula of Chan, Golub and LeVeque, which does not cancel where the mean is large.

    Args:
        num_units: Number of units.
        unit_size: Number of coordinates of a unit.
        threshold: Variance above which a unit is active; 0.01 is customary for units of prior variance 1.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: A size below 1 or a negative threshold; in ``update``, means of another size.

    References:
        Importance Weighted Autoencoders (Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2015),
        https://arxiv.org/abs/1509.00519; Algorithms for Computing the Sample Variance: Analysis and Recommendations
        (Tony F. Chan, Gene H. Golub, Randall J. LeVeque, 1983), https://doi.org/10.1080/00031305.1983.10483115

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import ActiveUnits
        >>> metric = ActiveUnits(num_units=2)
        >>> metric.update(torch.tensor([[1.0, 0.5], [-1.0, 0.5]]))
        >>> int(metric.compute()), metric.variances().tolist()
        (1, [1.0, 0.0])
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    moments: Tensor

    def __init__(self, num_units: int, unit_size: int = 1, threshold: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_units = check_positive_int("num_units", num_units)
        self.unit_size = check_positive_int("unit_size", unit_size)
        if not 0 <= threshold < math.inf:
            raise ValueError(f"needed threshold >= 0, got {threshold}.")
        self.threshold = threshold
        zeros = torch.zeros(3, num_units * unit_size, dtype=torch.float64)
        self.add_state("moments", zeros, dist_reduce_fx=_merge_moments)

    def update(self, means: Tensor) -> None:
        """Add the posterior means ``[B, ...]`` of a batch, ``num_units * unit_size`` of each example."""
        rows = means.detach().double().flatten(1)
        if rows.shape[1] != self.num_units * self.unit_size:
            raise ValueError(
                f"needed {self.num_units} * {self.unit_size} posterior means of each example, got {list(means.shape)}."
            )
        if len(rows):
            mean = rows.mean(0)
            batch = torch.stack([torch.full_like(mean, len(rows)), mean, (rows - mean).square().sum(0)])
            self.moments = _merge_moments(torch.stack([self.moments.double(), batch]))

    def compute(self) -> Tensor:
        """The number of active units, a scalar."""
        number: Tensor = (self._variances() > self.threshold).sum()
        return number

    def variances(self) -> Tensor:
        """Variance of the posterior mean of each unit ``[num_units]``; on several ranks all must call it."""
        with self.sync_context():
            return self._variances()

    def means(self) -> Tensor:
        """Mean over the data of the posterior mean ``[num_units, unit_size]``; on several ranks all must call it."""
        with self.sync_context():
            return self.moments[1].reshape(self.num_units, self.unit_size).clone()

    def _variances(self) -> Tensor:
        count, _, squares = self.moments
        variances: Tensor = (squares / some(count)).reshape(self.num_units, self.unit_size).sum(-1)
        return variances


def _merge_moments(parts: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations ``[3, D]`` of disjoint sets, from those of each ``[P, 3, D]``."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp_min(1)
    return torch.stack([count, mean, squares.sum(0) + (counts * (means - mean).square()).sum(0)])


class CodePerplexity(Metric):
    r"""Effective number of codes or categories that the data use, averaged over the variables: from 1 to K.

    .. math:: \exp\Big(-\sum_{k=1}^K \bar q_k \log \bar q_k\Big), \qquad \bar q_k = \frac1N \sum_n q(k \mid x_n)

    With integer codes q is all mass on one code. A value near 1 is a collapsed codebook; it cannot exceed the number of
    codes that were seen.

    Args:
        num_codes: Number K of codes or categories.
        num_variables: Number of variables with codes of their own; 1 for one codebook that several latents share.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: A size below 1; in ``update``, codes that do not fit.

    References:
        Neural Discrete Representation Learning (Aaron van den Oord, Oriol Vinyals, Koray Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import CodePerplexity
        >>> metric = CodePerplexity(num_codes=8)
        >>> metric.update(torch.tensor([[0], [5], [0], [5]]))
        >>> round(float(metric.compute()), 6), float(metric.usage())
        (2.0, 0.25)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    counts: Tensor

    def __init__(self, num_codes: int, num_variables: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_codes = check_positive_int("num_codes", num_codes)
        self.num_variables = check_positive_int("num_variables", num_variables)
        self.add_state("counts", torch.zeros(num_variables, num_codes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add a batch.

        Args:
            codes: Integer codes ``[..., num_variables]``, or probabilities ``[..., num_variables, num_codes]``.
        """
        shape, soft = (self.num_variables, self.num_codes), codes.is_floating_point()
        wanted = shape if soft else shape[:1]
        if tuple(codes.shape[codes.dim() - len(wanted) :]) != wanted:
            raise ValueError(
                f"needed integer codes [..., {shape[0]}] or probabilities [..., {shape[0]}, {shape[1]}], got "
                f"{codes.dtype} {list(codes.shape)}."
            )
        if soft:
            counts = codes.detach().double().reshape(-1, *shape).sum(0)
        else:
            rows = codes.reshape(-1, self.num_variables)
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_codes:
                raise ValueError(
                    f"needed codes from 0 to {self.num_codes - 1}, got {int(rows.min())}..{int(rows.max())}."
                )
            shifted = rows + self.num_codes * torch.arange(self.num_variables, device=rows.device)
            counts = torch.bincount(shifted.flatten(), minlength=math.prod(shape)).reshape(shape)
        self.counts = self.counts.double() + counts

    def compute(self) -> Tensor:
        """The perplexity averaged over the variables, a scalar."""
        perplexities: Tensor = torch.special.entr(self._frequencies()).sum(-1).exp()
        return perplexities.mean()

    def frequencies(self) -> Tensor:
        """Share of each code ``[num_variables, num_codes]``; on several ranks all must call it."""
        with self.sync_context():
            return self._frequencies()

    def usage(self, used_above: float = 0.01) -> Tensor:
        """Share of the codes that are in use: more frequent than ``used_above`` times ``1 / num_codes``; a scalar."""
        return (self.frequencies() * self.num_codes > used_above).double().mean()

    def _frequencies(self) -> Tensor:
        return self.counts / some(self.counts.sum(-1, keepdim=True))
