"""Lightning callbacks: reproducible noise, gradient variance, pictures, schedules, a warning of collapse, a report."""

from lightning_modules.callbacks.collapse import CollapseWarning
from lightning_modules.callbacks.gradient_variance import GradientVarianceMonitor
from lightning_modules.callbacks.pictures import Pictures
from lightning_modules.callbacks.report import Report
from lightning_modules.callbacks.schedules import TemperatureSchedule
from lightning_modules.noise import ReproducibleNoise

__all__ = [
    "CollapseWarning",
    "GradientVarianceMonitor",
    "Pictures",
    "Report",
    "ReproducibleNoise",
    "TemperatureSchedule",
]
