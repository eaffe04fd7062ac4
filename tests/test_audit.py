"""The audit: what it takes, what it refuses and in which words, what it finds on defences whose answer is known, and what an interrupt leaves."""

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

from advlab import __main__, audit, evaluation, report
from advlab.attacks import eot
from advlab.defenses import masked
from tests.helpers import closest, linear_model

BUDGET = evaluation.Budget(images=24, steps=10, restarts=1, samples=2, queries=20)
EPS = 0.1
QUIET = {"say": lambda line: None, "classes": 3, "eps": EPS}


@pytest.fixture(scope="module")
def linear():
    model = linear_model((1, 4, 4), classes=3, seed=2)
    x = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return model, x, model(x).argmax(1)


# what audit refuses; a module of its own so that specs can name it
number, Sound = 3, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()


def builder():
    return Sound


def training():
    return nn.Sequential(nn.BatchNorm2d(3), Sound)


def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))


def grey():
    return nn.Sequential(nn.Conv2d(1, 1, 1), Sound)


def soft():
    return nn.Sequential(Sound, nn.Softmax(1))


def split():
    return {"defence": Sound, "restorer": nn.Hardtanh(0.4, 0.6), "classifier": Sound}


def text():
    return "a network"


def misspelt():
    return {"defense": Sound}


HERE = f"{__name__}:"


@pytest.mark.parametrize(("spec", "words"), [
    ("nowhere", "package.module:builder"), ("no.such.module:x", "cannot import 'no.such.module'"), (HERE + "bilder", "did you mean 'builder'"),
    (HERE + "number", "no builder but a int"), (HERE + "training", "call model.eval()"), (HERE + "narrow", "(8, 10)"),
    (HERE + "grey", "fails on images of shape (8, 3, 32, 32)"), (HERE + "soft", "leave out the last softmax"),
    (HERE + "split", "not classifier(restorer(x))"), (HERE + "text", "returned str"), (HERE + "misspelt", "no entry 'defense'"),
])
def test_a_defence_that_cannot_be_audited_is_refused_in_words(spec, words, capsys):
    assert __main__.main(["audit", spec, "--profile", "smoke", "--surrogates"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("advlab: ") and words in error and error.count("\n") == 1


def test_an_unknown_data_set_is_refused(capsys):
    assert __main__.main(["audit", HERE + "builder", "--data", "imaginary"]) == 1
    assert "imaginary" in capsys.readouterr().err


def test_every_form_of_a_defence_is_understood():
    restorer, classifier = nn.Hardtanh(0, 1), nn.Flatten()
    both = nn.Sequential(OrderedDict(restorer=restorer, classifier=classifier))
    known = {"restorer": restorer, "classifier": classifier}
    for built in (both, (restorer, classifier), (both, evaluation.Parts(**known)), known, {"defence": both}):
        defence, parts = audit.opened(built)
        assert torch.equal(defence(torch.ones(1, 2, 1, 1) * 2), torch.ones(1, 2)) and (parts.restorer, parts.classifier) == (restorer, classifier)
    assert audit.opened(nn.Sequential(restorer, classifier))[1] == evaluation.Parts()  # children without these names promise nothing
    assert audit.find(HERE + "Sound")() is Sound


def test_a_linear_models_worst_case_is_that_of_its_distances(linear):
    model, x, y = linear
    found = audit.audit(model, evaluation.Parts(), x, y, BUDGET, **QUIET)
    stands = (closest(model, x, y, "linf") > EPS).sum().item()
    assert 0 < stands < 24 and found.worst["correct"] == stands
    assert {r["curve"] for r in found.curves} == {"eps", "steps"} and found.verdict().endswith(f"No check failed on {found.probed} images.")
    at = {r["eps"]: r["correct"] for r in found.curves if r["curve"] == "eps"}
    # nothing lies nearer than the nearest
    assert at[0.0] == 24 and all(count >= (closest(model, x, y, "linf") > eps).sum() for eps, count in at.items())
    assert at[EPS] <= stands + 2 and at[2 * EPS] <= at[EPS]


def test_shattered_gradients_are_told_and_cured_by_parts(linear):
    model, x, y = linear
    alone = audit.audit(nn.Sequential(masked.Quantise(4), model), evaluation.Parts(), x, y, BUDGET, **QUIET)
    words = audit.text(alone)
    assert "end to end" in {r["threat"] for r in alone.climbed.rows}  # a gradient that is zero is one
    assert "checks failed" in alone.verdict() and "**gradients** (failed)" in words and "give `restorer` and `classifier`" in words
    defence, parts = audit.opened((masked.Quantise(4), model))
    known = audit.audit(defence, parts, x, y, BUDGET, **QUIET)
    assert known.worst["value"] < alone.worst["value"]
    cured = next(r for r in known.curves if (r["system"], r["curve"], r["eps"]) == ("bpda identity", "eps", EPS))
    assert cured["value"] <= known.climbed.rows[0]["value"] - 0.2


def test_leaked_labels_are_told(linear):
    model, x, y = linear
    found = audit.audit(masked.Memory(model, x, y, far=0.02), evaluation.Parts(), x, y, BUDGET, **QUIET)
    assert found.worst["value"] > 0.5  # looks strong
    assert {"falls to chance", "no rise with eps"} & {c["check"] for c in found.checks if not c["passed"]} and "upper bound" in found.verdict()


def test_a_random_defence_is_found_out(linear):
    model, x, y = linear
    assert audit.examined(nn.Sequential(masked.RandomView(), model), evaluation.Parts(), x, y, 3).random
    assert not audit.examined(model, evaluation.Parts(), x, y, 3).random
    shift = torch.Generator().manual_seed(0)
    once = nn.Sequential(Function(lambda v: v + 0.3 * torch.randn(v.shape[1:], generator=shift)), model)
    each = nn.Sequential(Function(lambda v: v + 0.3 * torch.randn(v.shape, generator=shift)), model)
    assert [audit.examined(m, evaluation.Parts(), x, y, 3).per_call for m in (once, each, model)] == [True, False, False]
    ways = evaluation.rungs(once, audit.examined(once, evaluation.Parts(), x, y, 3), BUDGET, eps=EPS)
    assert all(m.apart for *_, m in ways if isinstance(m, eot))


class Function(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


class Detached(nn.Module):
    """A network behind which the graph is cut, as by JPEG on the CPU."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).detach()


def test_without_any_gradient_queries_remain(linear):
    model, x, y = linear
    found = audit.audit(Detached(model), evaluation.Parts(), x, y, BUDGET, **QUIET)
    assert [r["threat"] for r in found.climbed.rows] == ["none", "query", "worst case"] and found.curves == []
    assert [c["check"] for c in found.checks if not c["passed"]] == ["gradients", "white box is strongest"]
    defence, parts = audit.opened((nn.Hardtanh(0, 1), Detached(model)))
    found = audit.audit(defence, parts, x, y, BUDGET, **QUIET)
    assert [r["threat"] for r in found.climbed.rows] == ["none", "query", "worst case"]


def test_a_backward_pass_that_fails_is_told_in_the_report(linear):
    model, x, y = linear
    found = audit.audit(nn.Sequential(Function(lambda v: v.sigmoid().mul_(2)), model), evaluation.Parts(), x, y, BUDGET, **QUIET)
    (check,) = [c for c in found.checks if c["check"] == "gradients"]
    assert not check["passed"] and "inplace operation" in check["reading"] and "inplace operation" in audit.text(found)


class Interrupted(nn.Module):
    """Stops at its `at`th pass, as Ctrl-C would."""

    def __init__(self, model, at):
        super().__init__()
        self.model, self.at = model, at

    def forward(self, x):
        self.at -= 1
        if self.at < 0:
            raise KeyboardInterrupt
        return self.model(x)


def test_an_interrupt_keeps_the_rungs_that_are_done(linear, tmp_path):
    model, x, y = linear
    said = []
    found = audit.audit(Interrupted(model, 45), evaluation.Parts(), x, y, BUDGET, **QUIET | {"say": said.append})
    assert not found.finished and found.worst["threat"] == "worst case" and 2 <= len(found.climbed.rows) - 1 < 6
    assert found.worst["correct"] == found.climbed.standing.sum() == found.climbed.rows[-2]["correct"] and "interrupted" in said[-1]
    page = audit.write(found, run=report.run_info({}, 0, 0.0), profile="smoke", dataset="made", where=tmp_path)
    assert "interrupted" in page.read_text()
    with pytest.raises(KeyboardInterrupt):
        audit.audit(Interrupted(model, 4), evaluation.Parts(), x, y, BUDGET, **QUIET)


def test_the_command_writes_a_valid_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    few = ["--profile", "smoke", "--n", "8", "--steps", "2", "--surrogates"]
    assert __main__.main(["audit", HERE + "builder", *few, "--name", "mine"]) == 0
    folder = tmp_path / "runs" / "audit" / "mine"
    assert {f.name for f in folder.iterdir()} >= {"report.html", "report.md", "audit.json", "audit-eps.png", "audit-steps.png"}
    rows = report.validate(json.loads((folder / "audit.json").read_text()))["rows"]
    assert rows[0]["n"] == 8 and {"curve", "check", "worst case", "query"} <= {r["threat"] for r in rows}
    page = (folder / "report.html").read_text()
    assert "worst case" in page and "audit-eps.png" in page and "http" not in page
    assert "rung 1 of" in capsys.readouterr().out
