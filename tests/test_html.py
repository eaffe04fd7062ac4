"""The HTML report: complete, linked, readable without a network."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from advlab import html, paths


def requests(page: str) -> list[str]:
    """What a browser would fetch on its own: sources, stylesheets, imports; a link waits for a click."""
    return re.findall(r"""(?:src\s*=\s*|<link[^>]+href\s*=\s*|@import\s+|url\()["']?((?:https?:)?//[^"'\s)>]+)""", page)


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    folder = paths.runs("smoke", "skimage10")
    folder.mkdir(parents=True)
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    text = r"# 01 · A title < b" + "\n\n" + r"$\frac{a}{b}$ and `$ADVLAB_DATA`, see [02](02_b.ipynb), [03](03_c.ipynb), [file](../data/x.json), [paper](https://arxiv.org/abs/1)"
    formulas = r"| $x_t$ |" + "\n| --- |\n" + r"| $\nabla_x \mathcal{L}$ |" + "\n\n" + r"$$\arg\min_i p_i G_i = 0$$"
    cells = [new_markdown_cell(text), new_markdown_cell(formulas),
             new_code_cell("1 + 1", outputs=[new_output("display_data", {"image/png": png}), new_output("stream", text="a < b"),
                                              new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}})])]
    (folder.parent / "mnist").mkdir()
    for place in ("skimage10/01_a", "skimage10/02_b", "mnist/01_a"):
        nbformat.write(new_notebook(cells=cells), folder.parent / f"{place}.ipynb")
    return html.export("smoke")


def test_every_notebook_has_a_page_and_the_index_leads_to_it(made):
    links = re.findall(r'href="([^"]+)"', made.read_text())
    assert sorted(links) == ["mnist/01_a.html", "skimage10/01_a.html", "skimage10/02_b.html"] and all((made.parent / link).exists() for link in links)
    assert "01 · A title &lt; b" in made.read_text()


def test_pages_fetch_nothing_and_formulas_are_drawn_by_the_browser(made):
    for page in made.parent.rglob("*.html"):
        assert requests(page.read_text()) == [] and "<script" not in page.read_text()
    page = (made.parent / "skimage10" / "01_a.html").read_text()
    assert page.count("<math") == 4 and "<mfrac>" in page and 'display="block"' in page and "$ADVLAB_DATA" in page and ">\\" not in page
    assert "data:image/png;base64" in page and "a &lt; b" in page
    assert requests('<script src="https://cdn.example/x.js">') and requests('<link rel="x" href="//cdn.example/x.css">')  # the test can fail
    assert not requests('<a href="https://arxiv.org">')


def test_links_lead_to_pages_and_files(made):
    page = (made.parent / "skimage10" / "01_a.html").read_text()
    for place in ("skimage10", "mnist"):  # where a notebook has not run on a page's data set, its page of another one
        assert 'href="../skimage10/02_b.html"' in (made.parent / place / "01_a.html").read_text()
    assert 'see <a href="../skimage10/02_b.html">' in page and 'href="../../../../notebooks/03_c.ipynb"' in page
    assert 'href="../../../../data/x.json"' in page
    assert (made.parent / "skimage10" / "../../../..").resolve() == paths.home()


def test_without_executed_notebooks_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make reproduce PROFILE=smoke"):
        html.export("smoke")
