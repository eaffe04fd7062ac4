"""HGD: what the denoiser is before training, the pool of Table 1, the four targets, and the numbers of Figs. 5 and 7 worked out by hand."""

from functools import partial

import pytest
import torch
from torch import nn

from advlab import evaluation, gradients, training
from advlab.data import Dataset
from advlab.defenses import hgd
from advlab.models import classifier, layer_names, seeded

SIZES = [28, 32, 64, 224, 299]
NARROW = (4, 8, 8)


@pytest.fixture(scope="module")
def classifiers():
    with seeded(0):
        return [classifier("small_cnn", width=w).eval() for w in (4, 5, 6)]


@pytest.fixture(scope="module")
def source():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (120, 3, 16, 16), generator=g, dtype=torch.uint8), torch.arange(120) % 10
    return Dataset("made", "train", x, y, tuple("abcdefghij"), "0" * 64)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    return tmp_path


def pairs(source, classifiers, guide, **options):
    return hgd.pairs(None, source=source, models=classifiers, classifier=classifiers[0], guide=guide, images=60, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["LGD", "DAE"])
def test_any_size_comes_back_and_the_dunet_starts_as_the_identity(name, size):
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(size))
    net = hgd.denoiser(name, widths=NARROW).eval()
    with torch.no_grad():
        out = net(x)
    assert out.shape == x.shape
    assert torch.equal(out, x) == (name == "LGD")


def test_the_papers_network_has_its_eleven_million_weights():
    assert sum(p.numel() for p in hgd.denoiser("FGD", widths=hgd.WIDTHS["imagenet"]).parameters()) == pytest.approx(11.03e6, rel=0.005)
    assert sum(p.numel() for p in hgd.denoiser("FGD", widths=hgd.WIDTHS["small"]).parameters()) == pytest.approx(6.9e6, rel=0.02)
    assert sum(p.numel() for p in hgd.denoiser("FGD", widths=hgd.WIDTHS["xs"]).parameters()) == pytest.approx(1.73e6, rel=0.02)
    with pytest.raises(ValueError, match="unknown denoiser 'PGD'"):
        hgd.denoiser("PGD")


@pytest.mark.parametrize("attack", hgd.STEPS)
def test_an_oblivious_attack_keeps_its_ball_and_an_own_budget_for_each_image(classifiers, batch, attack):
    x, _ = batch
    eps = torch.arange(1, len(x) + 1) / 255
    x_adv = hgd.oblivious(classifiers, x, attack=attack, eps=eps, batch_size=3)
    size = (x_adv - x).flatten(1).abs().amax(1)
    assert (size <= eps + 1e-6).all() and (size > 0).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(hgd.oblivious(classifiers, x, attack=attack, eps=torch.zeros(len(x))), x)


def test_fgsm_takes_the_predicted_label_so_the_true_one_cannot_leak(classifiers, batch):
    x, _ = batch
    model, eps = classifiers[0], 4 / 255
    xs = x.clone().requires_grad_()
    logits = model(xs)
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum"), xs)
    torch.testing.assert_close(hgd.oblivious(model, x, attack="fgsm", eps=eps), (x + eps * grad.sign()).clamp(0, 1))


