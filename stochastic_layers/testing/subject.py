"""The layer under test: how to build it, alike each time, and how to take one training step with it."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_layers.families import takes_categories
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.registry import create, layer_class
from stochastic_layers.testing.exact import PolynomialCost, exact_value
from stochastic_layers.testing.moments import Expectation

__all__ = ["NotApplicable", "Step", "Subject", "close", "step"]

NUM_CATEGORIES = 3


class NotApplicable(Exception):
    """Raised by a check that has nothing to check on this layer; the message says why."""


@dataclass(frozen=True)
class Step:
    """One training step: the sample, the cost, the loss, and the gradients of the summed loss."""

    sample: Sample
    cost: Tensor
    loss: Tensor
    encoder: Tensor
    decoder: Tensor


def step(
    layer: StochasticLayer,
    params: Tensor,
    cost_fn: nn.Module,
    *,
    seed: int = 0,
    black_box: bool = False,
    shift: float = 0.0,
) -> Step:
    """Sample, evaluate, surrogate, backward, from a fixed random state.

    Args:
        layer: The layer.
        params: ``[*batch, in_features]``.
        cost_fn: The cost; its first parameter plays the decoder.
        seed: Seed of the draws.
        black_box: Whether only the values of the cost are given to the layer.
        shift: A constant that is added to the cost.
    """
    leaf = params.detach().clone().requires_grad_()
    theta = next(cost_fn.parameters())
    with torch.random.fork_rng(devices=[params.device] if params.is_cuda else []):
        torch.manual_seed(seed)
        sample = layer.sample(leaf)
        if black_box:
            with torch.no_grad():
                cost = cost_fn(sample.z.detach()) + shift
        else:
            cost = cost_fn(sample.z) + shift
        loss = sample.surrogate(cost)
        grads: tuple[Tensor | None, ...] = (None, None)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss.sum(), (leaf, theta), allow_unused=True, retain_graph=True)
    encoder, decoder = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, (leaf, theta), strict=True))
    return Step(sample, cost, loss, encoder, decoder)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> bool:
    """Whether two float64 tensors agree up to rounding, relative to the larger of 1 and their largest entry."""
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    scale = max(1.0, float(a.abs().max()), float(b.abs().max()))
    return bool((a - b).abs().max() <= tolerance * scale)


class Subject:
    """A recipe for a layer; every call of :meth:`build` gives the same fresh one.

    Args:
        layer: A registered name, a layer class, or a layer, of which deep copies are tested.
        family: The distribution family; by default the layer's own.
        options: Further constructor arguments.
        seed: Seed of the layer's parameters, of params and of the draws.
        expectation: What computes E_q[cost], differentiable; by default :func:`exact_value`.
        visible_bias: The bias that the statistical checks must be able to see.
        max_draws: Most draws that one statistical check may take.
        backend: Backend of ``torch.compile``.

    Raises:
        ValueError: The layer cannot be built with ``latent_dim`` alone (and ``num_categories`` where there are any).
    """

    def __init__(
        self,
        layer: str | StochasticLayer | type[StochasticLayer],
        *,
        family: str | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        expectation: Expectation = exact_value,
        visible_bias: float = 0.05,
        max_draws: int = 4_000_000,
        backend: str = "aot_eager",
    ) -> None:
        self.seed, self.backend = seed, backend
        self.expectation, self.visible_bias, self.max_draws = expectation, visible_bias, max_draws
        self.options: dict[str, Any] = dict(options or {})
        self.template: StochasticLayer | None = None
        self.by_name = layer if isinstance(layer, str) else None
        self.cls: type[StochasticLayer]
        if isinstance(layer, StochasticLayer):
            if family not in (None, layer.family.name) or self.options:
                raise ValueError(
                    f"needed neither family nor options with a layer object, got family={family!r} and "
                    f"{sorted(self.options)}; pass its name or class, or build the object with them."
                )
            self.template, self.cls, self.family = layer, type(layer), layer.family.name
            return
        self.cls = layer_class(layer) if isinstance(layer, str) else layer
        default = inspect.signature(self.cls).parameters.get("family")
        fallback = default.default if default is not None and isinstance(default.default, str) else self.cls.families[0]
        self.family = family or fallback
        self.options["family"] = self.family
        if takes_categories(self.family):
            # of three, two that are chosen are one that is not
            self.options.setdefault("num_categories", 4 if self.family == "subset" else NUM_CATEGORIES)
        if "latent_dim" not in self.options:
            # few enough for expectations by enumeration or a product rule; a point of a simplex is several numbers
            self.options["latent_dim"] = {"bernoulli": 3, "dirichlet": 1}.get(self.family, 2)
            try:
                self.build()
            except ValueError:  # layers of one joint variable
                self.options["latent_dim"] = 1
        self.build()

    @property
    def importable(self) -> bool:
        """Whether the layer's class is found by its module and name, as pickle and the compiler look it up."""
        found: object = sys.modules.get(self.cls.__module__)
        for part in self.cls.__qualname__.split("."):
            found = getattr(found, part, None)
        return found is self.cls

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.cls.name or self.cls.__qualname__

    def build(self, dtype: torch.dtype = torch.float64, **options: Any) -> StochasticLayer:
        """A fresh layer in training mode; ``options`` override those of the recipe."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.template is not None:
                layer = copy.deepcopy(self.template)
            elif self.by_name is not None:
                layer = create(self.by_name, **{**self.options, **options})
            else:
                layer = self.cls(**{**self.options, **options})
        return layer.to(dtype).train()

    def params(self, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Asymmetric params ``[*batch, in_features]`` of both signs, with tame moments.

        Log-variances are about -1, and the tails of Student's t such that the cost has a variance.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        layer = self.build()
        params = 0.8 * torch.randn(*batch, layer.in_features, generator=generator, dtype=torch.float64) - 0.2
        family = layer.family
        shifts = {"log_variance": -1.0, "raw_concentration": 10.0 if "loc" in family.parts else 0.0}
        for part, values in zip(family.parts, torch.split(params, list(family.part_sizes), -1), strict=True):
            values += shifts.get(part, 0.0)
        return params.to(dtype)

    def cost(self, kind: str = "asymmetric") -> PolynomialCost:
        """A cost of z with a decoder parameter."""
        return PolynomialCost(kind, self.build().out_features)

    def step(self, params: Tensor | None = None, kind: str = "asymmetric", **options: Any) -> Step:
        """:func:`step` of a fresh layer."""
        params = self.params(4) if params is None else params
        return step(self.build(), params, self.cost(kind), seed=self.seed, **options)
