"""Results files, tables and figures."""

import csv
import json
import math
import os
import subprocess
import time

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from advlab import ledger, paths, plots, report

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    return tmp_path


def make(**fields):
    return report.row(**{"exhibit": "HGD-T3", "system": "LGD", "attack": "FGSM", "value": 75.0, "unit": "%"} | fields)


def info(**parameters):
    return report.run_info(parameters, seed=0, started=time.time())


def save(rows, notebook="10_hgd_denoisers", profile="quick", dataset="skimage10", **kw):
    return report.save_results(notebook, rows, run=info(eps=8 / 255), profile=profile, dataset=dataset, **kw)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_where_a_committed_profile_has_not_run_the_checkouts_results_are_read(home):
    first = {"notebook": "00_data_and_classifiers", "profile": "standard", "dataset": "fashion_mnist"}
    assert report.load_results(**first)["run"]["profile"] == "standard"
    assert ("00_data_and_classifiers", "fashion_mnist") in ledger.documents("standard")
    assert paths.stored("figures", "standard") == paths.SOURCE / "figures" / "standard"
    with pytest.raises(FileNotFoundError):
        report.load_results(**first, where=home)
    save([make()], profile="standard", dataset="mnist")  # from now on one's own, and nothing mixed
    assert list(ledger.documents("standard")) == [("10_hgd_denoisers", "mnist")]
    with pytest.raises(FileNotFoundError, match="run notebook 00_data"):
        report.load_results(**first)
    assert paths.stored("results", "quick") == home / "data" / "results" / "quick" and paths.stored("figures", "smoke") == home / "runs" / "smoke"


# --- rows -----------------------------------------------------------------------------------------


def test_row_fills_the_core_fields():
    full = make(eps=torch.tensor(0.5), n=np.int64(4), correct=3, trained_on="MIM")
    assert list(full) == [*report.FIELDS, "trained_on"]
    assert (full["eps"], full["n"]) == (0.5, 4) and type(full["eps"]) is float and type(full["n"]) is int
    assert full["threat"] is full["paper"] is full["seed"] is None


@pytest.mark.parametrize("wrong, right", [("exibit", "exhibit"), ("sytem", "system"), ("step", "steps"), ("units", "unit"), ("values", "value")])
def test_row_refuses_misspelt_fields(wrong, right):
    with pytest.raises(report.SchemaError, match=f"{wrong!r}: did you mean {right!r}"):
        make(**{wrong: 1})


def test_rows_of_the_evaluation_fit():
    from advlab import evaluation

    x, y = torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.long)
    always_zero = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(always_zero[1].weight)
    always_zero[1].bias.data = torch.tensor([1.0, 0.0])
    full = report.row(exhibit="study", system="zero", **evaluation.robustness(always_zero, lambda model, x, y: x, x, y))
    assert (full["n"], full["correct"], full["value"], full["high"]) == (6, 6, 1.0, 1.0)
    assert report.percent(full)["value"] == 100 and report.percent(full)["unit"] == "%" and full["value"] == 1.0
    assert report.percent(make()) == make()


# --- the schema -----------------------------------------------------------------------------------

BAD = [
    ("value", None, "must not be null"),
    ("value", math.nan, "finite number, not nan"),
    ("value", math.inf, "finite number, not inf"),
    ("value", "75", "finite number, not '75'"),
    ("value", True, "finite number, not True"),
    ("low", -math.inf, "finite number"),
    ("n", 3.0, "an integer, not 3.0"),
    ("steps", -1, "must not be negative"),
    ("eps", -0.1, "must not be negative, but is -0.1"),
    ("system", "", "non-empty text"),
    ("attack", 3, "non-empty text, not 3"),
    ("exhibit", "HGD-T9", "exhibits.csv"),
    ("low", 80.0, "is 80.0, above value = 75.0"),
    ("high", 70.0, "above high = 70.0"),
    ("correct", 5, "is 5, above n = 4"),
    ("extra", [1], "not [1]"),
    ("extra", math.nan, "not nan"),
    ("norm", ..., "is missing"),
]


