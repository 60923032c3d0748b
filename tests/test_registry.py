"""Names for layers: creating, listing, describing, registering, and the layers of installed packages."""

import dataclasses
import importlib
import sys

import pytest
import torch

import stochastic_layers as sl
from stochastic_layers import registry
from stochastic_layers.testing import check_layer


@pytest.fixture
def own_registry(monkeypatch):
    """A registry that forgets what the test adds, and that has yet to look for installed packages."""
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))
    monkeypatch.setattr(registry, "_BROKEN", {})
    monkeypatch.setattr(registry, "_pending_entry_points", True)


def layer_of(**attributes):
    return type("Layer", (sl.StraightThrough,), attributes)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'gumbel_softmaxx'; did you mean 'gumbel_softmax'"):
        sl.create("gumbel_softmaxx", latent_dim=2)
    with pytest.raises(ValueError, match="did you mean 'reinforce'"):
        sl.describe("reinforc")


@pytest.mark.parametrize(
    ("name", "layer"),
    [("RLOO", "leave_one_out"), ("vargrad", "leave_one_out"), ("normal", "gaussian"), ("REBAR", "rebar")],
)
def test_a_name_of_the_papers_names_the_layer(name, layer):
    with pytest.raises(ValueError, match=f"got {name!r}; did you mean '{layer}'"):
        sl.create(name, latent_dim=2)


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(ValueError, match=r"valid names: .*'gaussian'.*'reinforce'"):
        sl.create("xyzzy", latent_dim=2)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="'reinforce' has no option 'num_sample'; did you mean 'num_samples'"):
        sl.create("reinforce", latent_dim=2, num_sample=3)


def test_a_missing_latent_dim_is_named():
    with pytest.raises(ValueError, match="needed the option 'latent_dim' of 'reinforce'"):
        sl.create("reinforce")


def test_a_family_that_the_layer_lacks_names_those_it_has():
    advice = r"supports the families \('gaussian',\), got 'bernoulli'; see sl.list_layers\(family='bernoulli'\)\.$"
    with pytest.raises(ValueError, match=advice):
        sl.create("gaussian", latent_dim=2, family="bernoulli")
    with pytest.raises(ValueError, match=r"got 'catgorical'; did you mean 'categorical'"):
        sl.create("arms", latent_dim=2, family="catgorical")
    with pytest.raises(ValueError, match=r"got 'xyz'; valid names: 'bernoulli', .*'quantized'"):
        sl.create("gaussian", latent_dim=2, family="xyz")
    with pytest.raises(ValueError, match="needed num_categories >= 2"):
        sl.create("straight_through", latent_dim=2, family="categorical")
    with pytest.raises(ValueError, match="has no num_categories"):
        sl.create("straight_through", latent_dim=2, num_categories=3)


def test_a_description_is_a_frozen_record_of_the_class():
    record = sl.describe("reinforce")
    assert record.name == "reinforce" and record.needs == ("cost",) and record.unbiased is True
    assert record.exact_draws and record.evaluations == "num_samples" and "doi.org" in record.reference
    assert record.summary.startswith("REINFORCE")
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.unbiased = False


def test_every_description_has_what_a_user_chooses_by():
    for name in sl.list_layers():
        record = sl.describe(name)
        assert record.name == name and record.families and record.summary
        assert "https://" in record.reference, name


def test_filters_select_by_capability():
    everything = sl.list_layers()
    assert everything == sorted(everything)
    for family in ("bernoulli", "categorical", "gaussian"):
        assert sl.list_layers(family=family) == [n for n in everything if family in sl.describe(n).families]
    assert sl.list_layers(unbiased=True) == [n for n in everything if sl.describe(n).unbiased is True]
    assert sorted(sl.list_layers(unbiased=True) + sl.list_layers(unbiased=False)) == everything
    assert "straight_through" in sl.list_layers(unbiased=False)  # unbiased under a condition only
    assert sl.list_layers(needs="cost") == [n for n in everything if "cost" in sl.describe(n).needs]
    assert sorted(sl.list_layers(exact_draws=True) + sl.list_layers(exact_draws=False)) == everything
    assert "gumbel_softmax" in sl.list_layers(exact_draws=False)
    assert sl.list_layers(family="gaussian", needs="cost", unbiased=True) == [
        n for n in sl.list_layers(family="gaussian") if n in sl.list_layers(needs="cost", unbiased=True)
    ]


def test_an_unknown_filter_value_names_the_valid_ones():
    with pytest.raises(ValueError, match="got 'bernouli'; did you mean 'bernoulli'"):
        sl.list_layers(family="bernouli")
    with pytest.raises(ValueError, match=r"needed one of .*'cost_gradient'.*, got 'gradient'"):
        sl.list_layers(needs="gradient")


def test_a_name_that_is_taken_is_refused_and_registering_twice_is_not(own_registry):
    with pytest.raises(ValueError, match=r"'reinforce', which is already stochastic_layers\.score_function\.Reinforce"):
        sl.register("reinforce")(layer_of())
    assert sl.register("reinforce")(sl.Reinforce) is sl.Reinforce
    assert isinstance(sl.create("reinforce", latent_dim=1), sl.Reinforce)


