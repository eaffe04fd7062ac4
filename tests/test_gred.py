"""GRED and its input sensitivity against closed forms, hand-worked masks and curves, and models whose answers are known."""

import math
from functools import partial

import pytest
import torch
from helpers import PassCounter, assert_pure, linear_model
from torch import nn

from advlab import detection, training
from advlab.attacks import core, fgsm, pgd
from advlab.attacks.adaptive import aware, rejecting
from advlab.defenses import gred
from advlab.gradients import input_sensitivity, log_odds_gradient, log_sensitivity

SHAPE = (1, 4, 4)


@pytest.fixture
def linear():
    return linear_model(SHAPE, classes=5)


@pytest.fixture
def images():
    return torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(3))


class Fixed(nn.Module):
    """Logits (B, 2) whose difference is gain * (mean pixel - middle)."""

    def __init__(self, gain=10.0, middle=0.5):
        super().__init__()
        self.gain, self.middle = gain, middle

    def forward(self, x):
        d = self.gain * (x.flatten(1).mean(1) - self.middle)
        return torch.stack([torch.zeros_like(d), d], 1)


def closed_form(model, x):
    """|sum over j of p_j (W_j - W_yhat)| in float64, (B, pixels), for a linear model."""
    weight, logits = model[1].weight.double(), model[1].double()(x.double().flatten(1))
    model[1].float()
    p, top = logits.softmax(1), logits.argmax(1)
    return (p[:, :, None] * (weight[None] - weight[top][:, None])).sum(1).abs()


# --- input sensitivity ------------------------------------------------------------


def test_input_sensitivity_is_the_closed_form_of_a_linear_model(linear, images):
    s = input_sensitivity(linear, images)
    torch.testing.assert_close(s.flatten(1).double(), closed_form(linear, images), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(log_sensitivity(linear, images), s.log10(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_sensitivity(linear, images, norm=True), s.flatten(1).norm(dim=1).log10(), rtol=1e-4, atol=1e-4)


def test_confident_images_do_not_underflow(images):
    model = linear_model(SHAPE, classes=5)
    with torch.no_grad():
        model[1].weight *= 60
        model[1].bias *= 60
    plain = core.gradient(model, images, model(images).argmax(1), nn.CrossEntropyLoss(reduction="none"))[2]
    assert (plain.flatten(1) == 0).all(1).any()  # what float32 makes of it
    truth = closed_form(model, images).norm(dim=1).log10()
    assert -300 < truth.min() < -45
    torch.testing.assert_close(log_sensitivity(model, images, norm=True).double(), truth, rtol=1e-4, atol=1e-3)


def test_sensitivity_knows_nothing_of_the_batch_and_leaves_nothing_behind(linear, images):
    assert_pure(linear, images, linear(images).argmax(1), lambda m, x, y: 0.5 + 0.4 * torch.tanh(input_sensitivity(m, x)))
    torch.testing.assert_close(input_sensitivity(linear, images)[3:4], input_sensitivity(linear, images[3:4]))
    assert not input_sensitivity(linear, images.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert input_sensitivity(linear, images).sum() > 0
    with pytest.raises(ValueError, match="BatchNorm2d in training mode"):
        input_sensitivity(nn.Sequential(nn.BatchNorm2d(1), linear), images)


def test_sensitivity_costs_one_pass_and_differentiates_twice(linear, images):
    with PassCounter(linear) as passes:
        for p in linear.parameters():
            p.requires_grad_(False)
        log_odds_gradient(linear, images)
    assert (passes.forward, passes.backward) == (12, 12)
    model, x = linear.double(), images.double().requires_grad_()
    (grad,) = torch.autograd.grad(log_sensitivity(model, x, norm=True, create_graph=True).sum(), x)
    step = torch.zeros_like(x)
    step[:, 0, 1, 2] = 1e-6
    slope = (log_sensitivity(model, x + step, norm=True) - log_sensitivity(model, x - step, norm=True)) / 2e-6
    torch.testing.assert_close(grad[:, 0, 1, 2], slope.detach(), rtol=1e-4, atol=1e-6)


def test_the_view_runs_from_floor_to_one_on_a_fixed_scale(linear, images):
    s = input_sensitivity(linear, images)
    torch.testing.assert_close(gred.insen(linear, images), (((s + 1e-12).log10() + 12) / 12).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert gred.insen(linear, images).max() <= 1 and torch.equal(gred.insen(linear, images, raw=1e9), torch.ones_like(images))
    with torch.no_grad():
        linear[1].weight *= 1000
        linear[1].bias *= 1000
        assert gred.insen(linear, images).min() < 1e-3
    x = images.clone().requires_grad_()
    assert gred.insen(linear_model(SHAPE, classes=5), x).requires_grad


def test_saliency_stacks_the_image_with_two_maps():
    torch.manual_seed(0)
    f = gred.classifier("small_cnn", channels=3, width=4).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        seen = gred.saliency(f, x)
    assert seen.shape == (2, 5, 32, 32) and torch.equal(seen[:, :3], x) and seen[:, 3:].min() >= 0 and seen[:, 3:].max() <= 1
    assert len(seen[:, 3:].unique()) > 10


# --- detection ------------------------------------------------------------


def test_roc_by_hand():
    fpr, tpr, cuts = detection.roc(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8]))
    assert fpr.tolist() == [0, 0, 0.5, 0.5, 1] and tpr.tolist() == [0, 0.5, 0.5, 1, 1]
    torch.testing.assert_close(cuts, torch.tensor([torch.inf, 0.8, 0.4, 0.35, 0.1]).double())
    assert detection.auc(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8])) == 0.75