def test_the_pool_holds_every_kind_in_its_ball_and_is_found_again(classifiers, source, folder):
    x = source.images()
    made = hgd.pool(classifiers, x, seed=3)
    assert made["names"][-2:] == ["clean", "noise"] and len(made["names"]) == 9 == len(made["kind"].unique())
    levels = (255 * made["eps"]).round()
    assert torch.equal(levels / 255, made["eps"]) and levels.min() >= 1 and levels.max() <= 16
    size = (made["x_adv"] - x).flatten(1).abs().amax(1)
    assert (size <= made["eps"] + 1e-6).all()
    for k, name in enumerate(made["names"]):
        on = made["kind"] == k
        if name == "clean":
            assert torch.equal(made["x_adv"][on], x[on])
        elif name != "noise":
            attack, victim = name.split(" on ")
            attacked = classifiers if victim == "ensemble" else classifiers[int(victim[1:]) - 1]
            assert torch.equal(made["x_adv"][on], hgd.oblivious(attacked, x[on], attack=attack, eps=made["eps"][on]))
    noise = ((made["x_adv"] - x) / made["eps"].view(-1, 1, 1, 1))[made["kind"] == 8]
    inside = noise[(noise.abs() < 0.99) & (noise != 0)]  # not clipped to valid pixels
    assert abs(inside.mean()) < 0.05 and inside.std() == pytest.approx(0.57, abs=0.03)  # uniform, not signs
    (file,) = (folder / "data" / "checkpoints").glob("pool-*.pt")
    again = hgd.pool(classifiers, x, seed=3)
    assert torch.equal(again["x_adv"], made["x_adv"]) and again["seconds"] == made["seconds"]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged"):
        remade = hgd.pool(classifiers, x, seed=3)
    assert torch.equal(remade["x_adv"], made["x_adv"])
    assert len(hgd.pool(classifiers, x, seed=3, extra=())["kind"].unique()) == 7
    with pytest.raises(ValueError, match="unknown extra kind 'claen'"):
        hgd.pool(classifiers, x, seed=3, extra=("claen",))


def test_each_test_set_attacks_the_classifier_of_table_1_at_each_eps(classifiers):
    with seeded(1):
        holdout = classifier("small_cnn", width=4).eval()
    x, grid = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(5)), [4 / 255, 16 / 255]
    found = hgd.test_sets(classifiers, holdout, x, eps=grid)
    assert list(found) == [(threat, eps) for threat in ("oblivious", "transfer") for eps in grid]
    for (threat, eps), attacks in found.items():
        assert list(attacks) == ["fgsm", "ifgsm4"]
        for attack, x_adv in attacks.items():
            attacked = holdout if threat == "transfer" else classifiers[0] if attack == "fgsm" else classifiers
            assert torch.equal(x_adv, hgd.oblivious(attacked, x, attack=attack, eps=eps))
            assert (x_adv - x).abs().max() == pytest.approx(eps, abs=1e-6) and x_adv.min() >= 0 and x_adv.max() <= 1
    every = [x_adv for attacks in found.values() for x_adv in attacks.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


def test_pooled_attacks_count_their_images_once():
    right = [torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, False, False]])]
    found = evaluation.pooled(right)
    low, high = evaluation.wilson(1.5, 4)
    assert found == {"n": 4, "correct": None, "value": 0.375, "unit": "accuracy", "low": low, "high": high, "pooled_attacks": 2}
    assert evaluation.pooled(right[:1]) == evaluation.score(right[0]) | {"pooled_attacks": 1}


@pytest.mark.parametrize("guide", ["pixels", "features", "logits", "labels"])
def test_targets_come_from_the_clean_image_without_the_denoiser(classifiers, source, folder, guide):
    x, y, model = source.images(slice(60)), source.y[:60], classifiers[0]
    x_adv, target = pairs(source, classifiers, guide)
    with torch.no_grad():
        wanted = {"pixels": x, "labels": y, "logits": model(x), "features": model[:-2](x)}[guide]
    torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-5)
    untrained = hgd.assemble("LGD", model, widths=NARROW).eval()
    value, _ = hgd.guided(untrained, x_adv, target, None, guide=guide)
    if guide == "pixels":  # the identity leaves the whole perturbation
        assert value.item() == pytest.approx((x_adv - x).abs().mean().item(), rel=1e-5)
    if guide == "labels":
        assert value.item() == pytest.approx(nn.functional.cross_entropy(model(x_adv), y).item(), rel=1e-5)
    else:
        clean, _ = hgd.guided(untrained, x, target, None, guide=guide)
        assert clean.item() == pytest.approx(0, abs=1e-6) and value > 0


def test_pairs_of_chosen_classes_only_and_from_the_place_asked_for(classifiers, source, folder):
    assert set(pairs(source, classifiers, "labels", classes=[0, 4])[1].tolist()) == {0, 4}
    x_adv, y = pairs(source, classifiers, "labels", start=60)
    assert torch.equal(y, source.y[60:]) and (x_adv - source.images(slice(60, 120))).abs().max() <= 16 / 255 + 1e-6


