"""A generic VAE on Lightning that trains any stochastic layer."""

from lightning_modules.callbacks import (
    CollapseWarning,
    GradientVarianceMonitor,
    Pictures,
    Report,
    ReproducibleNoise,
    TemperatureSchedule,
)
from lightning_modules.checkpoints import CorruptCheckpointError, VerifiedCheckpointIO
from lightning_modules.classifier import StochasticClassifier
from lightning_modules.comparison import Comparison, compare
from lightning_modules.gradient_moments import GradientMoments
from lightning_modules.hierarchical import HierarchicalVAE
from lightning_modules.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedLogistic,
    GaussianLikelihood,
    Likelihood,
)
from lightning_modules.multi_sample import IWAE, RWS, TVO, Renyi
from lightning_modules.objectives import ELBO, Objective, Terms
from lightning_modules.priors import LearnedPrior, Prior, StandardPrior
from lightning_modules.scoring import LayerScore, LayerScores, score_layers
from lightning_modules.vae import VAE

__all__ = [
    "ELBO",
    "IWAE",
    "RWS",
    "TVO",
    "VAE",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "CollapseWarning",
    "Comparison",
    "CorruptCheckpointError",
    "DiscretizedLogistic",
    "GaussianLikelihood",
    "GradientMoments",
    "GradientVarianceMonitor",
    "HierarchicalVAE",
    "LayerScore",
    "LayerScores",
    "LearnedPrior",
    "Likelihood",
    "Objective",
    "Pictures",
    "Prior",
    "Renyi",
    "Report",
    "ReproducibleNoise",
    "StandardPrior",
    "StochasticClassifier",
    "TemperatureSchedule",
    "Terms",
    "VerifiedCheckpointIO",
    "compare",
    "score_layers",
]
