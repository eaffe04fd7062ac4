"""Evaluation, the ladder and its checks: against counted tables, closed forms, and defences made to fail each check."""

from functools import partial

import pytest
import torch
from torch import nn

from advlab import data, evaluation, training
from advlab.attacks import core, pgd
from advlab.attacks.adaptive import smooth, straight_through
from advlab.evaluation import BUDGETS, Budget, Parts, accuracy, craft, judge, ladder, random_targets, robustness, rungs, score, wilson
from advlab.models import seeded, small_cnn
from advlab.report import row as result_row
from advlab.sanity import black_box, dynamic, failed, gradients, outputs, randomness, sanity

SMALL = Budget(images=12, steps=20, restarts=1, samples=4, queries=60)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture(scope="module")
def batch(net):
    x = 0.2 + 0.6 * torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 4  # one image is wrong from the start
    return x, y


@pytest.mark.parametrize(("correct", "n", "low", "high"),
                         [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)])
def test_wilson_agrees_with_published_values(correct, n, low, high):
    """Newcombe (1998), table I, for 81 of 263; the others by hand from the formula."""
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError, match="interval needs"):
        wilson(correct, n)


def test_score_of_a_counted_table():
    right = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    one, three = score(right[:1]), score(right)
    assert (one["correct"], one["n"], one["value"]) == (2, 4, 0.5) and "spread" not in one
    assert three["value"] == pytest.approx(0.5) and three["spread"] == 0 and three["correct"] is None
    assert three["majority"] == 0.5  # images 0 and 1 win two draws of three
    for r in (one, three):
        result_row(exhibit="study", system="s", **r)


def test_accuracy_counts(net, batch):
    r = accuracy(net, *batch)
    assert (r["correct"], r["n"]) == (11, 12)


def test_wrong_images_count_as_wrong_and_are_never_attacked(net, batch):
    x, y = batch
    seen = []

    def attack(model, x, y):
        seen.append(len(x))
        return x

    x_adv, right, before = craft(net, attack, x, y)
    assert sum(seen) == 11 and int(right.sum()) == 11 and not before[0] and torch.equal(x_adv, x)
    lucky = robustness(net, lambda m, x, y: x.flip(0), x, y)
    assert lucky["correct"] <= 11  # image 0 cannot become right


def test_robustness_reports_what_the_attack_did(net, batch):
    r = robustness(net, partial(pgd, eps=0.3, steps=10), *batch)
    assert r["linf"] == pytest.approx(0.3, abs=1e-6) and r["clean"] == pytest.approx(11 / 12) and r["correct"] == 0
    still = robustness(net, partial(pgd, eps=0.0), *batch)
    assert still["linf"] == still["l2"] == 0 and still["correct"] == 11


def test_surrogate_is_what_the_attacker_differentiates(net, batch):
    other, seen = nn.Sequential(net), []
    other.register_forward_hook(lambda *a: seen.append(1))
    robustness(net, partial(pgd, eps=0.1, steps=3), *batch, surrogate=other)
    assert len(seen) == 3


def test_targets_are_wrong_classes_and_equal_ones_are_refused(net, batch):
    x, y = batch
    t = random_targets(y, 4)
    assert ((t != y) & (t >= 0) & (t < 4)).all() and torch.equal(t, random_targets(y, 4))
    with pytest.raises(ValueError, match="target equals its label at image 3"):
        t = t.clone()
        t[3] = y[3]
        robustness(net, partial(pgd, eps=0.1, targeted=True), x, y, targets=t)


