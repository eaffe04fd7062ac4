import copy
import math
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advlab.models import (
    Normalize,
    classifier,
    features,
    folded,
    layer_names,
    pretrained,
    resnet18,
    seeded,
    segnet,
    small_cnn,
    torchvision_classifier,
    unet,
    unpool,
    vgg0,
    vgg11,
)

NARROW = {
    "small_cnn": partial(small_cnn, width=4),
    "vgg11": partial(vgg11, width=4),
    "vgg11_bn": partial(vgg11, width=4, batch_norm=True),
    "vgg0": partial(vgg0, width=4),
    "vgg0_64": partial(vgg0, width=4, stages=5),
    "resnet18": partial(resnet18, width=4),
}
RESTORERS = {
    "dunet": partial(unet, widths=(4, 6, 8, 8)),
    "dae": partial(unet, widths=(4, 6, 8, 8), residual=False, lateral=False),
    "segnet": partial(segnet, width=4),
    "segnet_nearest": partial(segnet, width=4, stages=4, unpool="nearest"),
    "segnet_bilinear": partial(segnet, width=4, stages=5, unpool="bilinear"),
}
ALL = NARROW | RESTORERS


def build(name, **kwargs):
    """A network in eval mode whose BN statistics and final layers are not the trivial ones of a fresh network."""
    with seeded(0):
        model = ALL[name](**kwargs)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    if name == "dunet":
        nn.init.constant_(model.final.weight, 0.05)
    return model.eval()


def images(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_normalize_by_hand_and_back():
    x = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    normalize = Normalize([0.0, 0.25, 0.5], [1.0, 0.5, 0.25])
    assert normalize(x).flatten().tolist() == [0.0, 0.5, 2.0]
    assert torch.equal(normalize.inverse(normalize(x)), x)
    assert torch.equal(Normalize(0.5, 0.25)(x).flatten(), torch.tensor([-2.0, 0.0, 2.0]))
    assert list(normalize.state_dict()) == ["mean", "std"] and not list(normalize.parameters())


@pytest.mark.parametrize("std", [0.0, [0.2, -0.1, 0.2]])
def test_normalize_refuses_a_std_that_is_not_positive(std):
    with pytest.raises(ValueError, match="std must be above 0"):
        Normalize(0.5, std)


def test_grey_images_are_not_broadcast_to_colour():
    with pytest.raises(ValueError, match="3 channels, the images have 1"):
        small_cnn(width=4, mean=[0.5] * 3, std=[0.2] * 3)(images(2, 1, 32, 32))


def resnet18_by_hand(w=64, k=10):
    stem = 3 * w * 9 + 2 * w
    total = stem + 4 * (w * w * 9 + 2 * w)
    for c in (2 * w, 4 * w, 8 * w):
        total += (c // 2) * c * 9 + (c // 2) * c + 3 * (c * c * 9) + 5 * 2 * c  # five BNs: four and the shortcut's
    return total + 8 * w * k + k


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        (lambda: unet(3, (64, 128, 256, 256, 256)), 11.03),
        (unet, 6.90),
        (lambda: unet(3, (32, 64, 128, 128)), 1.73),
        (lambda: segnet(3, 5).encoder, 14.72),
        (lambda: segnet(3, 5).decoder, 14.76),
        (lambda: segnet(3, 3).encoder, 1.74),
        (lambda: segnet(3, 3).decoder, 1.77),
        (vgg0, 0.939),
        (resnet18, resnet18_by_hand() / 1e6),
        # 3x3 convolutions with biases and the head 512-512-10
        (
            vgg11,
            sum(9 * i * o + o for i, o in [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512)] + 3 * [(512, 512)])
            / 1e6
            + (2 * 513 * 512 + 513 * 10) / 1e6,
        ),
    ],
    ids=["dunet", "dunet-s", "dunet-xs", "segnet5-enc", "segnet5-dec", "segnet3-enc", "segnet3-dec", "vgg0", "r18", "vgg11"],
)
def test_parameter_counts_of_the_papers(model, millions):
    assert count(model()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_resnet18_count_is_exact():
    assert count(resnet18(width=8, num_classes=7)) == resnet18_by_hand(8, 7)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 64)])
def test_classifiers_map_any_small_image_to_logits(name, channels, size):
    model = build(name, channels=channels, num_classes=7, mean=[0.4] * channels, std=[0.2] * channels)
    assert isinstance(model[0], Normalize)
    with torch.no_grad():
        logits = model(images(2, channels, size, size))
    assert logits.shape == (2, 7) and logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("name", RESTORERS)
