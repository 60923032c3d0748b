"""The proofs this library applies to its layers, for yours: exact expectations, tests of stated power, certificates."""

from stochastic_layers.testing.certificate import Certificate, Row
from stochastic_layers.testing.conformance import CHECKS, check_layer
from stochastic_layers.testing.exact import COSTS, PolynomialCost, check_law, enumerate_outcomes, exact_value
from stochastic_layers.testing.moments import Moments, Reference, check_mean, measure, measure_all, references

__all__ = [
    "CHECKS",
    "COSTS",
    "Certificate",
    "Moments",
    "PolynomialCost",
    "Reference",
    "Row",
    "check_law",
    "check_layer",
    "check_mean",
    "enumerate_outcomes",
    "exact_value",
    "measure",
    "measure_all",
    "references",
]