def test_a_class_without_capabilities_is_refused(own_registry):
    class Silent(sl.StochasticLayer):
        families = ("bernoulli",)
        needs = ("cost",)

        def draw(self, params, context):
            raise AssertionError

    with pytest.raises(ValueError, match=r"got .*Silent without 'unbiased'"):
        sl.register("silent")(Silent)
    with pytest.raises(ValueError, match=r"subset of .* as needs, got \['gradients'\]"):
        sl.register("other")(layer_of(needs=("gradients",)))
    assert not {"silent", "other"} & set(sl.list_layers())


SOURCE = '''
"""A layer that an installed package provides."""
from stochastic_layers import Sample, StochasticLayer
from stochastic_layers.layer import sum_rightmost


class Coin(StochasticLayer):
    """Coin: the score-function estimator with two draws and each other's cost as baseline."""

    families = ("bernoulli",)
    unbiased = True
    needs = ("cost",)
    evaluations = 2

    def __init__(self, latent_dim: int, *, family: str = "bernoulli") -> None:
        super().__init__(latent_dim, family=family, num_samples=2)

    def draw(self, params, context) -> Sample:
        q = self.law(params)
        z = self.family.sample(q, 2)

        def credit(cost):
            log_prob = sum_rightmost(self.family.log_prob(q, z), cost.dim())
            return ((cost - cost.flip(0)).detach() * log_prob).mean(0)

        return self._sample(q, z, credit=credit)
'''


@pytest.fixture
def install(tmp_path, monkeypatch, own_registry):
    """Put a distribution of one module and its entry points on the path, as an installer would leave it."""

    def install(source, **entries):
        module = "coin_layers"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / "coin_layers-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coin-layers\nVersion: 1.0\n")
        lines = [f"{name} = {module}:{target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[stochastic_layers.layers]", *lines]) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield install
    sys.modules.pop("coin_layers", None)


def test_a_layer_of_an_installed_package_is_one_of_ours(install, capsys):
    from lightning_modules.catalogue import capability_markdown

    assert "coin" not in registry._LAYERS
    install(SOURCE, coin="Coin")
    layer = sl.create("coin", latent_dim=4)  # looking up the name imports the package
    assert layer.name == "coin" and layer.sample(torch.zeros(5, 4)).z.shape == (2, 5, 4)
    assert "coin" in sl.list_layers(family="bernoulli", unbiased=True)
    assert "| `coin` | bernoulli | yes | cost | 2 | yes |" in capability_markdown(["coin"])
    check_layer("coin").require()


def test_the_command_line_lists_describes_and_certifies_a_layer_of_an_installed_package(install, capsys):
    from lightning_modules.cli import main

    install(SOURCE, coin="Coin")
    main(["list"])
    main(["describe", "coin"])
    with pytest.raises(SystemExit) as status:
        main(["certify", "coin", "--quick"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert out.count("coin") >= 3 and "passed" in out


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("import no_such_module\n", "Coin", "ModuleNotFoundError: No module named 'no_such_module'"),
        (SOURCE, "Missing", "AttributeError"),
        (SOURCE, "Sample", "without 'families'"),
    ],
    ids=["broken module", "missing class", "no layer"],
)
def test_a_broken_entry_point_names_itself_and_leaves_the_others_alone(install, source, target, reason):
    install(source, coin=target)
    assert isinstance(sl.create("reinforce", latent_dim=2), sl.Reinforce)
    with pytest.warns(RuntimeWarning, match="entry point 'coin' = .* of the package 'coin-layers' could not be loaded"):
        names = sl.list_layers()
    assert "coin" not in names and "reinforce" in names
    with pytest.raises(ValueError, match="got 'coin'; the entry point 'coin'") as error:
        sl.create("coin", latent_dim=2)
    assert reason in str(error.value)
    assert sl.list_layers() == names


def test_an_entry_point_whose_name_is_taken_does_not_replace_the_layer(install):
    install(SOURCE, reinforce="Coin", coin="Coin")
    with pytest.warns(RuntimeWarning, match="needed a name that is free, got 'reinforce'"):
        assert "coin" in sl.list_layers()
    assert isinstance(sl.create("reinforce", latent_dim=2), sl.Reinforce)


def test_a_layer_prints_its_options():
    assert "num_categories=4" in repr(
        sl.create("straight_through", latent_dim=2, family="categorical", num_categories=4)
    )
    assert "num_categories" not in repr(sl.create("straight_through", latent_dim=2))


@pytest.mark.parametrize(("name", "options"), [("hard_concrete", {}), ("invertible_gaussian", {"num_categories": 3})])
def test_a_temperature_that_is_part_of_the_law_is_shown_and_cannot_be_annealed_in_vain(name, options):
    layer = sl.create(name, latent_dim=2, temperature=0.25, **options)
    assert "temperature=0.25" in repr(layer)
    with pytest.raises(AttributeError):
        layer.temperature = 0.1


def test_a_class_in_the_place_of_a_name_is_refused():
    with pytest.raises(ValueError, match="build a layer of a class by calling it"):
        sl.create(sl.Reinforce, latent_dim=2)
