"""Every registered layer has its certificate; every planted mistake is found, by the check that is named after it."""

import math
from dataclasses import replace

import pytest
import torch

import stochastic_layers as sl
from stochastic_layers.discrete_families import BernoulliFamily
from stochastic_layers.registry import layer_class
from stochastic_layers.score_function import Reinforce
from stochastic_layers.straight_through import StraightThrough
from stochastic_layers.testing import CHECKS, COSTS, check_layer, exact_value

REGISTRY = [(name, family) for name in sl.list_layers() for family in sl.describe(name).families]


@pytest.mark.parametrize(("name", "family"), REGISTRY)
def test_a_registered_layer_keeps_the_contract(name, family):
    check_layer(name, family=family, quick=True).require()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), REGISTRY)
def test_a_registered_layer_has_the_means_it_states_and_compiles(name, family):
    certificate = check_layer(name, family=family, checks=["gradients", "compiled step"]).require()
    if family not in ("bernoulli", "categorical", "gaussian"):
        return  # the family's own tests hold its expectations
    # nothing was left out for want of power or of an exact value
    assert not [row.check for row in certificate.rows if row.outcome == "not applicable"]
    outcome = "passed" if certificate.unbiased is True else "measured"
    found = {row.check: row.outcome for row in certificate.rows}
    assert all(found[f"encoder gradient, {kind} cost"] == outcome for kind in COSTS)


class Control(Reinforce):
    """REINFORCE on bits without a baseline, for planting mistakes into."""

    families = ("bernoulli",)

    def __init__(self, latent_dim, *, family="bernoulli", num_samples=2):
        super().__init__(latent_dim, family=family, num_samples=num_samples, baseline="none")


class OwnSampleBaseline(Control):
    def draw(self, params, context):
        sample = super().draw(params, context)
        return replace(sample, credit=lambda cost: ((cost - cost.mean(0)).detach() * sample.log_prob).mean(0))


class SignFlip(Control):
    def draw(self, params, context):
        sample = super().draw(params, context)
        return replace(sample, credit=lambda cost: -sample.credit(cost))


class WrongWeights(Control):
    def draw(self, params, context):
        sample = super().draw(params, context)
        return replace(sample, weights=torch.ones_like(sample.weights))


class SoftEvalDraws(Control):
    def sample(self, params, context=None):
        sample = super().sample(params, context)
        return sample if self.training else replace(sample, z=0.9 * sample.z + 0.05)


class WrongLawInEval(Control):
    def sample(self, params, context=None):
        return super().sample(params if self.training else 0.8 * params, context)


class WrongLawInTraining(Control):
    def draw(self, params, context):
        return super().draw(0.8 * params, context)


class DetachedLaw(Control):  # the references, which are made of the same law, forget the gradient as well
    def law(self, params):
        return super().law(torch.cat([params[..., :1], params[..., 1:].detach()], -1))


class GradientInEval(StraightThrough):
    families = ("bernoulli",)

    def sample(self, params, context=None):
        return super().sample(params, context) if self.training else super().train().sample(params, context)


class UndeclaredCostGradient(StraightThrough):
    needs = ("cost",)


class UndeclaredRelaxation(sl.GumbelSoftmax):
    needs = ("cost_gradient",)


class UndeclaredCost(Control):  # silently without gradient outside capture()
    needs = ("cost_gradient",)


class Float32Inside(Control):
    def draw(self, params, context):
        return super().draw(params.float(), context)


class Half(Control):
    def law(self, params):
        return super().law(params.half() if params.dtype == torch.float32 else params)


class ViewsParams(Control):
    def draw(self, params, context):
        # reads the memory of a strided tensor in another order
        return super().draw(torch.as_strided(params, params.shape, torch.empty(params.shape).stride()), context)


class TwoPointsStatedAsOne(Control):
    evaluations = 1


class DecoderTwice(Control):
    def draw(self, params, context):
        sample = super().draw(params, context)
        return replace(sample, credit=lambda cost: sample.credit(cost) + cost.mean(0))


class HiddenState(Control):
    steps = 0.0

    def draw(self, params, context):
        sample = super().draw(params, context)
        self.steps += 1.0
        steps = self.steps
        return replace(sample, credit=lambda cost: steps * sample.credit(cost))


