"""Lightning callbacks: reproducible noise, pictures, a report."""

from lightning_modules.callbacks.pictures import Pictures
from lightning_modules.callbacks.report import Report
from lightning_modules.noise import ReproducibleNoise

__all__ = ["Pictures", "Report", "ReproducibleNoise"]
