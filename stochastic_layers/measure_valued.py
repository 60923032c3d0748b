"""Measure-valued layers: the derivative of a law is a difference of two laws, and the cost is evaluated under both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochastic_layers.layer import Sample, StochasticLayer, sum_rightmost
from stochastic_layers.noise import exponential
from stochastic_layers.options import check_points
from stochastic_layers.registry import register

__all__ = ["MeasureValued"]


@register("measure_valued")
class MeasureValued(StochasticLayer):
    r"""Measure-valued (weak) derivative of a Gaussian: a gradient from values of the cost alone.

    .. math::
        \partial_{\mu_i} E_q[f] &= \frac{1}{\sigma_i \sqrt{2\pi}} E[f(\mu_i + \sigma_i W) - f(\mu_i - \sigma_i W)] \\
        \partial_{\log\sigma_i^2} E_q[f] &= \tfrac12 E[f(\mu_i + \sigma_i M) - f(\mu_i + \sigma_i U M)]

    with W from the Rayleigh law (Weibull of shape 2), M from the double-sided Maxwell law and U uniform, so that U M is
    normal; the other coordinates of z are those of the draw. Both halves of a difference share their noise, which
    lowers the variance. Approximates the gradient of E_q[f] for any f of bounded expectation, differentiable or
    not; unbiased. The price: ``4 * latent_dim`` auxiliary points, of weight 0, for every draw. A bit needs no such
    layer: its weak derivative is ``f(1) - f(0)``, the local expectation gradient.

    The cost must keep one value per batch element, because every element has its own auxiliary points. Where it
    overflows at one of them the gradient is infinite, and the loss of that element, which shows it, NaN: compute a cost
    that grows fast in float32.

    Args:
        latent_dim: Number of latent variables D.
        family: ``"gaussian"``, or ``"log_normal"`` (the exponentials of the same points).
        num_samples: Number S of draws per example. z holds the S draws, then the ``4 D S`` auxiliary points.

    Raises:
        ValueError: The points of one example are more than 2 ** 28 numbers, as with 8,192 latent variables.

    References:
        Monte Carlo Gradient Estimation in Machine Learning (Shakir Mohamed, Mihaela Rosca, Michael Figurnov, Andriy
        Mnih, 2019), https://arxiv.org/abs/1906.10652

    Example:
        >>> import torch, stochastic_layers as sl
        >>> layer = sl.create("measure_valued", latent_dim=3)
        >>> params = torch.zeros(5, 6, requires_grad=True)
        >>> sample = layer.sample(params)
        >>> sample.surrogate((sample.z.sum(-1) > 1).float()).mean().backward()
        >>> sample.z.shape, bool((params.grad[:, :3] >= 0).all())
        (torch.Size([13, 5, 3]), True)
    """

    families = ("gaussian", "log_normal")
    unbiased = True
    needs = ("cost",)
    evaluations = "num_samples * (4 * latent_dim + 1)"
    reference = (
        "Monte Carlo Gradient Estimation in Machine Learning (Mohamed, Rosca, Figurnov and Mnih, 2019). "
        "https://arxiv.org/abs/1906.10652"
    )

    def __init__(self, latent_dim: int, *, family: str = "gaussian", num_samples: int = 1) -> None:
        super().__init__(latent_dim, family=family, num_samples=num_samples)

    def check_num_samples(self, num_samples: int) -> None:
        points = num_samples * (4 * self.latent_dim + 1)
        check_points("measure_valued", points, self.latent_dim, "'pathwise' or 'leave_one_out'")

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        loc, log_variance = params.chunk(2, -1)
        center, scale = loc.detach(), (0.5 * log_variance.detach()).exp()
        size, dim = self.num_samples, self.latent_dim
        noise = torch.randn(size, *loc.shape, dtype=loc.dtype, device=loc.device)
        offsets = self._offsets(noise)  # [4, S, *batch, D]
        coordinate = torch.eye(dim, dtype=torch.bool, device=loc.device).view(dim, 1, *[1] * (loc.dim() - 1), dim)
        moved = torch.where(coordinate, offsets.unsqueeze(1), noise)  # [4, D, S, *batch, D]: one coordinate replaced
        z = center + scale * torch.cat([noise, moved.flatten(0, 2)])
        if self.family.name == "log_normal":
            z = z.exp()
        weights = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
        weights[:size] = 1.0 / size

        def credit(cost: Tensor) -> Tensor:
            if cost.dim() != loc.dim():
                raise ValueError(
                    f"needed a cost of shape {[z.shape[0], *loc.shape[:-1]]} for 'measure_valued', got "
                    f"{list(cost.shape)}: batch dimensions cannot be summed, as every element has auxiliary points of "
                    "its own; draw them with latent_dim instead."
                )
            points = cost.detach()[size:].reshape(4, dim, size, *cost.shape[1:])
            up, down, far, near = points.mean(2).movedim(1, -1)  # each [*batch, D]
            slope = (up - down) / (scale * math.sqrt(2 * math.pi))
            return sum_rightmost(loc * slope + log_variance * (0.5 * (far - near)), cost.dim() - 1)

        return self._sample(q, z, weights=weights, credit=credit)

    def _offsets(self, like: Tensor) -> Tensor:
        """Noise ``[4, *like.shape]`` of the four points of a coordinate: W, -W, M and U M."""
        w = exponential(like.shape, like).mul_(2).sqrt_()
        m = torch.randn(3, *like.shape, dtype=like.dtype, device=like.device).norm(dim=0)
        u = 2 * torch.rand_like(like) - 1
        # the sign of M is that of U, whose product with it has the law of one coordinate of three normal ones
        return torch.stack([w, -w, torch.copysign(m, u), m * u])