@pytest.mark.parametrize("size", [28, 32, 64, 224, 299])
def test_restorers_keep_every_size(name, size):
    channels = 1 if size == 28 else 3
    model, x = build(name, channels=channels), images(1, channels, size, size)
    with torch.no_grad():
        assert model(x).shape == x.shape
        assert model(x[..., : size - 5]).shape == x[..., : size - 5].shape


@pytest.mark.parametrize("training", [True, False])
def test_dunet_is_the_identity_at_first_and_the_dae_is_not(training):
    x = images(2, 3, 28, 28)
    assert torch.equal(unet(widths=(4, 8)).train(training)(x), x)
    assert not torch.allclose(unet(widths=(4, 8), residual=False, lateral=False).train(training)(x), x, atol=0.1)


def test_unet_scales_and_lateral_widths_are_the_papers():
    net, dae = (unet(3, (2, 4, 8, 8, 8), residual=r, lateral=r) for r in (True, False))  # 1/32 of the paper's widths
    shapes = features(net, images(1, 3, 299, 299), [f"down.{i}" for i in range(5)])
    assert [z.shape[1:] for z in shapes.values()] == [(2, 299, 299), (4, 150, 150), (8, 75, 75), (8, 38, 38), (8, 19, 19)]
    assert [up[0][0].in_channels for up in net.up] == [16, 16, 12, 6]
    assert [up[0][0].in_channels for up in dae.up] == [8, 8, 8, 4]
    assert [len(stage) for stage in [*net.down, *net.up]] == [2, 3, 3, 3, 3, 3, 3, 3, 2]


