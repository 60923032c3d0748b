"""Every Python snippet of the README and the docs runs, file by file; the table of layers is the registry's."""

import re
from pathlib import Path

import pytest

import stochastic_layers as sl
from lightning_modules.catalogue import capability_markdown
from stochastic_layers import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_LAYERS", dict(registry._LAYERS))  # a page may register layers of its own
    namespace = {"__name__": "snippet"}
    for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), namespace)


def test_table_of_layers_in_the_readme_is_the_registry():
    text = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- layers:.*?-->\n(.*?)<!-- end of layers -->", text, re.S)[1].strip()
    expected = capability_markdown(sl.list_layers()).strip()
    assert table == expected, "paste the output of `stochastic-layers list --markdown`"


def anchor(heading):
    """The fragment that renderers of Markdown give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if target.startswith(("http:", "https:")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert fragment in map(anchor, headings), f"{page.name} links to {target}, but there is no such heading"
