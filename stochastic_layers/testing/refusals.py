"""Checks of what a layer refuses, and how it says so, and of params so large that a careless formula overflows."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from stochastic_layers.layer import StochasticLayer
from stochastic_layers.testing.contract import expect, refuses
from stochastic_layers.testing.exact import PolynomialCost
from stochastic_layers.testing.subject import Subject, step

__all__ = ["extreme_params", "refused_costs", "refused_params"]


def refused_costs(subject: Subject) -> str:
    """A reduced cost, a wrong shape and an integer cost are refused."""
    layer = subject.build()
    points = layer.sample(subject.params(2)).z.shape[0]
    sample = layer.sample(subject.params(points + 2))
    cost = subject.cost()(sample.z)  # [S, S + 2]
    wrong = {
        "a cost averaged over everything": cost.mean(),
        "a cost averaged over the draws": cost.mean(0),
        "a cost averaged over the batch": cost.mean(-1),
        "a cost with one batch element too few": cost[:, 1:],
        "a transposed cost": cost.t(),
        "a cost with a dimension too many": cost.unsqueeze(-1).expand(-1, -1, 7),
        "a cost of integers": cost.detach().long(),
    }
    for what, value in wrong.items():
        message = refuses(lambda value=value: sample.surrogate(value), what)  # type: ignore[misc]
        expect("got" in message, f"the message about {what} does not say what it got: {message}")
    return ", ".join(wrong)


def refused_params(subject: Subject) -> str:
    """NaN, infinite, integer and wrongly sized params are refused, saying what is needed and what was got."""
    layer = subject.build()
    good = subject.params(4)

    def spoiled(value: float) -> Tensor:
        params = good.clone()
        params[1, 0] = value
        return params

    wrong = {
        "NaN": spoiled(math.nan),
        "infinity": spoiled(math.inf),
        "integers": good.long(),
        "one feature too many": torch.cat([good, good[:, :1]], -1),
        "one feature too few": good[:, 1:],
        "no dimension": good[0, 0],
    }
    for what, params in wrong.items():
        for training in (True, False):
            layer.train(training)
            message = refuses(lambda params=params: layer.sample(params), what)  # type: ignore[misc]
            expect(
                "needed" in message and "got" in message,
                f"the message about {what} does not say what is needed and what it got: {message}",
            )
    return ", ".join(wrong)


def extreme_params(subject: Subject) -> str:
    """Params of +-1e4, at a temperature of 1e-3 where there is one: finite, or refused by a ValueError; never NaN."""
    variants: list[tuple[str, StochasticLayer]] = [("params of +-1e4", subject.build(torch.float32))]
    if subject.template is None and hasattr(variants[0][1], "temperature"):
        with contextlib.suppress(ValueError):  # a layer may set itself a lower limit
            variants.append(("a temperature of 1e-3", subject.build(torch.float32, temperature=1e-3)))
    refused = []
    for what, layer in variants:
        for scale in (1e4, 1.0):
            params = subject.params(8, dtype=torch.float32).sign() * scale
            try:
                run = step(layer, params, PolynomialCost("quadratic", layer.out_features).float())
            except ValueError:
                refused.append(what)
                continue
            found = {
                "z": run.sample.z,
                "log_prob": run.sample.log_prob,
                "surrogate()": run.loss,
                "gradient": run.encoder,
            }
            for name, tensor in found.items():
                remedy = "bound it, or refuse such params in Family.check()"
                expect(torch.isfinite(tensor).all(), f"{name} is not finite for {what}, +-{scale:g}; {remedy}")
    return "finite" if not refused else f"refused: {refused[0]}"
