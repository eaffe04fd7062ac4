"""Fixed-budget gradient attacks: against a linear model whose boundary is known, and the contract that every attack keeps."""

from functools import partial

import pytest
import torch
from helpers import PassCounter, closest, in_precision, linear_model, size
from torch import nn

from advlab import attacks
from advlab.attacks import core
from advlab.attacks.core import cross_entropy, dlr, dlr_targeted, margin
from advlab.attacks.gradient import apgd, bim, ffgsm, fgsm, mim, pgd

ONE_STEP = {"fgsm": fgsm, "ffgsm": ffgsm}
STEPS = 10
MANY = {"bim": partial(bim, steps=STEPS), "mim": partial(mim, steps=STEPS), "pgd": partial(pgd, steps=STEPS),
        "pgd, best": partial(pgd, steps=STEPS, keep="best"), "pgd, first": partial(pgd, steps=STEPS, keep="first"),
        "pgd, restarts": partial(pgd, steps=STEPS, restarts=3), "pgd, margin": partial(pgd, steps=STEPS, loss=margin),
        "apgd": partial(apgd, steps=STEPS), "apgd, restarts": partial(apgd, steps=STEPS, restarts=2, loss=margin)}
ALL = ONE_STEP | MANY
BOTH_NORMS = {name: a for name, a in ALL.items() if name != "ffgsm"}
SHAPES = [(1, 4, 4), (3, 5, 7)]


def images(model, shape, n, seed=1):
    x = 0.5 + 0.1 * (torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) - 0.5)
    return x, model(x).argmax(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize(("name", "norm"), [*((name, "linf") for name in ALL), *((name, "l2") for name in BOTH_NORMS)])
def test_success_just_beyond_the_boundary_and_failure_just_before(name, norm, n, shape):
    model = linear_model(shape)
    x, y = images(model, shape, n)
    options = {"norm": norm} if norm == "l2" else {}
    away = closest(model, x, y, norm)
    beyond, before = (ALL[name](model, x, y, eps=factor * away, **options) for factor in (1.05, 0.95))
    if name != "ffgsm":  # its step of 1.25 eps from a random start need not reach the corner
        assert (model(beyond).argmax(1) != y).all()
    assert (model(before).argmax(1) == y).all()
    assert (size(beyond - x, norm) <= 1.05 * away * (1 + 1e-5) + 1e-6).all()


def test_ffgsm_of_a_linear_model_moves_each_pixel_from_its_start_by_a_step():
    model = linear_model((1, 4, 4))
    x, y = images(model, (1, 4, 4), 5)
    start = core.random_start(x, core.check_budget(0.02, x), "linf", torch.Generator().manual_seed(3))
    w = (model[1].weight[1] - model[1].weight[0]).view(1, 4, 4)
    up = torch.where(y.view(-1, 1, 1, 1) == 0, w, -w).sign()
    expected = (start + 0.025 * up).clamp(min=x - 0.02, max=x + 0.02)
    torch.testing.assert_close(ffgsm(model, x, y, eps=0.02, generator=torch.Generator().manual_seed(3)), expected)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("name", "norm"), [*((name, "linf") for name in ALL), *((name, "l2") for name in BOTH_NORMS)])
def test_contract(net, batch, name, norm, targeted):
    """Ball and range for a budget of each image's own, purity, and determinism by generator."""
    x, y = batch
    y = (y + 1) % 6 if targeted else y
    eps = torch.linspace(0, 0.2, 9)
    options = {"norm": norm} if norm == "l2" else {}
    options |= {"targeted": True} if targeted else {}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    original, state, modes = x.clone(), torch.get_rng_state(), [m.training for m in net.modules()]
    x_adv = ALL[name](net, x, y, eps=eps, **options)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert (size(x_adv - x, norm) <= eps * (1 + 1e-5) + 1e-6).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(x_adv[0], x[0])  # eps = 0
    assert (x_adv[1:] != x[1:]).flatten(1).any(1).all()
    assert torch.equal(x, original) and torch.equal(torch.get_rng_state(), state) and modes == [m.training for m in net.modules()]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(x_adv, ALL[name](net, x, y, eps=eps, **options))
    drawn = [ALL[name](net, x, y, eps=eps, generator=torch.Generator().manual_seed(s), **options) for s in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1])
    assert ("pgd" in name or name == "ffgsm") != torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("name", "forward", "backward"), [
    ("fgsm", 1, 1), ("ffgsm", 1, 1), ("bim", STEPS, STEPS), ("mim", STEPS, STEPS), ("pgd", STEPS, STEPS), ("pgd, margin", STEPS, STEPS),
    ("pgd, best", STEPS + 1, STEPS), ("pgd, restarts", 3 * (STEPS + 1), 3 * STEPS), ("apgd", STEPS + 1, STEPS + 1)])
