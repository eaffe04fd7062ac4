"""Adversarial transformation: g stays in its ball and does what it says, its derivative is the identity, a seed is a seed, and passes are counted."""

from functools import partial

import pytest
import torch
from helpers import PassCounter, linear_model
from torch import nn
from torch.nn import functional as F

from advlab import data, evaluation
from advlab.attacks import bpda, core, eot, pgd, through
from advlab.checkpoints import describe
from advlab.defenses import transform
from advlab.defenses.transform import VARIANTS, Transform, Unrolled, starts
from advlab.gradients import finite_differences, input_gradient
from advlab.models import vgg0


@pytest.fixture(scope="module")
def f_b():
    """A small VGG with running statistics of its own and dropout, in training mode, as a careless caller would pass it."""
    torch.manual_seed(0)
    model = vgg0(num_classes=5, width=4)
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(32, 3, 16, 16))
        model.logits.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def x():
    return torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def f_a(shape=(3, 16, 16), classes=5):
    return linear_model(shape, classes, seed=3)


def plain(f_b):
    """f_b in eval mode: what g must have differentiated."""
    twin = vgg0(num_classes=5, width=4)
    twin.load_state_dict(f_b.state_dict())
    return twin.eval()


# --- the transformation ---


@pytest.mark.parametrize("name", list(VARIANTS))
def test_g_stays_within_delta_and_clips_only_when_told(f_b, x, name):
    g = Transform(f_b, delta=0.2, **VARIANTS[name])
    out = g(x)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert (out - x).abs().max() <= 0.2 + 1e-6
    assert (out.min() >= 0 and out.max() <= 1) == (name == "clip01")


@pytest.mark.parametrize("seed", range(8))
def test_clip01_never_leaves_the_range_of_images(f_b, seed):
    v = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    g, number = Transform(f_b, steps=2, seed=seed, **VARIANTS["clip01"]), torch.arange(12)
    for out in (g(v, number), Unrolled(g)(v, number)):
        assert out.min() == 0 and out.max() == 1
    assert torch.equal(g(v, number), Transform(f_b, steps=2, seed=seed)(v, number).clamp(0, 1))


def test_g_walks_to_the_labels_that_it_is_told(f_b, x):
    judge, g, number, y = plain(f_b), Transform(f_b), torch.arange(len(x)), torch.arange(len(x)) % 5
    told = g(x, number, labels=y)
    assert (core.cross_entropy(judge(told), y) < core.cross_entropy(judge(x), y)).all()
    assert torch.equal(g(x, number, labels=judge(x).argmin(1)), g(x, number)) and not torch.equal(told, g(x, number))


def test_g_descends_towards_the_least_likely_class_of_its_own_input(f_b, x):
    judge, g = plain(f_b), Transform(f_b)
    y = judge(x).argmin(1)
    before, after = (core.cross_entropy(judge(v), y).detach() for v in (x, g(x)))
    assert (after < before).all() and after.mean() < 0.8 * before.mean()


def test_the_untargeted_variant_ascends_from_the_predicted_class(f_b, x):
    judge, g = plain(f_b), Transform(f_b, **VARIANTS["repo"])
    y = judge(x).argmax(1)
    assert (core.cross_entropy(judge(g(x)), y) > core.cross_entropy(judge(x), y)).all()
    assert g.step == 0.1 and not g.targeted


def test_one_step_by_hand():
    """Without start: x - eta sign(J^T (p - e_L)), where J = W for a linear model."""
    model, v = linear_model((1, 4, 4), 3), torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    logits = model(v).detach()
    away = logits.softmax(1) - F.one_hot(logits.argmin(1), 3)
    hand = v - 0.05 * (away @ model[1].weight.detach()).sign().view_as(v)
    torch.testing.assert_close(Transform(model, delta=0.1, steps=1, step=0.5, start="none")(v), hand)
    two = linear_model((1, 4, 4), 2)  # whose gradient keeps its signs: two steps reach the border, the third stays there
    once, thrice = (Transform(two, delta=0.1, steps=k, step=0.5, start="none")(v) for k in (1, 3))
    torch.testing.assert_close(thrice - v, 2 * (once - v))