@pytest.mark.parametrize("field, value, why", BAD)
def test_validate_names_row_and_field(field, value, why):
    bad = {**make(n=4, correct=3), field: value}
    if value is ...:
        del bad[field]
    with pytest.raises(report.SchemaError) as error:
        report.validate({"run": info(), "rows": [make(), bad]})
    named = {"high": "value"}.get(field, field)  # the pair is reported by its lower half
    assert "row 1" in str(error.value) and f"field {named!r}" in str(error.value) and why in str(error.value)


@pytest.mark.parametrize("fields", [
    {}, {"exhibit": "ladder"}, {"exhibit": "comparison"}, {"exhibit": "benchmark"}, {"exhibit": "study"},
    {"low": 75.0, "high": 75.0}, {"value": 0.0, "low": 0.0}, {"n": 4, "correct": 4}, {"note": None, "masked": True, "queries": 200, "name": ""},
])  # fmt: skip
def test_validate_accepts(fields):
    document = {"run": info(), "rows": [make(**fields)]}
    assert report.validate(document) is document


@pytest.mark.parametrize("document, why", [
    ([], "must be"), ({"rows": []}, "must be"), ({"run": {}, "rows": {}}, "must be"), ({"run": {}, "rows": []}, "lacks 'parameters'"),
    ({"run": dict.fromkeys(report.RUN, object()), "rows": []}, "cannot be written as JSON"),
    ({"run": dict.fromkeys(report.RUN), "rows": [3]}, "row 0"),
])  # fmt: skip
def test_validate_refuses_other_documents(document, why):
    with pytest.raises(report.SchemaError, match=why):
        report.validate(document)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(home):
    rows = [make(eps=4 / 255), make(attack=None, paper=76.2, trained_on="MIM, PGD")]
    path = save(rows)
    assert path == home / "data/results/quick/skimage10/10_hgd_denoisers.json"
    document = report.load_results("10_hgd_denoisers", profile="quick", dataset="skimage10")
    assert document["rows"] == [rows[0], rows[1]]
    assert document["run"]["parameters"] == {"eps": 8 / 255} and document["run"]["notebook"] == "10_hgd_denoisers"
    assert document["run"]["profile"] == "quick" and document["run"]["dataset"] == "skimage10"
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [*report.FIELDS, "trained_on"]
    assert float(lines[0]["eps"]) == 4 / 255 and lines[0]["trained_on"] == "" and lines[1]["trained_on"] == "MIM, PGD"
    assert files(home) == ["data/results/quick/skimage10/10_hgd_denoisers.csv", "data/results/quick/skimage10/10_hgd_denoisers.json"]


def test_reruns_differ_in_run_only(home):
    texts = [json.loads(save([make()], where=home / name).read_text()) for name in "ab"]
    assert texts[0]["rows"] == texts[1]["rows"]
    assert save([], notebook="95_explore").exists()  # no rows is no error


def test_smoke_leaves_results_and_figures_alone(home):
    path = save([make()], profile="smoke")
    figure = plots.save_figure(plots.figure()[0], "10_hgd_denoisers", "empty", profile="smoke", dataset="skimage10")
    assert path.parent == figure.parent == home / "runs/smoke/skimage10"
    assert not (home / "data").exists() and not (home / "figures").exists()


def test_invalid_rows_leave_the_old_files(home):
    path = save([make()])
    before = {name: (home / name).read_bytes() for name in files(home)}
    with pytest.raises(report.SchemaError):
        save([make() | {"value": math.nan}])
    assert {name: (home / name).read_bytes() for name in files(home)} == before and path.exists()