@pytest.mark.parametrize("drop", [True, False])
def test_the_ladder_keeps_the_worst_case_of_each_image(net, batch, drop):
    x, y = batch
    restorer = nn.Identity()
    climbed = ladder(nn.Sequential(restorer, net), Parts(classifier=net, restorer=restorer, surrogates=[net]), SMALL, x, y, eps=0.08, drop=drop)
    assert torch.equal(judge(net, climbed.x_adv, y)[0], climbed.standing)
    assert (climbed.x_adv - x).abs().max() <= 0.08 + 1e-6
    assert climbed.fell_to[0] == "clean" and [f == "" for f in climbed.fell_to] == climbed.standing.tolist()
    worst = [r["worst"] for r in climbed.rows[1:]]
    assert worst == sorted(worst, reverse=True) and worst[-1] == climbed.rows[-1]["value"]
    for r in climbed.rows:
        result_row(**r)
    if drop:
        assert [r["tried"] for r in climbed.rows[2:-1]] == [a["tried"] - a["fell"] for a in climbed.rows[1:-2]]
    else:
        assert {r["tried"] for r in climbed.rows[1:-1]} == {11}
        assert min(r["value"] for r in climbed.rows[1:]) >= climbed.rows[-1]["value"]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.2)])
def test_every_rung_stays_in_the_ball(net, batch, norm, eps):
    x, y = batch
    parts = Parts(classifier=net, restorer=nn.Identity(), surrogates=[net], adaptive={"own": partial(pgd, eps=eps, norm=norm)})
    for threat, name, attack, surrogate in rungs(nn.Sequential(nn.Identity(), net), parts, SMALL, eps=eps, norm=norm):
        delta = (attack(surrogate or net, x, y) - x).flatten(1)
        assert (delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)).max() <= eps * 1.00001, (threat, name)
    with pytest.raises(ValueError, match=r"attack 'far' moved image \d+ by .* in l2, beyond eps = 0\.05"):
        ladder(net, Parts(paper={"far": partial(pgd, eps=0.05)}), SMALL, x, y, eps=0.05, norm="l2")


def test_the_smooth_rung_is_judged_by_a_defence_that_takes_gradients_itself(net, batch):
    class Ascent(nn.Module):
        """The classifier after a step on its own loss: smoothing the net changes the step, and with it the output."""

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(net, nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x):
            with torch.enable_grad():
                at = x if x.requires_grad else x.clone().requires_grad_()
                slope = torch.autograd.grad(self.net(at).square().sum(), at, create_graph=True)[0]
            return self.net(x + slope)

    defence, x = Ascent().requires_grad_(False), batch[0]
    (model,) = [m for _, name, _, m in rungs(defence, Parts(), SMALL, eps=0.1) if name == "pgd-ce smooth"]
    assert (smooth(defence)(x) - defence(x)).abs().max() > 1e-3  # the twin answers otherwise
    assert torch.allclose(model(x), defence(x), atol=1e-5)
    ours, twins = (torch.autograd.grad(m(at := x.clone().requires_grad_()).sum(), at)[0] for m in (model, smooth(defence)))
    assert torch.allclose(ours, twins)


@pytest.mark.parametrize(("attack", "words"), [(lambda m, x, y: x * torch.nan, "nan"), (lambda m, x, y: x - 0.3, "must clip")])
def test_an_attack_that_gives_nan_or_leaves_the_range_fells_nobody(net, batch, attack, words):
    x, y = batch
    with pytest.raises(ValueError, match=words):
        ladder(net, Parts(adaptive={"wrong": attack}), evaluation.Budget(9, 2, 1, 1, 2), x, y, eps=0.3)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        robustness(net, attack, x, y)


def test_rows_say_how_many_steps_autoattack_ran(net, batch):
    x, y = batch
    rows = ladder(net, Parts(), evaluation.Budget(2, 101, 1, 1, 2), x, y, eps=0.001).rows
    steps = {r["attack"]: r["steps"] for r in rows}
    assert steps == steps | {"pgd-ce": 101, "apgd-ce": 100, "fmn": 100, "square": 2}


def test_dropping_changes_no_verdict(net, batch):
    kept, dropped = (ladder(net, Parts(), SMALL, *batch, eps=0.05, drop=d).standing for d in (False, True))
    assert torch.equal(kept, dropped)


