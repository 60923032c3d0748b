"""Drop-in sampling layers for PyTorch: swap the gradient estimator by changing one word."""

from stochastic_layers.adapters import ChannelsFirst
from stochastic_layers.baselines import Baseline, LearnedBaseline, LeaveOneOut, MovingAverage
from stochastic_layers.exact import Enumeration
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.lookup_free import FiniteScalarQuantizer, LookupFreeQuantizer
from stochastic_layers.pathwise import Gaussian
from stochastic_layers.quantized import ResidualVectorQuantizer, RotationTrick, VectorQuantizer
from stochastic_layers.rao_blackwell import CoordinateFlip, LocalExpectation
from stochastic_layers.registry import Description, create, describe, list_layers, register
from stochastic_layers.relaxed import GumbelSoftmax
from stochastic_layers.score_function import Reinforce
from stochastic_layers.sparse import SparsemaxMarginalization
from stochastic_layers.straight_through import StraightThrough
from stochastic_layers.surrogate import capture, surrogate
from stochastic_layers.without_replacement import SumAndSample, UnorderedSet

__all__ = [
    "Baseline",
    "ChannelsFirst",
    "CoordinateFlip",
    "Description",
    "Enumeration",
    "FiniteScalarQuantizer",
    "Gaussian",
    "GumbelSoftmax",
    "LearnedBaseline",
    "LeaveOneOut",
    "LocalExpectation",
    "LookupFreeQuantizer",
    "MovingAverage",
    "Reinforce",
    "ResidualVectorQuantizer",
    "RotationTrick",
    "Sample",
    "SparsemaxMarginalization",
    "StochasticLayer",
    "StraightThrough",
    "SumAndSample",
    "UnorderedSet",
    "VectorQuantizer",
    "capture",
    "create",
    "describe",
    "list_layers",
    "register",
    "surrogate",
]
