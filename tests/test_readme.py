"""The README's numbers are those of the committed results files, and its code runs."""

import re

import pytest

from advlab import paths, readme

TEXT = (paths.SOURCE / "README.md").read_text()


def test_every_table_is_what_the_files_give():
    assert readme.filled(TEXT) == TEXT, "run `python -m advlab readme` and commit README.md"
    assert set(re.findall(r"<!-- begin: (\w+) -->", TEXT)) == set(readme.BLOCKS)


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="block 'imagined'"):
        readme.filled("<!-- begin: imagined --><!-- end: imagined -->")


def test_every_linked_file_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert links and all((paths.SOURCE / link).exists() for link in links), [link for link in links if not (paths.SOURCE / link).exists()]


def test_markdown_table_by_hand():
    assert readme.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert readme.share({"value": 0.5, "low": 0.25, "high": 0.755}) == "50.0 % [25.0, 75.5]"


@pytest.mark.slow
def test_the_readmes_code_runs(monkeypatch, tmp_path):
    """With small sizes in place of its own, so that nothing long is trained."""
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.S))
    changes = {'"quick")  #': '"smoke", progress=False)  #', "slice(64)": "slice(8)", "y[:64]": "y[:8]", 'BUDGETS["quick"]': 'BUDGETS["smoke"]',
               "steps=100, restarts=5": "steps=3, restarts=2", 'data.load("skimage10")': 'data.load("skimage10", limit=256)'}
    for here, small in changes.items():
        assert here in code, here
        code = code.replace(here, small)
    names = {}
    exec(compile(code + "\nexplorer = widgets.AttackExplorer(model, x, y)", "README.md", "exec"), names)
    assert names["explorer"].wait(60) and names["explorer"].error is None