def test_rungs_follow_the_parts(net):
    names = {t for t, *_ in rungs(net, Parts(), SMALL, eps=0.1)}
    assert names == {"end to end", "bpda", "autoattack", "query"}  # smooth ReLU needs no parts
    parts = Parts(classifier=net, surrogates=[net], paper={"theirs": pgd}, adaptive={"ours": pgd}, differentiable=False)
    assert [(t, name) for t, name, *_ in rungs(net, parts, SMALL, eps=0.1)][:3] == [("oblivious", "pgd"), ("paper", "theirs"), ("adaptive", "ours")]
    assert {t for t, *_ in rungs(net, parts, SMALL, eps=0.1)} == {"oblivious", "paper", "adaptive", "transfer", "query"}


def test_dropping_fallen_images_costs_at_most_half_the_passes(net, batch):
    """keep="first" gives the verdicts of the full run; on an undefended classifier nearly all images leave in the first steps."""
    x, y = batch
    seen = []
    hook = net.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    full = craft(net, partial(pgd, eps=0.2, steps=20, keep="best"), x, y)[1]
    cost, seen[:] = sum(seen), []
    quick = craft(net, partial(pgd, eps=0.2, steps=20, keep="first"), x, y)[1]
    hook.remove()
    assert torch.equal(full, quick) and sum(seen) <= cost / 2


@pytest.mark.slow
def test_dropping_fallen_images_halves_the_passes_on_a_trained_classifier_at_8_of_255():
    train, test, seen = data.load("skimage10", limit=2000), data.load("skimage10", "test", limit=200), []
    with seeded(0):
        target = small_cnn(width=8)
    training.fit(target, training.standard, train, epochs=4, batch_size=64, optimizer="adam", lr=3e-3, progress=False)
    x, y = test.images(), test.y
    assert (target(x).argmax(1) == y).float().mean() > 0.7  # chance is 0.1
    target.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    full = craft(target, partial(pgd, eps=8 / 255, steps=20, keep="best"), x, y)[1]
    cost, seen[:] = sum(seen), []
    assert torch.equal(full, craft(target, partial(pgd, eps=8 / 255, steps=20, keep="first"), x, y)[1]) and sum(seen) <= cost / 2


def test_budgets_grow_with_the_profile():
    for a, b in zip(list(BUDGETS.values()), list(BUDGETS.values())[1:], strict=False):
        assert all(getattr(a, k) <= getattr(b, k) for k in ("images", "steps", "restarts", "samples", "queries"))


# --- every check passes on an honest model, and fails on one made to fail it ---


def by_name(rows):
    return {r["check"]: r for r in rows}


def test_an_undefended_classifier_passes_every_check(net, batch):
    climbed = ladder(net, Parts(surrogates=[net]), SMALL, *batch, eps=0.08)
    rows = sanity(net, *batch, eps=0.08, steps=10, ladder=climbed)
    assert failed(rows) == [] and len(rows) == 11


class Shattered(nn.Module):
    """Quantises its input with a gradient of zero, or of noise when `noise` is set."""

    def __init__(self, net, noise=False):
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, x):
        q = (x * 8).round() / 8
        return self.net(straight_through(q, (1e4 * x).sin() * 1e-4 if self.noise else 0 * x))


def test_shattered_gradients_fail_the_checks_that_should_see_them(net, batch):
    x, y = batch
    zero = by_name(sanity(Shattered(net), x, y, eps=0.3, steps=10))
    assert not zero["gradients"]["passed"] and zero["gradients"]["value"] == 0
    masked = by_name(sanity(Shattered(net, noise=True), x, y, eps=0.3, steps=10))
    assert masked["gradients"]["passed"]  # neither zero nor NaN
    assert not masked["falls to chance"]["passed"] or not masked["noise is harmless"]["passed"]


def test_black_box_check_counts_images_that_only_queries_felled(net, batch):
    x, y = batch
    climbed = ladder(Shattered(net), Parts(differentiable=False), Budget(12, 5, 1, 1, 400), x, y, eps=0.4)
    assert not black_box(climbed)["passed"] and black_box(climbed)["value"] >= 2