def test_auc_is_the_chance_of_the_right_order_with_ties_counting_half():
    generator = torch.Generator().manual_seed(0)
    clean, adv = (torch.randint(0, 8, (n,), generator=generator).float() + shift for n, shift in ((40, 0), (30, 2)))
    pairs = (adv[:, None] > clean).double() + 0.5 * (adv[:, None] == clean)
    assert detection.auc(clean, adv) == pytest.approx(pairs.mean().item())
    assert detection.auc(torch.zeros(3), torch.zeros(5)) == 0.5 and detection.auc(clean, -adv - 100) == 0


def test_true_positives_at_a_false_positive_rate():
    clean, adv = torch.arange(10.0), torch.tensor([8.5, 9.5, 20.0, 1.0])
    assert detection.tpr_at(clean, adv, 0.0) == (0.5, 9.5)
    rate, cut = detection.tpr_at(clean, adv, 0.1)
    assert rate == 0.75 and (clean >= cut).float().mean() <= 0.1 and (adv >= cut).float().mean() == 0.75
    assert detection.tpr_at(clean, adv, 1.0)[0] == 1
    inf = torch.inf  # a harmless image that nothing exceeds: none is found without it
    assert detection.tpr_at(torch.tensor([inf, 0, 0, 0]), torch.tensor([1.0, 2.0]), 0.05) == (0.0, inf)
    assert detection.auc(torch.tensor([inf, 0.0]), torch.tensor([inf, 0.0])) == detection.auc(torch.tensor([inf]), torch.tensor([inf])) == 0.5
    assert detection.best_threshold(clean, adv) == 8.5  # three quarters found, a tenth of the clean ones flagged; the next below flags two tenths
    with pytest.raises(ValueError, match="between 0 and 1"):
        detection.tpr_at(clean, adv, 5)
    with pytest.raises(ValueError, match="negative group has 0"):
        detection.roc(clean[:0], adv)


# --- the two branches ------------------------------------------------------------