def test_passes(net, batch, name, forward, backward):
    """At eps = 0 nothing falls, so every image takes part in every pass. No attack ever asks for a gradient of a parameter."""
    with PassCounter(net) as count:
        ALL[name](net, *batch, eps=0.0)
    n = len(batch[0])
    assert count.forward == forward * n
    assert count.backward == backward * n if name != "apgd" else count.backward <= backward * n


def test_images_that_fall_leave_the_batch(net, batch):
    for attack in (partial(pgd, keep="first"), apgd):
        with PassCounter(net) as count:
            x_adv = attack(net, *batch, eps=1.0, steps=50)
        assert (net(x_adv).argmax(1) != batch[1]).all() and count.forward <= 0.2 * 50 * len(batch[0])


@pytest.mark.parametrize("attack", [partial(pgd, steps=20), partial(mim, steps=20)])
def test_keeping_first_best_or_last_agrees_where_it_must(net, batch, attack):
    x, y = batch
    fell = {k: net(attack(net, x, y, eps=0.02, keep=k)).argmax(1) != y for k in ("last", "best", "first")}
    assert torch.equal(fell["best"], fell["first"]) and (fell["best"] | ~fell["last"]).all()
    out = {k: net(attack(net, x, y, eps=0.004, keep=k)).detach() for k in ("last", "best")}
    stands = out["best"].argmax(1) == y  # one that fools the model is kept before one of greater loss
    assert stands.any() and (cross_entropy(out["best"], y) >= cross_entropy(out["last"], y) - 1e-6)[stands].all()


def test_more_restarts_and_steps_never_help_the_classifier(net, batch):
    x, y = batch
    margins = [margin(net(pgd(net, x, y, eps=0.01, steps=n, restarts=r, loss=margin, keep="best")), y) for n, r in ((2, 1), (2, 6), (40, 1))]
    assert (margins[1] >= margins[0] - 1e-6).all() and (margins[1] > margins[0] + 1e-4).any()  # the best of six, of which the first is the same
    assert margins[2].clamp(max=0).sum() > margins[0].clamp(max=0).sum() + 1e-4  # of images that stand; others stop at once


def test_a_targeted_attack_reaches_its_target(net, batch):
    x, y = batch
    target = (y + 2) % 6
    for attack in (pgd, partial(apgd, steps=30), partial(pgd, loss=margin)):
        assert (net(attack(net, x, target, eps=1.0, targeted=True)).argmax(1) == target).all()
    assert (net(apgd(net, x, y, eps=1.0, steps=30, targets=target)).argmax(1) != y).all()


def test_runs_under_no_grad(net, batch):
    x, y = batch
    with torch.no_grad():
        assert torch.equal(pgd(net, x, y, eps=0.1), pgd(net, x, y, eps=0.1)) and not torch.is_grad_enabled()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_other_precisions(net, batch, name, dtype):
    model, x, y = in_precision(net, batch, dtype)
    x_adv = ALL[name](model, x, y, eps=0.1)
    assert x_adv.dtype == dtype and 0 < (x_adv - x).abs().max() <= 0.1 + (0.004 if dtype == torch.bfloat16 else 1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_answers_in_bfloat16_as_under_autocast(net, batch, name):
    x, y = batch
    assert ALL[name](lambda v: net(v).bfloat16(), x, y, eps=0.1).dtype == torch.float32


def test_a_large_batch_in_half_precision_is_not_taken_for_nan():
    assert core.finish(torch.full((64, 3, 64, 64), 0.5, dtype=torch.float16)).isfinite().all()


# --- losses ---


def test_cross_entropy_is_cross_entropy_and_keeps_its_gradient_where_softmax_saturates():
    z, y = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 5
    torch.testing.assert_close(cross_entropy(z, y), nn.functional.cross_entropy(z, y, reduction="none"))
    sure = torch.tensor([[40.0, 0.0, -1.0]], requires_grad=True)
    (ours,) = torch.autograd.grad(cross_entropy(sure, torch.tensor([0])).sum(), sure)
    exact = torch.tensor([[40.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    p = torch.exp(exact - exact.logsumexp(1, keepdim=True)).detach()
    truth = torch.cat([-p[:, 1:].sum(1, keepdim=True), p[:, 1:]], 1).float()
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=0)
    (theirs,) = torch.autograd.grad(nn.functional.cross_entropy(sure, torch.tensor([0])), sure)
    assert theirs[0, 0] == 0 != ours[0, 0]


def test_margin_and_dlr_by_hand():
    z, y = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 4.0, 2.0, 1.0]]), torch.tensor([0, 2])
    assert margin(z, y).tolist() == [-2.0, 2.0]
    torch.testing.assert_close(dlr(z, y), torch.tensor([-2 / 3, 2 / 3]))  # over z_(1) - z_(3): 3 - 0 and 4 - 1
    torch.testing.assert_close(dlr_targeted(z, y, torch.tensor([1, 1])), torch.tensor([-2 / 3.5, 2 / 3.5]))  # 3 - (0 - 1) / 2, 4 - (1 + 0) / 2
    for loss in (cross_entropy, margin, dlr):
        assert loss(z, y).shape == (2,)


