"""Two latent variables with params of both signs, for layers of bits and of categories."""

import pytest
import torch

BITS = {"latent_dim": 2, "family": "bernoulli"}
CATEGORIES = {"latent_dim": 2, "family": "categorical", "num_categories": 3}
FAMILIES = [pytest.param(BITS, id="bernoulli"), pytest.param(CATEGORIES, id="categorical")]
PARAMS = torch.tensor([[0.7, -0.4, -1.1, 0.3, 0.9, -0.2], [-0.6, 0.8, 0.2, -0.9, 0.4, 1.0]], dtype=torch.float64)