def test_the_mode_of_f_b_and_of_the_whole_does_not_matter_and_f_b_is_not_touched(f_b, x):
    before = {k: v.clone() for k, v in f_b.state_dict().items()}
    g, number = Transform(f_b), torch.arange(len(x))
    reference = Transform(plain(f_b))(x, number)
    assert torch.allclose(g.train()(x, number), reference, atol=1e-6)
    assert torch.allclose(g.eval()(x, number), reference, atol=1e-6)
    assert f_b.training and all(torch.equal(v, before[k]) for k, v in f_b.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in g.parameters())
    assert all(p.requires_grad for p in f_b.parameters())


def test_g_works_without_and_within_grad_and_leaves_nothing_behind(f_b, x):
    g, number, rng = Transform(f_b), torch.arange(len(x)), torch.get_rng_state()
    with torch.no_grad():
        out = g(x, number)
    assert torch.equal(out, g(x, number)) and not x.requires_grad and torch.equal(torch.get_rng_state(), rng)


# --- randomness ---


def test_a_seed_gives_the_same_g_on_any_split_of_the_batch(f_b, x):
    whole = Transform(f_b, seed=4)(x)
    for sizes in ([5, 7], [1] * 12, [3, 3, 6]):
        g = Transform(f_b, seed=4)
        assert torch.allclose(torch.cat([g(part) for part in x.split(sizes)]), whole, atol=1e-6)
    assert not torch.allclose(Transform(f_b, seed=5)(x), whole, atol=0.1)


def test_calls_differ_with_a_random_start_and_agree_without(f_b, x):
    for name, same in (("paper", False), ("repo", False), ("noise", False), ("fixed_start", True), ("no_start", True)):
        g = Transform(f_b, **VARIANTS[name])
        assert torch.equal(g(x), g(x)) == same
    twice = torch.cat([x[:1], x[:1]])
    a, b = Transform(f_b)(twice)
    assert not torch.equal(a, b), "two copies in one batch got one draw"


def test_starts_are_uniform_independent_and_their_own_for_each_image_and_seed():
    u = starts(torch.arange(200), (3, 8, 8), seed=0)
    assert u.min() >= -1 and u.max() < 1
    flat = u.flatten(1).double()
    assert abs(flat.mean()) < 0.02 and abs(flat.var() - 1 / 3) < 0.01
    assert (torch.histc(flat, 10, -1, 1) / flat.numel() - 0.1).abs().max() < 0.01
    assert torch.corrcoef(flat[:50]).fill_diagonal_(0).abs().max() < 0.35  # 192 pixels: a standard error of 0.07
    assert abs(torch.corrcoef(flat.T[:50]).fill_diagonal_(0).abs().max()) < 0.35
    assert len(flat.unique()) > 0.99 * flat.numel()
    assert not torch.equal(u, starts(torch.arange(200), (3, 8, 8), seed=1))
    assert torch.equal(u[7:9], starts(torch.tensor([7, 8]), (3, 8, 8), seed=0))
    corners = Transform(nn.Identity(), **VARIANTS["noise"]).noise(torch.zeros(2, 3, 8, 8))
    assert corners.abs().unique().tolist() == [1.0] and abs(corners.mean()) < 0.2


# --- derivatives ---


