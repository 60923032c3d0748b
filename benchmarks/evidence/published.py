"""Published figures, each with its source; nothing here was measured by us."""

from __future__ import annotations

__all__ = ["IWAE_NLL", "RODEO_VARIANCE"]

# Read off results/var_dyn.png of github.com/thjashin/rodeo, panel "MNIST" (mean of 5 seeds): columns of pixels are 4,400
# steps wide and rows 0.9e-4 high, so that a point is good to about 2,000 steps and 1 % in variance. Names are those of
# our layers; the number is that of evaluations of the cost.
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
