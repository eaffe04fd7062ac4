"""S2S against what can be worked out by hand: linear classifiers, small autoencoders, counted true positives."""

import copy
import inspect
import math
from collections import OrderedDict
from functools import partial
from itertools import combinations

import pytest
import torch
from helpers import PassCounter, assert_pure, closest, linear_model
from torch import nn

from advlab import data, training
from advlab.attacks import bpda, core, margin
from advlab.defenses import s2s
from advlab.gradients import input_gradient, magnitude, reconstruction_gradient
from advlab.models import segnet, small_cnn, torchvision_classifier, unpool

SHAPE = (1, 4, 4)


def images(n=12, shape=SHAPE, seed=0, low=0.3, high=0.7):
    return low + (high - low) * torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pieces():
    """A SegNet with lively batch norm, a classifier, eight images and their labels."""
    torch.manual_seed(0)
    restorer, classifier = segnet(3, 2, 4), small_cnn(4, width=4)
    x = torch.rand(8, 3, 16, 16)
    for model in (restorer, classifier):
        model.train()
        for _ in range(3):
            model(x)
        model.eval()
    return restorer, classifier, x, torch.arange(8) % 4


def toy(n=64, side=16):
    generator = torch.Generator().manual_seed(0)
    x = (255 * torch.rand(n, 3, side, side, generator=generator)).to(torch.uint8)
    return data.Dataset("toy", "train", x, torch.arange(n) % 4, tuple("abcd"), "toy")


# --- networks and training ---


def test_unpooling_restores_the_maxima_and_leaves_zeros_elsewhere():
    z = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    pooled, index = nn.functional.max_pool2d(z, 2, return_indices=True)
    back = unpool(pooled, index)
    peak = z == nn.functional.interpolate(pooled, scale_factor=2)
    assert torch.equal(back, torch.where(peak, z, 0)) and (back != 0).sum() == pooled.numel()


def test_stage_two_trains_the_decoder_alone_and_leaves_encoder_and_classifier_bit_for_bit(pieces, tmp_path):
    restorer, classifier, *_ = pieces
    before = {name: v.clone() for name, v in s2s.chain(restorer, classifier).state_dict().items()}
    defence, record = s2s.s2snet(restorer, classifier, toy(), "smoke", folder=tmp_path, epochs=2, progress=False)
    after = defence.state_dict()
    moved = {name for name, v in after.items() if not torch.equal(v, before[name])}
    assert moved and all(name.startswith("restorer.decoder.") for name in moved)
    assert {name.split(".")[-1] for name in moved} >= {"weight", "bias", "running_mean", "running_var"}
    assert not any(m.training for m in defence.modules()) and len(record["history"]) == 2
    assert all(torch.equal(v, before[name]) for name, v in s2s.chain(restorer, classifier).state_dict().items()), "the caller's networks changed"
    again, cached = s2s.s2snet(restorer, classifier, toy(), "smoke", folder=tmp_path, epochs=2, progress=False)
    assert cached["cached"] and all(torch.equal(v, after[name]) for name, v in again.state_dict().items())


def test_stage_two_can_be_told_to_train_the_encoder_too(pieces, tmp_path):
    restorer, classifier, *_ = pieces
    defence, _ = s2s.s2snet(restorer, classifier, toy(), "smoke", folder=tmp_path, progress=False, train_modules=["restorer"])
    assert not torch.equal(defence.restorer.encoder.stages[0][0][0].weight, restorer.encoder.stages[0][0][0].weight)


def test_stage_one_learns_to_reconstruct_without_labels(tmp_path):
    small, blocks = toy(), torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = (255 * nn.functional.interpolate(blocks, size=16, mode="bilinear")).to(torch.uint8)
    one, other = (data.Dataset("toy", "train", smooth, y, tuple("abcd"), d) for y, d in ((small.y, "one"), (small.y.flip(0), "two")))
    fit = partial(s2s.autoencoder, profile="smoke", folder=tmp_path, progress=False, batch_size=16)
    net, record = fit(one, epochs=12)
    losses = [h["loss"] for h in record["history"]]
    assert losses[-1] < 0.75 * losses[0] and len(net.encoder.stages) == 2
    assert all(torch.equal(a, b) for a, b in zip(fit(one, epochs=1)[0].parameters(), fit(other, epochs=1)[0].parameters()))


