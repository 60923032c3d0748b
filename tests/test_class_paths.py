"""A layer of one's own on the command line by the path of its class, wherever a name may stand."""

import sys

import pytest

from lightning_modules import certify
from lightning_modules.catalogue import registered_name
from lightning_modules.cli import main
from lightning_modules.comparison.command import parser
from stochastic_layers import registry

SOURCE = """
import stochastic_layers as sl

@sl.register("my_own")
class Own(sl.StraightThrough):
    '''A layer of one's own.'''
    families = ("bernoulli",)

class Nameless(sl.StraightThrough):
    pass
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "module_of_mine.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))
    monkeypatch.setitem(sys.modules, "module_of_mine", None)  # so that it is taken out again
    monkeypatch.delitem(sys.modules, "module_of_mine")


def test_certify_and_describe_take_the_path_of_a_class(capsys):
    with pytest.raises(SystemExit) as status:
        main(["certify", "module_of_mine.Own", "--quick"])
    assert status.value.code == 0
    main(["describe", "module_of_mine.Own"])
    out = capsys.readouterr().out
    assert "passed" in out and "A layer of one's own." in out
    (one,) = certify.certify(["module_of_mine.Own"], quick=True)
    assert one.layer == "my_own"


def test_compare_takes_paths_in_lists_and_in_mappings(monkeypatch):
    asked = []

    def compare(parsed, layers, **options):
        asked.extend(layers)
        raise ValueError("enough")

    monkeypatch.setattr("lightning_modules.comparison.command.compare_parsed", compare)
    with pytest.raises(SystemExit, match="enough"):
        main(["compare", "--layers", "module_of_mine.Own, {name: module_of_mine.Own, num_samples: 2}, disarm"])
    assert asked == ["my_own", {"name": "my_own", "num_samples": 2}, "disarm"]
    assert parser().parse_args([]).layers is None


def test_a_path_that_leads_nowhere_is_said_to(monkeypatch):
    assert registered_name("disarm") == "disarm"
    for path, reason in (
        ("module_of_mine.Other", "has no attribute 'Other'"),
        ("no_such_module.Own", "No module named 'no_such_module'"),
        ("module_of_mine.Nameless", r"put @register\(NAME\) above the class"),
    ):
        with pytest.raises(ValueError, match=reason):
            registered_name(path)


def test_a_restricted_command_line_imports_nothing(monkeypatch):
    monkeypatch.setenv("STOCHASTIC_LAYERS_RESTRICT", "1")
    with pytest.raises(ValueError, match="class paths are restricted"):
        registered_name("module_of_mine.Own")
    assert "module_of_mine" not in sys.modules
