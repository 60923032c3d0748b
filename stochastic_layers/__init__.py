"""Drop-in sampling layers for PyTorch: swap the gradient estimator by changing one word."""

from stochastic_layers.adapters import ChannelsFirst
from stochastic_layers.arms import ARMS
from stochastic_layers.baselines import Baseline, LearnedBaseline, LeaveOneOut, MovingAverage
from stochastic_layers.captures import capture
from stochastic_layers.control_variates import NVIL, MuProp
from stochastic_layers.coupled import ARM, DisARM, DisARMTree
from stochastic_layers.coupled_categorical import ARSM, CARMS
from stochastic_layers.double_cv import DoubleControlVariate
from stochastic_layers.exact import Enumeration
from stochastic_layers.finite_scalar import FiniteScalarPerturbation, FiniteScalarQuantizer
from stochastic_layers.flows import Flow
from stochastic_layers.gumbel_straight_through import GappedStraightThrough, GumbelRao, StraightThroughGumbel
from stochastic_layers.hard_concrete import HardConcrete
from stochastic_layers.invertible_gaussian import InvertibleGaussian
from stochastic_layers.layer import Sample, StochasticLayer
from stochastic_layers.learned_quantizers import DiVeQ, SimVQ
from stochastic_layers.lookup_free import BinarySphericalQuantizer, LookupFreeQuantizer
from stochastic_layers.measure_valued import MeasureValued
from stochastic_layers.pathwise import Antithetic, Gaussian, Pathwise, QuasiMonteCarlo
from stochastic_layers.permutations import PlackettLuce
from stochastic_layers.poisson import Poisson, PoissonStraightThrough
from stochastic_layers.quantized import ResidualVectorQuantizer, RotationTrick, VectorQuantizer
from stochastic_layers.rao_blackwell import CoordinateFlip, LocalExpectation
from stochastic_layers.rebar import Rebar
from stochastic_layers.registry import Description, create, describe, list_layers, register
from stochastic_layers.reinmax import ReinMaxCV, ReinMaxRao
from stochastic_layers.relax import Relax
from stochastic_layers.relaxed import EntmaxGumbel, GumbelSoftmax
from stochastic_layers.rodeo import Rodeo
from stochastic_layers.score_function import Dice, LeaveOneOutReinforce, Reinforce
from stochastic_layers.soft_sort import SoftSort
from stochastic_layers.sparse import SparsemaxMarginalization
from stochastic_layers.straight_through import DecoupledStraightThrough, ReinMax, StraightThrough
from stochastic_layers.subsets import KSubset
from stochastic_layers.surrogate import surrogate
from stochastic_layers.without_replacement import SumAndSample, UnorderedSet

__version__ = "0.1.0"

__all__ = [
    "ARM",
    "ARMS",
    "ARSM",
    "CARMS",
    "NVIL",
    "Antithetic",
    "Baseline",
    "BinarySphericalQuantizer",
    "ChannelsFirst",
    "CoordinateFlip",
    "DecoupledStraightThrough",
    "Description",
    "DiVeQ",
    "Dice",
    "DisARM",
    "DisARMTree",
    "DoubleControlVariate",
    "EntmaxGumbel",
    "Enumeration",
    "FiniteScalarPerturbation",
    "FiniteScalarQuantizer",
    "Flow",
    "GappedStraightThrough",
    "Gaussian",
    "GumbelRao",
    "GumbelSoftmax",
    "HardConcrete",
    "InvertibleGaussian",
    "KSubset",
    "LearnedBaseline",
    "LeaveOneOut",
    "LeaveOneOutReinforce",
    "LocalExpectation",
    "LookupFreeQuantizer",
    "MeasureValued",
    "MovingAverage",
    "MuProp",
    "Pathwise",
    "PlackettLuce",
    "Poisson",
    "PoissonStraightThrough",
    "QuasiMonteCarlo",
    "Rebar",
    "ReinMax",
    "ReinMaxCV",
    "ReinMaxRao",
    "Reinforce",
    "Relax",
    "ResidualVectorQuantizer",
    "Rodeo",
    "RotationTrick",
    "Sample",
    "SimVQ",
    "SoftSort",
    "SparsemaxMarginalization",
    "StochasticLayer",
    "StraightThrough",
    "StraightThroughGumbel",
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
