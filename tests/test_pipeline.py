"""The pipeline: what makes a notebook stale, and what a run, a failure and a resumed run leave. The slow tests run Snakemake on a checkout of five
small notebooks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
from helpers import notebook

from advlab import paths, pipeline, series
from advlab.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("00_first", "10_one", "11_two", "20_other", "90_all")
# what the small notebooks do: leave a trace of every run, then write a results file
WORK = '''from advlab import paths
here = paths.runs(profile, dataset)
with open(here / "trace", "a") as trace:
    print({name!r}, file=trace)
(here / "{name}.json").write_text(str(n))'''


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the package with a series of its own, and everything written below it."""
    shutil.copytree(ROOT / "advlab", tmp_path / "advlab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copy(ROOT / "Snakefile", tmp_path)
    (tmp_path / "notebooks/params").mkdir(parents=True)
    for profile in series.PROFILES:
        (tmp_path / f"notebooks/params/{profile}.yaml").write_text("")
    (tmp_path / "advlab/toy.py").write_text('"""Made."""\n\nvalue = 1\n')
    for name in NAMES:
        extra = ["from advlab import toy"] if name == "20_other" else []
        notebook(tmp_path / "notebooks", name, *extra, WORK.format(name=name), parameters='profile = "smoke"\ndataset = "skimage10"\nn = 4')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for variable in ("ADVLAB_HOME", "ADVLAB_PROFILE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def run(checkout, *arguments, code=0):
    """`python -m advlab run` in a checkout: what it printed."""
    done = subprocess.run([sys.executable, "-m", "advlab", "run", "--profile", "smoke", *arguments], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def stale(checkout, *arguments):
    """The notebooks that a dry run lists, with its reasons."""
    return dict(line.split(": ", 1) for line in run(checkout, "--dry-run", *arguments).splitlines() if line.split(": ")[0] in NAMES)


def ran(checkout):
    """The notebooks that have run since the last call, in order."""
    trace = checkout / "runs/smoke/skimage10/trace"
    names = trace.read_text().split() if trace.exists() else []
    trace.unlink(missing_ok=True)
    return names


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def work(checkout, name, line):
    """Put a line before what a notebook does."""
    edit(checkout / f"notebooks/{name}.ipynb", "from advlab import paths", f"from advlab import paths, report\\n{line}")


# --- what depends on what ---


def test_00_comes_before_all_a_papers_notebooks_in_order_and_the_comparison_after_every_paper():
    names = ["00_a", "01_b", "02_c", "10_d", "11_e", "13_f", "20_g", "90_h", "91_i", "92_j", "95_k"]
    found = {name[:2]: [n[:2] for n in pipeline.before(name, names)] for name in names}
    assert found == {"00": [], "01": ["00"], "02": ["00"], "10": ["00"], "11": ["10"], "13": ["11"], "20": ["00"],
                     **{last: ["00", "10", "11", "13", "20"] for last in ("90", "91", "92", "95")}}
    waiting = {name[:2]: pipeline.behind(name, names) for name in names}
    assert waiting == {"00": 10, "01": 0, "02": 0, "10": 6, "11": 5, "13": 4, "20": 4, "90": 0, "91": 0, "92": 0, "95": 0}
    assert pipeline.before("11_e", ["11_e"]) == [] and pipeline.before("13_f", ["13_f", "10_d"]) == ["10_d"]


@pytest.mark.parametrize("name", series.names())
def test_a_notebook_depends_on_the_modules_that_it_imports_and_on_no_other_paper(name):
    used = {source.split()[0] for source in pipeline.sources(name)}
    papers = {f"advlab.defenses.{paper}" for paper in ("hgd", "s2s", "gred", "trn", "transform")}
    assert {"code", "advlab", "advlab.series", "advlab.report", "advlab.reference", "advlab.training", "advlab.attacks.core"} <= used
    assert "advlab.pipeline" not in used and "advlab.__main__" not in used  # or an edit of the runner would make everything stale
    if name[0] in "12345":
        own = papers & {f"advlab.defenses.{paper}" for paper in (name.split("_")[1],)}
        assert used & papers == own and own


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three modules and a notebook that uses two of them."""
    for file, text in {"__init__": "", "a": "import advlab.b\n", "b": '"""Old."""\n\ndef f():\n    """Old."""\n    return 1\n', "c": "x = 1\n",
                       "tables/__init__": "from . import inner\n", "tables/inner": "y = 1\n"}.items():
        (tmp_path / "advlab/tables").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"advlab/{file}.py").write_text(text)
    for table in ("t", "inner"):
        (tmp_path / f"advlab/tables/{table}.csv").write_text("1\n")
    notebook(tmp_path, "00_first", "def g():\n    from advlab import a\n", "%matplotlib inline\nimport advlab.tables")
    monkeypatch.setattr(paths, "SOURCE", tmp_path)
    monkeypatch.setattr(paths, "notebooks", lambda: tmp_path)
    yield tmp_path
    pipeline._module.cache_clear()


def test_sources_follow_imports_wherever_they_stand(package):
    pipeline._module.cache_clear()
    used = [source.split()[0] for source in pipeline.sources("00_first")]
    assert used == ["code", "advlab", "advlab.a", "advlab.b", "advlab.tables", "advlab.tables.inner"]


@pytest.mark.parametrize(("file", "old", "new", "changed"), [
    ("b.py", "return 1", "return 2", {"advlab.b"}), ("b.py", "Old", "New", set()), ("b.py", "return 1", "return 1  # one", set()),
    ("c.py", "1", "2", set()), ("tables/inner.py", "1", "2", {"advlab.tables.inner"}), ("tables/t.csv", "1", "2", {"advlab.tables"}),
    ("tables/inner.csv", "1", "2", {"advlab.tables.inner"})])
def test_sources_change_with_code_and_tables_not_with_comments_and_docstrings(package, file, old, new, changed):
    pipeline._module.cache_clear()
    before = set(pipeline.sources("00_first"))
    edit(package / "advlab" / file, old, new)
    pipeline._module.cache_clear()
    assert {source.split()[0] for source in set(pipeline.sources("00_first")) - before} == changed


def test_a_notebooks_code_counts_and_its_outputs_and_text_do_not(package):
    file = package / "00_first.ipynb"
    before = pipeline.sources("00_first")
    document = nbformat.read(file, as_version=4)
    document.cells[0].source = "# another title"
    document.cells[2].outputs, document.cells[2].execution_count = [nbformat.v4.new_output("stream", text="seen")], 3
    nbformat.write(document, file)
    assert pipeline.sources("00_first") == before
    edit(file, "import a\\n", "import a  # the first\\n")
    assert pipeline.sources("00_first") == before
    edit(file, "import a ", "import b ")
    assert pipeline.sources("00_first")[0] != before[0]


def test_what_fills_the_readme_depends_on_published_results(package, monkeypatch):
    monkeypatch.setenv("ADVLAB_HOME", str(package))
    (package / "advlab/readme.py").write_text("")
    notebook(package, "91_claims", "from advlab import readme")
    before = {name: pipeline.sources(name) for name in ("00_first", "91_claims")}
    place = paths.results("standard", "mnist")
    place.mkdir(parents=True)
    (place / "30_x.json").write_text('{"rows": [1], "run": {"seconds": 1}}')
    assert pipeline.sources("00_first") == before["00_first"]
    after = pipeline.sources("91_claims")
    assert {source.split()[0] for source in set(after) - set(before["91_claims"])} == {"published"}
    (place / "30_x.json").write_text('{"rows": [1], "run": {"seconds": 2}}')  # the same rows from another run
    (place / "91_claims.json").write_text('{"rows": [2]}')  # its own
    assert pipeline.sources("91_claims") == after and pipeline.sources("91_claims", "standard") == before["91_claims"]


# --- one notebook ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    (tmp_path / "params/quick.yaml").write_text("")
    monkeypatch.setattr(paths, "notebooks", lambda: tmp_path)
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    monkeypatch.setenv("ADVLAB_PROFILE", "paper")  # has no say in a run
    return tmp_path


@pytest.mark.slow
def test_a_step_writes_copy_and_stamp_and_refresh_takes_only_the_outputs(folder):
    notebook(folder, "00_first", 'print("n is", n)\nn')
    assert main(["step", "00_first", "--profile", "quick", "--values", '{"n": 9}']) == 0
    place = paths.runs("quick", "skimage10")
    assert "n is 9" in (place / "00_first.ipynb").read_text()
    assert json.loads((place / "00_first.done").read_text())["values"] == {"n": 9}
    edit(folder / "00_first.ipynb", "# made", "# written since")
    pipeline._refresh(place / "00_first.ipynb", folder / "00_first.ipynb")
    document = nbformat.read(folder / "00_first.ipynb", as_version=4)
    assert [c.source.split("\n")[0] for c in document.cells] == ["# written since", 'profile = "quick"', 'print("n is", n)']
    assert [c.execution_count for c in document.cells[1:]] == [1, 2] and document.cells[2].outputs[1].execution_count == 2
    assert document.cells[2].outputs[0].text == "n is 9\n" and "papermill" not in document.metadata
    edit(folder / "00_first.ipynb", "n is", "n was")
    with pytest.raises(series.SeriesError, match="another version"):
        pipeline._refresh(place / "00_first.ipynb", folder / "00_first.ipynb")


def test_a_refreshed_notebook_keeps_a_widgets_picture_and_not_the_widget(folder):
    view, file, ran = "application/vnd.jupyter.widget-view+json", folder / "00_first.ipynb", folder / "ran.ipynb"
    notebook(folder, "00_first", "explorer")
    document = nbformat.read(file, as_version=4)
    document.cells[-1].outputs = [nbformat.v4.new_output("display_data", {view: {"model_id": "a"}, "image/png": "QQ==", "text/plain": "Explorer"}),
                                  nbformat.v4.new_output("display_data", {view: {"model_id": "b"}, "text/plain": "a bar"})]
    nbformat.write(document, ran)
    pipeline._refresh(ran, file)
    outputs = nbformat.read(file, as_version=4).cells[-1].outputs
    assert [sorted(out["data"]) for out in outputs] == [["image/png", "text/plain"], [view, "text/plain"]]


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "words"), [("x = 1 / (n - n)", ["failed in cell 3 (x = 1 / (n - n)): ZeroDivisionError"]),
                                             ("import os, signal\nos.kill(os.getpid(), 9)", ["the kernel of notebook 00_first died"])])
def test_a_step_that_fails_names_notebook_cell_and_copy_and_leaves_no_stamp(folder, capsys, cell, words):
    notebook(folder, "00_first", 'print("fine")', cell, 'print("never")')
    place = paths.runs("quick", "skimage10")
    place.mkdir(parents=True)
    (place / "00_first.done").write_text("{}")
    assert main(["step", "00_first", "--profile", "quick", "--values", "{}"]) == 1
    message = capsys.readouterr().err
    for word in [*words, "notebook 00_first", str(place / "00_first.ipynb"), "make resume"]:
        assert word in message
    assert (place / "00_first.failed").read_text() in message
    assert not (place / "00_first.done").exists()
    assert "fine" in (place / "00_first.ipynb").read_text() and '"never\\n"' not in (place / "00_first.ipynb").read_text()


# --- the series under Snakemake ---


@pytest.mark.slow
def test_a_run_does_what_is_stale_and_nothing_else(checkout):
    notebooks = checkout / "notebooks"
    run(checkout)
    order = ran(checkout)
    assert sorted(order) == sorted(NAMES) and order[0] == "00_first" and order[-1] == "90_all" and order.index("10_one") < order.index("11_two")
    assert "Nothing to be done" in run(checkout, "-j", "1") and ran(checkout) == []

    document = nbformat.read(notebooks / "10_one.ipynb", as_version=4)  # saved in JupyterLab: outputs, text, a new time
    document.cells[2].outputs = [nbformat.v4.new_output("stream", text="seen")]
    document.cells[0].source = "another title"
    nbformat.write(document, notebooks / "10_one.ipynb")
    (notebooks / "params/smoke.yaml").write_text("# a comment\ncommon: {n: 4}\n")
    edit(checkout / "advlab/toy.py", "Made", "Written")
    assert "nothing to do: 5 notebooks are up to date" in run(checkout, "-n")

    edit(checkout / "advlab/toy.py", "value = 1", "value = 2")
    (notebooks / "params/smoke.yaml").write_text("11_two: {n: 5}\n")
    found = stale(checkout)
    assert set(found) == {"11_two", "20_other", "90_all"}
    assert "advlab.toy" in found["20_other"] and '"n": 5' in found["11_two"] and "updated by another job" in found["90_all"]
    run(checkout, "20")  # a subset runs alone
    assert ran(checkout) == ["20_other"]
    run(checkout)
    assert sorted(ran(checkout)) == ["11_two", "90_all"]

    edit(notebooks / "10_one.ipynb", "str(n)", "str(n + 1)")
    (checkout / "runs/smoke/skimage10/20_other.json").unlink()
    found = stale(checkout)
    assert set(found) == {"10_one", "11_two", "20_other", "90_all"} and "results are gone" in found["20_other"]
    run(checkout, "10", "20", "--force", "-p", "n=7")
    assert sorted(ran(checkout)) == ["10_one", "20_other"]
    assert (checkout / "runs/smoke/skimage10/10_one.json").read_text() == "8"
    assert set(stale(checkout)) == set(NAMES[1:])  # made with other values than the series'


@pytest.mark.slow
def test_a_failure_is_named_others_go_on_and_resume_does_the_rest(checkout):
    work(checkout, "10_one", "assert n == 5, 'too few'")
    message = run(checkout, code=1)
    assert "notebook 10_one failed in cell 2 (from advlab import paths, report): AssertionError: too few" in message
    assert "2 of 5 notebooks are done" in message
    assert sorted(ran(checkout)) == ["00_first", "20_other"]
    edit(checkout / "notebooks/10_one.ipynb", "n == 5", "n == 4")
    run(checkout, "--resume")
    assert sorted(ran(checkout)) == ["10_one", "11_two", "90_all"]


@pytest.mark.slow
def test_a_failure_is_told_although_a_later_notebook_cannot_be_refreshed(checkout):
    run(checkout)
    for name, line in (("10_one", "assert n == 5, 'too few'"), ("11_two", "x = 1"), ("20_other", "print('fresh')")):
        work(checkout, name, line)
    message = run(checkout, "--refresh", code=1)
    assert "AssertionError: too few" in message and "11_two.ipynb was made from another version" in message
    assert "fresh" in str(nbformat.read(checkout / "notebooks/20_other.ipynb", as_version=4).cells[-1].outputs)


@pytest.mark.slow
def test_committed_results_do_not_count_as_done(checkout):
    place = checkout / "data/results/standard/skimage10"
    place.mkdir(parents=True)
    for name in NAMES:
        (place / f"{name}.json").write_text("{}")
    assert set(stale(checkout, "--profile", "standard")) == set(NAMES)


# --- a disk that is full, a folder that cannot be written ---


@pytest.fixture
def mount():
    """A function that mounts, undone at the end; skips where that is not allowed."""
    places = []

    def do(*arguments):
        if shutil.which("mount") is None or subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        places.append(arguments[-1])

    yield do
    for place in set(places):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_what_was_finished_stays(checkout, mount, monkeypatch):
    disk = checkout / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", disk)
    monkeypatch.setenv("ADVLAB_HOME", str(disk))
    work(checkout, "20_other", "report.write_atomic(paths.home() / 'big', bytes(2 * 2**20))")
    message = run(checkout, "00", "10", "20", code=1)
    assert "notebook 20_other" in message and "No space left on device" in message and "make resume" in message
    place = disk / "runs/smoke/skimage10"
    done = {name: (place / f"{name}.done").read_text() for name in ("00_first", "10_one")}
    assert (place / "00_first.json").read_text() == "4" and not (disk / "big").exists() and not list(disk.glob(".big*"))
    mount("-o", "remount,size=8m", disk)
    run(checkout, "00", "10", "20", "--resume")
    assert (place / "20_other.json").read_text() == "4"
    assert done == {name: (place / f"{name}.done").read_text() for name in done}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a file in its place", "mounted read-only"])
def test_a_results_folder_that_cannot_be_written_is_named(checkout, mount, how):
    place = checkout / "data/results/quick"
    place.parent.mkdir(parents=True)
    if how == "mounted read-only":
        place.mkdir()
        mount("--bind", place, place)
        mount("-o", "remount,bind,ro", place)
    else:
        place.write_text("")
    work(checkout, "10_one", "report.write_atomic(paths.results('quick', dataset) / 'x', b'')")
    message = run(checkout, "00", "10", code=1)
    assert "notebook 10_one failed in cell" in message and str(place) in message
    assert ("Read-only file system" if how == "mounted read-only" else "rrno") in message
    assert ran(checkout) == ["00_first"] and stale(checkout, "00", "10").keys() == {"10_one"}


def test_runs_that_cannot_be_written_stop_a_run_at_once(folder, capsys):
    notebook(folder, "00_first")
    (folder / "runs").write_text("")
    assert main(["run", "00"]) == 1
    assert f"runs cannot be written: [Errno 20] Not a directory: '{folder / 'runs' / 'quick'}'; set ADVLAB_HOME" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["local", "slurm", "cloud"])
def test_every_profile_keeps_the_triggers_that_the_stamps_need(where):
    import yaml

    options = yaml.safe_load((ROOT / "profiles" / where / "config.yaml").read_text())
    assert options["rerun-triggers"] == ["mtime", "params"] and options["rerun-incomplete"] is True


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "wanted"), [("smoke", {"mem_mb=2000", "runtime=30", "gpu=0"}),
                                                 ("paper", {"mem_mb=24000", "runtime=1440", "gpu=1"})])
def test_a_scheduler_is_told_memory_minutes_and_gpus(checkout, monkeypatch, profile, wanted):
    """Snakemake's own account of a job, as the Slurm plugin gets it; set-resources gives one notebook more."""
    monkeypatch.chdir(checkout)
    request = f"request={quote(json.dumps({'profile': profile}))}"
    command = [sys.executable, "-m", "snakemake", "--directory", str(checkout / "runs"), "--config", request, "--cores", "1", "--dry-run",
               "--set-resources", "11_two:mem_mb=5555"]
    out = subprocess.run(command, capture_output=True, text=True)
    told = dict(re.findall(r"^(?:local)?rule (\d\d_\w+):\n(?:    .*\n)*?    resources: (.*)$", out.stdout, re.M))
    assert out.returncode == 0, out.stdout + out.stderr
    assert set(told) == set(NAMES) and wanted <= set(told["10_one"].split(", ")) and "mem_mb=5555" in told["11_two"]
