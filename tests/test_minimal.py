"""Minimum-norm attacks against linear models whose nearest adversarial point is known, and the contract that they all keep."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers import PassCounter, assert_pure, closest, in_precision, linear_model, size
from torch import nn

from advlab.attacks.core import cross_entropy, margin
from advlab.attacks.minimal import _soft_margin, cw, ddn, deepfool, fmn

DEEPFOOL = {"deepfool": deepfool, "deepfool, linf": partial(deepfool, norm="linf")}
TARGETED = {"cw": partial(cw, steps=50, lr=0.03), "ddn": partial(ddn, gamma=0.03, steps=150), "fmn": partial(fmn, steps=60),
            "fmn, linf": partial(fmn, norm="linf", steps=60)}
ALL = DEEPFOOL | TARGETED
SHAPES = [(1, 4, 6), (3, 5, 7)]


def norm_of(name):
    return "linf" if "linf" in name else "l2"


def images(model, shape, n, spread, norm="l2", seed=1):
    """n images round the middle of the box, where the boundaries meet, but not too near to them; spread 1 fills the box."""
    x = 0.5 + spread * (torch.rand(9 * n, *shape, generator=torch.Generator().manual_seed(seed)) - 0.5)
    x = x[closest(model, x, model(x).argmax(1), norm) > (0.05 if norm == "l2" else 0.005)][:n]
    assert len(x) == n
    return x, model(x).argmax(1)


def assert_nearest(reached, exact):
    ratio = reached / exact
    assert (ratio >= 1 - 1e-4).all() and (ratio <= 1.05).all(), ratio


# --- the nearest point ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize(("name", "classes"), [*((name, 2) for name in ALL), *((name, 6) for name in DEEPFOOL)])
def test_answers_are_the_nearest_images_that_fool(name, classes, n, shape):
    model, norm = linear_model(shape, classes), norm_of(name)
    x, y = images(model, shape, n, 0.6, norm)
    x_adv = ALL[name](model, x, y)
    assert (model(x_adv).argmax(1) != y).all()
    assert_nearest(size(x_adv - x, norm), closest(model, x, y, norm))


@pytest.mark.parametrize("name", ALL)
def test_the_box_is_kept_where_the_nearest_image_lies_on_its_wall(name):
    shape, norm = (1, 4, 6), norm_of(name)
    model = linear_model(shape, bias=5.0)
    x = (torch.rand(400, *shape, generator=torch.Generator().manual_seed(2)) * 3 - 1).clamp(0, 1)
    x = x[model(x).argmax(1) == 0][:8]
    y, exact = torch.zeros(8, dtype=torch.int64), closest(model, x, torch.zeros(8, dtype=torch.int64), norm)
    w = model[1].weight[1] - model[1].weight[0]
    free = (-margin(model(x), y) / w.norm(p=2 if norm == "l2" else 1)).detach()  # the distance if there were no box
    assert (exact > 1.05 * free).all() and exact.isfinite().all()
    x_adv = ALL[name](model, x, y)
    assert (model(x_adv).argmax(1) != y).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert_nearest(size(x_adv - x, norm), exact)


@pytest.mark.parametrize("name", TARGETED)
def test_targeted_attacks_reach_every_class_and_the_nearest_of_them_is_the_nearest_image(name):
    model, norm = linear_model((3, 5, 7), classes=4), norm_of(name)
    x, y = images(model, (3, 5, 7), 6, 0.6, norm)
    sizes = []
    for shift in (1, 2, 3):
        target = (y + shift) % 4
        x_adv = TARGETED[name](model, x, target, targeted=True)
        assert (model(x_adv).argmax(1) == target).all()
        sizes.append(size(x_adv - x, norm))
    assert_nearest(torch.stack(sizes).amin(0), closest(model, x, y, norm))


@pytest.mark.parametrize("name", ["ddn", "fmn"])
def test_the_gradient_turns_to_the_nearest_of_two_rivals(name):
    """Between two rivals almost equally near, the cross-entropy leads to the corner where their boundaries meet, 1.28 times as far."""
    model = linear_model((1, 1, 2), classes=3)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.8], [1.0, -0.8]]))
        model[1].bias.copy_(torch.tensor([0.92, 0.0, 0.0]))
    x, y = torch.tensor([[[[0.5, 0.51]]], [[[0.5, 0.49]]], [[[0.45, 0.5001]]]]), torch.zeros(3, dtype=torch.int64)
    assert_nearest(size(TARGETED[name](model, x, y) - x, "l2"), closest(model, x, y, "l2"))


@pytest.mark.parametrize("kappa", [0.5, 3.0])
@pytest.mark.parametrize("targeted", [False, True])
def test_cw_reaches_its_margin_and_goes_no_further(kappa, targeted):
    model = linear_model((1, 4, 6))
    x, y = images(model, (1, 4, 6), 5, 0.4)
    x_adv = cw(model, x, 1 - y if targeted else y, kappa=kappa, targeted=targeted)
    assert (margin(model(x_adv), y) >= kappa).all()
    w = model[1].weight[1] - model[1].weight[0]
    assert_nearest(size(x_adv - x, "l2"), ((kappa - margin(model(x), y)) / w.norm()).detach())


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_ddn_rounds_to_its_levels(levels):
    model = linear_model((1, 4, 6))
    x, y = images(model, (1, 4, 6), 8, 1.0)
    x_adv = ddn(model, x, y, levels=levels, init_norm=3.0)
    grid = x_adv * (levels - 1)
    assert (model(x_adv).argmax(1) != y).all()
    torch.testing.assert_close(grid, grid.round(), rtol=0, atol=1e-4)


def test_the_soft_margin_has_the_value_of_the_margin_and_turns_from_the_cross_entropy_to_it():
    z, y = torch.tensor([[2.0, 1.0, 0.5]], dtype=torch.float64, requires_grad=True), torch.tensor([0])
    losses = {"warm": partial(_soft_margin, heat=1.0), "cold": partial(_soft_margin, heat=0.01), "margin": margin, "ce": cross_entropy}
    grads = {name: torch.autograd.grad(loss(z, y).sum(), z)[0] for name, loss in losses.items()}
    torch.testing.assert_close(_soft_margin(z, y, 0.7), margin(z, y))
    torch.testing.assert_close(grads["warm"] / grads["warm"].norm(), grads["ce"] / grads["ce"].norm())
    torch.testing.assert_close(grads["cold"], grads["margin"])


# --- the contract ---


@pytest.mark.parametrize(("name", "targeted"), [*((name, False) for name in ALL), *((name, True) for name in TARGETED)])
def test_nothing_is_left_behind_and_all_images_fall(net, batch, name, targeted):
    x, y = batch
    y, options = ((y + 1) % 6, {"targeted": True}) if targeted else (y, {})
    x_adv = assert_pure(net, x, y, partial(ALL[name], generator=torch.Generator().manual_seed(0), **options))
    assert ((net(x_adv).argmax(1) == y) == targeted).all()
    with torch.no_grad():
        assert torch.equal(ALL[name](net, x, y, **options), x_adv)


@pytest.mark.parametrize("name", ALL)
def test_an_image_fares_the_same_alone_and_in_company(net, batch, name):
    net, x, y = net.double(), batch[0].double(), batch[1]
    together = ALL[name](net, x, y)
    alone = torch.cat([ALL[name](net, x[i:i + 1], y[i:i + 1]) for i in range(len(x))])
    net.float()
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_images_that_cannot_be_fooled_come_back_unchanged(name):
    model = linear_model((1, 4, 6), bias=1000.0)  # no image in the box is of class 1
    x = torch.rand(4, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(4, dtype=torch.int64)
    assert closest(model, x, y, norm_of(name)).isinf().all()
    assert torch.equal(ALL[name](model, x, y), x)
    if name == "ddn":
        assert torch.equal(ddn(model, x, y, gamma=0.9, steps=200), x)  # 1.9 ** 200 is more than a float32 holds


@pytest.mark.parametrize(("name", "targeted"), [*((name, False) for name in ALL), *((name, True) for name in TARGETED)])
def test_images_that_fool_the_model_already_come_back_unchanged_after_one_pass(net, batch, name, targeted):
    x, y = batch
    options = {"targeted": True} if targeted else {}
    fooling = torch.arange(9) % 3 == 0
    labels = torch.where(fooling == targeted, y, (y + 1) % 6)
    with PassCounter(net) as passes:
        x_adv = ALL[name](net, x, labels, **options)
    assert torch.equal(x_adv[fooling], x[fooling]) and (x_adv[~fooling] != x[~fooling]).flatten(1).any(1).all()
    with PassCounter(net) as alone:
        ALL[name](net, x[~fooling], labels[~fooling], **options)
    if "deepfool" not in name:  # whose passes depend on the company
        assert passes.forward == alone.forward + 3
    with PassCounter(net) as none:
        assert torch.equal(ALL[name](net, x[fooling], labels[fooling], **options), x[fooling])
    assert none.forward == 3


# --- passes ---


@pytest.mark.parametrize(("attack", "passes"), [
    (partial(ddn, steps=7), 7), (partial(fmn, steps=7), 7), (partial(fmn, steps=7, norm="linf"), 7), (partial(ddn, steps=1), 1),
    (partial(cw, steps=7, search_steps=1), 7), (partial(cw, steps=7, search_steps=3), 19)])  # 19: the pass on x is shared
def test_steps_cost_a_forward_and_a_backward_pass_each(net, batch, attack, passes):
    with PassCounter(net) as counted:
        attack(net, *batch)
    assert counted.forward == counted.backward == passes * 9 and counted.forward_batches == passes


@pytest.mark.parametrize(("candidates", "rivals"), [(10, 5), (None, 5), (6, 5), (3, 2), (2, 1)])
def test_deepfool_of_a_linear_model_takes_one_step(candidates, rivals):
    model = linear_model((3, 5, 7), classes=6)
    x, y = images(model, (3, 5, 7), 4, 0.6)
    with PassCounter(model) as counted:
        x_adv = deepfool(model, x, y, candidates=candidates)
    assert (counted.forward, counted.backward) == (2 * 4, rivals * 4)
    assert (model(x_adv).argmax(1) != y).all()


def test_deepfool_spends_no_more_than_its_active_images_need(net):
    """The images that fall at a step are carried through its backward passes, or left out by a second forward pass, whichever is less."""
    net, x = net.double(), torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y, steps = net(x).argmax(1), []
    for i in range(len(x)):
        with PassCounter(net) as alone:
            deepfool(net, x[i:i + 1], y[i:i + 1])
        assert alone.backward == 5 * (alone.forward - 1)
        steps.append(alone.backward // 5)
    with PassCounter(net) as counted:
        deepfool(net, x, y)
    net.float()
    active = [sum(k >= t for k in steps) for t in range(max(steps) + 2)]
    least = [min(5 * now, 6 * then) for now, then in pairwise(active)]
    assert counted.forward + counted.backward == sum(active) + sum(least) < 6 * sum(active[:-2]) + active[-2]
    assert counted.backward < 5 * sum(active[:-2])


def test_deepfool_stops_after_its_steps():
    def wavy(v):  # the boundary bends away from every linear estimate
        s = v.flatten(1).sum(1)
        return torch.stack([s * 0 + 1, s / (1 + s.abs())], 1)

    x = torch.full((2, 1, 2, 2), 0.1)
    seen = []
    assert torch.equal(deepfool(lambda v: seen.append(len(v)) or wavy(v), x, torch.zeros(2, dtype=torch.int64), steps=3), x)
    assert seen == [2, 2, 2, 2]


# --- bad input ---

x_ok, y_ok = torch.rand(2, 3, 6, 6), torch.tensor([0, 1])


@pytest.mark.parametrize(("attack", "change", "words"), [
    *((attack, change, words) for attack in (deepfool, cw, ddn, fmn) for change, words in (
        ({"x": x_ok[0]}, r"shape \(B, C, H, W\)"), ({"x": x_ok * 2}, "must lie in"), ({"x": x_ok[:0], "y": y_ok[:0]}, "empty"),
        ({"y": torch.tensor([0, 6])}, "label 6 is out of range"), ({"steps": 0}, "steps must be"))),
    (deepfool, {"norm": "l1"}, "unknown norm 'l1'"), (fmn, {"norm": "l0"}, "unknown norm 'l0'"),
    (deepfool, {"overshoot": -0.1}, "overshoot must be"),
    (deepfool, {"candidates": 1}, "candidates counts the label and its rivals, got 1"),
    (cw, {"search_steps": 0}, "search_steps must be"),
    (cw, {"c": 0.0}, "c must be positive"), (cw, {"lr": float("nan")}, "lr must be positive"), (cw, {"kappa": -1.0}, "kappa must be"),
    (ddn, {"gamma": 1.0}, "gamma must be positive and less than 1"), (ddn, {"init_norm": 0}, "init_norm must be"),
    (ddn, {"levels": 1}, "levels must be 2"), (fmn, {"step_size": float("inf")}, "step_size must be"),
    (fmn, {"gamma": 0.0}, "gamma must be")])
def test_bad_input_is_refused_with_its_value(net, attack, change, words):
    arguments = {"x": x_ok, "y": y_ok, **change}
    x, y = arguments.pop("x"), arguments.pop("y")
    with pytest.raises(ValueError, match=words):
        attack(net, x, y, **arguments)


@pytest.mark.parametrize("attack", [deepfool, partial(deepfool, norm="linf"), cw, ddn, fmn, partial(fmn, norm="linf")])
@pytest.mark.parametrize(("wrap", "words"), [
    (lambda net: nn.Sequential(net, nn.Softmax(1)), "returns probabilities"),
    (lambda net: lambda v: net(v).detach(), "carries no gradient"),
    (lambda net: lambda v: net(v) + (v - v).abs().sum().sqrt(), "NaN")])
def test_a_model_that_cannot_be_attacked_is_refused(net, batch, attack, wrap, words):
    with pytest.raises(ValueError, match=words):
        attack(wrap(net), *batch)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_other_precisions(net, batch, name, dtype):
    assert ALL[name](*in_precision(net, batch, dtype)).dtype == dtype