def test_entropy_in_bits_and_the_surer_branch_speaks():
    z = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, 1000.0]])
    torch.testing.assert_close(gred.entropy(z), torch.tensor([1.0, 2 - 0.75 * math.log2(3), 0.0]), atol=1e-5, rtol=0)
    org, sen = torch.tensor([[0.0, 3.0], [1.0, 0.0], [0.0, 2.0], [0.0, 50.0]]), torch.tensor([[2.0, 0.0], [0.0, 4.0], [2.0, 0.0], [60.0, 0.0]])
    assert torch.equal(gred.select(org, sen), torch.stack([org[0], sen[1], sen[2], sen[3]]))  # the last two tie, saturated or not


def test_suspicion_is_the_log_odds_of_the_branch_and_the_attackers_form_covers_both(images):
    org, sen = Fixed(10, 0.5), Fixed(-3, 0.4)
    d = [10 * (images.flatten(1).mean(1) - 0.5), -3 * (images.flatten(1).mean(1) - 0.4)]
    torch.testing.assert_close(gred.Suspicion(org)(images), d[0])
    torch.testing.assert_close(gred.Suspicion(org, sen)(images), torch.where(d[0].abs() > d[1].abs(), *d))
    pressed = gred.Suspicion(org, sen, slack=0.2)(images)
    torch.testing.assert_close(pressed, (d[0] + 0.2).relu() + (d[1] + 0.2).relu() - 1e-6)
    assert (gred.Suspicion(org, sen)(images)[pressed < 0] <= 0).all()


# --- pairs ------------------------------------------------------------


def test_pairs_are_right_before_and_wrong_after_rounding(linear, images):
    many = torch.cat([images] * 4)
    y = linear(many).argmax(1)
    y[::5] = (y[::5] + 1) % 5  # wrong from the start
    found = gred.pairs(linear, many, y, partial(fgsm, eps=0.2), 1000)
    index = [i for i in range(48) if i % 5 and linear(gred.round8(fgsm(linear, many[i : i + 1], y[i : i + 1], eps=0.2))).argmax() != y[i]]
    assert found.index.tolist() == index and found.tried == 38
    assert torch.equal(found.x, many[index]) and torch.equal(found.x_adv * 255, (found.x_adv * 255).round()) and torch.equal(found.y, y[index])
    few = gred.pairs(linear, many, y, partial(fgsm, eps=0.2), 3)
    assert len(few.x) == 3 and torch.equal(few.x_adv, found.x_adv[:3]) and few.tried < found.tried
    target = (y + 1) % 5
    aimed = gred.pairs(linear, many, y, partial(fgsm, eps=0.4, targeted=True), 1000, targets=target)
    assert torch.equal(linear(aimed.x_adv).argmax(1), target[aimed.index])
    with pytest.raises(ValueError, match="fooled f on none of 38 images"):
        gred.pairs(linear, many, y, partial(fgsm, eps=0.0), 3)


def test_crafted_pairs_are_kept_and_a_damaged_file_is_not_trusted(linear, images, tmp_path):
    linear.requires_grad_(False)
    y = linear(images).argmax(1)
    options = {"targets": (y + 1) % 5, "folder": tmp_path}
    tries = {"FGSM-U": partial(fgsm, eps=0.2), "FGSM-T": partial(fgsm, eps=0.5, targeted=True)}
    first = gred.crafted(linear, images, y, tries, 5, **options)
    assert (linear(first["FGSM-T"].x_adv).argmax(1) == options["targets"][first["FGSM-T"].index]).all()
    with PassCounter(linear) as passes:
        again = gred.crafted(linear, images, y, tries, 5, **options)
        assert passes.forward == 0
        gred.crafted(linear, images, y, tries, 6, **options)
        assert passes.forward > 0
    assert all(torch.equal(getattr(again[k], v), getattr(first[k], v)) for k in tries for v in ("x", "x_adv", "raw", "y", "index"))
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="is not used"):
        mended = gred.crafted(linear, images, y, tries, 5, **options)
    assert torch.equal(mended["FGSM-U"].x_adv, first["FGSM-U"].x_adv)


def made(n, seed=0):
    """Pairs whose adversarial images are lighter, n of them, from sources 0 to n - 1."""
    x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) / 2
    return gred.Pairs(x, x + 0.4, x + 0.4, torch.arange(n) % 3, torch.arange(n), n, n)


