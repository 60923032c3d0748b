"""The public names are a committed list, so that adding or removing one is a decision and not an accident."""

from pathlib import Path

import stochastic_layers as sl

LIST = Path(__file__).with_name("public_names.txt")


def test_public_names_are_those_of_the_committed_list():
    committed = LIST.read_text().split()
    public = sorted(sl.__all__)
    added, removed = (sorted(a - b) for a, b in ((set(public), set(committed)), (set(committed), set(public))))
    assert public == committed, (
        f"added: {added}, removed: {removed}, or out of order. Where this is meant, put one name a line, sorted, into "
        "tests/public_names.txt, and update the README table and CHANGELOG.md: "
        "python -c 'import stochastic_layers as sl; print(*sorted(sl.__all__), sep=chr(10))' > tests/public_names.txt"
    )


def test_every_public_name_exists_and_is_listed_once():
    assert len(sl.__all__) == len(set(sl.__all__))
    assert [name for name in sl.__all__ if not hasattr(sl, name)] == []
