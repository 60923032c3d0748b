"""Normalizing-flow posteriors: a Gaussian draw, bent by an invertible network. Needs the optional package zuko."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform, constraints

from stochastic_layers.continuous_families import ContinuousFamily
from stochastic_layers.families import MAX_LOG_VARIANCE, register_family
from stochastic_layers.gaussian_families import gaussian_nodes
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.options import check_positive_int
from stochastic_layers.registry import register

__all__ = ["Flow", "FlowDistribution", "FlowFamily"]

_EMPTY = torch.Size()


def _import_zuko() -> ModuleType:
    """Zuko, without what its import does to the argument checks of all distributions of the process."""
    checks = Distribution._validate_args
    try:
        zuko = import_module("zuko")
    except ImportError as error:
        raise ImportError(
            "needed the package zuko for the layer 'flow', got none; install it by "
            "`pip install 'stochastic-layers[flows]'`."
        ) from error
    Distribution.set_default_validate_args(checks)
    return zuko


class FlowDistribution(Distribution):
    r"""The law of :math:`z = \mu + \sigma T(\epsilon)`, with normal noise and an invertible T.

    Args:
        loc: :math:`\mu` ``[*batch, D]``.
        log_scale: :math:`\log\sigma` ``[*batch, D]``.
        transform: T, of event dimension 1, with zuko's ``call_and_ladj``.
        dtype: The precision in which T computes.
    """

    arg_constraints = {}  # noqa: RUF012 torch's own protocol
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, log_scale: Tensor, transform: Transform, dtype: torch.dtype) -> None:
        self.loc, self.log_scale, self.transform, self.dtype = loc, log_scale, transform, dtype
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def rsample(self, sample_shape: Any = _EMPTY) -> Tensor:
        return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, sample_shape: Any = _EMPTY) -> tuple[Tensor, Tensor]:
        """Draws and their log-probability, which costs nothing extra here."""
        noise = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        bent, stretch = self._call(self.transform, noise)
        return self.loc + self.log_scale.exp() * bent, self._log_normal(noise) - stretch - self.log_scale.sum(-1)

    def push(self, noise: Tensor) -> Tensor:
        """The z that a given noise ``[*batch, D]`` becomes."""
        return self.loc + self.log_scale.exp() * self._call(self.transform, noise)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        noise, stretch = self._call(self.transform.inv, (value - self.loc) * (-self.log_scale).exp())
        return self._log_normal(noise) + stretch - self.log_scale.sum(-1)

    def _call(self, transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image of x and the log-determinant of the Jacobian."""
        if not x.numel():  # the sums inside cannot be taken over an empty batch
            return x, x.sum(-1)
        y, stretch = transform.call_and_ladj(x.to(self.dtype))
        return y.to(x.dtype), stretch.to(x.dtype)

    @staticmethod
    def _log_normal(noise: Tensor) -> Tensor:
        return -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)


@register_family
class FlowFamily(ContinuousFamily):
    """Gaussians bent by a network; params are loc and log-variance, then a context for the network.

    The KL divergence to the standard normal has no closed form.

    Args:
        latent_dim: Number of latent variables.
        num_categories: None.
        network: A zuko ``LazyTransform`` of ``latent_dim`` features; ``None`` for the plain Gaussian.
        context_features: Size of the context, may be 0.
    """

    name = "flow"
    parts = ("loc", "log_variance", "context")
    limits = {"log_variance": MAX_LOG_VARIANCE}  # noqa: RUF012 see the base class

    def __init__(
        self,
        latent_dim: int,
        num_categories: int | None = None,
        *,
        network: nn.Module,
        context_features: int = 0,
    ) -> None:
        super().__init__(latent_dim, num_categories)
        if not isinstance(context_features, int) or isinstance(context_features, bool) or context_features < 0:
            raise ValueError(f"needed context_features >= 0, got {context_features!r}.")
        self.network, self.context_features = network, context_features

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return self.latent_dim, self.latent_dim, self.context_features

    @property
    def in_features(self) -> int:
        return sum(self.part_sizes)

    def distribution(self, params: Tensor) -> Distribution:
        loc, log_variance, context = self.split(params)
        dtype = next(self.network.parameters()).dtype
        transform = self.network(context.to(dtype) if self.context_features else None)
        return FlowDistribution(loc, 0.5 * log_variance, transform, dtype)

    def nodes(self, q: Distribution, refinement: int = 0) -> tuple[Tensor, Tensor]:
        assert isinstance(q, FlowDistribution)
        x, weights = gaussian_nodes(q.loc, 40 * 2**refinement)  # the network has kinks, or nearly
        return q.push(x), weights

    def mode(self, q: Distribution) -> Tensor:
        """What the mode of the noise becomes: no mode of q, but a typical point."""
        assert isinstance(q, FlowDistribution)
        return q.push(torch.zeros_like(q.loc))

    def standard(self) -> Distribution:
        """The standard normal."""
        zeros = torch.zeros(self.latent_dim)
        return Independent(Normal(zeros, zeros + 1, validate_args=False), 1, validate_args=False)


