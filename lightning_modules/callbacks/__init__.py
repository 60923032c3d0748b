"""Lightning callbacks: reproducible noise, pictures, schedules, a warning of collapse, a report."""

from lightning_modules.callbacks.collapse import CollapseWarning
from lightning_modules.callbacks.pictures import Pictures
from lightning_modules.callbacks.report import Report
from lightning_modules.callbacks.schedules import TemperatureSchedule
from lightning_modules.noise import ReproducibleNoise

__all__ = ["CollapseWarning", "Pictures", "Report", "ReproducibleNoise", "TemperatureSchedule"]