@pytest.mark.parametrize("name", ["DAE", "FGD"])
def test_training_moves_the_denoiser_and_leaves_the_classifier_bit_for_bit(classifiers, source, folder, name):
    model, before = classifiers[0], {k: v.clone() for k, v in classifiers[0].state_dict().items()}
    run = partial(hgd.train, name, model, classifiers, source, label="t", images=60, held=30, epochs=2, widths=NARROW, progress=False)
    defence, info = run()
    assert all(torch.equal(v, before[k]) for k, v in defence.classifier.state_dict().items())
    assert not any(m.training for m in defence.modules())
    assert any(p.abs().sum() > 0 for p in defence.restorer.final.parameters())
    assert all(row["validation"] > 0 for row in info["history"]) and not info["cached"]
    assert run()[1]["cached"]
    with pytest.raises(ValueError, match="60 images for training and 61 held out overlap: 'made' has 120"):
        run(held=61)


def test_the_online_control_trains_against_attacks_on_the_whole_defence(classifiers, source, folder, monkeypatch):
    seen = []
    real = hgd.pgd
    monkeypatch.setattr(hgd, "pgd", lambda model, x, y, **kw: seen.append((model.restorer.training, model, kw["eps"])) or real(model, x, y, **kw))
    defence = hgd.assemble("LGD", classifiers[0], widths=NARROW)
    defence.restorer.train()
    x, y = source.images(slice(8)), source.y[:8]
    value, _ = hgd.online(defence, x, y, torch.Generator().manual_seed(0), eps=8 / 255, steps=2)
    assert seen == [(False, defence, 8 / 255)] and value > 0 and value.requires_grad and defence.restorer.training


@pytest.mark.parametrize("kind", ["small_cnn", "vgg11", "vgg0", "resnet18"])
def test_the_last_stage_is_the_one_before_pooling(kind):
    model = classifier(kind, width=2).eval()
    found = hgd.represent(model, torch.rand(2, 3, 64, 64), "features")  # at 32 pixels VGG11's own last pool leaves one place
    assert found.ndim == 4 and found.shape[2] > 1 and not hgd.last_stage(model).startswith("pooled")


def test_cancellation_by_hand(batch):
    x, _ = batch
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) / 255
    for share in (1.0, 0.5, 1.5):  # the denoiser takes away this share of the noise, and nothing else
        found = hgd.cancellation(x, x + dx, x + dx - share * dx)
        assert found == {"k": pytest.approx(share, rel=1e-4), "r": pytest.approx(1, abs=1e-4), "residual": pytest.approx(0, abs=1e-3)}
    assert hgd.cancellation(x, x + dx, x + dx)["k"] == 0
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) / 255
    found = hgd.cancellation(x, x + dx, x - other)
    assert found["k"] == pytest.approx(1, abs=0.05) and found["residual"] == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="no perturbation"):
        hgd.cancellation(x, x, x)


def test_error_amplification_by_hand_and_at_every_layer(batch):
    x, _ = batch
    doubled = nn.Sequential()
    doubled.add_module("stem", nn.Identity())
    doubled.add_module("logits", nn.Flatten())
    found = gradients.error_amplification(doubled, x, 0.75 * x)
    assert list(found) == ["pixels", "stem", "logits"]
    assert all(torch.allclose(v, torch.full((len(x),), 0.25), atol=1e-5) for v in found.values())
    model = classifier("small_cnn", width=4).eval()
    same = gradients.error_amplification(model, x, x)
    assert list(same) == ["pixels", *layer_names(model)] and all((v == 0).all() for v in same.values())


def test_shares_measures_both_parts(classifiers, source, folder):
    x_adv, target = pairs(source, classifiers, "logits")
    defence = hgd.assemble("LGD", classifiers[0], widths=NARROW).eval()
    found = hgd.shares(defence, x_adv[:8], target[:8], guide="logits", repeats=1)
    assert found["denoiser"] > 0 and found["classifier"] > 0
    assert hgd.shares(defence, x_adv[:8], x_adv[:8], guide="pixels", repeats=1)["classifier"] == 0
    assert all(p.grad is None for p in defence.parameters()) and training.device().type in ("cpu", "cuda", "mps")
