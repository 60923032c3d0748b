"""What importance weights tell: a tighter bound of log p(x), and of how many draws it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_modules.metrics.means import ExampleMean

__all__ = ["EffectiveSampleSize", "ImportanceWeightedBound", "importance_statistics"]


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
