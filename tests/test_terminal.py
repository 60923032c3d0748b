"""Tables in a narrow terminal: several below each other, and no cell is cut."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from lightning_modules.terminal import InParts

ROWS = [
    ("straight_through", "bernoulli", "-123.68 ± 0.15", "0.0471 ± 0.001", "a sentence of several words"),
    ("disarm", "bernoulli", "-123.74 ± 0.09", "15.9 ± 0.6", ""),
]


def printed(width, names=1):
    table = Table(title="comparison", caption="mean ± deviation", caption_justify="left")
    for heading in ("layer", "family", "ELBO", "gradient variance"):
        table.add_column(heading, no_wrap=True)
    table.add_column("note", min_width=12)
    for row in ROWS:
        table.add_row(*row)
    file = io.StringIO()
    Console(file=file, width=width).print(InParts(table, names))
    return file.getvalue()


@pytest.mark.parametrize("names", [1, 2])
@pytest.mark.parametrize("width", [54, 64, 80, 120])
def test_every_cell_is_printed_whole_within_the_width(width, names):
    text = printed(width, names)
    assert max(map(len, text.splitlines())) <= width
    for row in ROWS:
        assert all(cell in text for cell in row[:4])
    assert "sentence of" in text and "…" not in text
    assert text.count("comparison") == text.count("mean ± deviation") == 1


def test_one_table_where_there_is_room_and_names_repeated_where_there_is_not():
    assert printed(120).count("┏") == 1
    parts = printed(64).count("┏")
    assert parts > 1 and printed(64).count("disarm") == parts
    assert printed(64, names=2).count("bernoulli") == 2 * printed(64, names=2).count("┏")
