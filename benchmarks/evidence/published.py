"""Published figures, each with its source; nothing here was measured by us."""

from __future__ import annotations

__all__ = ["RODEO_VARIANCE"]

RODEO_VARIANCE: dict[str, list[tuple[int, float]]] = {}