def test_nan_gradients_probabilities_randomness_and_inner_gradients_are_seen(net, batch):
    x, y = batch
    nan = _Wrap(lambda v: net(v) + (v - v).abs().sum().sqrt())  # d sqrt(0) / dx
    assert not gradients(nan, x, y)["passed"]
    assert not outputs(_Wrap(lambda v: net(v).softmax(1)), x)["passed"] and outputs(net, x)["passed"]
    noisy = _Wrap(lambda v: net(v + 0.1 * torch.randn(v.shape)))
    with torch.random.fork_rng():
        assert not randomness(noisy, x, 1)["passed"] and randomness(noisy, x, 10)["passed"]

    def inner(v):
        with torch.enable_grad():
            core.gradient(net, v, net(v).argmax(1), core.cross_entropy)
        return net(v)

    assert not dynamic(_Wrap(inner), x)["passed"] and dynamic(net, x)["passed"]


def test_a_defence_that_gets_better_with_eps_fails(net, batch):
    x, y = batch

    class Shy(nn.Module):  # right wherever an image has been changed by much
        def forward(self, v):
            far = (v - x[: len(v)]).abs().amax((1, 2, 3)) > 0.15 if len(v) == len(x) else torch.ones(len(v), dtype=torch.bool)
            return torch.where(far[:, None], 10 * nn.functional.one_hot(y[: len(v)], 4) + 0 * net(v), net(v))

    rows = by_name(sanity(Shy(), x, torch.where(net(x).argmax(1) == y, y, net(x).argmax(1)), eps=0.1, steps=10))
    assert not rows["no rise with eps"]["passed"] and not rows["falls to chance"]["passed"]


class _Wrap(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class _Coin(nn.Module):
    """Answers class 0 or, in so many of each four passes as the first pixel says, class 1; as random as an attacker can see, and countable."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        wrong = (self.passes - 1) % 4 < x[:, 0, 0, 0].mul(4).round()
        return torch.stack([~wrong, wrong], 1).double() + 0 * x.flatten(1).sum(1, keepdim=True)


def test_draws_before_and_after_an_attack_are_counted_alike(monkeypatch):
    """An attack that changes nothing takes nothing away, and images right in a minority of draws are attacked too."""
    x = torch.tensor([0.0, 0.25, 0.75, 1.0])[:, None, None, None].expand(4, 1, 2, 2).contiguous()
    y, seen = torch.zeros(4, dtype=torch.long), []

    def attack(model, x, y):
        seen.append(x[:, 0, 0, 0].tolist())
        return x

    r = robustness(_Coin(), attack, x, y, draws=4)
    assert seen == [[0.0, 0.25, 0.75]] and r["value"] == r["clean"] == 0.5 and r["majority"] == 0.5
    darker = [("adaptive", "one", attack, None), ("adaptive", "darker", lambda model, x, y: (x + 0.25).clamp(max=1), None)]
    monkeypatch.setattr(evaluation, "rungs", lambda *args, **options: darker)
    climbed = ladder(_Coin(), Parts(random=True), SMALL, x, y, eps=0.25, draws=4)
    assert seen[1:] == [[0.0, 0.25, 0.75]]
    assert climbed.standing.tolist() == [True, False, False, False] and climbed.fell_to == ["", "adaptive: darker", "clean", "clean"]
    assert climbed.rows[-1]["value"] == pytest.approx((0.75 + 0.5 + 0 + 0) / 4)  # the last row counts draws, right ones of fallen images too
    assert [(r["tried"], r["fell"]) for r in climbed.rows[1:3]] == [(3, 0), (3, 1)]


def test_a_random_defence_is_judged_over_draws(net, batch):
    x, y = batch
    generator = torch.Generator().manual_seed(0)
    noisy = _Wrap(lambda v: net(v + 0.02 * torch.randn(v.shape, generator=generator)))
    climbed = ladder(noisy, Parts(random=True), SMALL, x, y, eps=0.1, draws=5)
    last = climbed.rows[-1]
    assert last["draws"] == 5 and last["correct"] is None and 0 <= last["majority"] <= 1
    assert {"pgd-ce x1", "apgd-dlr"} <= {r["attack"] for r in climbed.rows}
