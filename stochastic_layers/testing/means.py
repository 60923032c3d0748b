"""The means of gradients and reported value against the exact ones: tested, or measured as bias."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stochastic_layers.layer import StochasticLayer
from stochastic_layers.point_mass import QuantizedFamily
from stochastic_layers.testing.certificate import Row
from stochastic_layers.testing.exact import COSTS, PolynomialCost, exact_value
from stochastic_layers.testing.honesty import SummedCost
from stochastic_layers.testing.moments import QUANTITIES, Expectation, Moments, measure_all, references
from stochastic_layers.testing.subject import NotApplicable, Subject

__all__ = ["gradients"]

PILOT_DRAWS = 20_000
BIAS_DRAWS = 100_000
MAX_REFERENCE_ERROR = 0.005  # a tenth of the bias that shall be visible
LABELS = {"encoder": "encoder gradient", "decoder": "decoder gradient", "value": "value"}


def gradients(subject: Subject) -> Iterator[Row]:
    """One row for each cost and quantity.

    What a layer states to be unbiased is tested: as many draws as make a bias of ``visible_bias`` along the exact
    gradient stand 8 standard errors out, then no coordinate, nor the projection, may be off by more than 5. False
    alarms: 6e-7 per coordinate; power: 0.998. Encoder gradients of a layer that states a bias, or a condition, are
    measured and reported; its decoder gradient and value are tested where its draws are exact.
    """
    layer = subject.build()
    params = subject.params(2)
    if isinstance(layer.family, QuantizedFamily):
        raise NotApplicable(
            "the draw is a step function of params, whose true gradient is zero; see the layer's own tests"
        )
    try:
        total = subject.expectation(layer, params, nn.Module.__new__(_One))
    except (ValueError, NotImplementedError) as error:
        raise NotApplicable(f"no exact expectation to compare with: {error} Pass expectation=...") from None
    if not torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-6):
        raise NotApplicable(
            f"no exact expectation to compare with: {subject.family!r} cannot be enumerated. Pass expectation=..."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        for kind in COSTS:
            yield from _rows(subject, layer, params, PolynomialCost(kind, layer.out_features), f"{kind} cost")
        summed = SummedCost("asymmetric", layer.out_features)
        try:
            sample = layer.sample(params.unsqueeze(0))
            sample.surrogate(summed(sample.z))
        except ValueError:
            return  # refused, which is allowed
        if layer.unbiased is True:
            yield from _rows(subject, layer, params.unsqueeze(0), summed, "asymmetric cost summed over the batch")


class _One(nn.Module):
    """The cost that is 1, by which an enumeration shows that it is one."""

    def __call__(self, z: Tensor) -> Tensor:
        return torch.ones(z.shape[:-1], dtype=z.dtype)


def _summed(expectation: Expectation) -> Expectation:
    """E_q also of a cost that has summed trailing batch dimensions, from that of its terms."""

    def value(layer: StochasticLayer, params: Tensor, cost_fn: nn.Module) -> Tensor:
        if not isinstance(cost_fn, SummedCost):
            return expectation(layer, params, cost_fn)
        terms = PolynomialCost(cost_fn.kind, layer.out_features)
        terms.theta, terms.matrix = cost_fn.theta, cost_fn.matrix
        return expectation(layer, params, terms).sum(-1)

    return value


def _refined(layer: StochasticLayer, params: Tensor, cost_fn: nn.Module) -> Tensor:
    return exact_value(layer, params, cost_fn, refinement=1)


def _rows(
    subject: Subject, layer: StochasticLayer, params: Tensor, cost_fn: PolynomialCost, label: str
) -> Iterator[Row]:
    tested = list(QUANTITIES) if layer.unbiased is True else ["decoder", "value"] if layer.exact_draws else []
    points = layer.sample(params).z.shape[0]

    refinable = subject.expectation is exact_value  # what a finer rule changes is the error of the reference
    expectation = _summed(_refined if refinable else subject.expectation)
    coarse = _summed(exact_value) if refinable else None
    exact = references(layer, params, cost_fn, expectation=expectation, coarse=coarse)

    def run(num_draws: int) -> dict[str, Moments]:
        return measure_all(
            layer,
            params,
            cost_fn,
            num_draws=num_draws,
            chunk_size=max(500, 2 * PILOT_DRAWS // points),
            exact=exact,
        )

    found = run(PILOT_DRAWS)
    needed = {}
    for name in tested:
        error = found[name].projection[1]
        ratio = (
            8 * error / subject.visible_bias if math.isfinite(error) else 0.0
        )  # no direction where the exact is zero
        needed[name] = int(PILOT_DRAWS * ratio**2 * 1.2)
    draws = [n for n in needed.values() if n <= subject.max_draws]
    enough = max([*draws, PILOT_DRAWS if len(tested) == len(QUANTITIES) else BIAS_DRAWS])
    if enough > PILOT_DRAWS:
        found = run(enough)
    for name in QUANTITIES:
        check = f"{LABELS[name]}, {label}"
        if cost_fn.kind == "constant" and name == "decoder":
            continue  # zero by construction of the cost
        yield _tested(check, name, found[name], needed[name]) if name in needed else _bias(check, name, found[name])


def _tested(check: str, name: str, found: Moments, needed: int) -> Row:
    exact = float((found.standard_error / (1 + found.exact.abs())).max()) < 1e-10
    z = found.largest_z
    off = z >= 5
    deviation = f"{found.relative_bias:.2g} of the exact {name} off" if off else f"|z| {z:.1f}"
    detail = f"{deviation} ({z:.1f} standard errors)" if off else deviation
    if exact:
        detail = "exact up to rounding" if not off else f"{deviation}, without any spread"
    detail += f", {found.num_draws} draws"
    if found.relative_error > MAX_REFERENCE_ERROR and name != "value":
        return Row(check, "not applicable", f"the reference is known to {found.relative_error:.1e} only", name, z)
    if not off and needed > found.num_draws:
        return Row(check, "not applicable", f"the variance is too high: {needed} draws would be needed", name, z)
    return Row(check, "failed" if off else "passed", detail, name, z, exact)


def _bias(check: str, name: str, found: Moments) -> Row:
    difference = found.mean - found.exact
    size, norm = float(difference.norm()), float(found.exact.norm())
    if norm < 1e-12:
        return Row(check, "measured", f"off by {size:.2g} from zero", name, found.largest_z)
    noise = float(found.standard_error.square().sum())
    bias = math.sqrt(max(size**2 - noise, 0.0)) / norm
    # the coordinates may be correlated: the triangle inequality bounds the error of the difference's length
    error = float((difference.abs() * found.standard_error).sum()) / max(size, 1e-300) / norm
    detail = f"relative bias {bias:.3f} +- {error:.3f}, {found.num_draws} draws"
    return Row(check, "measured", detail, name, found.largest_z, False, bias, error)
