"""Lightning callbacks: reproducible noise, gradient variance, pictures, a report."""

from lightning_modules.callbacks.gradient_variance import GradientVarianceMonitor
from lightning_modules.callbacks.pictures import Pictures
from lightning_modules.callbacks.report import Report
from lightning_modules.noise import ReproducibleNoise

__all__ = ["GradientVarianceMonitor", "Pictures", "Report", "ReproducibleNoise"]
