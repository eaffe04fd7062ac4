"""TRN: the gradient maps against separate backward passes and identities, the network's wiring and sizes by hand, and each attacker's gradient."""

from functools import partial

import pytest
import torch
from helpers import PassCounter, assert_pure
from torch import nn
from torch.nn import functional as F

from advlab.attacks import bim, fgsm, pgd
from advlab.data import Dataset
from advlab.defenses import trn
from advlab.gradients import gradient_maps, map_statistics
from advlab.models import Normalize, seeded, small_cnn

EPS = 8 / 255


def smooth_net(classes=5, gain=1.0):
    """A float64 classifier without a kink."""
    with seeded(1):
        body = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, classes)]
        model = nn.Sequential(Normalize(), *body).double().eval()
    model[5].weight.data *= gain
    return model


@pytest.fixture(scope="module")
def x64():
    return torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.1


def random_defence(classifier, channels=3, classes=10, **options):
    """A defence whose last layers are not zero, so that it does something."""
    with seeded(2):
        defence = trn.build(classifier, channels=channels, classes=classes, **{"blocks": 1, "width": 4} | options).eval()
        for p in defence.restorer.network.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return defence


@pytest.fixture(scope="module")
def defence():
    with seeded(0):
        return random_defence(small_cnn(width=4).eval(), blocks=2)


@pytest.fixture(scope="module")
def images():
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return x, torch.arange(5)


def one_by_one(model, x, classes):
    """n separate backward passes of the ordinary cross-entropy."""
    maps = []
    for i in range(classes):
        v = x.detach().requires_grad_()
        loss = F.cross_entropy(model(v), torch.full((len(x),), i), reduction="sum")
        maps.append(torch.autograd.grad(loss, v)[0])
    return torch.stack(maps, 1)


# --- gradient maps ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize("gain", [1.0, 30.0])
def test_maps_equal_separate_backward_passes(x64, chunk, gain):
    model = smooth_net(gain=gain)
    maps = gradient_maps(model, x64, chunk=chunk)
    torch.testing.assert_close(maps, one_by_one(model, x64, 5), rtol=1e-9, atol=1e-12)
    p = model(x64).softmax(1).detach()
    assert (p.view(4, 5, 1, 1, 1) * maps).sum(1).abs().max() < 1e-12
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x) for x in x64])  # (B, n, C, H, W)
    torch.testing.assert_close(maps, torch.einsum("bij,bjchw->bichw", p[:, None] - torch.eye(5).double(), jacobian))


def test_one_forward_and_n_minus_one_backward_passes(x64):
    model = smooth_net().requires_grad_(False)
    with PassCounter(model) as passes:
        gradient_maps(model, x64)
    assert (passes.forward, passes.backward) == (4, 4 * 4)
    with PassCounter(model) as passes:
        gradient_maps(model, x64, top=3)
    assert (passes.forward, passes.backward) == (4, 4 * 3)  # the mean over the classes left out takes one of its own


def test_a_confident_label_keeps_its_map_in_float32(x64):
    """p = 1 - 1e-12 or so, where p - 1 is 0 in float32: the map is still right to three digits."""
    model = smooth_net(gain=120.0)
    assert (1 - model(x64).softmax(1).amax(1)).min() < 1e-9
    exact = gradient_maps(model, x64)
    single = gradient_maps(smooth_net(gain=120.0).float(), x64.float())
    error = (single - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)
    assert error.max() < 1e-3