def test_finite_differences_of_a_linear_map_are_its_matrix():
    w = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    i, j = (v.flatten() for v in torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij"))
    found = finite_differences(lambda v: (v.flatten(1) @ w.T).view_as(v), torch.rand(1, 3, 2, 2, dtype=torch.float64), i, j, 1e-3)
    torch.testing.assert_close(found.view(12, 12), w)


@pytest.mark.parametrize("start", ["fixed", "none"])
def test_dg_dx_is_the_identity(f_b, x, start):
    """200 pairs in float64 at a step that flips no sign: 1 where i = j, exactly 0 elsewhere; also where the offset stands at its border."""
    g = Transform(f_b, start=start).double()
    generator = torch.Generator().manual_seed(0)
    j = torch.randperm(x[0].numel(), generator=generator)[:40].repeat_interleave(5)
    i = torch.where(torch.arange(200) % 5 == 0, j, torch.randint(x[0].numel(), (200,), generator=generator))
    point = x[:1].double()
    d = finite_differences(g, point, i, j, 1e-9)
    assert (d[i == j] - 1).abs().max() < 1e-5 and (d[i != j]).abs().max() < 1e-5
    border = ((g(point) - point).abs() > 0.199).flatten()[j]
    assert border.any() and not border.all()


@pytest.mark.parametrize("name", ["paper", "clip01"])
def test_autograd_through_g_is_bpda_with_the_identity(f_b, x, name):
    grads = []
    for whole in (lambda g: nn.Sequential(g, f_a()), lambda g: bpda(g, f_a())):
        g = Transform(f_b, **VARIANTS[name])
        grads.append(input_gradient(whole(g), x, torch.zeros(12, dtype=torch.long)))
    assert torch.equal(*grads) and grads[0].abs().min(1).values.max() > 0


@pytest.mark.parametrize("kind", transform.KINDS)
@pytest.mark.parametrize("delta", [10.0, 0.03])
def test_unrolled_against_the_formula_for_a_linear_f_b(kind, delta):
    """One step: out = x + P(-eta s(v(x))), v = (softmax(W x) - e_L) W, with the stand-ins' derivatives written out; delta 0.03 lets P bite."""
    model = linear_model((1, 3, 3), 3).double()
    v = torch.rand(4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    g = Transform(model, delta=delta, steps=1, step=0.5 / delta, start="none").double()
    out = Unrolled(g, kind=kind)(v)
    torch.testing.assert_close(out, g(v.detach()))
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad((out * weights).sum(), v)

    w = model[1].weight.detach()
    logits = model(v)
    slope = (logits.softmax(1) - F.one_hot(logits.argmin(1), 3)) @ w
    soft = slope.tanh() if kind == "tanh" else slope / (1 + slope.abs())
    inner = 0.5 * soft.view_as(v)  # eta = 0.5
    decay = (1 + 0.5) ** -2 if delta == 0.03 else 1.0  # every offset is eta = 0.5, outside a ball of 0.03
    (hand,) = torch.autograd.grad(((v - decay * inner) * weights).sum(), v)
    torch.testing.assert_close(found, hand)
    (mixed,) = torch.autograd.grad((Unrolled(g, kind=kind, mix=0.25)(v) * weights).sum(), v)
    torch.testing.assert_close(mixed, 0.25 * weights + 0.75 * hand)


def test_unrolled_is_exact_forward_with_any_stand_in_and_finite_backward(f_b, x):
    for options in ({}, {"kind": "soft sign"}, {"temperature": 1.0}, {"temperature": 0.1, "smoothing": 0.1, "mix": 0.5}):
        g, number = Transform(f_b, steps=4), torch.arange(3)
        v = x[:3].clone().requires_grad_()
        out = Unrolled(g, **options)(v, number)
        assert torch.allclose(out, g(v, number), atol=1e-6)
        (grad,) = torch.autograd.grad(f_a()(out).sum(), v)
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0
        with torch.no_grad():
            assert torch.allclose(Unrolled(g, **options)(x[:3], number), out, atol=1e-6)


# --- cost ---


def test_passes_of_g(f_b, x):
    for steps in (0, 1, 13):
        g = Transform(f_b, steps=steps)
        with PassCounter(g.f_b) as count:
            g(x)
        assert (count.forward, count.backward) == ((steps + 1) * len(x) if steps else 0, steps * len(x))


def test_k_samples_cost_k_times_one(f_b, x):
    seen = {}
    for k in (1, 5):
        g, behind = Transform(f_b, steps=3), f_a()
        with PassCounter(g.f_b) as inner, PassCounter(behind) as outer:
            pgd(eot(bpda(g, behind), k), x, torch.zeros(12, dtype=torch.long), eps=0.03, steps=2)
        seen[k] = inner.forward, inner.backward, outer.forward, outer.backward
    assert seen[1] == (2 * 12 * 4, 2 * 12 * 3, 24, 24)
    assert seen[5] == tuple(5 * v for v in seen[1])


# --- training, measures, attacks ---


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    return data.load("skimage10", "train", limit=96)


@pytest.mark.slow
def test_f_a_learns_on_g_and_f_b_stays_as_it_is(tiny):
    f_b, record = transform.external(tiny, "adversarial", profile="smoke", progress=False)
    g = Transform(f_b, steps=2)
    kept = {k: v.clone() for k, v in g.state_dict().items()}
    defence, info = transform.defended(tiny, g, profile="smoke", progress=False)
    noise, warm = transform.defended(tiny, Transform(nn.Identity(), **VARIANTS["noise"]), profile="smoke", progress=False)
    assert record["seconds"] > 0 and info["history"] and not defence.training and not noise.training
    assert info["seconds"] == pytest.approx(warm["seconds"] + sum(r["seconds"] for r in info["history"])) and warm["seconds"] > 0
    assert all(torch.equal(v, kept[k]) for k, v in defence.restorer.state_dict().items())
    again, info = transform.defended(tiny, g, profile="smoke", progress=False)
    assert info["cached"] and torch.equal(again.classifier.logits.weight, defence.classifier.logits.weight)
    control, _ = transform.defended(tiny, Transform(nn.Identity(), **VARIANTS["noise"]), profile="smoke", progress=False)
    other, _ = transform.defended(tiny, Transform(nn.Identity(), **VARIANTS["noise"], delta=0.05), profile="smoke", progress=False)
    assert other.restorer.delta == 0.05 and control.restorer.delta == 0.2
    assert not torch.equal(control.classifier.logits.weight, defence.classifier.logits.weight)


@pytest.mark.slow
def test_the_runs_of_table_1_agree_on_their_common_epochs(tiny):
    one, two = (transform.external(tiny, k, profile="smoke", progress=False)[1]["history"] for k in (1, 2))
    assert one[0]["loss"] == two[0]["loss"] and len(two) == 2
    model, record = transform.external(tiny, 0, profile="smoke")
    assert record["seconds"] == 0 and not model.training


def test_the_step_of_f_a_shows_it_g_and_not_x(x):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.restorer, self.classifier = Transform(nn.Identity(), delta=0.2, **VARIANTS["noise"]), f_a()
            self.classifier.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0]))

    y = torch.zeros(12, dtype=torch.long)
    losses = [transform.on_transformed(Spy(), x, y, torch.Generator().manual_seed(s))[0].item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2], "the generator decides the draw"
    assert torch.allclose((seen[0] - x).abs(), torch.full_like(x, 0.2), atol=1e-6)


def test_what_cannot_change_the_weights_is_no_part_of_the_configuration(f_b, x):
    g = Transform(f_b)
    before = describe(g)
    g(x)
    assert describe(g) == before != describe(Transform(f_b, delta=0.1))


def test_expected_halves_are_independent_means(x):
    g = Transform(nn.Identity(), delta=0.3, steps=0)
    one, two = transform.expected(g, x, samples=400, batch_size=100)
    assert not torch.equal(one, two)
    deviation = (0.3**2 / 3 / 200) ** 0.5  # of a mean of 200 uniform draws
    for half in (one, two):
        assert 0.8 * deviation < (half - x).std() < 1.2 * deviation
    assert 0.8 * 2**0.5 * deviation < (one - two).std() < 1.2 * 2**0.5 * deviation


def test_the_released_attack_leaves_the_label_of_f_a_on_the_raw_image(x):
    """Linear f_a, g the identity: x enters twice, so that the step is along W's rows for f_a's own label, whatever y says."""
    behind = f_a()
    defence = nn.Sequential()
    defence.restorer, defence.classifier = Transform(nn.Identity(), steps=0, start="none"), behind
    label = behind(x).argmax(1)
    wrong = (label + 1) % 5
    out = [transform.repo_bpda(defence, x, y, eps=0.03, generator=torch.Generator().manual_seed(0)) for y in (label, wrong)]
    assert torch.equal(*out) and (out[0] - x).abs().max() <= 0.03 + 1e-6
    assert (core.cross_entropy(behind(out[0]), label) > core.cross_entropy(behind(x), label)).all()


def test_the_student_learns_the_answers_of_the_defence(x):
    """The defence turns its input into the negative: its f_a alone answers otherwise, the student must not."""

    class Negative(nn.Module):
        def forward(self, v):
            return 1 - v

    many = torch.rand(256, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    defence = nn.Sequential()
    defence.restorer, defence.classifier = Negative(), f_a((3, 8, 8))
    kept = {k: v.clone() for k, v in defence.state_dict().items()}
    model = transform.student(defence, many, eps=0.03, rounds=2, draws=1, epochs=60, steps=2)
    soft = defence(many).softmax(1).detach()
    before, after = (F.cross_entropy(m(many), soft).item() for m in (defence.classifier, model))
    assert after < 0.9 * before
    assert all(torch.equal(v, kept[k]) for k, v in defence.state_dict().items())


def test_imitation_takes_images_or_soft_labels():
    v, goal = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    assert transform.imitate(nn.Identity(), v, goal, None)[0] == 0.25
    soft = torch.tensor([[0.25, 0.75]])
    logits = torch.tensor([[0.0, 0.0]])
    assert transform.imitate(nn.Identity(), logits, soft, None)[0].item() == pytest.approx(0.6931, abs=1e-3)


# --- the door ---


@pytest.mark.parametrize(("options", "words"), [({"start": "zero"}, "unknown start 'zero'"), ({"delta": -0.1}, "must not be negative"),
                                                ({"steps": -1}, "must not be negative"), ({"step": 0.0}, "step must be positive")])
def test_a_bad_option_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Transform(nn.Identity(), **options)


def test_a_batch_norm_that_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="does not follow a convolution"):
        Transform(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten()))
    with pytest.raises(ValueError, match="unknown kind 'relu'"):
        Unrolled(Transform(nn.Identity(), steps=0), kind="relu")


def test_intervals_and_rises():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    low, high = transform.interval(values)
    assert low == pytest.approx(2.5 - 1.96 * (5 / 3) ** 0.5 / 2) and low + high == pytest.approx(5.0)
    assert transform.interval(values[:1]) == (1.0, 1.0)
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert transform.rises([noise, noise + 1, noise + 1.001, noise + 2]), "the images' own differences do not blur a paired one"
    assert not transform.rises([noise, noise + 1, noise + 0.5, noise + 2]), "one step down"
    assert not transform.rises([noise, noise.flip(0)]), "not beyond the interval"


def test_partial_attacks_reach_the_ladder(x):
    """The released attack and one on a surrogate, as rungs: each moves images of a random defence that stand."""
    defence = nn.Sequential()
    defence.restorer, defence.classifier = Transform(nn.Identity(), steps=0, delta=0.05), f_a()
    y, hits = f_a()(x).argmax(1), []

    def attack(model, a, b):
        hits.append(model)
        return pgd(model, a, b, eps=0.3, steps=2)

    parts = evaluation.Parts(random=True, paper={"released attack": partial(transform.repo_bpda, eps=1e-4, steps=2)},
                             adaptive={"other": through(defence.classifier, attack)})
    climb = evaluation.ladder(defence, parts, evaluation.Budget(12, 1, 1, 2, 2), x, y, eps=0.3, draws=3)
    rows = {r["attack"]: r for r in climb.rows}
    assert rows["released attack"]["threat"] == "paper" and rows["other"]["threat"] == "adaptive"
    assert rows["released attack"]["tried"] > 0 and hits and all(m is defence.classifier for m in hits)
    assert climb.rows[-1]["value"] < rows["clean"]["value"]
