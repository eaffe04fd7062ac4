"""The baselines against what can be worked out by hand: levels, medians, an exact inverse, sizes, and what their training steps look at."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advlab import training
from advlab.attacks import bpda, eot, fgsm, pgd
from advlab.data import Dataset
from advlab.defenses import baselines
from advlab.models import seeded, small_cnn


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    with seeded(0):
        return small_cnn(width=4).eval()


def tiny_data(n=24):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(n) % 10
    return Dataset("noise", "train", x, y, tuple("0123456789"), f"noise {n}")


def test_bit_depth_by_hand():
    x = torch.tensor([0.0, 0.1, 0.17, 0.49, 0.51, 1.0]).view(1, 1, 1, 6)
    assert torch.allclose(baselines.BitDepth(1)(x).flatten(), torch.tensor([0.0, 0, 0, 0, 1, 1]))
    assert torch.allclose(baselines.BitDepth(2)(x).flatten() * 3, torch.tensor([0.0, 0, 1, 1, 2, 3]))
    assert len(baselines.BitDepth(3)(torch.rand(1, 1, 50, 50)).unique()) == 8


def test_median_by_hand(images):
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1  # a lone pixel is gone, whatever the size
    assert baselines.Median(3)(x).sum() == 0 and baselines.Median(2)(x).sum() == 0
    step = torch.zeros(1, 1, 6, 6)
    step[..., 3:] = 1  # an edge stays where it is
    assert torch.equal(baselines.Median(3)(step), step)
    assert torch.equal(baselines.Median(1)(images), images)
    middle = images[:, :, :2, :2].flatten(2).sort(2).values[:, :, 1]  # the lower median of the first window
    assert torch.equal(baselines.Median(2)(images)[:, :, 0, 0], middle)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_flat_images_and_loses_more_at_lower_quality(channels, images):
    flat = torch.full((2, channels, 16, 16), 128 / 255)
    torch.testing.assert_close(baselines.Jpeg(90)(flat), flat, atol=1.5 / 255, rtol=0)
    x = images[:, :channels]
    losses = [(baselines.Jpeg(q)(x) - x).square().mean() for q in (95, 50, 10)]
    assert losses[0] < losses[1] < losses[2]


def test_random_resize_and_pad(images):
    defence = baselines.RandomResizePad(seed=3)
    ones = defence(torch.ones(200, 1, 32, 32))
    assert ones.shape == (200, 1, 36, 36)
    inside = ones > 0.999
    heights, widths = inside.any(3).sum(2).flatten(), inside.any(2).sum(2).flatten()
    assert set(heights.tolist()) <= {30, 31, 32, 33, 34, 35}  # at the border the resampling mixes in the zeros beside it
    assert (heights - widths).abs().max() <= 2 and len(heights.unique()) >= 3
    tops = inside.any(3).int().argmax(2).flatten()
    assert len(tops.unique()) >= 3  # at many places, and not the same one for the whole batch
    small = baselines.RandomResizePad(33, seed=0)(images)  # side 32 on 33: the image itself, moved by 0 or 1
    for x, z in zip(images, small):
        found = [(z[:, i : i + 32, j : j + 32] - x).abs().max() for i in (0, 1) for j in (0, 1)]
        assert min(found) < 1e-4
    assert not torch.equal(defence(images), defence(images))
    assert torch.equal(baselines.RandomResizePad(seed=1)(images), baselines.RandomResizePad(seed=1)(images))


def test_wavelet_is_exact_without_a_threshold_and_removes_noise(images):
    """Without shrinkage only the enlargement remains, which keeps a flat image; with it, noise is reduced."""
    flat = torch.full((1, 1, 32, 32), 0.4)
    torch.testing.assert_close(baselines.WaveletSR(0.0)(flat), flat)
    ramp = torch.linspace(0.2, 0.8, 32).expand(1, 1, 32, 32)
    torch.testing.assert_close(baselines.WaveletSR(0.0)(ramp)[..., 8:24, 8:24], ramp[..., 8:24, 8:24], atol=1e-3, rtol=0)
    noisy = ramp + 0.03 * torch.randn(ramp.shape, generator=torch.Generator().manual_seed(0))
    error = [(baselines.WaveletSR(t)(noisy) - ramp)[..., 4:-4, 4:-4].square().mean() for t in (0.0, 0.04)]
    assert error[1] < 0.5 * error[0]
    x = images.clone().requires_grad_()
    assert torch.autograd.grad(baselines.WaveletSR()(x).sum(), x)[0].abs().sum() > 0


def test_every_baseline_has_its_attack(images, model):
    y = model(images).argmax(1)
    for restorer in (baselines.Jpeg(), baselines.feature_squeezing(), baselines.WaveletSR()):
        assert restorer(images).shape == images.shape and restorer(images).min() >= 0 and restorer(images).max() <= 1
        x_adv = pgd(bpda(restorer, model), images, y, eps=8 / 255, steps=2)
        assert (x_adv - images).abs().max() <= 8 / 255 + 1e-6
    random = nn.Sequential(baselines.RandomResizePad(), model)
    assert (pgd(eot(random, 3), images, y, eps=8 / 255, steps=2) != images).any()
    with pytest.raises(ValueError, match="bpda"):
        pgd(nn.Sequential(baselines.Jpeg(), model), images, y, eps=8 / 255, steps=1)


@pytest.mark.parametrize(("make", "text"), [
    (lambda: baselines.Jpeg(0), "quality"), (lambda: baselines.BitDepth(0), "bits"), (lambda: baselines.Median(0), "size"),
    (lambda: baselines.WaveletSR(-1.0), "threshold"), (lambda: baselines.RandomResizePad(32)(torch.rand(1, 1, 32, 32)), "square"),
])
def test_bad_settings_have_one_clear_error(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_nrp_step_never_looks_at_a_label(images, model):
    """Same loss whatever the labels; without a budget, the untrained U-Net, the identity, leaves nothing to learn."""
    defence = baselines.purifier(model, channels=3, widths=(4, 8)).eval()
    losses = [baselines.nrp_step(defence, images, y, torch.Generator().manual_seed(0), eps=8 / 255, steps=2)[0]
              for y in (torch.zeros(5, dtype=torch.long), torch.arange(5))]
    assert torch.equal(*losses) and losses[0] > 0
    same, _ = baselines.nrp_step(defence, images, torch.arange(5), torch.Generator().manual_seed(0), eps=0.0, steps=1)
    assert same < 1e-5


def test_nrp_trains_its_restorer_alone(tmp_path, model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    defence, info = baselines.nrp(model, tiny_data(), eps=8 / 255, widths=(4, 8), epochs=1, batch_size=12, folder=tmp_path, progress=False,
                                   device="cpu")
    assert all(torch.equal(v, before[k]) for k, v in defence.classifier.state_dict().items())
    assert len(info["history"]) == 1 and not defence.training
    x = torch.rand(2, 3, 32, 32)
    assert (defence.restorer(x) - x).abs().max() > 0


def test_adversarial_training_uses_the_attack_it_is_given(images, model):
    y = torch.arange(5)
    loss, _ = baselines.attack_at(model, images, y, None, attack=partial(fgsm, eps=8 / 255))
    torch.testing.assert_close(loss, F.cross_entropy(model(fgsm(model, images, y, eps=8 / 255)), y))


def test_tuned_starts_from_the_classifier_and_leaves_it_alone(tmp_path, model):
    before, settings = {k: v.clone() for k, v in model.state_dict().items()}, {"folder": tmp_path, "progress": False, "device": "cpu", "epochs": 1}
    step = partial(training.standard, label_smoothing=0.1)
    smoothed, info = baselines.tuned("smoothed", model, step, tiny_data(), **settings)
    assert info["config"]["step"]["label_smoothing"] == 0.1 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in smoothed.state_dict().items())
    still, _ = baselines.tuned("still", model, step, tiny_data(), lr=1e-12, weight_decay=0.0, **settings)
    assert (still.logits.weight - model.logits.weight).abs().max() < 1e-6