def test_pooled_pairs_stay_in_the_order_of_their_sources():
    both = gred.pooled([made(10), made(10, 1)], 100)
    assert both.index.tolist() == [i for i in range(10) for _ in range(2)] and (both.tried, both.fell) == (20, 20)
    torch.testing.assert_close(both.x_adv, both.x + 0.4)
    thin = gred.pooled([made(10), made(10, 1)], 5)
    assert len(thin.x) == 5 and thin.index.tolist() == sorted(thin.index.tolist())


def test_thinned_pairs_come_from_every_attack():
    every = [made(400, k) for k in range(8)]
    thin = gred.pooled(every, 800)
    origin = torch.stack([(thin.x == p.x[thin.index]).flatten(1).all(1) for p in every])
    assert (origin.sum(0) == 1).all() and all(60 <= count <= 140 for count in origin.sum(1).tolist())  # 100 each, give or take four deviations
    assert torch.equal(thin.x, gred.pooled(every, 800).x) and not torch.equal(thin.x, gred.pooled(every, 800, seed=1).x)


def test_a_detector_learns_and_no_source_is_in_both_splits(tmp_path, monkeypatch):
    data, seen, fit = gred.pooled([made(40), made(40, 1)], 80), {}, training.load_or_fit

    def spy(name, build, step, train, **settings):
        seen.update(train=train, spare=settings["evaluate"].keywords["x"])
        return fit(name, build, step, train, **settings)

    monkeypatch.setattr(training, "load_or_fit", spy)
    options = {"arch": "small_cnn", "width": 4, "epochs": 6, "batch_size": 16, "folder": tmp_path, "progress": False}
    net, info = gred.load_or_fit_detector("d", "org", nn.Identity(), data, **options)
    assert len(seen["train"][0]) == 144 and len(seen["spare"]) == 16 and seen["train"][1].tolist() == [0] * 72 + [1] * 72
    apart = torch.cdist(seen["train"][0].flatten(1), seen["spare"].flatten(1))
    assert apart.min() > 0.1
    with torch.no_grad():
        assert (net(data.x).argmax(1) == 0).all() and (net(data.x_adv).argmax(1) == 1).all()
    assert info["history"][-1]["validation"] == 1
    with pytest.raises(ValueError, match="unknown kind 'pixels'"):
        gred.load_or_fit_detector("d", "pixels", nn.Identity(), data, **options)


# --- the rectifier ------------------------------------------------------------


def test_suspects_by_hand():
    s = torch.tensor([[0.0, 1.0, 2.0, 10.0]]).view(1, 1, 2, 2)
    marked = {alpha: gred.suspects(s, alpha=alpha).flatten().tolist() for alpha in (0.0, 0.1, 0.5, 1.0)}
    assert marked == {0.0: [False, True, True, True], 0.1: [False, False, True, True], 0.5: [False] * 3 + [True], 1.0: [False] * 4}
    assert [int(gred.suspects(s, rate=q).sum()) for q in (0.0, 0.25, 0.5, 1.0)] == [0, 1, 2, 4]
    assert gred.suspects(torch.zeros(3, 2, 5, 5), rate=0.4).flatten(1).sum(1).tolist() == [20] * 3  # ties too
    assert torch.equal(gred.suspects(7 * s, alpha=0.15), gred.suspects(s, alpha=0.15))
    for bad in ({}, {"rate": 0.5, "alpha": 0.5}, {"rate": 1.5}):
        with pytest.raises(ValueError, match="either rate or alpha"):
            gred.suspects(s, **bad)


