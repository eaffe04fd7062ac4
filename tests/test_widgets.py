"""The explorers without a browser: set a control, read the picture's bytes and its words. Nothing stale is shown, nothing of the network or of the
global generators changes, long work can be stopped."""

import base64
import html
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advlab import report, widgets
from advlab.models import seeded, small_cnn

PNG = b"\x89PNG"
CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]


def blur(x):
    return F.avg_pool2d(x, 3, 1, 1)


class Gate(nn.Module):
    """A network that says when a pass begins, and then waits to be let through; or, with `pace`, takes that many seconds a pass."""

    def __init__(self, model, pace=None):
        super().__init__()
        self.model, self.pace, self.entered, self.open = model, pace, threading.Event(), threading.Event()

    def forward(self, x):
        self.entered.set()
        assert self.open.wait(60 if self.pace is None else self.pace) or self.pace is not None, "never let through"
        return self.model(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_cnn(6, width=4).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 6


@pytest.fixture(scope="module")
def other():
    torch.manual_seed(1)
    return small_cnn(6, width=4).eval()


def rows():
    common = {"exhibit": "study", "threat": "end to end", "attack": "pgd", "unit": "accuracy", "norm": "linf", "n": 10, "steps": 5}
    return [report.row(**common, system=name, eps=eps / 255, value=v, low=v / 2, high=(1 + v) / 2)
            for name, values in {"none": (0.6, 0.1), "elsewhere": (0.8, 0.5)}.items() for eps, v in zip((2, 8), values)]


def make(kind, model, images, other):
    x, y = images
    two, options = {"one": model, "two": other}, {"classes": CLASSES}
    with seeded(2):
        detector = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).eval()
    return {
        "attacks": lambda: widgets.AttackExplorer(two, x, y, **options),
        "maps": lambda: widgets.GradientMapExplorer(two, x, y, **options),
        "amplification": lambda: widgets.AmplificationExplorer(two, x, y, {"blur": blur}, **options),
        "sensitivity": lambda: widgets.SensitivityExplorer(two, x, y, org=detector, sen=detector, rectifier=other, **options),
        "similarity": lambda: widgets.SimilarityExplorer(two, x, y, {"blur": blur}, **options),
        "transformation": lambda: widgets.TransformExplorer(two, x, y, model, **options),
        "comparison": lambda: widgets.ComparisonBrowser(rows(), {"none": model, "two": other}, x, y, **options),
    }[kind]()


# for each explorer: controls with a value that must change the picture, and a word that must then be among the words
MOVES = {
    "attacks": {"eps": (2.0, "2/255"), "steps": (3, ""), "attack": ("fgsm", "fgsm"), "target": ("fox", ""), "image": (4, "elk"),
                "model": ("two", "")},
    "maps": {"eps": (0.0, "Clean"), "scale": ("shared", "shared scale"), "show": ("size", ""), "image": (4, "elk"), "model": ("two", "")},
    "amplification": {"eps": (2.0, "2/255"), "layer": ("layer2.0", "layer2.0"), "attacker": ("knows the denoiser too", "too"), "image": (4, "elk"),
                      "model": ("two", ""), "restorer": ("none", "")},
    "sensitivity": {"attack": ("pgd", ""), "rate": (90, "90 %"), "eps": (16.0, ""), "image": (4, "elk"), "model": ("two", "")},
    "similarity": {"second": ("blur", "blur"), "scaling": ("rank", ""), "image": (4, ""), "model": ("two", "two")},
    "transformation": {"delta": (0.1, "Δ = 0.1"), "steps": (2, "N = 2"), "draws": (6, "6 draws"), "image": (4, ""), "model": ("two", "")},
    "comparison": {"threat": ("end to end", "end to end"), "eps": (9, "9/255"), "model": ("elsewhere", "cannot be shown")},
}


@pytest.fixture(params=MOVES)
def kind(request):
    return request.param


def settle(explorer):
    assert explorer.wait(120)
    assert explorer.error is None, explorer.error
    return explorer.png


