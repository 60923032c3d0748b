"""Draws of compiled layers follow the law: the compiler brings random numbers of its own."""

import math
import shutil

import pytest
import torch
from scipy import stats

import stochastic_layers as sl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
]
ROWS = 40_000
FALSE_ALARM = 1e-6


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_draws(layer, params):
    with torch.no_grad():
        return torch.compile(layer, fullgraph=True, dynamic=False)(params.expand(ROWS, -1))


def hard(layer, z):
    """The exact draw in a relaxed one: its largest coordinate, or for a bit the half that it lies in."""
    if layer.num_categories is None:
        return (z > 0.5).float()
    return torch.nn.functional.one_hot(z.argmax(-1), layer.num_categories).float()


def largest_z(z, probs):
    """Largest deviation of frequencies from those of 0/1 variables, in standard errors; rare ones are left out."""
    frequency = z.view(-1, ROWS, *probs.shape).mean((0, 1))
    deviations = (frequency - probs) / (probs * (1 - probs) / ROWS).sqrt()
    return float(deviations[probs * ROWS > 20].abs().max())


@pytest.mark.parametrize(
    ("name", "categories"),
    [
        ("straight_through", None),
        ("straight_through", 5),
        ("straight_through", 37),
        ("reinmax", 64),
        ("gumbel_softmax", None),
        ("gumbel_softmax", 7),
        ("straight_through_gumbel", 7),
        ("disarm", None),
        ("disarm_tree", 4),
        ("arms", None),
        ("carms", 4),
    ],
)
def test_compiled_draws_of_bits_and_categories(name, categories):
    family = {"family": "categorical", "num_categories": categories} if categories else {"family": "bernoulli"}
    layer = sl.create(name, latent_dim=3, **family)
    params = 2 * torch.randn(1, layer.in_features)
    z = compiled_draws(layer, params)
    probs = layer.distribution(params[0]).mean
    z = z.view(-1, ROWS, *probs.shape)
    if not layer.exact_draws:
        z = hard(layer, z)
    assert bool(((z == 0) | (z == 1)).all())
    assert largest_z(z, probs) < 5  # of several draws it is at most that of one
    assert largest_z(z, probs.roll(1, -1)) > 20


def test_compiled_gaussian_draws():
    layer = sl.create("gaussian", latent_dim=2)
    params = torch.tensor([[1.0, -2.0, 0.5, -1.0]])
    z = compiled_draws(layer, params)
    noise = (z - params[:, :2]) / (0.5 * params[:, 2:]).exp()
    for column in noise.T:
        assert stats.kstest(column, "norm").pvalue > FALSE_ALARM
    assert abs(float(noise.prod(-1).mean())) < 5 / math.sqrt(ROWS)


@pytest.mark.parametrize("size", [1, 2])  # few enough for the compiler to write the sums over their numbers out
def test_compiled_draws_of_subsets_and_their_gradient(size):
    layer = sl.create("straight_through", latent_dim=1, num_categories=4, family={"name": "subset", "size": size})
    logits, cost = torch.tensor([0.3, -1.0, 0.7, 0.1], requires_grad=True), torch.tensor([1.0, 2.0, -1.0, 0.5])
    params = logits.detach().repeat(ROWS, 1).requires_grad_()
    z = torch.compile(layer, fullgraph=True, dynamic=False)(params)
    (z * cost).sum().backward()
    mean = layer.distribution(logits).mean.flatten()
    (exact,) = torch.autograd.grad((mean * cost).sum(), logits)  # what straight-through has of a linear cost
    assert torch.equal(z.sum(-1), torch.full((ROWS,), float(size)))
    assert largest_z(z.detach(), mean.detach()) < 5
    assert torch.allclose(params.grad, exact.expand(ROWS, -1), atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("reinforce", {}), ("soft_sort", {"hard": True}), ("soft_sort", {})])
def test_compiled_draws_of_orders(name, options):
    layer = sl.create(name, latent_dim=1, num_categories=3, family="permutation", **options)
    logits = torch.tensor([0.3, -1.0, 0.7])
    if name == "reinforce":
        layer.eval()  # in training it wants to be captured
    z = compiled_draws(layer, logits).view(ROWS, 3, 3)
    assert torch.allclose(z.sum(-1), torch.ones(ROWS, 3))
    outcomes = layer.family.outcomes(torch.float32).view(-1, 3, 3)
    drawn = (z.argmax(-1).unsqueeze(1) == outcomes.argmax(-1)).all(-1).float()  # which of the six
    assert largest_z(drawn, layer.family.outcome_scores(logits)[0].exp()) < 5