@register("flow")
class Flow(StochasticLayer):
    r"""Normalizing-flow posterior: a Gaussian draw, bent by an invertible network that sees the params.

    .. math:: z = \mu + \sigma \, T_h(\epsilon), \qquad \log q(z) = \log N(\epsilon) - \log |\det T_h'(\epsilon)| -
        \sum_i \log\sigma_i

    The params are :math:`\mu`, :math:`\log\sigma^2` and a context h. The pathwise gradient trains the params and the
    network; unbiased for f continuous and differentiable almost everywhere. ``log_prob`` of the draws is a by-product
    of drawing. The KL to a prior has to be estimated from it. ``mode`` is what the mode of the noise becomes.
    ``torch.compile`` breaks the graph inside zuko: leave ``fullgraph`` off.

    Args:
        latent_dim: Number of latent variables.
        family: ``"flow"``.
        num_samples: Number S of draws per example.
        context_features: Size of the context h; ``latent_dim`` by default, 0 for one T for all examples.
        transform: ``"spline"``, monotonic rational-quadratic on [-5, 5], or ``"affine"``.
        num_transforms: Number of layers of T.
        hidden_features: Widths of the hidden layers of each.
        coupling: Whether every layer changes one half of the variables given the other, so that the density of any
            point is as cheap as a draw; otherwise inverse autoregressive, where it costs ``latent_dim`` passes.

    Raises:
        ValueError: An option is out of range.
        ImportError: zuko is not installed.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Diederik P. Kingma, Tim Salimans, Rafal
        Jozefowicz, Xi Chen, Ilya Sutskever, Max Welling, 2016), https://arxiv.org/abs/1606.04934; Neural Spline Flows
        (Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios, 2019), https://arxiv.org/abs/1906.04032

    Example:
        >>> import stochastic_layers as sl
        >>> sl.describe("flow").needs
        ('cost_gradient',)
    """

    fullgraph = False  # zuko breaks the graph; plain torch.compile works
    families = ("flow",)
    unbiased = True
    needs = ("cost_gradient",)
    reference = (
        "Improving Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans, Jozefowicz, Chen, "
        "Sutskever and Welling, 2016). https://arxiv.org/abs/1606.04934"
    )

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str = "flow",
        num_samples: int = 1,
        context_features: int | None = None,
        transform: Literal["spline", "affine"] = "spline",
        num_transforms: int = 3,
        hidden_features: Sequence[int] = (64, 64),
        coupling: bool = True,
    ) -> None:
        if transform not in ("spline", "affine"):
            raise ValueError(f"needed transform 'spline' or 'affine', got {transform!r}.")
        if num_transforms < 1 or any(width < 1 for width in hidden_features):
            raise ValueError(
                f"needed num_transforms >= 1 and positive hidden_features, got {num_transforms!r} and "
                f"{list(hidden_features)}."
            )
        check_positive_int("latent_dim", latent_dim, "pass the number of latent variables")
        zuko = _import_zuko()
        context_features = latent_dim if context_features is None else context_features
        build = zuko.flows.NSF if transform == "spline" else zuko.flows.MAF
        flow = build(
            features=latent_dim,
            context=max(context_features, 0),
            transforms=num_transforms,
            hidden_features=list(hidden_features),
            passes=min(2, latent_dim) if coupling else None,
            randperm=False,
        )
        # the direction that zuko makes cheap goes from data to noise; here it goes from noise to z
        network: nn.Module = flow.transform
        super().__init__(
            latent_dim,
            family={"name": family, "network": network, "context_features": context_features},
            num_samples=num_samples,
        )
        self.network = network

    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        q = self.law(params)
        assert isinstance(q, FlowDistribution)
        z, log_prob = q.rsample_and_log_prob(torch.Size((self.num_samples,)))
        return replace(self._sample(q, z), log_density=lambda: log_prob)
