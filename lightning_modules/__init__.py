"""A generic VAE on Lightning that trains any stochastic layer."""

from lightning_modules.callbacks import Pictures, Report, ReproducibleNoise
from lightning_modules.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedLogistic,
    GaussianLikelihood,
    Likelihood,
)
from lightning_modules.objectives import ELBO, IWAE, Objective
from lightning_modules.priors import LearnedPrior, Prior, StandardPrior
from lightning_modules.vae import VAE

__all__ = [
    "ELBO",
    "IWAE",
    "VAE",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "DiscretizedLogistic",
    "GaussianLikelihood",
    "LearnedPrior",
    "Likelihood",
    "Objective",
    "Pictures",
    "Prior",
    "Report",
    "ReproducibleNoise",
    "StandardPrior",
]
