"""MuProp, NVIL and the leave-one-out baseline, each against its formula."""

import pytest
import torch
from control_variate_problems import train
from small_problems import BITS, CATEGORIES, build

import stochastic_layers as sl
from stochastic_layers.testing import PolynomialCost, check_mean, measure


def test_muprop_is_exact_for_a_linear_cost():
    for options in (BITS, CATEGORIES):
        layer, params = build("muprop", options)
        moments = measure(layer, params, PolynomialCost("linear", layer.out_features), num_draws=50)
        assert float((moments.mean - moments.exact).abs().max()) < 1e-12
        assert float(moments.standard_error.max()) < 1e-8


def test_muprop_without_its_correction_is_caught():
    from stochastic_layers import control_variates

    class Uncorrected(sl.MuProp):
        def draw(self, params, context):
            sample = super().draw(params, context)
            right = sample.credit

            def credit(cost):
                kept = control_variates.jacobian_product
                control_variates.jacobian_product = lambda family, point, vector: torch.zeros_like(vector)
                try:
                    return right(cost)
                finally:
                    control_variates.jacobian_product = kept

            return self._sample(sample.q, sample.z, weights=sample.weights, credit=credit)

    _, params = build("muprop", BITS)
    with pytest.raises(AssertionError, match="standard errors off"):
        check_mean(Uncorrected(3).double(), params, PolynomialCost("quadratic", 3))


def test_leave_one_out_is_reinforce_with_that_baseline():
    first, params = build("leave_one_out", {**BITS, "num_samples": 3})
    second, _ = build("reinforce", {**BITS, "num_samples": 3, "baseline": "leave_one_out"})
    found = []
    for layer in (first, second):
        torch.manual_seed(0)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        sample.surrogate(sample.z.pow(3).sum(-1)).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_nvil_divides_by_the_running_deviation_from_before_the_step():
    """The same noise with and without normalisation: the gradients differ by exactly that factor."""
    cost = PolynomialCost("cubic", 3)
    found = {}
    for normalize in (True, False):
        torch.manual_seed(5)
        layer, params = build("nvil", {**BITS, "normalize": normalize, "baseline": "none"})
        for step in range(4):
            leaf = params.clone().requires_grad_()
            spread = float(layer.moments.std)
            sample = layer.sample(leaf)
            sample.surrogate(1000 * cost(sample.z)).sum().backward()
            found[normalize, step] = leaf.grad, spread
    assert found[True, 0][1] == 1.0
    assert found[True, 3][1] > 100
    for step in range(4):
        (divided, spread), (plain, _) = found[True, step], found[False, step]
        assert torch.allclose(divided * max(1.0, spread), plain, rtol=1e-6)


def test_nvil_does_not_amplify_small_costs():
    layer, params = build("nvil", {**BITS, "baseline": "none"})
    train(layer, params, lambda z: 1e-3 * z.sum(-1), steps=50)
    assert float(layer.moments.std) < 1e-2
    found = []
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    for normalize in (True, False):
        layer.normalize = normalize
        layer.load_state_dict(state)
        torch.manual_seed(0)
        leaf = params.clone().requires_grad_()
        sample = layer.sample(leaf)
        sample.surrogate(1e-3 * sample.z.sum(-1)).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_nvil_moments_are_those_of_the_cost():
    layer, params = build("nvil", {**BITS, "baseline": "none", "decay": 0.9})
    cost = PolynomialCost("cubic", 3)
    train(layer, params, lambda z: 500.0 + cost(z), steps=200, copies=200)
    sample = layer.eval().sample(params.expand(50_000, 2, 3))
    value = (500.0 + cost(sample.z)).detach()
    assert float(layer.moments.mean) == pytest.approx(float(value.mean()), rel=0.01)
    assert float(layer.moments.std) == pytest.approx(float(value.std()), rel=0.1)
