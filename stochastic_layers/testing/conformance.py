"""Run every check on a layer and write its certificate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from stochastic_layers.layer import StochasticLayer
from stochastic_layers.registry import nearest
from stochastic_layers.testing import contract, honesty, laws, means, refusals
from stochastic_layers.testing.certificate import Certificate, Row
from stochastic_layers.testing.exact import exact_value
from stochastic_layers.testing.moments import Expectation
from stochastic_layers.testing.subject import NotApplicable, Subject

__all__ = ["CHECKS", "check_layer"]

Check = Callable[[Subject], "str | Iterable[Row]"]

_QUICK: tuple[Check, ...] = (
    contract.capability_record,
    contract.construction,
    contract.features,
    contract.batch_shapes,
    contract.precision,
    contract.mixed_precision,
    contract.devices,
    contract.non_contiguous_params,
    contract.reported_value,
    contract.weights,
    contract.evaluations,
    refusals.refused_costs,
    refusals.refused_params,
    refusals.extreme_params,
    contract.copies_and_state,
    laws.draws_in_eval,
    laws.draws_in_training,
    laws.support_in_training,
    laws.mode_of_q,
    laws.density_gradient,
    honesty.black_box_cost,
    honesty.shifted_cost,
    honesty.outside_capture,
    honesty.inside_capture,
    honesty.constant_cost,
    honesty.decoder_gradient,
    honesty.own_parameters,
    honesty.summed_batch,
)
_SLOW: tuple[Check, ...] = (honesty.compiled_step, means.gradients)
_BY_NAME: dict[str, Check] = {check.__name__.replace("_", " "): check for check in (*_QUICK, *_SLOW)}

CHECKS: tuple[str, ...] = tuple(_BY_NAME)


def check_layer(
    layer: str | StochasticLayer | type[StochasticLayer],
    *,
    family: str | None = None,
    options: Mapping[str, Any] | None = None,
    checks: Sequence[str] | None = None,
    quick: bool = False,
    seed: int = 0,
    expectation: Expectation = exact_value,
    visible_bias: float = 0.05,
    max_draws: int = 4_000_000,
    backend: str = "aot_eager",
) -> Certificate:
    """Test a layer against the contract and against its own capability record.

    Nothing is trained and the layer that is given is not changed; random state is left as it was.

    Args:
        layer: A registered name, a layer class, or a layer (a deep copy of it is tested; construction is not).
        family: The distribution family; by default the layer's own default.
        options: Further constructor arguments; ``latent_dim`` and ``num_categories`` are chosen where not given.
        checks: Names out of :data:`CHECKS`; by default all.
        quick: Leave out the two slow checks, compilation and the means of the gradients.
        seed: Seed of parameters and draws.
        expectation: Called as ``expectation(layer, params, cost)``, gives E_q[cost] ``[*batch]``, differentiable in
            params and in the cost's parameters. The default knows the discrete families and the Gaussian.
        visible_bias: The relative bias that the statistical checks must be able to see, with power 0.998.
        max_draws: Most draws of one statistical check; one that would need more is reported as not applicable.
        backend: Backend for the check of ``torch.compile``.

    Returns:
        The certificate; ``print`` it, look at ``passed``, or call ``require()`` in a test.

    Raises:
        ValueError: Unknown name, family or check, or the layer cannot be built.

    Example:
        >>> from stochastic_layers.testing import check_layer
        >>> certificate = check_layer("straight_through", checks=["weights", "evaluations"])
        >>> print(certificate)
        straight_through (bernoulli, 3 latent, 8 outcomes): passed
          weights      passed          1 points in eval()
          evaluations  passed          1 = num_samples
    """
    if checks is None:
        checks = [name for name, check in _BY_NAME.items() if not (quick and check in _SLOW)]
    for name in checks:
        if name not in _BY_NAME:
            raise ValueError(f"needed the name of a check, got {name!r}; {nearest(name, _BY_NAME)}")
    subject = Subject(
        layer,
        family=family,
        options=options,
        seed=seed,
        expectation=expectation,
        visible_bias=visible_bias,
        max_draws=max_draws,
        backend=backend,
    )
    rows: list[Row] = []
    with torch.random.fork_rng(), torch.enable_grad():
        for name in checks:
            torch.manual_seed(seed)
            rows += _run(name, _BY_NAME[name], subject)
        built, evaluations = subject.build(), None
        with contextlib.suppress(Exception):  # a row says what is wrong
            evaluations = built.sample(subject.params(1)).z.shape[0]
    return Certificate(
        layer=subject.name,
        family=subject.family,
        law=laws.describe_law(built),
        unbiased=built.unbiased,
        evaluations=evaluations,
        rows=tuple(rows),
    )


def _run(name: str, check: Check, subject: Subject) -> list[Row]:
    rows: list[Row] = []
    try:
        found = check(subject)
        if isinstance(found, str):
            return [Row(name, "passed", found)]
        for row in found:
            rows.append(row)
        return rows
    except NotApplicable as reason:
        return [*rows, Row(name, "not applicable", str(reason))]
    except AssertionError as failure:
        return [*rows, Row(name, "failed", str(failure))]
    except Exception as error:  # whatever a broken layer raises is a finding and not the end of the run
        return [*rows, Row(name, "failed", f"{type(error).__name__}: {error}")]