def test_randomise_replaces_suspects_only_half_of_them_by_draws_like_the_image():
    generator = torch.Generator().manual_seed(0)
    x = gred.round8(0.5 + 0.1 * torch.randn(8, 3, 32, 32, generator=generator)).clamp(0, 1)
    mask = torch.rand(x.shape, generator=generator) < 0.3
    out = gred.randomise(x, mask, generator)
    assert torch.equal(out[~mask], x[~mask]) and torch.equal(gred.round8(out), out)
    assert (out != x)[mask].float().mean().item() == pytest.approx(0.5 * (1 - 0.011), abs=0.03)  # a draw seldom equals the pixel
    assert torch.equal(gred.randomise(x, mask, generator, p=0), x)
    drawn = gred.randomise(x, torch.ones_like(mask), generator, p=1)
    torch.testing.assert_close(drawn.flatten(1).mean(1), x.flatten(1).mean(1), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.flatten(1).std(1), x.flatten(1).std(1), atol=0.01, rtol=0)
    again = [gred.randomise(x, mask, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again)


def test_the_mask_ignores_the_confidence_factor(linear, images):
    mask = gred.mask_of(linear, images, rate=0.25)
    assert torch.equal(mask, gred.suspects(input_sensitivity(linear, images), rate=0.25))
    assert gred.mask_of(linear, images, alpha=0.3).any()


def test_rectify_is_cross_entropy_on_copies(linear, images):
    y = torch.arange(12) % 5
    loss, metrics = gred.rectify(linear, torch.cat([images, torch.zeros_like(images)], 1), y, torch.Generator(), copies=3)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(linear(images), y))
    assert metrics["accuracy"] == (linear(images).argmax(1) == y).float().mean()
    masked, _ = gred.rectify(linear, torch.cat([images, torch.ones_like(images)], 1), y, torch.Generator().manual_seed(0))
    assert masked != loss


def test_recover_without_masks_is_f_rec_and_with_them_averages_its_copies(linear, images):
    rectifier = linear_model(SHAPE, classes=5, seed=1)
    torch.testing.assert_close(gred.Recover(linear, rectifier, rate=0.0, copies=3)(images), rectifier(images).log_softmax(1))
    for p in [*rectifier.parameters(), *linear.parameters()]:
        p.requires_grad_(False)
    recover = gred.Recover(linear, rectifier, copies=7, seed=4)
    with PassCounter(rectifier) as rec, PassCounter(linear) as f, torch.no_grad():
        z = recover(images)
    assert rec.forward == 84 and f.forward == 12 and rec.backward == 0
    torch.testing.assert_close(z.exp().sum(1), torch.ones(12))
    assert not torch.equal(recover(images), z) and torch.equal(gred.Recover(linear, rectifier, copies=7, seed=4)(images), z)


def test_replaced_pixels_carry_a_gradient_only_straight_through(linear, images):
    rectifier = linear_model(SHAPE, classes=5, seed=1)
    gradients = {}
    for through in (False, True):
        x = images.clone().requires_grad_()
        gred.Recover(linear, rectifier, rate=1.0, copies=1, seed=2, through=through)(x)[:, 0].sum().backward()
        gradients[through] = (x.grad != 0).float().mean().item()
    assert gradients[True] == 1 and 0.35 < gradients[False] < 0.65


def test_the_pipeline_sends_flagged_images_and_only_those_to_the_rectifier(linear, images):
    constant = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    nn.init.zeros_(constant[1].weight)
    suspicion = gred.Suspicion(Fixed(10, images.mean().item()))
    system = gred.GRED(linear, suspicion, gred.Recover(linear, constant.eval(), copies=2)).eval()
    flagged, state = suspicion(images) > 0, torch.get_rng_state()
    assert 0 < flagged.sum() < 12
    with torch.no_grad():
        z = system(images)
    assert torch.equal(z[~flagged], linear(images)[~flagged]) and torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(z[flagged], constant(images)[flagged].log_softmax(1))
    quiet = gred.GRED(linear, gred.Suspicion(Fixed(10, 2.0)), system.recover)
    assert torch.equal(quiet(images), linear(images))
    _, _, grad = core.gradient(quiet, images, torch.zeros(12, dtype=torch.int64), core.cross_entropy)
    torch.testing.assert_close(grad, core.gradient(linear, images, torch.zeros(12, dtype=torch.int64), core.cross_entropy)[2])


