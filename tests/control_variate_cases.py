"""x"""

import torch
from control_variate_problems import BITS, CATEGORIES

SMALL = {"hidden_features": 8}
BOTH = {**SMALL, "control_variate": "both"}
UNSCALED = {"normalize": False, "baseline": {"name": "learned", "hidden_features": 8}}
CASES = [
    ("leave_one_out", BITS),
    ("leave_one_out", {**CATEGORIES, "num_samples": 3}),
    ("leave_one_out", {"latent_dim": 2, "family": "gaussian", "num_samples": 4}),
    ("nvil", {**BITS, **UNSCALED}),
    ("nvil", {**CATEGORIES, **UNSCALED, "num_samples": 2}),
    ("muprop", BITS),
    ("muprop", {**CATEGORIES, "num_samples": 2}),
    ("rebar", BITS),
    ("rebar", CATEGORIES),
    ("rebar", {**BITS, "num_samples": 2, "temperature": 0.2}),
    ("relax", {**BITS, **SMALL}),
    ("relax", {**CATEGORIES, **SMALL, "num_samples": 2}),
    ("relax", {**BITS, **BOTH}),
    ("relax", {**CATEGORIES, **BOTH, "num_samples": 2}),
    ("double_cv", BITS),
    ("double_cv", {**CATEGORIES, "num_samples": 3}),
    ("rodeo", {**BITS, **SMALL}),
    ("rodeo", {**BITS, **SMALL, "num_samples": 3}),
    ("rodeo", {**BITS, **SMALL, "taylor": False}),
]
DISCRETE = [case for case in CASES if case[1].get("family") != "gaussian"]
MAIN = [
    ("nvil", {**BITS, **UNSCALED}),
    *(case for case in CASES if case[1] in (BITS, {**BITS, **SMALL}, {**BITS, **BOTH})),
]
LEARNED = [case for case in CASES if case[0] in ("rebar", "relax", "rodeo")]


def disturb(layer):
    """Control variates that are neither at their start nor any good: an unbiased layer stays so."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer
