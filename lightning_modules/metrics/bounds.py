"""The likelihood or its bound, in nats per example or in bits per value."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_modules.metrics.means import ExampleMean
from stochastic_layers.options import check_positive_int

__all__ = ["BitsPerDimension", "EvidenceLowerBound"]


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
        self.num_values = check_positive_int("num_values", num_values)

    def update(self, log_prob: Tensor) -> None:
        """Add log p(x) ``[B]`` of a batch in nats: the ELBO, the importance-weighted bound, or the exact value."""
        self.add(-log_prob.double() / (self.num_values * math.log(2)))