# --- attacks on both ------------------------------------------------------------


def test_bypassing_takes_a_fooled_classifier_and_no_flag(linear, images):
    y, suspicion = linear(images).argmax(1), gred.Suspicion(Fixed(10, images.mean().item()))
    wrong = (y + 1) % 5
    assert not gred.bypassed(linear, suspicion, images, y).any()
    assert torch.equal(gred.bypassed(linear, suspicion, images, wrong), suspicion(images) <= 0)
    assert torch.equal(gred.bypassed(linear, suspicion, images, y, targeted=True), suspicion(images) <= 0)


def test_selective_loss_works_on_what_is_unmet():
    out, y = torch.tensor([[2.0, 1.0, 0.7], [1.0, 2.0, 0.7]]), torch.tensor([0, 0])
    value = gred.selective(core.cross_entropy)(out, y)
    torch.testing.assert_close(value, torch.tensor([math.log(1 + math.exp(-1)), -0.7]))


class TwoPixels(nn.Module):
    """Logits (x0 - 0.5, 0) and a flag of x0 + x1 - 1: gradients (1, 0) and (1, 1)."""

    def forward(self, x):
        v = x.flatten(1)
        return torch.stack([v[:, 0] - 0.5, 0 * v[:, 0], v.sum(1) - 1], 1)


def test_orthogonal_pgd_steps_across_the_other_gradient():
    x, y = torch.tensor([0.6, 0.6]).view(1, 1, 1, 2), torch.tensor([0])
    out = gred.orthogonal_pgd(TwoPixels(), x, y, eps=0.4, steps=40, norm="l2")
    assert out[0, 0, 0, 0] < 0.5 and TwoPixels()(out)[0, 2] <= TwoPixels()(x)[0, 2] + 1e-6
    one = gred.orthogonal_pgd(TwoPixels(), torch.tensor([0.51, 0.6]).view(1, 1, 1, 2), y, eps=0.1, steps=1, norm="l2") - torch.tensor([0.51, 0.6])
    assert (one.flatten() @ torch.tensor([1.0, 1.0])).abs() < 1e-6 and one.flatten()[0] < 0  # down the class, along the level line of the flag


def test_orthogonal_pgd_is_pure_stays_in_its_ball_and_costs_what_it_says(linear, images):
    y, model = linear(images).argmax(1), aware(linear, gred.Suspicion(Fixed(10, 0.5))).eval()
    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        x_adv = assert_pure(model, images, y, partial(gred.orthogonal_pgd, eps=eps, steps=4, norm=norm))
        delta = (x_adv - images).flatten(1)
        assert (delta.abs().amax() if norm == "linf" else delta.norm(dim=1).amax()) <= eps + 1e-6
    with PassCounter(model.requires_grad_(False)) as passes:
        gred.orthogonal_pgd(model, images, y, eps=0.1, steps=4)
    assert (passes.forward, passes.backward) == (60, 120)
    assert torch.equal(gred.orthogonal_pgd(model, images, y, eps=0.0, steps=2), images)


def test_pressed_models_are_pressed_by_the_slack_and_judged_by_the_detector(linear, images):
    org, sen, y = Fixed(10, 0.5), Fixed(-3, 0.4), linear(images).argmax(1)
    suspicion = gred.Suspicion(org, sen)
    out = gred.Pressed(linear, suspicion, slack=0.2)(images)
    assert torch.equal(out[:, :5], linear(images)) and torch.equal(out[:, 6], suspicion(images))
    torch.testing.assert_close(out[:, 5], gred.Suspicion(org, sen, slack=0.2)(images))
    assert torch.equal(gred.passing(out, y, True), suspicion(images) <= 0) and not gred.passing(out, y).any()
    torch.testing.assert_close(gred.pressing(core.cross_entropy, weight=2.0)(out, y), core.cross_entropy(out[:, :5], y) - 2 * out[:, 5].relu())
    x = images.clone().requires_grad_()
    soft = gred.Pressed(linear, suspicion, slack=0.2, backward=gred.Suspicion(Fixed(1000, -5.0), sen))(x)
    torch.testing.assert_close(soft, out, atol=1e-3, rtol=0)
    assert torch.autograd.grad(soft[:, 5].sum(), x)[0].flatten(1).sum(1).min() > 900