# --- balls ---


@pytest.mark.parametrize("norm", core.NORMS)
def test_projection_is_the_identity_inside_and_lands_on_the_ball_outside(norm):
    x = torch.full((4, 1, 3, 3), 0.5)
    eps = core.check_budget(0.3, x)
    inside = core.random_start(x, eps * 0.99, norm, torch.Generator().manual_seed(0))
    torch.testing.assert_close(core.project(inside, x, eps, norm), inside)
    far = x + 0.2 * (inside - x) / core.rows(size(inside - x, norm)) * (5 if norm == "linf" else 4)
    out = core.project(far, x, eps, norm)
    torch.testing.assert_close(size(out - x, norm), torch.full((4,), 0.3))
    if norm == "l2":  # the nearest point lies on the ray
        torch.testing.assert_close((out - x) / 0.3, (far - x) / 0.8)


@pytest.mark.parametrize("norm", core.NORMS)
def test_random_starts_fill_the_ball(norm):
    x = torch.full((4000, 1, 1, 2), 0.5)
    delta = core.random_start(x, core.check_budget(0.4, x), norm, torch.Generator().manual_seed(0)) - x
    assert size(delta, norm).max() <= 0.4 + 1e-6
    share = (size(delta, norm) <= 0.2).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)  # in two dimensions half the radius holds a quarter of the area
    assert delta.mean().abs() < 0.02


# --- the door ---

x_ok, y_ok = torch.rand(2, 3, 6, 6), torch.tensor([0, 1])


@pytest.mark.parametrize(("change", "words"), [
    ({"x": x_ok[0]}, r"shape \(B, C, H, W\)"), ({"x": x_ok * 255}, "must lie in"), ({"x": x_ok - 1}, "must lie in"),
    ({"x": (x_ok * 255).byte()}, "divide uint8 pixels"), ({"x": x_ok.where(x_ok < 0.9, torch.nan)}, "NaN"),
    ({"x": x_ok[:0], "y": y_ok[:0]}, "empty"), ({"y": torch.tensor([0, 6])}, "label 6 is out of range"), ({"y": torch.tensor([0, -1])}, "negative"),
    ({"y": y_ok[:1]}, r"shape \(2,\)"), ({"y": y_ok.float()}, "int64"), ({"eps": -0.1}, "not negative, got -0.1"), ({"eps": float("nan")}, "finite"),
    ({"eps": float("inf")}, "finite"), ({"eps": torch.rand(3)}, "one for each of the 2 images"), ({"steps": 0}, "steps must be"),
    ({"steps": 2.5}, "steps must be"), ({"norm": "l1"}, "unknown norm 'l1'"), ({"step_size": -1.0}, "step_size must be"),
    ({"restarts": 0}, "restarts must be"), ({"keep": "all"}, "unknown keep")])
def test_bad_input_is_refused_with_its_value(net, change, words):
    arguments = {"x": x_ok, "y": y_ok, "eps": 0.1, **change}
    x, y = arguments.pop("x"), arguments.pop("y")
    with pytest.raises(ValueError, match=words):
        pgd(net, x, y, **arguments)


def test_apgd_refuses_a_target_that_equals_its_label(net, batch):
    with pytest.raises(ValueError, match="target equals its label, at image 0"):
        apgd(net, *batch, eps=0.1, targets=batch[1])


@pytest.mark.parametrize(("wrap", "words"), [
    (lambda net: nn.Sequential(net, nn.Softmax(1)), "returns probabilities"), (lambda net: net[:3], r"logits of shape \(9, classes\)"),
    (lambda net: lambda v: net(v).detach(), "carries no gradient"), (lambda net: lambda v: net(v) + (v - v).abs().sum().sqrt(), "NaN")])
def test_a_model_that_cannot_be_attacked_is_refused(net, batch, wrap, words):
    for attack in (pgd, partial(pgd, norm="l2"), partial(apgd, steps=5), mim):
        with pytest.raises(ValueError, match=words):
            attack(wrap(net), *batch, eps=0.1)


def test_a_model_left_in_train_mode_is_refused_and_left_as_it_was(net, batch):
    net.train()
    with pytest.raises(ValueError, match=r"BatchNorm2d in training mode; call model\.eval"):
        pgd(net, *batch, eps=0.1)
    assert net.training and all(p.requires_grad for p in net.parameters())
    net.eval()


def test_parameters_are_thawed_after_an_error(net, batch):
    with pytest.raises(ValueError, match="probabilities"):
        pgd(nn.Sequential(net, nn.Softmax(1)), *batch, eps=0.1)
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError), core.attacking(net):
        assert not any(p.requires_grad for p in net.parameters())
        pgd(net, *batch, eps=-1.0)
    assert all(p.requires_grad for p in net.parameters())
    assert attacks.__all__ == sorted(attacks.__all__)
