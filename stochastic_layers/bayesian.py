"""Bayesian linear and convolutional layers: random weights, drawn by reparameterization, locally, or by Flipout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_layers.bayesian_weights import BayesianLayer, GaussianWeight, LogUniformWeight, kl_divergence

__all__ = [
    "BayesianLayer",
    "FlipoutConv2d",
    "FlipoutLinear",
    "GaussianWeight",
    "LocalReparameterizationConv2d",
    "LocalReparameterizationLinear",
    "LogUniformWeight",
    "ReparameterizationConv2d",
    "ReparameterizationLinear",
    "VariationalDropoutLinear",
    "kl_divergence",
]


class _Reparameterization(BayesianLayer):
    def draw(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.loc + self.bias.noise()
        return self.affine(x, self.weight.loc + self.weight.noise(), bias)


class _LocalReparameterization(BayesianLayer):
    def draw(self, x: Tensor) -> Tensor:
        mean = self.affine(x, *self.means())
        with torch.autocast(x.device.type, enabled=False):  # squares of activations overflow in float16
            dtype = self.weight.loc.dtype
            variance = self.affine(x.to(dtype).square(), *self.variances())
            # the floor keeps the gradient of the root finite where the input is zero and there is no bias
            deviation = variance.clamp_min(torch.finfo(dtype).tiny).sqrt()
            noise = deviation * torch.randn_like(deviation)
        return mean + noise.to(mean.dtype)


class _Flipout(BayesianLayer):
    def draw(self, x: Tensor) -> Tensor:
        mean = self.affine(x, *self.means())
        flipped = self.affine(x * self._signs(x), self.weight.noise(), None)
        result = mean + flipped * self._signs(flipped)
        if self.bias is not None:  # signs of its own: those of the output would tie it to the weights' perturbation
            noise = self.bias.noise().view(-1, *[1] * (self.shared_dims - 1))
            result = result + (noise * self._signs(result)).to(result.dtype)
        return result

    def _signs(self, like: Tensor) -> Tensor:
        """Random signs -1 and 1, one for each example and channel."""
        positions = self.shared_dims - 1
        shape = (*like.shape[: like.dim() - positions], *[1] * positions)
        return torch.randint(0, 2, shape, device=like.device).to(like.dtype) * 2 - 1


class _Linear(BayesianLayer):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        prior_scale: float = 1.0,
        initial_scale: float = 0.01,
        sample_in_eval: bool = True,
    ) -> None:
        module = nn.Linear(in_features, out_features, bias)
        super().__init__(module, prior_scale=prior_scale, initial_scale=initial_scale, sample_in_eval=sample_in_eval)


class _Conv2d(BayesianLayer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        prior_scale: float = 1.0,
        initial_scale: float = 0.01,
        sample_in_eval: bool = True,
        **options: Any,
    ) -> None:
        module = nn.Conv2d(in_channels, out_channels, kernel_size, **options)
        super().__init__(module, prior_scale=prior_scale, initial_scale=initial_scale, sample_in_eval=sample_in_eval)


class ReparameterizationLinear(_Reparameterization, _Linear):
    r"""Linear layer with one draw of the weights for the whole batch: Bayes by Backprop.

    .. math:: y = x (M + S \odot E)^\top, \qquad E \sim N(0, I)

    An unbiased pathwise gradient, whose variance does not fall with the batch size, because all examples share E. Each
    pass is that of one network: the choice for drawing functions, and for acting by posterior sampling.

    Args:
        in_features: Size of the last dimension of the input ``[*batch, in_features]``.
        out_features: Size of the last dimension of the output.
        bias: Whether there is a bias; it is random like the weights.
        prior_scale: Standard deviation of the prior of each weight.
        initial_scale: Standard deviation of the posterior at the start.
        sample_in_eval: Whether ``eval()`` draws weights, or uses the posterior means.

    Raises:
        ValueError: A scale is not positive.

    References:
        Weight Uncertainty in Neural Networks (Charles Blundell, Julien Cornebise, Koray Kavukcuoglu, Daan Wierstra,
        2015), https://arxiv.org/abs/1505.05424

    Example:
        >>> import torch
        >>> from stochastic_layers.bayesian import ReparameterizationLinear
        >>> ReparameterizationLinear(3, 5)(torch.zeros(7, 3)).shape
        torch.Size([7, 5])
    """


class ReparameterizationConv2d(_Reparameterization, _Conv2d):
    """Convolution with one draw of the weights for the whole batch; see :class:`ReparameterizationLinear`.

    Args:
        in_channels: Channels of the input ``[B, in_channels, H, W]``.
        out_channels: Channels of the output.
        kernel_size: Size of the kernel.
        prior_scale: Standard deviation of the prior of each weight.
        initial_scale: Standard deviation of the posterior at the start.
        sample_in_eval: Whether ``eval()`` draws weights, or uses the posterior means.
        **options: Further arguments of ``torch.nn.Conv2d``: stride, padding, dilation, groups, bias.

    Raises:
        ValueError: A scale is not positive, or ``padding_mode`` is not ``"zeros"``.
    """


class LocalReparameterizationLinear(_LocalReparameterization, _Linear):
    r"""Linear layer that draws its outputs instead of its weights, independently for each example.

    .. math:: y \sim N(x M^\top, \; x^2 (S^2)^\top)

    The exact law of each row of the output, with the least gradient variance of the three, at the price of a second
    product. Rows are independent: not the joint law of several inputs under one network. A row is whatever the last
    dimension is counted along, so that the tokens of a sequence count as examples.

    It has the arguments and errors of :class:`ReparameterizationLinear`.

    References:
        Variational Dropout and the Local Reparameterization Trick (Diederik P. Kingma, Tim Salimans, Max Welling,
        2015), https://arxiv.org/abs/1506.02557

    Example:
        >>> import torch
        >>> from stochastic_layers.bayesian import LocalReparameterizationLinear
        >>> LocalReparameterizationLinear(3, 5)(torch.zeros(7, 3)).shape
        torch.Size([7, 5])
    """


class LocalReparameterizationConv2d(_LocalReparameterization, _Conv2d):
    """Convolution that draws its outputs; see :class:`LocalReparameterizationLinear`.

    Positions are drawn independently: each output value has its exact law, but the correlation of neighbouring
    positions, which share weights, is dropped. :class:`FlipoutConv2d` keeps it.

    It has the arguments and errors of :class:`ReparameterizationConv2d`.
    """


class FlipoutLinear(_Flipout, _Linear):
    r"""Linear layer with one perturbation of the weights for the batch, whose signs are flipped for each example.

    .. math:: y_n = x_n M^\top + ((x_n \odot r_n) (S \odot E)^\top) \odot t_n, \qquad r_n, t_n \in \{-1, 1\}

    The exact law of the weights for each example, and no correlation between examples, as far as products of signs can
    tell. The gradient variance falls with the batch size down to a small floor, the shared magnitudes :math:`|E|`. The
    bias has a perturbation and signs of its own.

    It has the arguments and errors of :class:`ReparameterizationLinear`.

    References:
        Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches (Yeming Wen, Paul Vicol, Jimmy Ba,
        Dustin Tran, Roger B. Grosse, 2018), https://arxiv.org/abs/1803.04386

    Example:
        >>> import torch
        >>> from stochastic_layers.bayesian import FlipoutLinear
        >>> FlipoutLinear(3, 5)(torch.zeros(7, 3)).shape
        torch.Size([7, 5])
    """


class FlipoutConv2d(_Flipout, _Conv2d):
    """Convolution by Flipout; all positions of an example share one draw of the weights; see :class:`FlipoutLinear`.

    It has the arguments and errors of :class:`ReparameterizationConv2d`.
    """


class VariationalDropoutLinear(_LocalReparameterization):
    """Sparse variational dropout: a log-uniform prior switches single weights off.

    Draws as :class:`LocalReparameterizationLinear` does; the bias is an ordinary parameter. Weights whose noise exceeds
    ``log_alpha > threshold`` carry no signal: ``eval()`` drops them, mean and noise. Anneal the KL in from zero over
    the first epochs, or most weights die before they have learned anything.

    Args:
        in_features: Size of the last dimension of the input ``[*batch, in_features]``.
        out_features: Size of the last dimension of the output.
        bias: Whether there is a bias.
        threshold: Weights with a larger log alpha are dropped in ``eval()``; 3 is a dropout rate of 0.95.
        initial_scale: Standard deviation of the posterior at the start.
        sample_in_eval: Whether ``eval()`` draws, or uses the posterior means of the weights that are left.

    Raises:
        ValueError: ``initial_scale`` is not positive, or ``threshold`` is not finite.

    References:
        Variational Dropout Sparsifies Deep Neural Networks (Dmitry Molchanov, Arsenii Ashukha, Dmitry Vetrov, 2017),
        https://arxiv.org/abs/1701.05369

    Example:
        >>> import torch
        >>> from stochastic_layers.bayesian import VariationalDropoutLinear
        >>> layer = VariationalDropoutLinear(3, 5)
        >>> layer(torch.zeros(7, 3)).shape, 0 <= layer.sparsity <= 1
        (torch.Size([7, 5]), True)
    """

    weight: LogUniformWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        threshold: float = 3.0,
        initial_scale: float = 0.01,
        sample_in_eval: bool = True,
    ) -> None:
        if not math.isfinite(threshold):
            raise ValueError(f"needed a finite threshold, got {threshold}; 3 is usual.")
        module = nn.Linear(in_features, out_features, bias=False)
        super().__init__(module, prior_scale=1.0, initial_scale=initial_scale, sample_in_eval=sample_in_eval)
        self.weight = LogUniformWeight(module.weight, 1.0, initial_scale)
        bound = in_features**-0.5  # as torch.nn.Linear starts it
        self.offset = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound)) if bias else None
        self.threshold = threshold

    @property
    def sparsity(self) -> float:
        """Share of the weights that ``eval()`` drops."""
        return float((self.weight.log_alpha > self.threshold).double().mean())

    def means(self) -> tuple[Tensor, Tensor | None]:
        """Means of the weights, without the dropped ones in ``eval()``, and the bias."""
        return self._kept(self.weight.loc), self.offset

    def variances(self) -> tuple[Tensor, Tensor | None]:
        """Variances of the weights, without the dropped ones in ``eval()``; the bias has none."""
        return self._kept(self.weight.scale.square()), None

    def _kept(self, values: Tensor) -> Tensor:
        return values if self.training else values * (self.weight.log_alpha <= self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, {super().extra_repr()}"