class OverflowingLaw(Control):
    def draw(self, params, context):
        sample = super().draw(params, context)
        p = params.exp() / (1 + params.exp())
        return replace(sample, credit=lambda cost: (cost.detach() * (sample.z * p.log()).sum(-1)).mean(0))


class OwnParameterLeaks(Control):
    def __init__(self, latent_dim, *, family="bernoulli", num_samples=2):
        super().__init__(latent_dim, family=family, num_samples=num_samples)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def draw(self, params, context):
        sample = super().draw(params, context)
        weight = 2.0 if self.scale.requires_grad else 1.0
        return replace(sample, credit=lambda cost: weight * sample.credit(cost))


class CompilesInTwoGraphs(Control):
    def draw(self, params, context):
        torch._dynamo.graph_break()
        return super().draw(params, context)


class AcceptsReducedCosts(Control):
    def sample(self, params, context=None):
        sample = super().sample(params, context)
        return Lenient(**{name: getattr(sample, name) for name in sample.__dataclass_fields__})


class Lenient(sl.Sample):
    def _check(self, cost):
        pass


class SumsTheBatchWrongly(Control):
    def draw(self, params, context):
        sample = super().draw(params, context)

        def credit(cost):
            log_prob = sample.log_prob.flatten(cost.dim()).mean(-1) if sample.log_prob.dim() > cost.dim() else None
            return (cost.detach() * (sample.log_prob if log_prob is None else log_prob)).mean(0)

        return replace(sample, credit=credit)


class BadMode(Control):
    def mode(self, params):
        return 1 - super().mode(params)


class TakesNaN(Control):
    def __init__(self, latent_dim, *, family="bernoulli", num_samples=2):
        super().__init__(latent_dim, family=family, num_samples=num_samples)
        self.family = Unchecked(latent_dim)


class Unchecked(BernoulliFamily):
    def check(self, params, low, high):
        pass

    def sample(self, q, num_samples):
        return (torch.rand(num_samples, *q.mean.shape, dtype=q.mean.dtype) < q.mean).to(q.mean.dtype)


class TakesAnyLatentDim(Control):
    def __init__(self, latent_dim, *, family="bernoulli", num_samples=2):
        super().__init__(max(1, int(latent_dim or 1)), family=family, num_samples=num_samples)


class DimensionTooMany(Control):
    def draw(self, params, context):
        sample = super().draw(params, context)
        return replace(sample, credit=lambda cost: sample.credit(cost).unsqueeze(0))


class MeanOverTheBatch(Control):
    def draw(self, params, context):
        sample = super().draw(params, context)
        return replace(sample, credit=lambda cost: sample.credit(cost) / max(1, params[..., 0].numel()))


CONTROLS = [
    (OwnSampleBaseline, "encoder gradient, linear cost"),
    (SignFlip, "encoder gradient, linear cost"),
    (WrongWeights, "weights"),
    (WrongWeights, "value, linear cost"),
    (SoftEvalDraws, "draws in eval"),
    (WrongLawInEval, "draws in eval"),
    (WrongLawInTraining, "draws in training"),
    (DetachedLaw, "density gradient"),
    (GradientInEval, "draws in eval"),
    (UndeclaredCostGradient, "black box cost"),
    (UndeclaredRelaxation, "support in training"),
    (UndeclaredCost, "outside capture"),
    (UndeclaredCost, "shifted cost"),
    (Float32Inside, "precision"),
    (Half, "precision"),
    (ViewsParams, "non contiguous params"),
    (TwoPointsStatedAsOne, "evaluations"),
    (DecoderTwice, "decoder gradient"),
    (HiddenState, "copies and state"),
    (OverflowingLaw, "extreme params"),
    (OwnParameterLeaks, "own parameters"),
    (CompilesInTwoGraphs, "compiled step"),
    (AcceptsReducedCosts, "refused costs"),
    (SumsTheBatchWrongly, "encoder gradient, asymmetric cost summed over the batch"),
    (BadMode, "mode of q"),
    (TakesNaN, "refused params"),
    (TakesAnyLatentDim, "construction"),
    (DimensionTooMany, "batch shapes"),
    (MeanOverTheBatch, "encoder gradient, linear cost"),
]


