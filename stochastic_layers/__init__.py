"""Drop-in sampling layers for PyTorch: swap the gradient estimator by changing one word."""

from stochastic_layers.adapters import ChannelsFirst
from stochastic_layers.baselines import Baseline, LearnedBaseline, LeaveOneOut, MovingAverage
from stochastic_layers.control_variates import NVIL, MuProp
from stochastic_layers.double_cv import DoubleControlVariate
from stochastic_layers.exact import Enumeration
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.pathwise import Gaussian
from stochastic_layers.rao_blackwell import CoordinateFlip, LocalExpectation
from stochastic_layers.rebar import Rebar, Relax
from stochastic_layers.registry import Description, create, describe, list_layers, register
from stochastic_layers.relaxed import GumbelSoftmax
from stochastic_layers.rodeo import Rodeo
from stochastic_layers.score_function import Dice, LeaveOneOutReinforce, Reinforce
from stochastic_layers.sparse import SparsemaxMarginalization
from stochastic_layers.straight_through import StraightThrough
from stochastic_layers.surrogate import capture, surrogate
from stochastic_layers.without_replacement import SumAndSample, UnorderedSet

__all__ = [
    "NVIL",
    "Baseline",
    "ChannelsFirst",
    "CoordinateFlip",
    "Description",
    "Dice",
    "DoubleControlVariate",
    "Enumeration",
    "Gaussian",
    "GumbelSoftmax",
    "LearnedBaseline",
    "LeaveOneOut",
    "LeaveOneOutReinforce",
    "LocalExpectation",
    "MovingAverage",
    "MuProp",
    "Rebar",
    "Reinforce",
    "Relax",
    "Rodeo",
    "Sample",
    "SparsemaxMarginalization",
    "StochasticLayer",
    "StraightThrough",
    "SumAndSample",
    "UnorderedSet",
    "capture",
    "create",
    "describe",
    "list_layers",
    "register",
    "surrogate",
]
