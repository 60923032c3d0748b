"""Metrics of latent-variable models as torchmetrics: float64 sums over examples, so that ranks reduce exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = [
    "ActiveUnits",
    "BitsPerDimension",
    "CodePerplexity",
    "EffectiveSampleSize",
    "EvidenceLowerBound",
    "ExampleMean",
    "ImportanceWeightedBound",
    "KLPerDimension",
    "importance_statistics",
]


class ExampleMean(Metric):
    r"""Mean over all examples of a number per example, whatever the sizes of batches and of the ranks' shards.

    .. math:: \frac{1}{N} \sum_{n=1}^N v_n

    The state is one sum and one count in double precision, added over the ranks: a run on several processes gives the
    value of one process on the joined data, up to rounding in double precision.

    Args:
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In ``update``, values that are not ``[B]``; in ``compute``, no example at all.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import ExampleMean
        >>> metric = ExampleMean()
        >>> metric.update(torch.tensor([1.0, 2.0, 3.0]))
        >>> metric.update(torch.tensor([6.0]))
        >>> float(metric.compute())
        3.0
    """

    full_state_update = False
    is_differentiable = False

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add the values ``[B]`` of a batch."""
        self.add(values)

    def add(self, values: Tensor) -> None:
        """Add values ``[B]`` to the sum."""
        if values.dim() != 1:
            raise ValueError(
                f"needed one value per example, [B], got {list(values.shape)}; do not reduce over a batch."
            )
        # double(): a model moved to half precision takes its metrics along
        self.total = self.total.double() + values.detach().double().sum()
        self.count = self.count.double() + len(values)

    def compute(self) -> Tensor:
        """The mean, a scalar."""
        return self.total / _some(self.count)