def test_the_layer_that_mistakes_are_planted_into_passes():
    check_layer(Control, quick=True).require()
    check_layer(Control, checks=["gradients"], max_draws=100_000).require()


@pytest.mark.parametrize(("cls", "row"), CONTROLS, ids=lambda v: getattr(v, "__name__", v))
def test_a_planted_mistake_is_found(cls, row):
    check = row if row in CHECKS else "gradients"
    certificate = check_layer(cls, checks=[check], max_draws=100_000)
    assert row in [failure.check for failure in certificate.failures], str(certificate)
    with pytest.raises(AssertionError, match=row):
        certificate.require()


def test_an_own_sample_baseline_shrinks_the_gradient_by_one_over_the_samples():
    failures = check_layer(OwnSampleBaseline, checks=["gradients"], max_draws=100_000).failures
    found = [row.detail for row in failures if row.check == "encoder gradient, linear cost"]
    assert found and found[0].startswith("0.5 of the exact encoder off")


def test_the_bias_of_straight_through_is_measured_and_zero_for_a_linear_cost():
    biases = check_layer("straight_through", checks=["gradients"]).biases
    assert biases["encoder gradient, linear cost"][0] < 1e-9
    bias, error = biases["encoder gradient, cubic cost"]
    assert bias > 0.05 and error < bias / 8


def test_a_layer_without_spread_is_proved_exactly():
    certificate = check_layer("enumeration", checks=["gradients"]).require()
    assert certificate.proof == "exact"
    assert check_layer("reinforce", checks=["gradients"], max_draws=20_000).proof == "statistical"


def test_a_foreign_expectation_takes_the_place_of_enumeration():
    calls = []

    def expectation(layer, params, cost):
        calls.append(params.shape)
        return exact_value(layer, params, cost)

    check_layer(Control, checks=["gradients"], expectation=expectation, max_draws=20_000).require()
    assert calls

    def wrong(layer, params, cost):
        return exact_value(layer, 0.5 * params, cost)

    assert not check_layer(Control, checks=["gradients"], expectation=wrong, max_draws=100_000).passed


def test_a_law_that_cannot_be_enumerated_is_not_applicable():
    def unknown(layer, params, cost):
        raise ValueError("no closed form.")

    (row,) = check_layer(Control, checks=["gradients"], expectation=unknown).rows
    assert row.outcome == "not applicable" and "expectation=" in row.detail


def test_too_few_draws_for_the_power_are_reported_and_not_passed():
    certificate = check_layer(Control, checks=["gradients"], max_draws=20_000)
    rows = [row for row in certificate.rows if row.outcome == "not applicable"]
    assert rows and all("draws would be needed" in row.detail for row in rows)


def test_a_layer_object_is_tested_without_being_changed():
    layer = sl.create("reinforce", latent_dim=2, baseline="learned", num_samples=3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    certificate = check_layer(layer, quick=True).require()
    assert {row.check: row.outcome for row in certificate.rows}["own parameters"] == "passed"
    assert certificate.evaluations == 3
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="layer object"):
        check_layer(layer, family="gaussian")


def test_a_layer_of_one_joint_variable_is_given_one():
    class Joint(Control):
        def __init__(self, latent_dim, *, family="bernoulli", num_samples=2):
            if latent_dim != 1:
                raise ValueError(f"needed latent_dim=1, got {latent_dim!r}.")
            super().__init__(latent_dim, family=family, num_samples=num_samples)

    certificate = check_layer(Joint, quick=True).require()
    assert "1 latent" in certificate.law


def test_an_unknown_check_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'weight'; did you mean 'weights'"):
        check_layer(Control, checks=["weight"])


def test_the_text_of_a_certificate_has_a_line_for_each_row():
    certificate = check_layer(WrongWeights, checks=["weights", "evaluations"])
    head, *lines = str(certificate).splitlines()
    assert "FAILED" in head and len(lines) == 2
    assert "failed" in lines[0] and "sum to 2" in lines[0] and "passed" in lines[1]
    assert math.isnan(certificate.largest_z or math.nan) and certificate.proof == "none"


def test_every_registered_class_is_found_by_its_name():
    assert {layer_class(name).name for name, _ in REGISTRY} == set(sl.list_layers())
