"""The contract: a layer turns params into a sample, a sample turns the cost of its draws into a surrogate loss."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from stochastic_layers.auxiliary import as_drawn, with_gradient_of
from stochastic_layers.captures import innermost
from stochastic_layers.families import Family, create_family
from stochastic_layers.options import check_positive_int
from stochastic_layers.recomputation import recomputing, refuse_reentrant
from stochastic_layers.registry import known_families, nearest

__all__ = ["Sample", "StochasticLayer", "sum_rightmost"]


def sum_rightmost(tensor: Tensor, ndim: int) -> Tensor:
    """Sum the trailing dimensions until ``ndim`` are left: event dimensions that the cost has already summed."""
    return tensor.flatten(ndim).sum(-1) if tensor.dim() > ndim else tensor


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off; where it is off already nothing is entered, which would cost as much as a small layer's kernel."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


@dataclass(frozen=True, eq=False)
class Sample:
    """The draws of one layer, and the rule that turns their cost into a loss.

    Attributes:
        z: ``[S, *batch, out_features]``, every point at which the cost is to be evaluated.
        weights: ``[S]`` or ``[S, *batch]``, sum 1 over S: ``(weights * cost).sum(0)`` is the reported estimate of
            E_q[cost]. Auxiliary points have weight 0.
        q: The distribution the draws stand for; batch shape ``[*batch]``.
        log_density: Function of no argument that returns log q(z) ``[S, *batch]``; read it as :attr:`log_prob`.
        credit: Function of the cost ``[S, *leading batch]`` that returns ``[*leading batch]``; only the gradient of its
            result is used. ``None`` where the gradient flows through z alone.
        aux: Extra losses ``[*batch]`` that are known at sampling time; the surrogate trains them.
        equally_weighted: Whether the S points are draws of q of weight 1/S each, one as good as the other.
    """

    z: Tensor
    weights: Tensor
    q: Distribution
    log_density: Callable[[], Tensor] = field(repr=False)
    credit: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    equally_weighted: bool = True

    @property
    def log_prob(self) -> Tensor:
        """log q(z) ``[S, *batch]``, computed when asked for."""
        return self.log_density()

    def surrogate(self, cost: Tensor) -> Tensor:
        """The loss whose value is the estimate of E_q[cost] and whose gradient is the estimator.

        Args:
            cost: ``[S, *leading batch]``: one value per draw and example. Batch dimensions of z that the cost does not
                have are event dimensions, which it has summed.

        Returns:
            ``[*leading batch]``, equal to ``(weights * cost).sum(0)``. Average it yourself.

        Raises:
            ValueError: The cost has another shape, for instance because it was reduced over the batch.
        """
        self._check(cost)
        weights = self.weights
        with _without_autocast(cost.device.type):  # statistics and log-probabilities stay in float32
            if cost.dtype in (torch.float16, torch.bfloat16):
                cost = cost.to(weights.dtype)
            ndim = cost.dim() - 1
            if weights.dim() == 1:
                weights = weights.view(-1, *[1] * ndim)
            loss = (weights * cost).sum(0)
            terms = [sum_rightmost(term, ndim) for term in self.aux.values()]
            if self.credit is not None and torch.is_grad_enabled():  # without gradients there is nothing to credit
                terms.append(self.credit(cost))
            for term in terms:
                loss = loss + (term - term.detach())  # value zero, so that only the gradient is added
        return loss

    def _check(self, cost: Tensor) -> None:
        expected = (self.z.shape[0], *self.q.batch_shape)
        if not isinstance(cost, Tensor) or not cost.is_floating_point():
            got = cost.dtype if isinstance(cost, Tensor) else type(cost).__name__
            raise ValueError(
                f"needed a floating-point cost of shape {list(expected)}, got {got}; convert it, cost.float() or, of "
                "an array, torch.as_tensor(cost).float()."
            )
        ndim = cost.dim()
        if ndim < min(len(expected), 2) or cost.shape != expected[:ndim]:
            raise ValueError(
                f"needed a cost of shape {list(expected)} (one value per draw and example; trailing batch dimensions "
                f"may be summed), got {list(cost.shape)}; do not reduce the cost over the draws or the batch before "
                "surrogate()."
            )
        if 1 < self.weights.dim() != ndim:
            raise ValueError(
                f"needed a cost of shape {list(expected)}, got {list(cost.shape)}: this layer weights or changes its "
                "points in each batch element by itself, so that batch dimensions cannot be summed; draw them with "
                "latent_dim instead."
            )
        if self.z.requires_grad and not cost.requires_grad and torch.is_grad_enabled() and self.credit is None:
            warnings.warn(
                "the cost does not depend on z through autograd, so this layer's gradient is zero; a layer that needs "
                "only values of the cost (sl.list_layers(needs='cost')) trains through a black box.",
                stacklevel=3,
            )


class StochasticLayer(nn.Module, ABC):
    """Base of all layers: checks, precision, evaluation mode and capture; a subclass implements :meth:`draw`.

    A subclass states its capabilities as class attributes (see :class:`~stochastic_layers.registry.Description`) and is
    given a name by :func:`~stochastic_layers.register`.

    Args:
        latent_dim: Number of latent variables.
        family: Name of the distribution family, or a mapping ``{"name": ..., **options}`` of one that has options.
        num_categories: Number of categories of each variable of a categorical family.
        num_samples: Number S of draws per example.

    Raises:
        ValueError: An option is out of range, or the layer does not support the family.
    """

    name: ClassVar[str] = ""
    families: ClassVar[tuple[str, ...]]
    unbiased: ClassVar[bool | str]
    needs: tuple[str, ...]  # this and the next: of the default options; an option may set others on the instance
    evaluations: int | str = "num_samples"
    exact_draws: ClassVar[bool] = True
    # Whether, in training, the S points are independent draws of q of equal weight: objectives with a gradient of their
    # own rely on it. Layers that couple, enumerate, weight or relax their points leave it False.
    independent_draws: ClassVar[bool] = False
    reference: ClassVar[str] = ""
    fullgraph: ClassVar[bool] = True  # whether a step compiles with torch.compile(fullgraph=True)
    default_latent_dim: ClassVar[int] = 32  # taken by a model that is given no size

    def __init__(
        self,
        latent_dim: int,
        *,
        family: str | Mapping[str, Any],
        num_categories: int | None = None,
        num_samples: int = 1,
    ) -> None:
        super().__init__()
        name = str(family.get("name") if isinstance(family, Mapping) else family)
        if name not in self.families:
            known = known_families()
            advice = f"see sl.list_layers(family={name!r})." if name in known else nearest(name, known)
            raise ValueError(
                f"{self.name or type(self).__name__!r} supports the families {self.families}, got {name!r}; {advice}"
            )
        self.family: Family = create_family(family, latent_dim, num_categories)
        self.num_samples = num_samples

    @abstractmethod
    def draw(self, params: Tensor, context: Tensor | None) -> Sample:
        """Training draws. ``params`` are checked and at least float32; autocast is off."""

    @property
    def num_samples(self) -> int:
        """Number S of draws per example; assign another to change it, which the layer checks as at construction."""
        return self._num_samples

    @num_samples.setter
    def num_samples(self, value: int) -> None:
        self.check_num_samples(check_positive_int("num_samples", value))
        self._num_samples = value

    def check_num_samples(self, num_samples: int) -> None:
        """Refuse a positive number of draws that the estimator cannot use; here none.

        It is called whenever the number is set, first by the constructor of the base class, which knows the family.

        Raises:
            ValueError: Too few or too many draws, or an odd number where there have to be pairs.
        """

    @property
    def latent_dim(self) -> int:
        """Number of latent variables."""
        return self.family.latent_dim

    @property
    def num_categories(self) -> int | None:
        """Number of categories of each variable, ``None`` where the family has none."""
        return self.family.num_categories

    @property
    def in_features(self) -> int:
        """Size of the last dimension of params."""
        return self.family.in_features

    @property
    def out_features(self) -> int:
        """Size of the last dimension of z."""
        return self.family.out_features

    def distribution(self, params: Tensor | Sequence[Tensor]) -> Distribution:
        """The law q of params ``[*batch, in_features]``, in at least float32."""
        params = self.family.prepare(params)
        with _without_autocast(params.device.type):
            return self.law(params)

    def law(self, params: Tensor) -> Distribution:
        """q of checked params; a layer that changes the law of its family (by a temperature, say) overrides this."""
        return self.family.distribution(params)

    def mode(self, params: Tensor | Sequence[Tensor]) -> Tensor:
        """The deterministic choice ``[*batch, out_features]``: the mode of q."""
        return self.family.mode(self.distribution(params))

    def sample(self, params: Tensor | Sequence[Tensor], context: Tensor | None = None) -> Sample:
        """Draw from the law of params.

        In ``train()`` the draws carry the estimator; in ``eval()`` they are exact draws of q without gradient.

        Args:
            params: ``[*batch, in_features]``, or a tuple of the family's parts (loc and log-variance).
            context: Features ``[*batch, F]`` for a learned baseline.

        Raises:
            ValueError: Wrong shape or dtype, or NaN or infinite values.
            RuntimeError: The layer gets a gradient from the cost or from an auxiliary loss, and reentrant activation
                checkpointing around it computes it again.
        """
        if not (context is None or (isinstance(context, Tensor) and context.dim())):
            got = "a number" if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"needed a tensor [*batch, F] as context, got {got}.")
        prepared = self.family.prepare(params)
        if not torch.is_grad_enabled():
            prepared = prepared.detach()  # the credit is computed later, with gradients on
        with _without_autocast(prepared.device.type):
            if self.training:
                sample = self.draw(prepared, context)
                if ("cost" in self.needs or sample.aux) and recomputing() and torch.is_grad_enabled():
                    refuse_reentrant()
            else:
                q = self.law(prepared.detach())
                z, log_density = self.family.sample_with_log_prob(q, self.num_samples)
                sample = self._sample(q, z, log_density=log_density)
        parts = [params] if isinstance(params, Tensor) else params
        dtype = reduce(torch.promote_types, [part.dtype for part in parts])
        if sample.z.dtype == dtype:
            return sample
        z = sample.z.to(dtype)
        if dtype == torch.float16 and not torch.compiler.is_compiling() and not bool(torch.isfinite(z).all()):
            raise ValueError(
                f"needed draws of magnitude at most {torch.finfo(dtype).max:g} for float16 params, got "
                f"{float(sample.z.detach().abs().max()):.3g}; clamp the log-variance, or use bfloat16 or float32."
            )
        return replace(sample, z=z)

    def forward(self, params: Tensor | Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        """Draw z ``[*batch, out_features]`` (``[S, *batch, out_features]`` for more than one point).

        Auxiliary losses (``Sample.aux``) are trained by the surrogate. Outside ``sl.capture()`` there is none: then
        their means over the batch are added to the backward pass through z, at scale one. That is right for an
        objective that is a mean over the batch; use ``sl.capture()`` for a sum, or under a gradient scaler (float16).

        Raises:
            RuntimeError: The layer needs the cost, is in training mode with gradients on, and no ``sl.capture()`` is
                open, so that its gradient would silently be zero.
        """
        again = recomputing()  # whoever captures the call has its sample
        samples = None if again else innermost()
        if samples is None and not again and "cost" in self.needs and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.name or type(self).__name__!r} gets its gradient from the cost and was called outside "
                "sl.capture(): the encoder would not train. Write `with sl.capture() as samples: ...` and "
                "`sl.surrogate(cost, samples).mean().backward()`, or call layer.eval() or torch.no_grad() to only draw."
            )
        sample = self.sample(params, context)
        z = sample.z.squeeze(0) if sample.z.shape[0] == 1 else sample.z
        if samples is not None:
            samples.append(sample)
        elif sample.aux and torch.is_grad_enabled():
            z = with_gradient_of(z, sample.aux.values())
        return z

    def _sample(
        self,
        q: Distribution,
        z: Tensor,
        *,
        weights: Tensor | None = None,
        credit: Callable[[Tensor], Tensor] | None = None,
        aux: Mapping[str, Tensor] | None = None,
        log_density: Callable[[], Tensor] | None = None,
    ) -> Sample:
        """A :class:`Sample` of z ``[S, *batch, out_features]``, equally weighted unless weights are given."""
        equally_weighted = weights is None
        if weights is None:
            weights = torch.full((z.shape[0],), 1.0 / z.shape[0], dtype=z.dtype, device=z.device)
        if log_density is None:
            family, read = self.family, as_drawn(z)
            log_density = lambda: family.log_prob(q, read())  # noqa: E731
        return Sample(z, weights, q, log_density, credit, dict(aux or {}), equally_weighted)

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"latent_dim": self.latent_dim, "family": self.family.spec}
        if self.num_categories is not None:
            options["num_categories"] = self.num_categories
        options["num_samples"] = self.num_samples
        return ", ".join(f"{k}={v!r}" for k, v in options.items())