def test_losses_by_hand(pieces):
    _, classifier, x, y = pieces
    restorer = segnet(3, 2, 4, mean=0.4, std=0.2).eval()
    with torch.no_grad():
        loss, metrics = s2s.reconstruct(restorer, x, y, None)
        out = restorer(x)
        torch.testing.assert_close(loss, ((x - out) ** 2).mean() / 0.04)
        torch.testing.assert_close(metrics["mse"], ((x - out) ** 2).mean())
        defence = s2s.chain(restorer, classifier)
        loss, metrics = s2s.finetune(defence, x, y, None)
        torch.testing.assert_close(loss, -classifier(out).log_softmax(1)[torch.arange(8), y].mean())
        assert metrics["accuracy"] == (defence(x).argmax(1) == y).float().mean()


@pytest.mark.parametrize(("side", "stages"), [(28, 2), (32, 2), (64, 3)])
def test_larger_images_get_one_stage_more(side, stages, tmp_path):
    net, _ = s2s.autoencoder(toy(4, side), "smoke", folder=tmp_path, progress=False)
    assert len(net.encoder.stages) == stages and net(torch.rand(1, 3, side, side)).shape[-1] == side


def test_unknown_profiles_and_unpoolings_are_refused(pieces):
    restorer, classifier, *_ = pieces
    with pytest.raises(ValueError, match="no recipe for profile 'fast'; choose one of smoke, quick"):
        s2s.s2snet(restorer, classifier, toy(), "fast")
    with pytest.raises(ValueError, match="Unknown unpool 'max'"):
        s2s.autoencoder(toy(), "smoke", unpool="max", progress=False)


# --- gradients ---


def test_the_gradient_through_the_autoencoder_equals_finite_differences(pieces):
    restorer, _, x, y = pieces
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Tanh(), nn.Linear(8, 4))
    defence, x = s2s.chain(copy.deepcopy(restorer), smooth).double(), x[:2].double()
    grad = input_gradient(defence, x, y[:2])
    with torch.no_grad():
        for at in [(0, 0, 3, 5), (0, 2, 10, 1), (1, 1, 7, 7), (1, 0, 15, 15)]:
            step = torch.zeros_like(x)
            step[at] = 1e-6
            up, down = (nn.functional.cross_entropy(defence(x + s * step), y[:2], reduction="sum") for s in (1, -1))
            assert grad[at].item() == pytest.approx(((up - down) / 2e-6).item(), abs=1e-4 * grad.abs().max().item())


def test_counterfactual_a_is_the_gradient_at_the_reconstruction(pieces):
    restorer, classifier, x, y = pieces
    z = restorer(x).detach().requires_grad_()
    (want,) = torch.autograd.grad(nn.functional.cross_entropy(classifier(z), y, reduction="sum"), z)
    torch.testing.assert_close(input_gradient(bpda(restorer, classifier), x, y), want, atol=1e-6, rtol=1e-4)


def test_gradient_maps_are_those_of_table_one_and_do_not_depend_on_batches(pieces):
    a_s, classifier, x, y = pieces
    a_f = copy.deepcopy(a_s)
    with torch.no_grad():
        for p in a_f.decoder.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    maps = s2s.gradient_maps(classifier, a_s, a_f, x, y)
    want = {name: input_gradient(model, x, y) for name, model in
            {"R": classifier, "R o A_R": s2s.chain(a_f, classifier), "R o A_S": s2s.chain(a_s, classifier)}.items()}
    want |= {"A_R": reconstruction_gradient(a_f, x), "A_S": reconstruction_gradient(a_s, x)}
    assert list(maps) == list(want) and all(torch.equal(maps[name], magnitude(g)) for name, g in want.items())
    assert not any(torch.allclose(maps[a], maps[b], rtol=0.05) for a, b in combinations(maps, 2))
    constant = s2s.gradient_maps(classifier, a_s, a_f, x, y, detach_target=True)
    assert torch.equal(constant["A_R"], magnitude(reconstruction_gradient(a_f, x, detach_target=True)))
    apart = s2s.gradient_maps(classifier, a_s, a_f, x, y, batch_size=3)
    assert all(torch.allclose(maps[name], apart[name], atol=1e-5, rtol=1e-3) for name in maps)


def test_masking_of_the_identity_and_of_a_restorer_without_gradient(pieces):
    _, classifier, x, y = pieces
    signs = s2s.masking(nn.Identity(), classifier, x, y, noise=0.0)
    assert all(torch.allclose(signs[name], torch.ones(8), atol=1e-5) for name in ("cosine with the identity gradient", "cosine after small noise"))
    torch.testing.assert_close(signs["gradient norm"], input_gradient(classifier, x, y).flatten(1).norm(dim=1))
    half = nn.Sequential()
    half.forward = lambda v: torch.cat([v[:, :, :8], 0 * v[:, :, 8:]], 2)
    assert (s2s.masking(half, classifier, x, y)["share of zero entries"] >= 0.5).all()


