"""Metrics of latent-variable models as torchmetrics: float64 sums over examples, so that ranks reduce exactly."""

from lightning_modules.metrics.bounds import BitsPerDimension, EvidenceLowerBound
from lightning_modules.metrics.importance import EffectiveSampleSize, ImportanceWeightedBound, importance_statistics
from lightning_modules.metrics.latents import ActiveUnits, CodePerplexity, KLPerDimension
from lightning_modules.metrics.means import ExampleMean

__all__ = [
    "ActiveUnits",
    "BitsPerDimension",
    "CodePerplexity",
    "EffectiveSampleSize",
    "EvidenceLowerBound",
    "ExampleMean",
    "ImportanceWeightedBound",
    "KLPerDimension",
    "importance_statistics",
]
