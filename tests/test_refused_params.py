"""Params that have no finite law are refused, on either side, and others are not."""

import math

import pytest
import torch

import stochastic_layers as sl


@pytest.mark.parametrize("sign", [1, -1])
def test_params_whose_square_overflows_are_refused_and_smaller_ones_are_not(sign):
    layer = sl.create("straight_through", latent_dim=3)
    assert bool(layer(torch.tensor([0.0, sign * 1e18, 0.0])).isfinite().all())
    with pytest.raises(ValueError, match=r"magnitude at most 1e\+18, got 2e\+18"):
        layer(torch.tensor([0.0, sign * 2e18, 0.0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["straight_through", "gaussian"])
def test_params_that_are_not_finite_are_counted(name, bad):
    layer = sl.create(name, latent_dim=3)
    params = torch.zeros(4, layer.in_features)
    params[1, 2] = params[3, 0] = bad
    with pytest.raises(ValueError, match=r"needed finite params, got 2 NaN or infinite values in \[4, [36]\]"):
        layer(params)


@pytest.mark.parametrize("sign", [1, -1])
def test_log_variances_that_overflow_are_refused_and_locs_as_large_are_not(sign):
    layer = sl.create("gaussian", latent_dim=2)
    assert bool(layer(torch.tensor([sign * 1e6, 0.0, sign * 80.0, 0.0])).isfinite().all())
    with pytest.raises(ValueError, match=r"log-variances between -80 and 80, got one of magnitude 81"):
        layer(torch.tensor([0.0, 0.0, sign * 81.0, 0.0]))