# --- the paper's attacks and measures ---


@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_bims_eps_is_a_step_and_nothing_is_projected(eps):
    model, x = linear_model(SHAPE), images()
    y = model(x).argmax(1)
    x_adv = s2s.paper_attack("bim", eps)(model, x, y)
    way = (model[1].weight[1 - y] - model[1].weight[y]).sign().view_as(x)
    torch.testing.assert_close(x_adv, (x + 10 * eps / 255 * way).clamp(0, 1), atol=1e-6, rtol=0)
    assert 255 * (x_adv - x).abs().max() <= 10 * eps + 1e-3


def test_paper_attacks_are_pure_and_count_their_passes(net, batch):
    for name, passes in {"fgsm": 1, "bim": 10, "cw": 101}.items():
        attack = s2s.paper_attack(name, 2.0)
        assert_pure(net, *batch, attack)
        with PassCounter(net) as counter:
            attack(net, *batch)
        assert counter.forward_batches == counter.backward_batches == passes
    with pytest.raises(ValueError, match="unknown attack 'pgd'; choose one of fgsm, bim, cw"):
        s2s.paper_attack("pgd", 1.0)


def test_cw_descent_comes_near_the_closest_image_and_leaves_wrong_ones_alone():
    model, x = linear_model(SHAPE), images()
    y = model(x).argmax(1)
    y[0] = 1 - y[0]
    x_adv = s2s.cw_descent(model, x, y, eps=0.01, steps=150)
    far, least = (x_adv - x).flatten(1).norm(dim=1)[1:], closest(model, x, y, "l2")[1:]
    assert torch.equal(x_adv[0], x[0]) and (model(x_adv).argmax(1) != y).all()
    assert (far >= least - 1e-5).all() and (far <= least + 0.0101).all()


def test_cw_descent_respects_kappa_and_returns_the_last_iterate_where_it_fails():
    model, x = linear_model(SHAPE), images()
    y = model(x).argmax(1)
    z = model(s2s.cw_descent(model, x, y, eps=0.05, steps=100, weight=100.0, kappa=0.5))
    assert (z.gather(1, 1 - y[:, None]) - z.gather(1, y[:, None]) >= 0.5).all()
    short = s2s.cw_descent(model, x, y, eps=1e-4, steps=3)
    torch.testing.assert_close((short - x).flatten(1).norm(dim=1), torch.full((12,), 3e-4), atol=1e-6, rtol=0)


