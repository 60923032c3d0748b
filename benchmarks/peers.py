"""The same draws by other libraries; one that is missing, or fails, is reported with its error."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Work", "categorical", "gaussian", "quantised", "usable"]

Work = Callable[[], object]


def _module(name: str) -> Any:
    with warnings.catch_warnings():  # their deprecations are not ours
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def usable(cases: dict[str, Callable[[], Work]], unavailable: dict[str, str]) -> dict[str, Work]:
    """Build and try every case; the errors of those that fail go into ``unavailable``."""
    works = {}
    for name, build in cases.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work = build()
                work()
        except Exception as error:  # whatever a peer raises is its result
            unavailable[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            works[name] = work
    return works


def categorical(logits: Tensor, upstream: Tensor, cost: Tensor) -> dict[str, dict[str, Callable[[], Work]]]:
    """Draws of one-hot variables with a gradient, by kind.

    Args:
        logits: ``[B, L, C]``, requires grad.
        upstream: The cost's slope at the draw ``[B, L, C]``.
        cost: One cost per example ``[B]``.
    """

    def backward(z: Tensor) -> None:
        torch.autograd.grad(z, logits, upstream)

    def pyro_relaxed(hard: bool) -> Work:
        dist = _module("pyro.distributions")
        law = dist.RelaxedOneHotCategoricalStraightThrough if hard else dist.RelaxedOneHotCategorical
        one = torch.ones((), device=logits.device)
        return lambda: backward(law(one, logits=logits).rsample())

    def pyro_straight_through() -> Work:
        law = _module("pyro.distributions").OneHotCategoricalStraightThrough
        return lambda: backward(law(logits=logits).rsample())

    def reinmax() -> Work:
        function = _module("reinmax").reinmax
        return lambda: backward(function(logits, 1.0)[0].view_as(logits))

    def storchastic(method_of: Callable[[Any], Any], score: bool) -> Work:
        storch = _module("storch")
        method = method_of(storch.method)

        def work() -> None:
            logits.grad = None
            storch.reset()
            batched = storch.denote_independent(logits, 0, "batch")
            slope = storch.denote_independent(upstream, 0, "batch")
            z = method(torch.distributions.OneHotCategorical(logits=batched, validate_args=False))
            storch.add_cost(((z.detach() if score else z) * slope).sum(-1).sum(-1), "cost")
            storch.backward()

        return work

    def torch_score() -> Work:
        def work() -> None:
            law = torch.distributions.OneHotCategorical(logits=logits, validate_args=False)
            z = law.sample()
            torch.autograd.grad((cost * law.log_prob(z).sum(-1)).sum(), logits)

        return work

    return {
        "hard": {
            "pyro relaxed straight-through": lambda: pyro_relaxed(True),
            "pyro straight-through": pyro_straight_through,
            "reinmax package": reinmax,
            "torch REINFORCE": torch_score,
            "storchastic REINFORCE": lambda: storchastic(lambda m: m.ScoreFunction("z"), True),
            "storchastic Gumbel hard": lambda: storchastic(
                lambda m: m.GumbelSoftmax("z", straight_through=True), False
            ),
        },
        "soft": {
            "pyro relaxed": lambda: pyro_relaxed(False),
            "storchastic Gumbel": lambda: storchastic(lambda m: m.GumbelSoftmax("z"), False),
        },
    }


def gaussian(params: Tensor, upstream: Tensor) -> dict[str, Callable[[], Work]]:
    """A pathwise draw and the KL to a standard normal, ``params [B, 2 L]``."""

    def pyro() -> Work:
        dist = _module("pyro.distributions")
        kl = _module("torch.distributions").kl_divergence
        zero, one = torch.zeros_like(upstream[0]), torch.ones_like(upstream[0])

        def work() -> None:
            loc, log_variance = params.chunk(2, -1)
            q = dist.Normal(loc, (0.5 * log_variance).exp(), validate_args=False).to_event(1)
            loss = (q.rsample() * upstream).sum() + kl(q, dist.Normal(zero, one, validate_args=False).to_event(1)).sum()
            torch.autograd.grad(loss, params)

        return work

    return {"pyro": pyro}


def quantised(x: Tensor, levels: list[int], codebook_size: int) -> dict[str, dict[str, Callable[[], Work]]]:
    """Quantised bottlenecks of ``x [B, L, D]`` by kind; the gradient is straight-through."""

    def run(layer: torch.nn.Module, inputs: Tensor) -> Work:
        def work() -> None:
            z, *rest = layer(inputs)
            loss = z.sum() + sum(r.sum() for r in rest if isinstance(r, Tensor) and r.requires_grad)
            torch.autograd.grad(loss, inputs)

        return work

    def build(name: str, inputs: Tensor, **options: Any) -> Callable[[], Work]:
        return lambda: run(getattr(_module("vector_quantize_pytorch"), name)(**options).to(x.device), inputs)

    dim = x.shape[-1]
    return {
        "vq": {"vector-quantize-pytorch": build("VectorQuantize", x, dim=dim, codebook_size=codebook_size)},
        "fsq": {"vector-quantize-pytorch": build("FSQ", x[..., : len(levels)], levels=levels)},
    }