class EvidenceLowerBound(ExampleMean):
    r"""The evidence lower bound in nats per example; higher is better.

    .. math:: \frac1N \sum_n E_{q(z \mid x_n)} [\log p(x_n \mid z)] - KL(q(z \mid x_n) \| p(z)) \leq
        \frac1N \sum_n \log p(x_n)

    It is a bound where the reconstruction is the mean over exact draws of q (or exact) and the KL has weight 1.

    Args:
        **kwargs: Options of :class:`torchmetrics.Metric`.

    References:
        Auto-Encoding Variational Bayes (Diederik P. Kingma, Max Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import EvidenceLowerBound
        >>> metric = EvidenceLowerBound()
        >>> metric.update(reconstruction=torch.tensor([-90.0, -80.0]), kl=torch.tensor([12.0, 8.0]))
        >>> float(metric.compute())
        -95.0
    """

    higher_is_better = True

    def update(self, reconstruction: Tensor, kl: Tensor) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            reconstruction: E_q log p(x | z) ``[B]`` in nats.
            kl: KL(q || p) ``[B]`` in nats.
        """
        self.add(reconstruction.double() - kl.double())


def importance_statistics(log_weights: Tensor | Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    r"""The importance-weighted bound and the effective sample size of each example, in double precision.

    .. math:: L_K = \log \frac1K \sum_k w_k, \qquad
        \mathrm{ESS} = \frac{(\sum_k w_k)^2}{\sum_k w_k^2}, \qquad w_k = p(x, z_k) / q(z_k \mid x)

    Args:
        log_weights: :math:`\log w_k`, ``[K, B]``, or an iterable of chunks ``[K_i, B]``, which are taken one at a time.

    Returns:
        The bound ``[B]`` in nats and the effective sample size ``[B]``, between 1 and K.

    Raises:
        ValueError: No weights, or a chunk that is not ``[K_i, B]``.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import importance_statistics
        >>> bound, ess = importance_statistics(torch.zeros(5, 1) for _ in range(2))
        >>> abs(round(float(bound), 6)), round(float(ess), 6)
        (0.0, 10.0)
    """
    first: Tensor | None = None
    second: Tensor | None = None
    draws = 0
    for chunk in (log_weights,) if isinstance(log_weights, Tensor) else log_weights:
        if chunk.dim() != 2:
            raise ValueError(f"needed log-weights [K, B], got {list(chunk.shape)}.")
        chunk = chunk.detach().double()
        one, two = chunk.logsumexp(0), (2 * chunk).logsumexp(0)
        first = one if first is None else torch.logaddexp(first, one)
        second = two if second is None else torch.logaddexp(second, two)
        draws += len(chunk)
    if first is None or second is None or draws == 0:
        raise ValueError("needed log-weights of at least one draw, got none.")
    return first - math.log(draws), (2 * first - second).exp()


class ImportanceWeightedBound(ExampleMean):
    r"""The importance-weighted bound of log p(x) in nats per example; higher is better, and it rises with K.

    .. math:: \frac1N \sum_n \log \frac1K \sum_{k=1}^K \frac{p(x_n, z_{nk})}{q(z_{nk} \mid x_n)}, \qquad
        z_{nk} \sim q(z \mid x_n)

    Chunks of draws are taken one at a time and without gradient, so that memory is that of one chunk: hand over a
    generator.

    Args:
        **kwargs: Options of :class:`torchmetrics.Metric`.

    References:
        Importance Weighted Autoencoders (Yuri Burda, Roger Grosse, Ruslan Salakhutdinov, 2015),
        https://arxiv.org/abs/1509.00519

    Example:
        >>> import torch
        >>> from lightning_modules import VAE
        >>> from lightning_modules.metrics import ImportanceWeightedBound
        >>> model, x = VAE("gaussian", {"latent_dim": 2}).eval(), torch.zeros(4, 1, 8, 8)
        >>> metric = ImportanceWeightedBound()
        >>> metric.update(model.log_weights(x, model.encode(x), 10) for _ in range(5))
        >>> metric.compute().shape
        torch.Size([])
    """

    higher_is_better = True

    def update(self, log_weights: Tensor | Iterable[Tensor]) -> None:
        """Add a batch: ``[K, B]``, or an iterable of chunks ``[K_i, B]`` of its draws."""
        self.add(importance_statistics(log_weights)[0])


class EffectiveSampleSize(ExampleMean):
    r"""Effective number of the K importance weights of an example, averaged over examples: from 1 to K.

    .. math:: \frac1N \sum_n \frac{(\sum_k w_{nk})^2}{\sum_k w_{nk}^2}

    It is K where q is the posterior. A value near 1 says that one draw carries the importance-weighted bound, which is
    then loose: take more draws, or a better q.

    Args:
        **kwargs: Options of :class:`torchmetrics.Metric`.

    References:
        Sequential Imputations and Bayesian Missing Data Problems (Augustine Kong, Jun S. Liu, Wing Hung Wong, 1994),
        https://doi.org/10.1080/01621459.1994.10476469

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import EffectiveSampleSize
        >>> metric = EffectiveSampleSize()
        >>> metric.update(torch.tensor([[0.0], [0.0], [-1e4]]))  # two equal weights, and one of no weight
        >>> round(float(metric.compute()), 6)
        2.0
    """

    higher_is_better = True

    def update(self, log_weights: Tensor | Iterable[Tensor]) -> None:
        """Add a batch: ``[K, B]``, or an iterable of chunks ``[K_i, B]`` of its draws."""
        self.add(importance_statistics(log_weights)[1])


class BitsPerDimension(ExampleMean):
    r"""Negative log-likelihood (or its bound) in bits per value of an example; lower is better.

    .. math:: -\frac{1}{N D \log 2} \sum_n \log p(x_n)

    It is a code length where p is a probability of discrete data. A density of data scaled to [0, 1] with L grey levels
    must be multiplied by the width of a level first: subtract ``D * log(L)`` from ``log_prob``.

    Args:
        num_values: Number D of values of an example: channels times height times width.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``num_values`` < 1.

    References:
        Pixel Recurrent Neural Networks (Aaron van den Oord, Nal Kalchbrenner, Koray Kavukcuoglu, 2016),
        https://arxiv.org/abs/1601.06759

    Example:
        >>> import math, torch
        >>> from lightning_modules.metrics import BitsPerDimension
        >>> metric = BitsPerDimension(num_values=64)
        >>> metric.update(torch.tensor([-64 * math.log(2)]))  # 64 fair coins
        >>> round(float(metric.compute()), 6)
        1.0
    """

    higher_is_better = False

    def __init__(self, num_values: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_values = _positive("num_values", num_values)

    def update(self, log_prob: Tensor) -> None:
        """Add log p(x) ``[B]`` of a batch in nats: the ELBO, the importance-weighted bound, or the exact value."""
        self.add(-log_prob.double() / (self.num_values * math.log(2)))


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
        self.num_latents = _positive("num_latents", num_latents)
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
        return self.totals / _some(self.count)


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
        self.num_units, self.unit_size = _positive("num_units", num_units), _positive("unit_size", unit_size)
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
        variances: Tensor = (squares / _some(count)).reshape(self.num_units, self.unit_size).sum(-1)
        return variances


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
        self.num_codes, self.num_variables = (
            _positive("num_codes", num_codes),
            _positive("num_variables", num_variables),
        )
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
        return self.counts / _some(self.counts.sum(-1, keepdim=True))


def _merge_moments(parts: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations ``[3, D]`` of disjoint sets, from those of each ``[P, 3, D]``."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp_min(1)
    return torch.stack([count, mean, squares.sum(0) + (counts * (means - mean).square()).sum(0)])


def _some(count: Tensor) -> Tensor:
    """A count of examples that is not zero."""
    if not bool((count > 0).all()):
        raise ValueError("needed at least one example, got none; call update() before compute().")
    return count


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"needed {name} >= 1, got {value!r}.")
    return value