def test_every_control_moves_the_picture_and_its_words_and_leaves_the_networks_alone(kind, model, images, other):
    state = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, other)]
    rng = torch.get_rng_state()
    explorer = make(kind, model, images, other)
    last, words = settle(explorer), explorer.alt
    assert last.startswith(PNG)
    shown = explorer.children[-1].value
    assert html.escape(explorer.alt) in shown and base64.b64encode(last).decode() in shown and "<img alt=" in shown
    for name, (value, word) in MOVES[kind].items():
        assert explorer.controls[name].value != value
        explorer.controls[name].value = value
        png = settle(explorer)
        assert png != last or explorer.alt != words, name
        assert word in explorer.alt, (name, explorer.alt)
        assert base64.b64encode(png).decode() in explorer.children[-1].value
        assert html.escape(explorer.status) in explorer.children[1].value
        last, words = png, explorer.alt
    assert torch.equal(rng, torch.get_rng_state())
    for m, before in zip((model, other), state):
        assert not any(part.training for part in m.modules())
        assert all(p.grad is None and p.requires_grad for p in m.parameters())
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_every_control_has_a_label_and_a_tooltip_and_reports_when_it_is_let_go(kind, model, images, other):
    explorer = make(kind, model, images, other)
    settle(explorer)
    for control in explorer.controls.values():
        assert control.description and len(control.tooltip) > 5
        assert not getattr(control, "continuous_update", False)


def test_a_control_that_would_change_nothing_is_disabled(model, images):
    explorer = widgets.AttackExplorer(model, *images)
    steps, attack = explorer.controls["steps"], explorer.controls["attack"]
    assert not steps.disabled
    attack.value = "fgsm"
    assert steps.disabled
    attack.value = "apgd"
    assert not steps.disabled
    settle(explorer)


def test_the_same_settings_give_the_same_picture(kind, model, images, other):
    one, two = (make(kind, model, images, other) for _ in range(2))
    assert settle(one) == settle(two) is not None and one.alt == two.alt


def test_where_nobody_moves_a_slider_the_picture_is_in_the_output(model, images):
    explorer = widgets.AttackExplorer(model, *images)
    bundle = explorer._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == explorer.png and explorer.png.startswith(PNG)
    assert explorer.alt in bundle["text/plain"] and bundle["application/vnd.jupyter.widget-view+json"]["model_id"]


def test_a_change_during_a_drawing_overtakes_it_and_the_old_picture_is_never_shown(model, images):
    explorer = widgets.AttackExplorer(model, *images)
    settle(explorer)
    wanted = {}
    for eps in (2.0, 4.0):
        explorer.controls["eps"].value = eps
        wanted[eps] = settle(explorer)
    gate = Gate(model)
    gate.open.set()
    explorer.replace(models=gate)
    settle(explorer)
    published = []
    explorer.children[-1].observe(lambda change: published.append(explorer.alt), "value")
    gate.entered.clear(), gate.open.clear()
    explorer.controls["eps"].value = 2.0
    assert gate.entered.wait(60)  # the drawing for 2/255 is under way, and held
    explorer.controls["eps"].value = 4.0
    assert not explorer.wait(0.05)
    gate.open.set()
    assert settle(explorer) == wanted[4.0] != wanted[2.0]
    assert all("2/255" not in alt for alt in published)


def test_many_fast_changes_end_at_the_last(model, images):
    explorer = widgets.AttackExplorer(model, *images)
    for eps in [1.0, 5.0, 3.0, 7.0, 2.5] * 4:
        explorer.controls["eps"].value = eps
    settle(explorer)
    assert "2.5/255" in explorer.alt
    calm = widgets.AttackExplorer(model, *images)
    calm.controls["eps"].value = 2.5
    assert settle(calm) == explorer.png


def test_long_work_shows_progress_and_stops_when_cancelled(model, images):
    explorer = widgets.AttackExplorer(model, *images)
    stop, bar = explorer.children[0].children[-2:]
    settle(explorer)
    explorer.controls["steps"].value = 1
    explorer.replace(models=Gate(model, pace=0.1))
    settle(explorer)
    assert stop.disabled and bar.layout.visibility == "hidden"
    seen = threading.Event()
    bar.layout.observe(lambda change: seen.set() if change["new"] == "visible" else None, "visibility")
    explorer.controls["steps"].value = 100
    assert seen.wait(60) and not stop.disabled
    assert 0 < bar.value < 1
    stop.click()
    assert explorer.wait(60)
    assert explorer.png is None and "<img" not in explorer.children[-1].value and "Cancelled" in explorer.children[1].value
    assert stop.disabled and bar.layout.visibility == "hidden"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    explorer.controls["steps"].value = 2  # any change draws again
    assert settle(explorer).startswith(PNG)


