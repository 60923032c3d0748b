"""Running moments of the actual gradient over training, as the papers report them: a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["GradientMoments"]


class GradientMoments(Metric):
    r"""Variance of a gradient over the steps of training: exponential moving averages of its first two moments.

    .. math:: m_t = \frac{\sum_{s \leq t} d^{t-s} g_s}{\sum_{s \leq t} d^{t-s}}, \qquad
        v_t = \frac{1}{1 - \sum w^2} \Big( \frac{\sum_s d^{t-s} g_s^2}{\sum_s d^{t-s}} - m_t^2 \Big)

    The variance is averaged over the coordinates. It contains the noise of the minibatch and the drift of the gradient
    as well as that of the estimator: a different number from the estimator's variance at fixed data. Weights w are
    normalised at every step, and the factor removes the bias of few steps, so that the first values are meaningful and
    a gradient with independent, identically distributed noise is measured without bias. The update is that of Welford,
    which does not subtract large squares.

    Under DDP pass the averaged gradient, as it stands before the optimizer step: it is the same on every rank, so that
    the states agree without communication.

    Args:
        decay: Weight d of the past at each step, in [0, 1).
        sync_on_compute: Whether :meth:`compute` averages the states over the ranks first; needless if they agree.

    Raises:
        ValueError: ``decay`` is out of range.

    References:
        DisARM: An Antithetic Gradient Estimator for Binary Latent Variables (Zhe Dong, Andriy Mnih, George Tucker,
        2020), https://arxiv.org/abs/2006.10680

    Example:
        >>> import torch
        >>> from lightning_modules import GradientMoments
        >>> moments = GradientMoments(decay=0.9)
        >>> for gradient in ([1.0, 2.0], [3.0, 2.0]):
        ...     moments.update([torch.tensor(gradient)])
        >>> moments.compute()["variance"].item()  # of 1 and 3: 2, of 2 and 2: 0
        1.0
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = True

    mean: Tensor
    spread: Tensor
    weight: Tensor
    weight_squares: Tensor

    def __init__(self, decay: float = 0.999, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"needed 0 <= decay < 1, got {decay}.")
        self.decay = decay
        self.add_state("mean", torch.zeros(0), dist_reduce_fx="mean")  # [coordinates], as the first step has them
        self.add_state("spread", torch.zeros(0), dist_reduce_fx="mean")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="mean")  # 1 - decay ** steps
        self.add_state("weight_squares", torch.zeros(()), dist_reduce_fx="mean")
        self.persistent(True)

    @torch.no_grad()
    def update(self, gradients: Iterable[Tensor]) -> None:
        """Count one step.

        Args:
            gradients: The gradient, one tensor for each parameter, in the same order at every step.

        Raises:
            ValueError: Another number of coordinates than before.
        """
        gradient = torch.cat([g.reshape(-1) for g in gradients])
        gradient = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient
        if self.mean.numel() == 0:
            self.mean, self.spread = torch.zeros_like(gradient), torch.zeros_like(gradient)
        elif self.mean.shape != gradient.shape:
            raise ValueError(f"needed a gradient of {self.mean.numel()} coordinates as before, got {gradient.numel()}.")
        newest = torch.full_like(self.weight, 1 - self.decay)
        self.weight.mul_(self.decay).add_(newest)
        rate = newest / self.weight  # of weights that sum to 1; a tensor, so that nothing waits for the device
        delta = gradient.sub_(self.mean)
        self.mean.add_(delta * rate)
        self.spread.mul_(1 - rate).add_(delta.square_().mul_(rate * (1 - rate)))
        self.weight_squares.mul_((1 - rate).square()).add_(rate.square())

    def compute(self) -> dict[str, Tensor]:
        """The moments so far; NaN before the second step, when there is no variance yet.

        Returns:
            ``variance``, averaged over the coordinates; ``squared_mean``, an unbiased estimate of the squared expected
            gradient, averaged likewise; and ``snr``, the root of their quotient.
        """
        factor = 1 - self.weight_squares
        variance = torch.where(factor > 0, self.spread.mean() / factor, torch.nan)
        squared_mean = self.mean.square().mean() - self.weight_squares * variance
        snr = (squared_mean.clamp_min(0) / variance).sqrt()
        return {"variance": variance, "squared_mean": squared_mean, "snr": snr}