def test_likeliest_labels_first(x64):
    model = smooth_net()
    order = model(x64).argsort(1, descending=True)[:, :3]
    expected = one_by_one(model, x64, 5)[torch.arange(4)[:, None], order]
    torch.testing.assert_close(gradient_maps(model, x64, top=3), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_maps_whatever_the_caller_does_with_gradients(x64, context):
    model = smooth_net()
    expected = gradient_maps(model, x64)
    with context():
        maps = gradient_maps(model, x64 * 1.0)
    assert torch.equal(maps, expected) and not maps.requires_grad
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not x64.requires_grad


@pytest.mark.parametrize("top", [None, 2])
def test_differentiable_maps_have_the_right_derivative(top, x64):
    model, x = smooth_net(), x64[:2, :, :3, :3]
    pad = partial(F.pad, pad=(0, 3, 0, 3))
    assert torch.autograd.gradcheck(lambda v: gradient_maps(lambda u: model(pad(u)), v, top=top, differentiable=True), x.clone().requires_grad_())


def test_bad_input_has_one_clear_error(x64):
    model = smooth_net()
    for wrong, text in ((x64[0], "float batch"), (x64[:0], "float batch"), ((x64 * 255).to(torch.uint8), "float batch")):
        with pytest.raises(ValueError, match=text):
            gradient_maps(model, wrong)
    for options, text in (({"top": 1}, "between 2 and the 5"), ({"top": 6}, "between 2 and the 5"), ({"chunk": 0}, "chunk")):
        with pytest.raises(ValueError, match=text):
            gradient_maps(model, x64, **options)
    with pytest.raises(ValueError, match="training mode"):
        gradient_maps(smooth_net().train(), x64)


def test_map_statistics_by_hand():
    """Five labels on 1 x 3 pixels: the others are (1, 2, 3) or its mirror image, the predicted one a tenth of the first."""
    a, b = torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])
    maps = torch.stack([a, a / 10, a, b]).view(1, 4, 1, 1, 3)
    found = {k: v.item() for k, v in map_statistics(maps, torch.tensor([1])).items()}
    assert found == pytest.approx({"other": (1 - 1 - 1) / 3, "predicted": (1 + 1 - 1) / 3, "ratio": 0.1}, abs=1e-5)


# --- the network --------------------------------------------------------------------------------------------------------------------------


def count(channels, maps, w, streams="both", last=True):
    """Parameters of a block, from the table of its convolutions (inputs, outputs) and attentions (channels)."""
    c, m = channels, maps
    image = [(c + k * w, w) for k in range(5)] if streams != "gradient" else []
    mixed = m + (3 if streams == "both" else 2) * w
    gradient = [(m, w), (m + w, w), (mixed, w), (mixed + w, w)] if streams != "image" else []
    into = (c + 5 * w if image else 0) + (w if gradient else 0)
    convolutions = [*image, *gradient, (into, c)] + ([] if last or not gradient else [(mixed + 2 * w, m)])
    attentions = ([mixed] if gradient else []) + ([] if last or not gradient else [m])
    squeeze = [max(4, a // 16) for a in attentions]
    return sum(9 * i * o + o for i, o in convolutions) + sum(a * s + s + s * a + a for a, s in zip(attentions, squeeze))


@pytest.mark.parametrize("streams", trn.STREAMS)
@pytest.mark.parametrize(("channels", "width", "blocks"), [(3, 64, 3), (1, 16, 2), (3, 8, 1)])
def test_parameter_counts_by_hand(streams, channels, width, blocks):
    network = trn.TwoStream(channels, 10 * channels, blocks=blocks, width=width, streams=streams)
    expected = (blocks - 1) * count(channels, 10 * channels, width, streams, last=False) + count(channels, 10 * channels, width, streams)
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("streams", trn.STREAMS)
def test_an_untrained_network_is_the_identity_and_all_of_it_learns(streams, images):
    x, y = images
    with seeded(0):
        defence = trn.build(small_cnn(width=4).eval(), channels=3, classes=10, blocks=2, width=4, streams=streams)
    assert torch.equal(defence.restorer(x), x) and torch.equal(defence(x), defence.classifier(x))
    network, opt = defence.restorer.network, torch.optim.SGD(defence.restorer.network.parameters(), 0.1)
    for _ in range(3):  # the zero layers hold back the gradient of those before them
        opt.zero_grad()
        trn.step(defence, x, y, None, attack=partial(fgsm, eps=EPS))[0].backward()
        opt.step()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())


def test_each_stream_sees_what_it_should(images):
    x, maps = images[0], torch.randn(5, 30, 32, 32, generator=torch.Generator().manual_seed(0))
    for streams, from_maps in (("both", True), ("gradient", True), ("image", False)):
        with seeded(0):
            net = trn.TwoStream(3, 30, blocks=2, width=4, streams=streams)
            for p in net.parameters():
                p.data += 0.1 * torch.randn_like(p)
        change = net(x, maps) - x
        assert torch.allclose(net(x, 0 * maps) - x, change) != from_maps
        moved = net(x.roll(1, 0), maps) - x.roll(1, 0)
        assert torch.allclose(moved, change, atol=1e-5) == (streams == "gradient")  # which never looks at the image


def test_a_block_receives_the_refined_maps(images):
    x, maps = images[0], torch.randn(5, 30, 32, 32, generator=torch.Generator().manual_seed(0))
    block = trn.FusionBlock(3, 30, 4)
    assert torch.equal(block(x, maps)[1], maps)  # a zero g5
    nn.init.ones_(block.g5[0].bias)
    assert not torch.equal(block(x, maps)[1], maps)
    assert trn.FusionBlock(3, 30, 4, last=True).g5 is None


def test_attention_weighs_channels_alone():
    attention = trn.ChannelAttention(40)
    z = torch.rand(2, 40, 5, 5) + 0.1
    ratio = attention(z) / z
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio)) and ratio.min() > 0 and ratio.max() < 1
    assert attention.gate[1].out_channels == 4 and trn.ChannelAttention(160).gate[1].out_channels == 10


