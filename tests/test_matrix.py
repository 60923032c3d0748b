"""Every layer, in every way to run it: the cells of docs/matrix.md."""

import re

import pytest
import scale_matrix
import torch
from scale_runs import NAMES


@pytest.fixture(scope="module")
def cells():
    return scale_matrix.matrix()


@pytest.mark.ddp
@pytest.mark.parametrize("column", scale_matrix.COLUMNS)
@pytest.mark.parametrize("name", NAMES)
def test_cell(cells, name, column):
    assert cells[name][column] == ""


@pytest.mark.skipif(not scale_matrix.PAGE.exists(), reason="docs are not part of a source distribution")
def test_the_published_matrix_is_of_the_registered_layers_and_green():
    published = scale_matrix.PAGE.read_text()
    green = scale_matrix.page({name: dict.fromkeys(scale_matrix.COLUMNS, "") for name in NAMES})
    assert published.strip() == green.strip(), (
        "run `PYTHONPATH=. python tests/scale_matrix.py > docs/matrix.md`; a cell that cannot be green is named there"
    )
    assert len(re.findall(r"^\| `", published, re.M)) == len(NAMES)


def test_control_the_comparison_sees_a_difference():
    ours = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    assert scale_matrix.different(ours, {"w": ours["w"] * (1 + 1e-8)}, 1e-9) == "w differs by 2e-08"
    assert scale_matrix.different(ours, {}) == "w is on one side only"
    assert scale_matrix.different(ours, {"w": ours["w"].clone()}) == ""