def test_other_images_and_models_leave_the_controls_as_they_were(model, images, other):
    x, y = images
    explorer = widgets.AttackExplorer({"one": model, "two": other}, x, y, CLASSES)
    values = {"model": "two", "image": 4, "eps": 3.0, "attack": "bim", "steps": 7, "target": "fox"}
    for name, value in values.items():
        explorer.controls[name].value = value
    settle(explorer)
    explorer.replace(x=x.flip(0), y=y.flip(0))
    settle(explorer)
    assert {n: c.value for n, c in explorer.controls.items()} == values
    assert f"True label {CLASSES[int(y.flip(0)[4])]}" in explorer.alt
    explorer.replace(models={"three": model, "two": other}, x=x[:3], y=y[:3])
    settle(explorer)
    assert explorer.controls["model"].value == "two" and explorer.controls["image"].value == 2 and explorer.controls["target"].value == "fox"
    explorer.replace(models=model)
    settle(explorer)
    assert explorer.controls["eps"].value == 3.0 and explorer.controls["model"].layout.display == "none"


def test_what_was_begun_for_other_models_is_not_kept(model, images, other):
    explorer = widgets.AttackExplorer({"net": model}, *images, CLASSES)
    settle(explorer)

    def late():
        explorer.replace(models={"net": other})  # while this is being worked out
        return "of the old network"

    assert explorer.remember("answer", late) == "of the old network" and "answer" not in explorer.kept
    settle(explorer)


def test_what_cannot_be_drawn_says_why_and_shows_no_picture(model, images):
    explorer = widgets.AttackExplorer(model, *images, CLASSES)
    settle(explorer)
    explorer.controls["target"].value = "ant"  # what image 0 is
    assert explorer.wait(60) and isinstance(explorer.error, ValueError) and explorer.png is None
    assert "already" in explorer.status and "ant" in explorer.status
    explorer.controls["target"].value = "bee"
    assert settle(explorer).startswith(PNG)


def test_any_function_will_do_and_bad_input_is_refused_at_once(model, images):
    x, y = images
    explorer = widgets.AttackExplorer(lambda v: model(v), x, y)
    settle(explorer)
    assert explorer.classes == [str(k) for k in range(6)]
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="images"):
        widgets.AttackExplorer(model, x[0], y)
    with pytest.raises(ValueError, match="labels"):
        widgets.AttackExplorer(model, x, y[:3])
    leaves = widgets.AmplificationExplorer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 6)).eval(), x, y)
    settle(leaves)
    assert list(leaves.controls["layer"].options) == ["pixels", "0", "1", "2", "3"]


def test_a_browsers_curve_is_of_one_norm_and_rounding_and_lies_on_its_axis(model, images):
    row = {"exhibit": "study", "system": "none", "threat": "paper", "attack": "cw", "unit": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    rows = [row | {"norm": "linf", "eps": 76.5 / 255, "rounded": True}, row | {"norm": "linf", "eps": 4 / 255, "rounded": False},
            row | {"norm": "l2", "eps": 1.0}]
    browser = widgets.ComparisonBrowser([report.row(**r) for r in rows], {"none": model}, *images, CLASSES)
    (points,) = browser.curves(widgets.Job(lambda: False, print), "none", "paper", 4.0).values()
    assert [round(p[0], 3) for p in points] == [76.5]
    browser.controls["threat"].value = "paper"
    fig, *_ = browser.draw(widgets.Job(lambda: False, print), model="none", image=0, threat="paper", eps=4)
    assert fig.axes[0].get_xlim()[1] > 76.5


def test_a_browser_without_rows_attacks_now_and_its_curve_counts_what_fell(model, images):
    x, y = images
    y = model(x).argmax(1)
    browser = widgets.ComparisonBrowser([], {"none": model}, x, y, CLASSES)
    settle(browser)
    points = browser.curves(widgets.Job(lambda: False, print), "none", widgets.comparison.LIVE, 4.0)["PGD-20"]
    assert [p[0] for p in points] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0] and points[0][1] == 1.0
    assert all(low <= value <= high for _, value, low, high in points)
    x_adv, _, fell = browser.kept["none", 4.0]
    assert (x_adv - x).abs().max() <= 4 / 255 + 1e-6 and torch.equal(fell, model(x_adv).argmax(1) != y)
    assert points[3][1] == pytest.approx(1 - fell.double().mean().item())
    assert f"{int(fell.sum())} of 12 images fell" in browser.status


def test_saved_rows_come_from_every_notebook_of_a_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    assert widgets.saved_rows("quick", "skimage10") == []
    run = dict.fromkeys(report.RUN)
    for name in ("01_one", "13_two"):
        report.save_results(name, rows(), run=run, profile="quick", dataset="skimage10")
    found = widgets.saved_rows("quick", "skimage10")
    assert [r["notebook"] for r in found] == ["01"] * 4 + ["13"] * 4 and found[0]["system"] == "none"