def test_a_write_that_fails_leaves_the_old_file(home, monkeypatch):
    path = report.write_atomic(home / "a.txt", b"old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and files(home) == ["a.txt"]


@pytest.mark.parametrize("text", ["", '{"run": {}', "[1]", '{"run": {}, "rows": []}', "\udcff"])
def test_load_reports_damage(home, text):
    path = save([make()])
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(report.SchemaError, match="is not a results file"):
        report.load_results("10_hgd_denoisers", profile="quick", dataset="skimage10")


def test_load_says_how_to_make_what_is_missing():
    with pytest.raises(FileNotFoundError, match="run notebook 10_hgd_denoisers with profile paper"):
        report.load_results("10_hgd_denoisers", profile="paper", dataset="cifar10")


@pytest.mark.parametrize("part", [{"profile": "../x"}, {"dataset": "a/b"}, {"notebook": ""}, {"dataset": ".."}])
def test_paths_stay_inside(part, home):
    with pytest.raises(ValueError, match="cannot be part of a path"):
        save([make()], **part)
    assert files(home) == []


def test_run_info(home, monkeypatch):
    run = report.run_info({"eps": np.float64(0.5), "layers": [1, 2]}, seed=3, started=time.time() - 2)
    assert tuple(run) == report.RUN and run["seed"] == 3 and run["seconds"] >= 2
    assert run["parameters"] == {"eps": 0.5, "layers": [1, 2]} and json.dumps(run)
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0] and run["threads"] == torch.get_num_threads()
    monkeypatch.setattr(paths, "SOURCE", home)
    assert info()["commit"] is None  # no checkout
    git = ["git", "-C", str(home), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert info()["commit"] is None  # a checkout without a commit
    subprocess.run([*git, "commit", "-q", "--allow-empty", "--no-verify", "-m", "x"], check=True)
    assert len(info()["commit"]) == 40


# --- tables ---------------------------------------------------------------------------------------


def test_table():
    rows = [
        make(system="TRN", attack="PGD", value=0.5, unit="accuracy", paper=0.8696, low=0.4, high=0.6),
        make(system="TRN", attack="clean", value=94.37, unit="%"),
        make(system="AT", attack="PGD", value=44.16, paper=44.16),
    ]
    frame = report.table(rows)
    assert list(frame.index) == ["TRN", "AT"] and list(frame.columns) == ["PGD", "clean"]  # order of appearance
    assert frame.values.tolist() == [["50.0 (87.0)", "94.4"], ["44.2 (44.2)", ""]]
    assert report.table(rows, interval=True, digits=0).loc["TRN", "PGD"] == "50 [40, 60] (87)"
    deep = report.table(rows, index=["system", "exhibit"], columns=["attack", "eps"])
    assert deep.loc[("TRN", "HGD-T3"), ("clean", "-")] == "94.4"
    with pytest.raises(ValueError, match="two rows for TRN / PGD"):
        report.table([*rows, rows[0]])
    with pytest.raises(ValueError, match="no rows"):
        report.table([])


@pytest.mark.parametrize("name, value, text", [
    ("eps", 8 / 255, "8/255"), ("eps", 0.5 / 255, "0.5/255"), ("eps", 0.031, "0.031"), ("eps", 0.0, "0"), ("steps", 20, "20"), ("seed", None, "-"),
    ("eps", np.float32(8 / 255).item(), "8/255"), ("system", "AT", "AT"),
])  # fmt: skip
def test_label(name, value, text):
    assert report.label(name, value) == text


# --- figures --------------------------------------------------------------------------------------


def curves(**kw):
    rows = [make(system=s, eps=e / 255, value=v, low=max(v - 5, 0), high=min(v + 5, 100), **kw) for s, e, v in (
        ("AT", 8, 40.0), ("AT", 0, 80.0), ("no defence", 0, 95.0), ("no defence", 8, 2.0))]  # fmt: skip
    return rows


def test_every_look_differs_without_colour():
    for part in range(4):
        assert len({look[part] for look in plots.LOOKS}) == len(plots.LOOKS)


def test_curves_show_the_rows():
    ax = plots.accuracy_curves(curves(paper=42.7), chance=10, title="PGD").axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert lines["AT"] == [[0, 80], [8, 40]] and lines["no defence"] == [[0, 95], [8, 2]]  # in 255ths, sorted
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (35, 85)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["AT", "no defence", "chance", "in the paper"]


def test_bars_show_the_rows():
    rows = [make(system=s, attack=a, value=v, unit="accuracy", paper=p) for s, a, v, p in (
        ("AT", "clean", 0.8, None), ("TRN", "clean", 0.9, 0.94), ("AT", "PGD", 0.4, None), ("TRN", "PGD", 0.1, None))]  # fmt: skip
    ax = plots.bars(rows).axes[0]
    assert [[bar.get_height() for bar in group] for group in ax.containers] == [[80, 40], [90, 10]]  # per cent
    assert [t.get_text() for t in ax.get_xticklabels()] == ["clean", "PGD"]
    assert [line.get_ydata().item() for line in ax.get_lines() if len(line.get_xdata())] == [94]
    assert plots.bars(rows, legend=False).axes[0].get_legend() is None


@pytest.mark.parametrize("draw", [plots.accuracy_curves, plots.bars])
def test_confused_rows_are_refused(draw):
    with pytest.raises(ValueError, match="two rows at system = 'AT', eps"):
        draw([*curves(), curves()[0]], x="eps")
    with pytest.raises(ValueError, match="different units in one figure: %, s"):
        draw([*curves(), make(system="AT", eps=0.5, unit="s")], x="eps")
    with pytest.raises(ValueError, match="9 different system in one figure, at most 8"):
        draw([make(system=str(i), eps=0.0) for i in range(9)], x="eps")


def test_matrix():
    ax = plots.matrix([[1, 0.17], [math.nan, 1]], ["R", "A"], ["R", "A"], vmin=0, vmax=1).axes[0]
    assert [(t.get_text(), t.get_color()) for t in ax.texts] == [("1.00", "black"), ("0.17", "white"), ("-", "black"), ("1.00", "black")]
    assert plots.matrix([[-0.001]], ["R"], ["A"]).axes[0].texts[0].get_text() == "0.00"
    with pytest.raises(ValueError, match=r"shape \(1, 2\), labels say \(2, 2\)"):
        plots.matrix([[1, 2]], ["a", "b"], ["c", "d"])


def test_perturbation_has_one_scale():
    delta = torch.tensor([[-0.2, 0.0], [0.1, 0.2]])
    assert torch.allclose(plots.perturbation(delta), torch.tensor([[0, 0.5], [0.75, 1]]))
    assert torch.allclose(plots.perturbation(delta, 0.1), torch.tensor([[0, 0.5], [1, 1]]))
    assert (plots.perturbation(torch.zeros(2, 3)) == 0.5).all()


def test_image_grid(home):
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fig = plots.image_grid([x, x[:2], x.mean(1, keepdim=True)], ["rgb", "short", "grey"], list("abc"), captions=[list("123")] * 3)
    shown = [ax.get_images() for ax in fig.axes]
    assert [len(i) for i in shown] == [1, 1, 1, 1, 1, 0, 1, 1, 1]
    assert np.array_equal(shown[1][0].get_array(), x[1].permute(1, 2, 0)) and shown[6][0].get_array().shape == (8, 8)
    for bad in (x + 0.5, x - 0.5, x * math.nan):
        with pytest.raises(ValueError, match="picture 0 of row 1 has pixels in"):
            plots.image_grid([x, bad])
    with pytest.raises(ValueError, match="2 row labels for a grid of 1 rows and 3 columns"):
        plots.image_grid([x], ["a", "b"])


def test_figures_are_files_of_the_same_bytes(home):
    before = dict(matplotlib.rcParams)
    where = {"profile": "standard", "dataset": "fashion_mnist"}
    path, again = [plots.save_figure(plots.accuracy_curves(curves()), "01_gradient_attacks", name, **where) for name in ("curves", "again")]
    assert path == home / "figures/standard/fashion_mnist/01_gradient_attacks-curves.png"
    assert path.read_bytes() == again.read_bytes() and path.read_bytes().startswith(PNG)
    fig, _ = plots.figure()
    assert fig._repr_png_().startswith(PNG)  # what a notebook shows
    assert dict(matplotlib.rcParams) == before


def test_histograms_share_their_bins_and_sum_to_one():
    fig = plots.histograms({"a": [0.0, 0.0, 1.0], "b": [1.0, 3.0]}, bins=3)
    heights = [{round(float(y), 6) for y in c.get_paths()[0].vertices[:, 1]} - {0} for c in fig.axes[0].collections]
    assert heights == [{0.333333, 0.666667}, {0.5}]  # bins [0, 1), [1, 2), [2, 3], each a share of its own group


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_histograms_refuse_what_cannot_be_drawn(values):
    with pytest.raises(ValueError, match="group 'a'"):
        plots.histograms({"a": values})


def test_a_verdict_counts_cells_near_the_paper_and_statements_that_came_true():
    near, far = ({"exhibit": "HGD-T3", "system": "LGD", "value": v, "unit": "accuracy", "paper": 0.70, "n": n} for v, n in ((0.74, 200), (0.76, 100)))
    times = {"value": 10.6, "unit": "s", "paper": 10.0, "n": None}
    both = report.verdict("HGD-T3", claim="c", rows=[near, far, {**near, "paper": None}], survives=False)
    assert (both["reproduced"], both["met"], both["marks"], both["survives"], both["n"]) == ("partly", 1, 2, "refuted", 100)
    assert report.verdict("HGD-T3", claim="c", rows=[near], claims={"it rises": True})["reproduced"] == "yes"
    assert report.verdict("HGD-T3", claim="c", rows=[far, times], claims={"it rises": True})["reproduced"] == "no"  # relative: 6 % off
    assert report.verdict("HGD-T3", claim="c", rows=[times], tolerance=0.1, survives=True)["survives"] == "held"
    with pytest.raises(ValueError, match="nothing to judge HGD-T3 by"):
        report.verdict("HGD-T3", claim="c", rows=[{**near, "paper": None}])
    shown = report.verdicts([near, {**both, "claim": "x" * 200}])
    assert "x" * 200 in shown._repr_html_()
    assert list(shown.index) == ["HGD-T3"] and shown["number reproduced"].iloc[0] == "partly (1 of 2 numbers within 0.05)"
    mixed = report.verdict("HGD-T3", claim="c", rows=[near, far], claims={"a: b": False, "it rises": True, "it falls": False})
    assert report.counted(mixed) == "no (1 of 2 numbers within 0.05, 1 of 3 statements)"
    assert report.counted(report.verdict("HGD-T3", claim="c", claims={"it rises": True})) == "yes (1 of 1 statements)"
    with pytest.raises(ValueError, match="no verdict"):
        report.verdicts([near])


def test_a_mean_row_has_the_normal_interval():
    r = report.mean_row(torch.tensor([1.0, 3.0]), exhibit="study", system="s", unit="u")
    assert (r["value"], r["n"]) == (2, 2) and r["high"] - 2 == pytest.approx(1.959964) == 2 - r["low"]  # standard deviation sqrt(2), over sqrt(2)
    assert report.mean_row(torch.tensor([5.0]), exhibit="study", system="s", unit="u")["low"] is None


def test_a_joint_histogram_draws_the_line_of_least_squares():
    x = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    fig = plots.joint({"half": (x, x / 2), "none": (x, 0 * x)}, xlabel="x", ylabel="y")
    assert [ax.get_title() for ax in fig.axes[:2]] == ["half, k = 0.50", "none, k = 0.00"]
    assert fig.axes[0].get_xlim() == (-3, 3) == fig.axes[0].get_ylim()
    far = torch.cat([3 * x.repeat(1000), torch.tensor([500.0])])  # one point in 4,001 is no reason to zoom out
    assert plots.joint({"far": (torch.cat([x.repeat(1000), x[:1]]), far)}, xlabel="x", ylabel="y").axes[0].get_ylim() == (-6, 6)
    with pytest.raises(ValueError, match="every x of 'flat' is 0"):
        plots.joint({"flat": (0 * x, x)}, xlabel="x", ylabel="y")