def test_width_of_a_control(defence):
    shape = {"channels": 1, "classes": 10, "blocks": 3}
    assert trn.matched_width("both", 16, **shape) == 16
    for streams in ("image", "gradient"):
        w, wanted = trn.matched_width(streams, 16, **shape), 2 * count(1, 10, 16, last=False) + count(1, 10, 16)
        size = [2 * count(1, 10, v, streams, last=False) + count(1, 10, v, streams) for v in (w - 1, w, w + 1)]
        assert abs(size[1] - wanted) <= min(abs(size[0] - wanted), abs(size[2] - wanted)) and w > 16


def test_scales_of_the_maps(images):
    x = images[0]
    with seeded(0):
        model = small_cnn(width=4).eval()
    raw = gradient_maps(model, x)
    scaled = {scale: trn.GradientMaps(model, scale=scale)(x).unflatten(1, (10, 3)) for scale in trn.SCALES}
    torch.testing.assert_close(scaled["none"], raw)
    torch.testing.assert_close(scaled["rms"].square().mean((1, 2, 3, 4)), torch.ones(5))
    torch.testing.assert_close(scaled["map"].square().mean((2, 3, 4)), torch.ones(5, 10))
    torch.testing.assert_close(scaled["max"].abs().amax((1, 2, 3, 4)), torch.ones(5))
    assert torch.equal(scaled["sign"], raw.sign())
    size = raw.square().mean((1, 2, 3, 4), keepdim=True).sqrt()  # one number an image, so that sizes still differ between labels
    torch.testing.assert_close(scaled["rms"] * size, raw)


