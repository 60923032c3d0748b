"""Random weights: their posteriors, the base of the layers that hold them, and the KL of a whole model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stochastic_layers.options import check_positive

__all__ = ["BayesianLayer", "GaussianWeight", "LogUniformWeight", "kl_divergence"]


def kl_divergence(model: nn.Module) -> Tensor:
    """KL of the posterior to the prior of all Bayesian layers in a model, in nats; a scalar.

    The ELBO of a data set of N examples is ``sum of log-likelihoods - KL``. With the mean negative log-likelihood of a
    batch as the loss, the KL is counted once per data set: divide it by the number of training examples N, not by the
    size of the batch or the number of batches.

    Args:
        model: A module; layers that occur twice in it count once.

    Raises:
        ValueError: The model has no Bayesian layer.

    Example:
        >>> import torch
        >>> from stochastic_layers import bayesian
        >>> model = torch.nn.Sequential(bayesian.FlipoutLinear(3, 8), torch.nn.ReLU(), bayesian.FlipoutLinear(8, 1))
        >>> x, y, dataset_size = torch.randn(16, 3), torch.randn(16, 1), 1000
        >>> loss = (model(x) - y).square().mean() + bayesian.kl_divergence(model) / dataset_size
        >>> loss.shape
        torch.Size([])
    """
    terms = [module.kl_divergence() for module in model.modules() if isinstance(module, BayesianLayer)]
    if not terms:
        raise ValueError(f"needed a model with Bayesian layers, got {type(model).__name__} without one.")
    return torch.stack(terms).sum()


class GaussianWeight(nn.Module):
    """Independent normal posterior N(loc, scale^2) of a tensor of weights, with prior N(0, prior_scale^2).

    Args:
        loc: The means at the start.
        prior_scale: Standard deviation of the prior.
        initial_scale: Standard deviation of the posterior at the start.

    Raises:
        ValueError: A scale is not positive and finite.
    """

    def __init__(self, loc: Tensor, prior_scale: float, initial_scale: float) -> None:
        super().__init__()
        self.prior_scale = check_positive("prior_scale", prior_scale)
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(
            torch.full_like(self.loc, math.log(check_positive("initial_scale", initial_scale)))
        )

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the posterior."""
        return self.log_scale.exp()

    def noise(self) -> Tensor:
        """A draw less its mean: ``scale * eps``."""
        return self.scale * torch.randn_like(self.loc)

    def kl_divergence(self) -> Tensor:
        """KL(posterior || prior) in nats, summed over the weights; finite for scales that underflow."""
        log_ratio = self.log_scale - math.log(self.prior_scale)
        return (0.5 * ((2 * log_ratio).exp() + (self.loc / self.prior_scale).square() - 1) - log_ratio).sum()

    def extra_repr(self) -> str:
        return f"{tuple(self.loc.shape)}, prior_scale={self.prior_scale}"


class LogUniformWeight(GaussianWeight):
    r"""Normal posterior with the improper prior of sparse variational dropout, uniform in log|w|.

    The KL depends on :math:`\log\alpha = \log(\text{scale}^2 / \text{loc}^2)` alone and is known up to a constant,
    which is chosen so that it vanishes for large alpha. It has no closed form: this is the published fit, off by less
    than 0.01 nats for each weight,

    .. math:: k_1 \sigma(-k_2 - k_3 \log\alpha) + \tfrac12 \log(1 + \alpha^{-1}), \qquad
        k = (0.63576, 1.87320, 1.48695)

    References:
        Variational Dropout Sparsifies Deep Neural Networks (Dmitry Molchanov, Arsenii Ashukha, Dmitry Vetrov, 2017),
        https://arxiv.org/abs/1701.05369
    """

    @property
    def log_alpha(self) -> Tensor:
        """Logarithm of the ratio of the variance to the squared mean: the dropout rate of each weight."""
        floor = torch.finfo(self.loc.dtype).tiny  # a mean of zero has log alpha near 80, whose KL is zero
        return 2 * (self.log_scale - self.loc.abs().clamp_min(floor).log())

    def kl_divergence(self) -> Tensor:
        """Approximate KL to the log-uniform prior, in nats up to a constant, summed over the weights."""
        log_alpha = self.log_alpha
        return (0.63576 * torch.sigmoid(-1.87320 - 1.48695 * log_alpha) + 0.5 * F.softplus(-log_alpha)).sum()


class BayesianLayer(nn.Module, ABC):
    """Base of layers with random weights: the posterior of weight and bias, and when they are drawn.

    Weights are drawn in ``train()`` and, unless ``sample_in_eval`` is false, in ``eval()``: the prediction of a
    Bayesian network is an average over draws, and a single pass at the mean weights is another, overconfident
    predictor. Average the probabilities of several passes; set ``sample_in_eval`` false (it is also an attribute) for
    one deterministic pass at the posterior means.

    Args:
        module: The layer whose shapes, options and starting weights are taken over.
        prior_scale: Standard deviation of the prior of each weight.
        initial_scale: Standard deviation of the posterior at the start.
        sample_in_eval: Whether ``eval()`` draws weights; the posterior means otherwise.

    Raises:
        ValueError: A scale is not positive, or the module pads with something other than zeros.
    """

    bias: GaussianWeight | None

    def __init__(
        self, module: nn.Linear | nn.Conv2d, prior_scale: float, initial_scale: float, sample_in_eval: bool
    ) -> None:
        super().__init__()
        self.weight = GaussianWeight(module.weight, prior_scale, initial_scale)
        self.bias = None if module.bias is None else GaussianWeight(module.bias, prior_scale, initial_scale)
        self.sample_in_eval = sample_in_eval
        self.affine: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        self.shared_dims = 1  # trailing dimensions that share one draw of the weights: channels and positions
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros":
                raise ValueError(f"needed padding_mode='zeros', got {module.padding_mode!r}; pad the input before.")
            self.affine = _Convolution(module)
            self.shared_dims = 3

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*batch, in]`` to ``[*batch, out]`` (``[B, in, H, W]`` to ``[B, out, H', W']``) by random weights."""
        if self.training or self.sample_in_eval:
            return self.draw(x)
        return self.affine(x, *self.means())

    @abstractmethod
    def draw(self, x: Tensor) -> Tensor:
        """The output for random weights."""

    def means(self) -> tuple[Tensor, Tensor | None]:
        """Posterior means of weight and bias."""
        return self.weight.loc, None if self.bias is None else self.bias.loc

    def variances(self) -> tuple[Tensor, Tensor | None]:
        """Posterior variances of weight and bias."""
        return self.weight.scale.square(), None if self.bias is None else self.bias.scale.square()

    def kl_divergence(self) -> Tensor:
        """KL of the posterior of weight and bias to the prior, in nats."""
        kl = self.weight.kl_divergence()
        return kl if self.bias is None else kl + self.bias.kl_divergence()

    def extra_repr(self) -> str:
        return f"sample_in_eval={self.sample_in_eval}"


class _Convolution:
    """``conv2d`` with the options of a module; a plain object, so that the module's own weights are let go."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.options = (module.stride, module.padding, module.dilation, module.groups)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation, groups = self.options
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
