"""``torch.export`` of models with a layer in them: for any batch size, and as the model itself."""

import pytest
import torch
from torch import nn

import stochastic_layers as sl

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="needed a torch whose export says that it is one"
)
ONE_OF_EACH = {  # a layer of each family, and each way of drawing categories
    "bernoulli": ("straight_through", {}),
    "categorical": ("reinforce", {"num_categories": 4}),
    "categorical, many": ("reinmax", {"num_categories": 40}),
    "gaussian": ("gaussian", {}),
    "quantized": ("vq", {"num_codes": 8, "code_dim": 4}),
    "poisson": ("poisson", {}),
}
# torch cannot export the sampler of these for any batch size
NO_SYMBOLIC_SAMPLER = ("beta", "dirichlet", "power_spherical")


def model_of(name, **options):
    layer = sl.create(name, latent_dim=4, **options)
    return nn.Sequential(nn.Linear(5, layer.in_features), layer, nn.Linear(layer.out_features, 2)).eval()


class ByMode(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        encoder, layer, decoder = self.model
        return decoder(layer.mode(encoder(x)))


def exported(model):
    with torch.no_grad():
        batch = torch.export.Dim("batch")
        return torch.export.export(model, (torch.randn(4, 5),), dynamic_shapes=({0: batch},))


def check(name, options, path):
    family = options.get("family", "")
    model = model_of(name, **options)
    by_mode, x = ByMode(model), torch.randn(9, 5)
    torch.testing.assert_close(exported(by_mode).module()(x), by_mode(x))
    if family in NO_SYMBOLIC_SAMPLER:
        return
    torch.export.save(exported(model), path)
    program = torch.export.load(path).module()
    many = x[:1].expand(4000, -1)
    with torch.no_grad():
        found, wanted = program(many), model(many)
    assert found.shape == wanted.shape
    found, wanted = found.view(-1, 2), wanted.view(-1, 2)
    error = ((found.var(0) + wanted.var(0)) / 4000).sqrt()  # of several draws it is at most that of one
    assert bool(((found.mean(0) - wanted.mean(0)).abs() <= 5 * error + 1e-5).all())
    with pytest.raises(RuntimeError, match="needed finite params"):
        program(torch.full((3, 5), float("nan")))


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_family(case, tmp_path):
    name, options = ONE_OF_EACH[case]
    check(name, options | ({"family": "categorical"} if case.startswith("categorical") else {}), tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in sl.list_layers() for family in sl.describe(name).families]
)
def test_every_layer_and_family(name, family, tmp_path):
    options = {"family": family} if len(sl.describe(name).families) > 1 else {}
    if sl.families.takes_categories(family):
        options["num_categories"] = 3 if family == "permutation" else 4  # of 4 items there are many orders
    check(name, options, tmp_path / "model.pt2")