def test_bad_settings_have_one_clear_error():
    model = small_cnn(width=4)
    for wrong in ({"streams": "three"}, {"scale": "rsm"}, {"blocks": 0}, {"width": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            trn.build(model, channels=3, classes=10, **wrong)
    with pytest.raises(ValueError, match="attack"):
        trn.trained(model, None, attack="CW")


# --- the defence --------------------------------------------------------------------------------------------------------------------------


def test_an_answer_depends_on_its_own_image_alone(defence, images):
    x, _ = images
    whole = defence(x)
    torch.testing.assert_close(torch.cat([defence(v[None]) for v in x]), whole, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(defence(x), whole)
        assert not defence(x).requires_grad
    assert defence.restorer(x).min() >= 0 and defence.restorer(x).max() <= 1


@pytest.mark.parametrize("wrap", [lambda d: d, trn.constant, trn.image_stream, trn.soft_maps])
def test_attackers_models_give_the_defences_answer_and_attacks_leave_nothing(defence, images, wrap):
    x, y = images
    model = wrap(defence)
    torch.testing.assert_close(model(x), defence(x))
    assert {id(p) for p in model.parameters()} <= {id(p) for p in defence.parameters()}  # shared, not copied
    assert_pure(model, x, y, partial(pgd, eps=EPS, steps=2))
    assert defence.restorer.estimate.differentiable  # a wrapper changes its own copy


def test_the_four_attackers_have_four_gradients(defence, images):
    x, y = images

    def slope(model):
        v = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(v), y, reduction="sum"), v)[0]

    found = [slope(wrap(defence)) for wrap in (lambda d: d, trn.constant, trn.image_stream, trn.soft_maps)]
    assert all((a - b).abs().max() > 1e-3 * a.abs().max() for i, a in enumerate(found) for b in found[:i])


def test_full_gradient_is_the_true_one(x64):
    """W-full against central differences, in float64 on a smooth classifier and a network without kinks; W-const is not that gradient."""
    defence = random_defence(smooth_net(), classes=5).double()
    for module in list(defence.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    y, way = torch.arange(4), torch.randn(x64.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(v):
        return F.cross_entropy(defence.classifier(defence.restorer.raw(v)), y, reduction="none")  # the clamp has kinks

    def slope(model):
        v = x64.clone().requires_grad_()
        value = F.cross_entropy(model.classifier(model.restorer.raw(v)), y, reduction="sum")
        return (torch.autograd.grad(value, v)[0] * way).flatten(1).sum(1)

    h = 1e-5
    true = ((loss(x64 + h * way) - loss(x64 - h * way)) / (2 * h)).detach()
    torch.testing.assert_close(slope(defence), true, rtol=1e-5, atol=1e-8)
    assert ((slope(trn.constant(defence)) - true).abs() / true.abs()).max() > 1e-2


def test_frozen_maps_are_those_of_the_clean_images(defence, images):
    """One step from the image itself sees the same maps frozen or worked out anew; the second does not."""
    x, y = images
    one = trn.frozen(bim, defence, x, y, eps=EPS, steps=1)
    assert torch.equal(one, bim(trn.constant(defence), x, y, eps=EPS, steps=1))
    three = [trn.frozen(bim, defence, x, y, eps=EPS, steps=3), bim(trn.constant(defence), x, y, eps=EPS, steps=3)]
    assert not torch.equal(*three)


def test_soft_maps_see_what_full_gradients_do_not():
    """A two-class ReLU network z = (0, relu(a)) on one pixel: the maps' size is p relu'(a), constant between kinks but for p. The soft derivative
    adds the second derivative of softplus, largest at the kink."""
    class Kink(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            a = self.relu(x.flatten(1) - 0.5)
            return torch.cat([0 * a, a], 1)

    defence = trn.build(Kink().eval(), channels=1, classes=2, blocks=1, width=2, scale="none")
    x = torch.tensor([0.52]).view(1, 1, 1, 1).requires_grad_()
    exact = torch.autograd.grad(defence.restorer.estimate(x)[0, 0].sum(), x)[0].item()
    soft = torch.autograd.grad(trn.soft_maps(defence, 0.1).restorer.estimate(x)[0, 0].sum(), x)[0].item()
    p, s = torch.sigmoid(torch.tensor(0.02)).item(), torch.sigmoid(torch.tensor(0.2)).item()
    assert exact == pytest.approx(p * (1 - p), rel=1e-4)  # G_0 = p z', so G_0' = p (1 - p) z'^2 + p z''
    assert soft == pytest.approx(p * (1 - p) * s * s + p * s * (1 - s) / 0.1, rel=1e-4)


# --- training -----------------------------------------------------------------------------------------------------------------------------


def test_step_by_hand_for_the_identity(images):
    """Untrained, the restored image is the input: the pixel loss is the attack's mean square, the other that of the bare classifier."""
    x, y = images
    defence = trn.build(small_cnn(width=4).eval(), channels=3, classes=10, blocks=1, width=4)
    attack = partial(fgsm, eps=EPS)
    loss, metrics = trn.step(defence, x, y, None, attack=attack, weight=10.0)
    x_adv = attack(defence.classifier, x, y)
    pixel = (x_adv - x).square().mean() / 2
    torch.testing.assert_close(metrics["pixel"], pixel)
    torch.testing.assert_close(loss, 10 * pixel + F.cross_entropy(defence.classifier(torch.cat([x_adv, x])), torch.cat([y, y])))


def test_training_touches_the_network_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("advlab.paths.checkpoints", lambda: tmp_path)
    x = torch.randint(256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Dataset("noise", "train", x, torch.arange(12) % 10, tuple("0123456789"), "n")
    with seeded(0):
        classifier = small_cnn(width=4).eval()
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    options = {"attack": "PGD", "batch_size": 6, "blocks": 1, "width": 4, "progress": False}
    defence, info = trn.trained(classifier, data, images=8, **options)
    assert defence.classifier is classifier and defence.restorer.estimate.classifier is classifier
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items()) and not any(m.training for m in defence.modules())
    assert defence.restorer.network.blocks[0].i6.weight.abs().sum() > 0 and info["config"]["data"]["n"] == 8
    again, found = trn.trained(classifier, data, images=8, **options)
    assert found["cached"] and torch.equal(again(data.images(slice(2))), defence(data.images(slice(2))))
    assert not trn.trained(classifier, data, images=8, **options | {"attack": "BIM"})[1]["cached"]
    same = {"step_size": 1.0 / 255, "milestones": [0.6, 0.85], "augment": False}
    assert trn.trained(classifier, data, images=8, **options, **same)[1]["cached"]  # the defaults, said aloud
    config = trn.trained(classifier, data, images=8, **options, step_size=3 / 255, eps=12 / 255, milestones=[1 / 3, 2 / 3], augment=True)[1]["config"]
    assert config["milestones"] == [1 / 3, 2 / 3] and config["augment"]["function"].startswith("advlab.zoo")
    assert config["step"]["attack"]["step_size"] == 3 / 255


def test_the_papers_attacks():
    found = trn.attacks(EPS)
    assert list(found) == ["PGD", "BIM", "FGSM", "MIM", "FFGSM"]
    assert found["PGD"].keywords == {"eps": EPS, "steps": 10, "step_size": pytest.approx(1 / 255)}
    x, model = torch.full((1, 3, 32, 32), 0.5), small_cnn(width=4).eval()
    for attack in found.values():
        assert (attack(model, x, torch.tensor([0])) - x).abs().max() <= EPS + 1e-6


# --- measures -----------------------------------------------------------------------------------------------------------------------------


def test_radial_spectrum_finds_a_wave():
    across = torch.arange(32) / 32
    wave = torch.cos(2 * torch.pi * 5 * across).expand(2, 1, 32, 32)
    spectrum = trn.radial_spectrum(wave)
    assert len(spectrum) == 17 and spectrum.argmax() == 5 and spectrum[5] > 1e4 * spectrum[[3, 4, 6, 7]].max()
    white = trn.radial_spectrum(torch.randn(200, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert (white - 1).abs().max() < 0.15  # unit variance: unit power at every frequency


def test_spectra_of_double_precision_and_of_images_too_small_for_a_peak():
    assert trn.radial_spectrum(torch.rand(2, 1, 14, 14, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="up to frequency 7 has no peak from 8 on"):
        trn.peaks(trn.radial_spectrum(torch.rand(2, 1, 14, 14)))


def test_peaks_are_grids_and_not_a_smooth_decay():
    decay = 1 / (1 + torch.arange(17.0)) ** 4
    assert decay[8:].max() > 3 * decay[8:].median() and trn.peaks(decay)[0] == []
    grid = decay.clone()
    grid[[10, 16]] *= 5
    found, largest, where = trn.peaks(grid)
    assert found == [10, 16] and where == 10
    assert largest == pytest.approx((2 * grid[10] / (decay[9] + decay[11])).item())
    assert trn.peaks(grid, start=11)[0] == [16]  # compared with its one neighbour
    grid[4] *= 100
    assert trn.peaks(grid, ratio=10.0)[0] == []  # too low, or below 8 cycles