def test_segnet_shapes_are_the_specs():
    net, x = segnet(3, 3), images(1, 3, 32, 32)
    code, indices = net.encoder(x)
    decoded = features(net, x, [f"decoder.stages.{i}" for i in range(3)])
    assert code.shape[1:] == (256, 4, 4) and [i.shape[1:] for i in indices] == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]
    assert [z.shape[1:] for z in decoded.values()] == [(128, 8, 8), (64, 16, 16), (64, 32, 32)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_unpooling_by_index_restores_maxima_and_zeros_elsewhere(memory_format):
    z = images(2, 3, 6, 8).contiguous(memory_format=memory_format)
    pooled, index = F.max_pool2d(z, 2, return_indices=True)
    back = unpool(pooled, index)
    is_maximum = z == F.interpolate(pooled, scale_factor=2)
    assert torch.equal(back, torch.where(is_maximum, z, 0)) and (back != 0).sum() == pooled.numel()
    assert torch.equal(unpool(pooled, index, "nearest"), F.interpolate(pooled, scale_factor=2))


def test_unpooling_can_be_swapped_on_the_same_weights():
    x, net = images(1, 3, 32, 32), build("segnet")
    other = copy.deepcopy(net)
    other.decoder.unpool = "nearest"
    assert net.state_dict().keys() == segnet(width=4, unpool="nearest").state_dict().keys()
    assert not torch.allclose(net(x), other(x))


def test_the_decoder_alone_can_be_trained():
    net = build("segnet")
    net.encoder.requires_grad_(False)
    net.decoder.train()
    before = copy.deepcopy(net.state_dict())
    (net(images(2, 3, 32, 32)) ** 2).mean().backward()
    trained = {name: p for name, p in net.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for p in trained.values():
            p -= 0.1 * p.grad
    changed = {key.split(".")[0] for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"decoder"} and trained.keys() == {f"decoder.{name}" for name, _ in net.decoder.named_parameters()}


@pytest.mark.parametrize("name", ALL)
def test_eval_mode_treats_images_one_by_one(name):
    model, x = build(name), images(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(x)[2:3], model(x[2:3]), atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_channels_last_gives_the_same_result(name):
    model, x = build(name), images(2, 3, 28, 28)
    with torch.no_grad():
        expected = model(x)
        got = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_input_gradient_and_its_own_gradient_agree_with_finite_differences(name):
    model, x = build(name).double(), images(1, 3, 28, 28, dtype=torch.float64).requires_grad_()
    v = images(1, 3, 28, 28, dtype=torch.float64) - 0.5

    def loss(x):
        return (model(x) ** 2).sum()

    (g,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (hv,) = torch.autograd.grad((g * v).sum(), x)
    h = 1e-7  # small enough that hardly any ReLU or maximum switches between the two points
    with torch.no_grad():
        slope = (loss(x + h * v) - loss(x - h * v)) / (2 * h)
    assert (g * v).sum().item() == pytest.approx(slope.item(), rel=1e-4)
    assert hv.isfinite().all() and hv.abs().max() > 0
    bent = [torch.autograd.grad(loss(x + s * h * v), x)[0] for s in (1, -1)]
    assert torch.allclose(hv, (bent[0] - bent[1]) / (2 * h), rtol=1e-3, atol=1e-3 * hv.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip(name, tmp_path):
    model, x = build(name, mean=[0.1, 0.2, 0.3], std=[0.3, 0.2, 0.1]), images(1, 3, 32, 32)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with seeded(5):
        other = ALL[name](mean=[0.0] * 3, std=[1.0] * 3).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(x), other(x))


def test_dropout_and_unknown_options_of_the_vggs():
    assert [m.p for m in vgg11(width=4, dropout=0.3).modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]
    assert not [m for m in vgg11(width=4).modules() if isinstance(m, nn.BatchNorm2d)]
    with pytest.raises(ValueError, match="stages=3"):
        vgg0(stages=3)


@pytest.mark.parametrize("kwargs", [{"stages": 6}, {"stages": 0}, {"unpool": "magic"}])
def test_segnet_refuses_what_it_has_not(kwargs):
    with pytest.raises(ValueError, match=str(next(iter(kwargs.values())))):
        segnet(**kwargs)


def test_unet_needs_two_scales():
    with pytest.raises(ValueError, match="at least two"):
        unet(widths=(8,))


def test_classifier_by_name():
    assert count(classifier("vgg0", width=4)) == count(vgg0(width=4))
    with pytest.raises(ValueError, match=r"'vgg12'.*vgg11.*resnet50"):
        classifier("vgg12")


def test_seeded_repeats_weights_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    with seeded(3):
        a = small_cnn(width=4)
    with seeded(3):
        b = small_cnn(width=4)
    with seeded(4):
        c = small_cnn(width=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.stem[0][0].weight, b.stem[0][0].weight)
    assert not torch.equal(a.stem[0][0].weight, c.stem[0][0].weight)


def test_layer_names_are_the_documented_ones():
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert layer_names(resnet18(width=4)) == ["stem", *blocks, "pooled", "logits"]
    expected = ["stem", "layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "pooled", "logits"]
    assert layer_names(small_cnn(width=4)) == expected
    vgg = ["stem", "layer1.0", *(f"layer{i}.{j}" for i in (2, 3, 4) for j in (0, 1)), "pooled", "fc1", "fc2", "logits"]
    assert layer_names(vgg11(width=4)) == vgg
    assert layer_names(nn.Sequential(unet(widths=(4, 4)), resnet18(width=4)))[0] == "1.stem"


@pytest.mark.parametrize("name", NARROW)
def test_features_are_what_the_model_computes(name):
    model, x = build(name), images(2, 3, 32, 32).requires_grad_()
    names = layer_names(model)
    found = features(model, x, reversed(names))
    assert list(found) == names[::-1]
    assert torch.equal(found["logits"], model(x)) and torch.equal(found["logits"], model.logits(found[names[-2]]))
    for key, value in found.items():
        assert len(value) == 2 and (key == "logits" or name == "resnet18" or value.min() >= 0), key
    (g,) = torch.autograd.grad(sum(value.sum() for value in found.values()), x)
    assert g.isfinite().all() and g.abs().max() > 0


def test_stage_features_of_resnet_are_its_last_block():
    model, x = build("resnet18"), images(2, 3, 32, 32)
    found = features(model, x, ["layer4", "layer4.1", "pooled"])
    assert found["layer4"].shape == (2, 32, 4, 4) and torch.equal(found["layer4"], found["layer4.1"])
    assert torch.allclose(found["pooled"], found["layer4"].mean((2, 3)), atol=1e-6)


def test_features_always_remove_their_hooks():
    model = build("small_cnn")
    features(model, images(1, 3, 32, 32), ["stem", "logits"])
    with pytest.raises(ValueError, match=r"'layer9'.*stem.*logits"):
        features(model, images(1, 3, 32, 32), ["stem", "layer9"])
    with pytest.raises(RuntimeError):
        features(model, images(1, 5, 32, 32), ["stem", "logits"])
    assert not [m for m in model.modules() if m._forward_hooks]


def no_inplace(model):
    return not [m for m in model.modules() if getattr(m, "inplace", False)]


@pytest.mark.parametrize("name", ALL)
def test_nothing_works_in_place(name):
    assert no_inplace(build(name))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_torchvision_classifiers_behind_the_unit_range(name, tmp_path, monkeypatch):
    from torchvision import models

    monkeypatch.setitem(pretrained.TORCHVISION, "resnet18", pretrained.TORCHVISION["resnet50"])  # quicker than 50 or 152
    options = {"init_weights": False} if name == "inception_v3" else {}
    original = models.get_model(name, weights=None, num_classes=5, **options).eval()
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    model, x = torchvision_classifier(name, tmp_path / "weights.pth", num_classes=5), images(2, 3, 96, 96)
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if name == "resnet18" else ([0.5] * 3, [0.5] * 3)
    with torch.no_grad():
        expected = original((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        assert not model.training and torch.allclose(model(x), expected, atol=1e-4)
        found = features(model, x, layer_names(model))
    assert found["pooled"].shape == (2, original.fc.in_features) and next(iter(found)) == "stem" and no_inplace(model)
    assert list(found)[-3].startswith("layer") and found["logits"].shape == (2, 5)


@pytest.mark.slow
def test_resnet152_by_name_has_its_published_size():
    assert count(classifier("resnet152", weights=None)) / 1e6 == pytest.approx(60.19, abs=0.01)


def test_unusable_weights_are_refused_clearly(tmp_path):
    load = partial(torchvision_classifier, "resnet50")
    with pytest.raises(ValueError, match=r"resnet51.*resnet50"):
        torchvision_classifier("resnet51")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load(tmp_path / "none.pth")
    whole = tmp_path / "other.pth"
    torch.save(small_cnn(width=4).state_dict(), whole)
    with pytest.raises(ValueError, match=r"other\.pth.*do not fit resnet50"):
        load(whole)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[: math.ceil(whole.stat().st_size / 2)])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read"):
        load(cut)
    assert cut.exists() and whole.exists()


def test_no_network_is_reported_with_the_file_to_provide(tmp_path, monkeypatch):
    from urllib.error import URLError

    def offline(*_args, **_kwargs):
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"resnet50.*no route.*weights") as info:
        torchvision_classifier("resnet50")
    assert str(Path(tmp_path) / "checkpoints" / "resnet50-") in str(info.value)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "vgg0"])
def test_folded_batch_norm_gives_the_same_logits_and_input_gradients(name):
    with seeded(0):
        model = classifier(name, width=8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(3):
            model(torch.rand(16, 3, 32, 32))  # moves the running statistics away from 0 and 1
    with pytest.raises(ValueError, match="eval"):
        folded(model)
    twin, before = folded(model.eval()), {k: v.clone() for k, v in model.state_dict().items()}
    grads = []
    for m in (model, twin):
        x = torch.linspace(0, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32).requires_grad_()
        grads.append((m(x), *torch.autograd.grad(m(x).square().sum(), x)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in twin.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("build", [partial(classifier, "small_cnn"), partial(classifier, "resnet18"), unet, partial(segnet, stages=2)])
def test_frozen_units_fold_batch_norm_as_they_go_and_nothing_else_changes(build):
    """With frozen parameters no batch norm runs, and logits and input gradients are those of a plain Sequential; with a hook, in training, or when
    a parameter's gradient is wanted, every layer runs."""
    with seeded(0):
        model = build(width=4) if build is not unet else unet(widths=(4, 8))
        model.double()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.uniform_(-1, 1), m.running_var.uniform_(0.5, 2), nn.init.uniform_(m.weight, 0.5, 2), nn.init.uniform_(m.bias)
        if build is unet:
            nn.init.normal_(model.final.weight)
    model.eval()
    x = torch.linspace(0, 1, 2 * 3 * 32 * 32, dtype=torch.float64).view(2, 3, 32, 32).requires_grad_()
    weights = {n: p for n, p in model.named_parameters()}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    def answer(wanted: bool):
        for p in weights.values():
            p.requires_grad_(wanted)
        with mock.patch.object(F, "batch_norm", wraps=F.batch_norm) as norm:
            out = model(x)
        return norm.call_count, out, *torch.autograd.grad(out.square().sum(), [x, *(weights.values() if wanted else ())], materialize_grads=True)

    all_run, plain, slope, *of_weights = answer(True)
    none_run, out, grad = answer(False)
    assert (all_run, none_run) == (len(norms), 0) and all(g.isfinite().all() for g in of_weights) and any(g.any() for g in of_weights)
    torch.testing.assert_close((out, grad), (plain, slope), rtol=1e-9, atol=1e-9)
    handle = norms[0].register_forward_hook(lambda *_: None)
    assert answer(False)[0] == 1
    handle.remove()
    model.train()
    assert answer(False)[0] == len(norms)
