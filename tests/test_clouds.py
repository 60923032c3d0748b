"""The pictures of docs/sampling-and-gradients.md can be made again."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_pictures_are_those_that_the_script_makes(tmp_path):
    subprocess.run([sys.executable, ROOT / "benchmarks/clouds.py", "--folder", tmp_path], check=True, timeout=300)
    made = {p.name for p in tmp_path.glob("*.png")}
    page = (ROOT / "docs/sampling-and-gradients.md").read_text()
    assert made and all(f"images/{name}" in page and (ROOT / "docs/images" / name).exists() for name in made)
