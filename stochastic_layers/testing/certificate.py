"""What a conformance run found: one row per check, as data and as plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Certificate", "Outcome", "Row"]

Outcome = Literal["passed", "failed", "measured", "not applicable"]


@dataclass(frozen=True)
class Row:
    """The result of one check.

    Attributes:
        check: Name of the check.
        outcome: ``"passed"``, ``"failed"``, ``"measured"`` (a figure that is neither right nor wrong, such as the bias
            of a layer that says it has one) or ``"not applicable"``.
        detail: What was found, or why the check failed or does not apply.
        quantity: For gradients, ``"encoder"``, ``"decoder"`` or ``"value"``; else empty.
        largest_z: Largest deviation from the exact value in standard errors, where there is one.
        exact: Whether the estimate had no spread, so that it was compared up to rounding.
        relative_bias: Norm of the measured bias over that of the exact value, less what noise adds to it.
        standard_error: Upper bound of the standard error of ``relative_bias``.
    """

    check: str
    outcome: Outcome
    detail: str = ""
    quantity: str = ""
    largest_z: float | None = None
    exact: bool = False
    relative_bias: float | None = None
    standard_error: float | None = None


@dataclass(frozen=True)
class Certificate:
    """The rows of one layer and family; ``str()`` of it is a table in plain text.

    Attributes:
        layer: The layer's name.
        family: The distribution family it was tested with.
        law: The law in words, and how its expectations were computed.
        unbiased: What the layer states.
        evaluations: Number of evaluations of the cost in one training step, as counted; ``None`` if it never drew.
        rows: One per check, in order.
    """

    layer: str
    family: str
    law: str
    unbiased: bool | str
    evaluations: int | None
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.outcome == "failed")

    @property
    def largest_z(self) -> float | None:
        """Largest deviation of a tested gradient or value that has a spread from the exact one, in standard errors."""
        rows = [r for r in self.rows if r.quantity and not r.exact and r.outcome != "measured"]
        values = [r.largest_z for r in rows if r.largest_z is not None]
        return max(values, default=None)

    @property
    def proof(self) -> str:
        """``"exact"``, ``"statistical"``, or ``"none"`` where no gradient or value was tested."""
        tested = [row for row in self.rows if row.quantity and row.outcome in ("passed", "failed")]
        if not tested:
            return "none"
        return "exact" if all(row.exact for row in tested) else "statistical"

    @property
    def biases(self) -> dict[str, tuple[float, float]]:
        """Relative bias of the encoder's gradient and its standard error, by check, where the layer states a bias."""
        return {
            row.check: (row.relative_bias, row.standard_error or 0.0)
            for row in self.rows
            if row.outcome == "measured" and row.quantity == "encoder" and row.relative_bias is not None
        }

    def require(self) -> Certificate:
        """Return the certificate itself.

        Raises:
            AssertionError: A check failed; the message lists the failures.
        """
        if not self.passed:
            lines = "\n".join(f"  {row.check}: {row.detail}" for row in self.failures)
            raise AssertionError(f"{self.layer} ({self.family}) failed {len(self.failures)} checks:\n{lines}")
        return self

    def __str__(self) -> str:
        width = max((len(row.check) for row in self.rows), default=0)
        head = f"{self.layer} ({self.law}): {'passed' if self.passed else 'FAILED'}"
        lines = [f"  {row.check:<{width}}  {row.outcome:<14}  {row.detail}".rstrip() for row in self.rows]
        return "\n".join([head, *lines])
