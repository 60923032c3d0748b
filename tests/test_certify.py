"""The certificates and the table of compatible objectives, from the command line and in the docs."""

import os
import signal
from pathlib import Path

import pytest

import stochastic_layers as sl
from lightning_modules import certify, objectives
from lightning_modules.build import OBJECTIVES, build_objective
from lightning_modules.cli import main
from lightning_modules.compatibility import compatibility, compatibility_markdown
from stochastic_layers import registry

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def broken_layer(monkeypatch):
    """A registered layer that says that it is unbiased for every cost, which it is not."""
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))

    @sl.register("braggart")
    class Braggart(sl.StraightThrough):
        """Straight-through that claims too much."""

        families = ("bernoulli",)
        unbiased = True

    return "braggart"


def run(*args):
    with pytest.raises(SystemExit) as status:
        main(["certify", *args])
    return status.value.code


def test_certify_prints_a_row_and_succeeds(capsys):
    assert run("straight_through", "--family", "bernoulli", "--quick") in (0, None)
    out = capsys.readouterr().out
    assert "straight_through" in out and "passed" in out


def test_a_narrow_terminal_loses_no_letters(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert certify.main(["vq", "--quick"]) == 0
    text = capsys.readouterr().out
    assert "vq" in text and "…" not in text


def test_certify_fails_with_a_nonzero_status_and_says_what_failed(broken_layer, capsys):
    assert run(broken_layer) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "encoder gradient, cubic cost" in out


def test_certify_that_is_ended_from_outside_ends_what_it_has_started(capsys, monkeypatch):
    ended = []

    def certificates(pairs, certificate, jobs):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            yield
        finally:
            ended.append(True)

    monkeypatch.setattr(certify, "_certificates", certificates)
    before = signal.getsignal(signal.SIGTERM)
    assert run("straight_through") == 130 and "interrupted" in capsys.readouterr().err
    assert ended and signal.getsignal(signal.SIGTERM) == before


def test_certify_knows_layers_and_families(capsys):
    assert "did you mean 'reinforce'" in run("reinforc")
    for names in (["gaussian"], ["arm", "gaussian"]):  # none is left out without a word
        assert "needed layers of the family 'bernoulli', got ['gaussian']" in run(*names, "--family", "bernoulli")


@pytest.mark.ddp
def test_several_processes_give_the_same_certificates():
    names = ["straight_through", "arm", "reinmax"]
    assert certify.certify(names, quick=True, jobs=2) == certify.certify(names, quick=True)


def test_no_processes_are_refused():
    assert "needed jobs >= 1, got 0" in run("arm", "--jobs", "0")


def test_the_markdown_page_has_a_row_for_each_layer_and_family():
    certificates = certify.certify(["reinforce", "gaussian"], quick=True)
    page = certify.certificate_markdown(certificates)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(sl.describe("reinforce").families) + 1
    assert {line.count("|") for line in page.splitlines() if line.startswith("|")} == {len(certify.COLUMNS) + 1}


def test_the_page_of_certificates_names_every_layer_and_no_failure():
    if not DOCS.is_dir():
        pytest.skip("docs/ is not part of a release")
    text = (DOCS / "certificates.md").read_text()
    missing = [name for name in sl.list_layers() if f"| `{name}` |" not in text]
    assert not missing, "run: stochastic-layers certify --markdown > docs/certificates.md"
    assert "FAILED" not in text


def test_the_page_of_compatible_objectives_is_the_generated_one():
    if not DOCS.is_dir():
        pytest.skip("docs/ is not part of a release")
    text = (DOCS / "compatibility.md").read_text()
    assert text == compatibility_markdown() + "\n", (
        "run: stochastic-layers list --compatibility > docs/compatibility.md"
    )


def test_compatibility_is_what_each_objective_says_of_each_layer():
    rows = {(row.layer, row.family): row.refusals for row in compatibility()}
    assert set(rows) == {(name, family) for name in sl.list_layers() for family in sl.describe(name).families}
    assert all(set(refusals) == set(OBJECTIVES) for refusals in rows.values())
    assert rows["gaussian", "gaussian"]["iwae"] == "" == rows["reinforce", "bernoulli"]["elbo"]
    refusal = rows["straight_through", "bernoulli"]["iwae"]
    with pytest.raises(ValueError) as error:
        build_objective("iwae").check(sl.create("straight_through", latent_dim=2))
    assert refusal == str(error.value)


def test_compatibility_follows_the_objectives(monkeypatch):
    class Picky(objectives.ELBO):
        def check(self, layer):
            raise ValueError(f"needed another layer, got {layer.name!r}; try one.")

    monkeypatch.setitem(OBJECTIVES, "picky", Picky)
    assert all(row.refusals["picky"].endswith("try one.") for row in compatibility())
    page = compatibility_markdown()
    assert "`picky`" in page and page.count("needed another layer, got this layer; try one.") == 1


def test_the_command_line_prints_the_page_of_compatible_objectives(capsys):
    main(["list", "--compatibility"])
    assert capsys.readouterr().out == compatibility_markdown() + "\n"
