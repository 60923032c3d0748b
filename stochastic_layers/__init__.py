"""Drop-in sampling layers for PyTorch: swap the gradient estimator by changing one word."""

from stochastic_layers.adapters import ChannelsFirst
from stochastic_layers.baselines import Baseline, LearnedBaseline, LeaveOneOut, MovingAverage
from stochastic_layers.coupled import ARM, ARMS, DisARM, DisARMTree
from stochastic_layers.coupled_categorical import ARSM, CARMS
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.pathwise import Gaussian
from stochastic_layers.registry import Description, create, describe, list_layers, register
from stochastic_layers.relaxed import GumbelSoftmax
from stochastic_layers.score_function import Reinforce
from stochastic_layers.straight_through import StraightThrough
from stochastic_layers.surrogate import capture, surrogate

__all__ = [
    "ARM",
    "ARMS",
    "ARSM",
    "CARMS",
    "Baseline",
    "ChannelsFirst",
    "Description",
    "DisARM",
    "DisARMTree",
    "Gaussian",
    "GumbelSoftmax",
    "LearnedBaseline",
    "LeaveOneOut",
    "MovingAverage",
    "Reinforce",
    "Sample",
    "StochasticLayer",
    "StraightThrough",
    "capture",
    "create",
    "describe",
    "list_layers",
    "register",
    "surrogate",
]