def test_the_papers_cw_takes_a_first_step_of_length_eps_with_a_weight_of_ten():
    """The first step has 8-bit length eps; from the second on, the way back to x weighs 2 (x_t - x) against 10 times the margin's gradient."""
    model, x = linear_model(SHAPE), images()
    y = model(x).argmax(1)
    way = (model[1].weight[1 - y] - model[1].weight[y]).view_as(x)  # of the margin, which is linear
    unit = way / way.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(s2s.paper_attack("cw", 2.0, steps=1)(model, x, y), x + 2 / 255 * unit, atol=1e-6, rtol=0)
    assert inspect.signature(s2s.cw_descent).parameters["weight"].default == 10.0
    torch.manual_seed(0)
    bent = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4)).eval()  # not linear: the second step turns
    y = bent(x).argmax(1)
    one, two = (s2s.paper_attack("cw", 20.0, steps=k)(bent, x, y) for k in (1, 2))
    _, value, grad = core.gradient(bent, one, y, margin)
    stands, step = value < 0, 10 * grad - 2 * (one - x)
    want = (one + 20 / 255 * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
    assert stands.any()
    torch.testing.assert_close(two[stands], want[stands], atol=1e-6, rtol=0)


@pytest.mark.parametrize("eps", [-1.0, math.nan])
def test_cw_descent_refuses_a_bad_step(eps):
    model, x = linear_model(SHAPE), images()
    with pytest.raises(ValueError, match="finite and not negative"):
        s2s.cw_descent(model, x, model(x).argmax(1), eps=eps)


def test_rounding_goes_away_from_zero_in_both_directions():
    x = torch.tensor([100.0, 100.0, 100.0, 100.0, 100.0, 0.0, 255.0, 254.0]).view(1, 1, 2, 4) / 255
    delta = torch.tensor([0.5, -0.5, 0.49, -1.5, 2.4, -0.5, 0.5, 1.5]).view_as(x) / 255
    want = torch.tensor([101.0, 99.0, 100.0, 98.0, 102.0, 0.0, 255.0, 255.0]).view_as(x)
    torch.testing.assert_close(255 * s2s.eight_bit(x + delta, x), want, atol=1e-4, rtol=0)


def test_normalised_l2_by_hand():
    x = torch.tensor([3.0, 4.0, 0.0, 0.0]).view(1, 1, 2, 2) / 10
    assert s2s.normalised_l2(x + torch.tensor([0.0, 0.0, 0.05, 0.0]).view_as(x), x).item() == pytest.approx(0.1)
    assert s2s.normalised_l2(torch.zeros_like(x), x).item() == pytest.approx(1.0)


def test_strength_counts_true_positives_only():
    """One pixel decides: class 1 above 1/2. A step of 0.2 turns pixels within 0.2 of it; of five images, one is wrong before."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model[1].bias.copy_(torch.tensor([0.5, -0.5]))
    x = torch.tensor([0.1, 0.4, 0.6, 0.9, 0.8]).view(5, 1, 1, 1)
    y = torch.tensor([0, 0, 1, 1, 0])
    common = torch.tensor([True, True, False, False, False])
    (rounded, right), (plain, same) = s2s.strength(model, s2s.paper_attack("fgsm", 51.0), x, y, common=common)
    assert right.tolist() == same.tolist() == [True, False, False, True] and rounded["rounded"] and not plain["rounded"]
    assert plain["l2"] == pytest.approx((0.2 / 0.1 + 0.2 / 0.4 + 0.2 / 0.6 + 0.2 / 0.9) / 4, rel=1e-5)
    assert plain["clean"] == 0.8 and plain["common"] == 0.5
    elsewhere = s2s.strength(model, s2s.paper_attack("fgsm", 51.0), x, y, surrogate=lambda v: model(1 - v))  # attacks the wrong way round
    assert all(right.all() and fields["common"] is None for fields, right in elsewhere)
    with pytest.raises(ValueError, match="none of 2 images right"):
        s2s.strength(model, s2s.paper_attack("fgsm", 1.0), x[:2], 1 - y[:2])


@pytest.mark.parametrize("places", [0.0, 1.0])
def test_the_code_attack_brings_the_code_nearer_and_stays_in_its_ball(pieces, places):
    restorer, classifier, x, _ = pieces
    defence, y, pool = s2s.chain(restorer, classifier), torch.zeros(8, dtype=torch.int64), images(20, (3, 16, 16), low=0.0, high=1.0)
    labels = torch.arange(20) % 2
    x_adv = assert_pure(defence, x, y, lambda m, a, b: s2s.code_attack(m, a, b, pool=pool, labels=labels, count=1, places=places, eps=0.1, steps=10))
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    goal = encoding(restorer, pool[s2s.guides(restorer, x, y, pool, labels, count=1)[0]])[0]
    before, after = ((encoding(restorer, v)[0] - goal).norm(dim=1) for v in (x, x_adv))
    if not places:  # else the code competes with the places
        assert (after < before).all()


def encoding(restorer, v):
    with torch.no_grad():
        code, places = restorer.encoder(restorer.normalize(v))
    return code.flatten(1), torch.cat([p.flatten(1) for p in places], 1)


def test_the_hinge_brings_the_places_of_the_maxima_to_the_guides(pieces):
    restorer, classifier, x, _ = pieces
    y, labels, guide, same = torch.zeros(8, dtype=torch.int64), torch.ones(1, dtype=torch.int64), x[:1].flip(3), {}
    for places in (0.0, 10.0):
        x_adv = s2s.code_attack(s2s.chain(restorer, classifier), x, y, pool=guide, labels=labels, count=1, places=places, eps=0.3, steps=40)
        same[places] = (encoding(restorer, x_adv)[1] == encoding(restorer, guide)[1]).double().mean()
    assert same[10.0] > same[0.0] + 0.02


def test_guides_are_the_nearest_codes_of_other_classes(pieces):
    restorer, _, x, y = pieces
    found = s2s.guides(restorer, x, y, x, y, count=3, batch_size=5)
    code = encoding(restorer, x)[0]
    for i in range(8):
        far = {j: (code[i] - code[j]).norm().item() for j in range(8) if y[j] != y[i]}
        assert found[:, i].tolist() == sorted(far, key=far.get)[:3]
    with pytest.raises(ValueError, match="fewer than 7 images of other classes among 8"):
        s2s.guides(restorer, x, y, x, y, count=7)


def test_the_code_attack_tries_one_guide_after_another_until_the_model_errs(pieces, monkeypatch):
    """The attack is replaced by one that writes its number into the first pixel; an image falls once that reaches its second pixel."""
    restorer, _, x, _ = pieces
    x, attacked = x.clone(), []
    x[:, 0, 0, 0], x[:, 0, 0, 1] = 0, torch.arange(8) / 10

    def numbered(model, x, y, **options):
        attacked.append(len(x))
        return x.index_put((torch.arange(len(x)), *(torch.zeros(len(x), dtype=torch.int64),) * 3), torch.tensor(len(attacked) / 10))

    defence = nn.Sequential(OrderedDict(restorer=restorer)).eval()
    defence.forward = lambda v: torch.stack([torch.zeros(len(v)), v[:, 0, 0, 0] - v[:, 0, 0, 1] + 0.01], 1)
    monkeypatch.setattr(s2s, "pgd", numbered)
    y, labels = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64)
    out = s2s.code_attack(defence, x, y, pool=x, labels=labels, count=3, eps=0.1)
    assert attacked == [8, 6, 5] and torch.allclose(out[:, 0, 0, 0], torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]))


# --- intervals and answers ---


def test_intervals_by_hand():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])
    mean, low, high = s2s.interval(a)
    assert (mean, high - mean, mean - low) == pytest.approx((2.0, *2 * [1.959964 / math.sqrt(3)]))
    mean, low, high = s2s.interval(a, b)
    assert (mean, high - mean, mean - low) == pytest.approx((1.0, *2 * [1.959964 * math.sqrt(1 / 3 + 2 / 2)]))
    assert all(map(math.isnan, s2s.interval(a[:1])))


def test_a_statement_is_held_not_held_or_undecided():
    above, below, across = (2.0, 1.0, 3.0), (-2.0, -3.0, -1.0), (0.5, -1.0, 2.0)
    assert [s2s.decide(found, least=0)[0] for found in (above, below, across)] == ["held", "not held", "undecided"]
    assert [s2s.decide(above, found, least=0)[0] for found in (above, below, across)] == ["held", "not held", "undecided"]
    assert [s2s.decide(across, least=-b, most=b)[0] for b in (3, 1)] == ["held", "undecided"]
    assert s2s.decide(above, least=-0.5, most=0.5)[0] == "not held"
    assert s2s.decide((0.0, 0.0, 0.0), least=0)[0] == s2s.decide((math.nan,) * 3, least=0)[0] == "undecided"
    assert s2s.decide(above, across, least=0)[1] == "+2.0 [+1.0, +3.0] and +0.5 [-1.0, +2.0]"
    assert s2s.told({"a < b": s2s.decide(above, least=0), "c": ("not held", "1")}) == "a < b: held (+2.0 [+1.0, +3.0]); c: not held (1)"


# --- the path to ImageNet ---


@pytest.mark.slow
def test_imagenets_networks_run_end_to_end_on_four_images_and_two_steps(tmp_path):
    """torchvision's classifiers without weights, SegNet-5, an image folder, f's own predictions as labels."""
    from PIL import Image

    for i in range(4):
        folder = tmp_path / "photos" / "test" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (255 * torch.rand(120, 100, 3, generator=torch.Generator().manual_seed(i))).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    for name in ("resnet50", "inception_v3"):
        x = data.load(tmp_path / "photos", "test", size=96).images()
        torch.manual_seed(0)
        classifier = torchvision_classifier(name, None, num_classes=10)
        y = classifier(x).detach().argmax(1)
        options = {"epochs": 1, "batch_size": 2, "lr": 1e-3, "optimizer": "adam", "progress": False}
        restorer = segnet(3, 5, 2)
        training.fit(restorer, s2s.reconstruct, (x, y), **options)
        defence = s2s.chain(restorer, classifier)
        training.fit(defence, s2s.finetune, (x, y), train_modules=["restorer.decoder"], **options)
        own = defence(x).detach().argmax(1)
        (fields, right), _ = s2s.strength(defence, s2s.paper_attack("bim", 2.0, steps=2), x, own)
        assert len(right) == 4 and 0 < fields["l2"] < 0.1
