"""Layers under ``torch.func``: per-example gradients by ``vmap``, which have the law of those of a batch."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import stochastic_layers as sl

# what they need is not to be had there, and what torch says of it
REFUSED = {
    # a derivative of their own
    "requires_grad_": {*("double_cv", "muprop", "rebar", "relax", "rodeo")},
    # statistics or a codebook that a step changes
    "in-place operation": {"nvil"},
    "Batching rule not implemented for stochastic_layers::": {"diveq", "residual_vq", "rotation_trick", "vq"},
    # a decision on values
    r"calling \.item\(\)": {"sparsemax_marginalization"},
    # a law with a derivative for which torch has no rule there
    "must override the setup_context": {("pathwise", law) for law in ("beta", "dirichlet", "power_spherical")},
}


def vmap_knows_views():
    try:
        vmap(lambda row: row.view(torch.int32))(torch.zeros(2, 2))
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not vmap_knows_views(), reason="needed a torch whose vmap takes views of another dtype")
PAIRS = [(name, family) for name in sl.list_layers() for family in sl.describe(name).families]
EXAMPLES = 4096


def a_layer(name, family):
    options = {"num_categories": 3} if sl.families.takes_categories(family) else {}
    if name in ("reinforce", "dice"):
        options["baseline"] = "none"
    return sl.create(name, latent_dim=1 if name == "arsm" else 2, family=family, **options)


def cost(z):
    weights = torch.linspace(-0.7, 1.1, z.shape[-1])
    return (z * weights - 0.3).sum(-1).square()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own gamma law, for one
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_gradients_of_single_examples_have_the_law_of_those_of_a_batch(name, family):
    torch.manual_seed(0)
    layer = a_layer(name, family)
    one = 0.5 * torch.randn(layer.in_features)
    params = one.expand(EXAMPLES, -1).contiguous()

    def loss(row):
        sample = layer.sample(row)
        return sample.surrogate(cost(sample.z))

    refused = [sentence for sentence, those in REFUSED.items() if {name, (name, family)} & those]
    if refused:
        with pytest.raises(RuntimeError, match=refused[0]):
            vmap(grad(loss), randomness="different")(params)
        return
    single = vmap(grad(loss), randomness="different")(params)
    batch = params.clone().requires_grad_()
    sample = layer.sample(batch)
    sample.surrogate(cost(sample.z)).sum().backward()
    error = ((single.var(0) + batch.grad.var(0)) / EXAMPLES).sqrt()
    # 5 standard errors: false alarms 6e-7 per coordinate, some 250 of them
    assert bool(((single.mean(0) - batch.grad.mean(0)).abs() <= 5 * error + 1e-6).all())
    assert torch.equal(single.var(0) > 1e-9, batch.grad.var(0) > 1e-9)  # each example has noise of its own


def test_params_that_are_not_finite_are_refused_whichever_example_has_them():
    layer = sl.create("straight_through", latent_dim=2)
    params = torch.zeros(5, 2)
    params[3, 1] = torch.nan
    with pytest.raises(ValueError, match="needed finite params"):
        vmap(lambda row: layer(row), randomness="different")(params)
    with pytest.raises(ValueError, match="needed finite params"):
        vmap(vmap(grad(lambda row: layer(row).sum()), randomness="different"), randomness="different")(params[None])


def test_an_ensemble_of_models_is_trained_in_one_call():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), sl.create("reinmax", latent_dim=4), nn.Linear(4, 1)) for _ in range(3)]
    weights, buffers = stack_module_state(models)
    x = torch.randn(7, 3)

    def loss(weights, buffers):
        return functional_call(models[0], (weights, buffers), (x,)).square().mean()

    gradients = vmap(grad(loss), randomness="different")(weights, buffers)
    assert {k: v.shape for k, v in gradients.items()} == {k: v.shape for k, v in weights.items()}
    assert all(bool((g.flatten(1) != 0).any(1).all()) for g in gradients.values())
