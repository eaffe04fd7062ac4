"""Names and types checked before anything runs, and the committed notebooks' own rules."""

import nbformat
import pytest
from helpers import notebook

from advlab import paths, series
from advlab.__main__ import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A series of two notebooks and two profiles, with everything written below tmp_path."""
    notebooks = tmp_path / "notebooks"
    (notebooks / "params").mkdir(parents=True)
    monkeypatch.setattr(paths, "notebooks", lambda: notebooks)
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    monkeypatch.delenv("ADVLAB_PROFILE", raising=False)
    notebook(notebooks, "00_first", 'print("n is", n)')
    notebook(notebooks, "01_second", 'print("fine")', "x = 1 / (n - n)", 'print("never")')
    (notebooks / "params" / "quick.yaml").write_text("")
    (notebooks / "params" / "smoke.yaml").write_text("common: {n: 2}\n01_second: {n: 3, rate: 1}\n")
    return notebooks


def test_parameters_are_the_literals_of_the_tagged_cell(folder):
    assert series.parameters("00_first") == {"profile": "quick", "dataset": "skimage10", "n": 4, "rate": 0.5, "flag": True, "names": ["a"]}


def test_overrides_common_first_then_the_notebooks_own(folder, monkeypatch):
    assert series.overrides("00_first", "smoke") == {"profile": "smoke", "n": 2}
    assert series.overrides("01_second", "smoke") == {"profile": "smoke", "n": 3, "rate": 1}
    assert series.from_environment("00_first") == {}
    monkeypatch.setenv("ADVLAB_PROFILE", "smoke")
    assert series.from_environment("00_first") == {"profile": "smoke", "n": 2}


def test_a_plan_holds_only_what_differs_from_the_notebook(folder):
    assert series.plan((), "quick", None, {}) == [("00_first", {}), ("01_second", {})]
    assert series.plan(("01",), "smoke", None, {"n": 4, "flag": False}) == [("01_second", {"profile": "smoke", "rate": 1, "flag": False})]


def test_a_section_for_one_data_set_comes_on_top(folder):
    (folder / "params" / "quick.yaml").write_text("01_second: {n: 3}\n01_second@mnist: {n: 5}\n")
    assert series.overrides("01_second", "quick") == {"profile": "quick", "n": 3}
    assert series.overrides("01_second", "quick", "mnist")["n"] == 5
    assert series.overrides("00_first", "quick", "mnist") == {"profile": "quick"}


@pytest.mark.parametrize("wanted", [("01",), ("01_second",), ("notebooks/01_second.ipynb",), ("01", "01_second")])
def test_a_notebook_is_picked_by_number_name_or_file(folder, wanted):
    assert series.pick(wanted) == ["01_second"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["run", "07"], "unknown notebook '07'; the series has 00_first, 01_second"),
    (["run", "--profile", "fast"], "unknown profile 'fast'; choose one of quick, smoke"),
    (["run", "--dataset", "imagined"], "imagined"),
    (["run", "--dataset", "/a/folder/mnist.npz"], "a data set by its name, which its results get, not '/a/folder/mnist.npz'"),
    (["run", "-p", "rte=1.0"], "no parameter 'rte' (from the command line); did you mean 'rate'?"),
    (["run", "-p", "n=many"], "parameter 'n' of 00_first takes a int, got 'many'"),
    (["run", "-p", "flag=1"], "parameter 'flag' of 00_first takes a bool, got 1"),
    (["run", "-p", "n"], "-p takes name=value, got 'n'"),
    (["run", "--on", "mars"], "no config.yaml in"),
    (["run", "-j", "-1"], "at least one job and one thread, got -1 and 1")])
def test_unknown_names_stop_everything_before_it_runs(folder, capsys, arguments, words):
    before = sorted(p for p in folder.parent.rglob("*"))
    assert main(arguments) == 1
    assert words in capsys.readouterr().err
    assert sorted(p for p in folder.parent.rglob("*")) == before


@pytest.mark.parametrize(("yaml", "words"), [("common: {m: 1}", "no parameter 'm' (from quick.yaml)"), ("02_third: {n: 1}", "section '02_third'"),
                                             ("00_first: {n: x}", "takes a int, got 'x'")])
def test_a_wrong_profile_file_is_refused(folder, yaml, words):
    (folder / "params" / "quick.yaml").write_text(yaml)
    with pytest.raises(series.SeriesError) as error:
        series.plan((), "quick", None, {})
    assert words in str(error.value)


@pytest.mark.parametrize(("cell", "words"), [("n = len('abc')", "is no literal"), ("import os", "may only assign literals")])
def test_a_parameters_cell_with_code_is_refused(folder, cell, words):
    notebook(folder, "02_third", parameters=cell)
    with pytest.raises(series.SeriesError, match=words):
        series.parameters("02_third")


# --- the committed notebooks ---


@pytest.mark.parametrize("name", series.names())
def test_a_committed_notebook_is_executed_in_order_at_quick_and_has_a_check_that_compares(name):
    cells = nbformat.read(paths.notebooks() / f"{name}.ipynb", as_version=4).cells
    code = [c for c in cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not any(out.output_type == "error" for c in code for out in c.outputs)
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in cells)
    checks = [c for c in code if "NBVAL_CHECK_OUTPUT" in c.source]
    assert checks and all(c.outputs for c in checks)
    assert series.parameters(name)["profile"] == "quick"
    assert not any(line.startswith("class ") for c in code for line in c.source.splitlines())


@pytest.mark.parametrize("profile", series.PROFILES)
@pytest.mark.parametrize("name", series.names())
def test_every_profile_names_only_parameters_that_exist(name, profile):
    assert series.overrides(name, profile)["profile"] == profile


def test_notebooks_name_themselves():
    for name in series.names():
        assert f'NAME = "{name}"' in (paths.notebooks() / f"{name}.ipynb").read_text().replace('\\"', '"')
