"""Compare layers on one's own model and data: the same budget, the same seeds, one process for each run."""

from lightning_modules.comparison.function import compare
from lightning_modules.comparison.result import Comparison

__all__ = ["Comparison", "compare"]