class Threes(nn.Module):
    """Logits (x0, 0.5, x1) of two pixels and a flag of 0.5 - x1."""

    def forward(self, x):
        v = x.flatten(1)
        return torch.stack([v[:, 0], torch.full_like(v[:, 0], 0.5), v[:, 1], 0.5 - v[:, 1]], 1)


def test_leaving_ends_neither_in_the_label_nor_in_flagged():
    model, x = rejecting(Threes()), torch.tensor([[0.9, 0.3], [0.1, 0.3]]).view(2, 1, 1, 2)
    y = torch.tensor([0, 1])
    z = gred.Merged(model, 1)(x)
    assert z.shape == (2, 3) and torch.equal(z[:, [0, 2]], model(x)[:, [0, 2]]) and torch.equal(z[:, 1], model(x)[:, [1, 3]].amax(1))
    out = gred.leaving(model, partial(pgd, eps=0.5, steps=20), y, x)
    assert (model(out).argmax(1) < 3).all() and (model(out).argmax(1) != y).all()


def test_going_on_stays_in_the_ball_round_x_and_rests_where_it_fools(linear, images):
    y = linear(images).argmax(1)
    start = (images + 0.3).clamp(0, 1)
    out = gred.onwards(linear, start, images, y, eps=0.1, steps=5)
    assert (out - images).abs().max() <= 0.1 + 1e-6
    wrong = (y + 1) % 5
    assert torch.equal(gred.onwards(linear, images, images, wrong, eps=0.1, steps=5), images)
    toward = gred.onwards(linear, images, images, wrong, eps=0.5, steps=20, targeted=True)
    assert (linear(toward).argmax(1) == wrong).float().mean() > 0.8


def test_the_nearest_answer_that_passes_is_kept(linear, images):
    y, never = linear(images).argmax(1), gred.Suspicion(Fixed(10, 2.0))
    wrong = (y + 1) % 5
    near, far = (images + 0.02).clamp(0, 1), (images + 0.1).clamp(0, 1)
    kept, won, raw = gred.nearest_passing(linear, never, images, linear(near).argmax(1), [far, near], targeted=True)
    assert won.all() and raw.all() and torch.equal(kept, gred.round8(near))
    kept, won, _ = gred.nearest_passing(linear, gred.Suspicion(Fixed(10, -2.0)), images, wrong, [far, near])
    assert not won.any() and torch.equal(kept, gred.round8(far))


def test_the_second_stage_sheds_the_flag_and_keeps_a_wrong_class(linear, images):
    images, y = gred.round8(images), linear(gred.round8(images)).argmax(1)
    suspicion = gred.Suspicion(Fixed(10, images.mean().item()))
    for name, attack in gred.attacks(eps=0.3, steps=20, ddn_steps=60, cw_steps=60).items():
        if name.endswith("-U"):
            bare = attack(linear, images, y)
            out = gred.two_stage(linear, suspicion, attack, bare, images, y)
            already, passed = (gred.bypassed(linear, suspicion, gred.round8(v), y) for v in (bare, out))
            assert already.sum() < 12 and passed.sum() > already.sum(), name
            if name[:3] in ("FGS", "PGD"):
                assert (out - images).abs().max() <= 0.3 + 1e-6


def test_the_attacks_are_the_papers_eight():
    tries = gred.attacks(eps=0.1, steps=3)
    assert sorted(tries) == sorted(["FGSM-U", "PGD-U", "PGD-T", "DeepFool-U", "CW-U", "CW-T", "DDN-U", "DDN-T"])
    assert all(tries[name].keywords.get("targeted", False) == name.endswith("-T") for name in tries)
