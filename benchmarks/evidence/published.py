"""Published figures, each with its source; nothing here was measured by us."""

from __future__ import annotations

__all__ = ["CATEGORICAL_VAE", "IWAE_NLL", "ONE_BIT_LOSS", "QUADRATIC_OBJECTIVE", "QUADRATIC_VARIANCE", "RODEO_VARIANCE"]

# Read off results/var_dyn.png of github.com/thjashin/rodeo, panel "MNIST" (mean of 5 seeds): columns of pixels are
# 4,400 steps wide and rows 0.9e-4 high, so that a point is good to about 2,000 steps and 1 % in variance. Names are
# those of our layers; the number is that of evaluations of the cost.
RODEO_VARIANCE: dict[tuple[str, int], list[tuple[int, float]]] = {
    ("disarm", 2): [(4800, 1.591e-2), (9200, 1.615e-2), (13600, 1.607e-2), (18000, 1.589e-2)],
    ("double_cv", 2): [(4800, 1.776e-2), (9200, 1.719e-2), (13600, 1.652e-2), (18000, 1.568e-2)],
    ("rodeo", 2): [(4800, 1.160e-2), (9200, 1.127e-2), (13600, 1.095e-2), (18000, 1.071e-2)],
    ("arms", 3): [(4800, 0.882e-2), (9200, 0.876e-2), (13600, 0.860e-2), (18000, 0.850e-2)],
    ("relax", 3): [(4800, 0.738e-2), (9200, 0.773e-2), (13600, 0.813e-2), (18000, 0.823e-2)],
}

# Test negative log-likelihood in nats after 3,280 epochs, one stochastic layer, dynamically binarized MNIST. Pathwise:
# "Importance Weighted Autoencoders" (Burda, Grosse, Salakhutdinov, 2015), table 1; DReG: the re-implementation
# github.com/nbip/IWAE, which has 86.35, 85.18 and 84.59 for pathwise.
IWAE_NLL: dict[tuple[str, int], float] = {
    ("pathwise", 1): 86.76,
    ("pathwise", 5): 85.54,
    ("pathwise", 50): 84.78,
    ("dreg", 1): 86.08,
    ("dreg", 5): 84.90,
    ("dreg", 50): 84.32,
}

# Negative training ELBO in nats after 160 epochs, 4 variables of 8 categories, grey MNIST, mean of 10 seeds: the column
# "8x4" of the table of MNIST-VAEs in "Bridging Discrete and Backpropagation: Straight-Through and Beyond" (Liu, Dong,
# Liu, Yu, Gao, 2023), whose names are ReinMax, ST, STGS, GST-1.0 and GR-MCK.
CATEGORICAL_VAE: dict[str, float] = {
    "reinmax": 124.66,
    "straight_through": 135.53,
    "straight_through_gumbel": 126.85,
    "gapped_straight_through": 126.35,
    "gumbel_rao": 125.94,
}

# Read off the figures results/var_quad.png and loss_quad.png of github.com/thjashin/double-cv (single runs).
QUADRATIC_VARIANCE: dict[str, list[tuple[int, float]]] = {
    "leave_one_out": [(0, 1.3e-9), (2000, 0.6e-9)],
    "disarm": [(0, 1.3e-9), (2000, 0.6e-9)],
    "exact_mean": [(0, 0.63e-9), (2000, 0.17e-9)],
    "double_cv": [(0, 1.3e-9), (1000, 0.0)],
}
QUADRATIC_OBJECTIVE: dict[str, list[tuple[int, float]]] = {
    "reinforce": [(2000, 0.2500)],
    "muprop": [(2000, 0.2500)],
    "leave_one_out": [(2000, 0.25054)],
    "disarm": [(2000, 0.25057)],
    "exact_mean": [(2000, 0.2507)],
    "double_cv": [(2000, 0.2510)],
}

# Exact loss over steps, decoded from the vector figures in github.com/duvenaud/relax, paper/figures (single runs).
_STEPS = (500, 1000, 2000, 4000, 8000, 10000)
ONE_BIT_LOSS: dict[str, dict[str, list[tuple[int, float]]]] = {
    "0.499": {
        name: list(zip(_STEPS, losses, strict=True))
        for name, losses in {
            "reinforce": (0.250137, 0.250397, 0.250451, 0.249889, 0.249937, 0.249597),
            "rebar": (0.249795, 0.249882, 0.250054, 0.250137, 0.249995, 0.249939),
            "relax": (0.249945, 0.249849, 0.249673, 0.249417, 0.249267, 0.249129),
            "enumeration": (0.249117, 0.249042, 0.249013, 0.249004, 0.249001, 0.249001),
        }.items()
    },
    "0.45": {
        "reinforce": [(3000, 0.2095)],
        "rebar": [(3000, 0.2068)],
        "relax": [(3000, 0.2032)],
        "enumeration": [(3000, 0.2028)],
    },
}
