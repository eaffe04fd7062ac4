"""Classifiers for images of 28 to 64 px: a small CNN, two VGGs and ResNet-18, each with a width.

All are ``nn.Sequential`` with the same named children (``normalize``, ``stem``, ``layer1``, ..., ``pooled``, ``logits``), take
(B, channels, H, W) in [0,1], give logits (B, num_classes), and share the keywords ``num_classes``, ``channels``, ``width``
(channels of the first stage), ``mean`` and ``std`` (one number or one a channel). Weights are drawn from torch's global
generator; `seeded` makes them reproducible.
"""

from collections import OrderedDict

from torch import Tensor, nn

from .layers import Normalize, Pad, Statistic, Units, conv_unit, he_init
from .pretrained import TORCHVISION, torchvision_classifier


def small_cnn(
    num_classes: int = 10, channels: int = 3, width: int = 16, mean: Statistic = 0.5, std: Statistic = 0.25
) -> nn.Sequential:
    """Six 3x3 convolutions of widths w, w, 2w, 2w, 4w, 4w, of stride 2 at the second, third and fifth, with BN and ReLU."""
    w = width
    stages = _stages(channels, [(w,), (w,), (2 * w, 2 * w), (4 * w, 4 * w)], stride=2)
    return _assemble(Normalize(mean, std), stages, [nn.Linear(4 * w, num_classes)])


def vgg11(
    num_classes: int = 10, channels: int = 3, width: int = 64, mean: Statistic = 0.5, std: Statistic = 0.25,
    *, batch_norm: bool = False, dropout: float = 0.5,
) -> nn.Sequential:  # fmt: skip
    """VGG11 (arXiv 1409.1556, A) with a head 8w-8w-num_classes: GRED's classifier and, with ``batch_norm``, its detectors.

    GRED (arXiv 2002.12527) leaves the head open; 512-512 is the usual one for 32 px. The five poolings need multiples of
    32 px: other sizes are padded inside, and the last map is averaged to 1x1.
    """
    w = width
    plan = [(w, "M"), (2 * w, "M"), (4 * w, 4 * w, "M"), (8 * w, 8 * w, "M"), (8 * w, 8 * w, "M")]
    stages = {"pad": Pad(32)} | _stages(channels, plan, bias=True, batch_norm=batch_norm)
    return _assemble(Normalize(mean, std), stages, _vgg_head(8 * w, num_classes, dropout))


def vgg0(
    num_classes: int = 10, channels: int = 3, width: int = 64, mean: Statistic = 0.0, std: Statistic = 1.0,
    *, stages: int = 4, dropout: float = 0.5,
) -> nn.Sequential:  # fmt: skip
    """The small VGG that is f_b in adversarial transformation (arXiv 1911.11219): w M 2w M w w M 2w 2w M, head 8w-8w.

    The paper promises its layers in an appendix that we do not have; these give the published weights' size, and no
    normalisation. ``stages=5``, for 64 px, repeats the last stage. Sizes are padded inside to multiples of 2**stages.
    """
    if stages not in (4, 5):
        raise ValueError(f"vgg0 has 4 stages, or 5 for 64 px; got stages={stages}.")
    w = width
    plan = [(w, "M"), (2 * w, "M"), (w, w, "M"), (2 * w, 2 * w, "M"), (2 * w, 2 * w, "M")][:stages]
    body = {"pad": Pad(2**stages)} | _stages(channels, plan, bias=True)
    return _assemble(Normalize(mean, std), body, _vgg_head(8 * w, num_classes, dropout), cells=2)


def resnet18(
    num_classes: int = 10, channels: int = 3, width: int = 64, mean: Statistic = 0.5, std: Statistic = 0.25
) -> nn.Sequential:
    """ResNet-18 (arXiv 1512.03385) for small images: a 3x3 stem of stride 1 without pooling, stages w, 2w, 4w, 8w."""
    stages, cin = {"stem": conv_unit(channels, width)}, width
    for i in range(4):
        cout = width * 2**i
        stages[f"layer{i + 1}"] = nn.Sequential(BasicBlock(cin, cout, 2 if i else 1), BasicBlock(cout, cout, 1))
        cin = cout
    return _assemble(Normalize(mean, std), stages, [nn.Linear(cin, num_classes)])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a strided 1x1 convolution where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        second = nn.Conv2d(cout, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout)
        self.body = Units(*conv_unit(cin, cout, stride=stride), *second)
        self.shortcut = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = Units(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        self.relu = nn.ReLU()

    def forward(self, z: Tensor) -> Tensor:
        return self.relu(self.body(z) + self.shortcut(z))


CLASSIFIERS = {f.__name__: f for f in (small_cnn, vgg11, vgg0, resnet18)}


def classifier(name: str, **kwargs) -> nn.Sequential:
    """`small_cnn`, `vgg11`, `vgg0`, `resnet18` or one of `torchvision_classifier`'s by name; ValueError for any other."""
    if name in TORCHVISION:
        return torchvision_classifier(name, **kwargs)
    if name not in CLASSIFIERS:
        raise ValueError(f"Unknown classifier {name!r}; choose one of {', '.join([*CLASSIFIERS, *TORCHVISION])}.")
    return CLASSIFIERS[name](**kwargs)


def _stages(channels: int, plan: list[tuple], *, stride: int = 1, **unit) -> dict[str, nn.Module]:
    """``stem``, ``layer1``, ... from widths, "M" standing for 2x2 max pooling; ``stride`` opens every stage but the stem."""
    stages, cin = {}, channels
    for i, widths in enumerate(plan):
        stage = OrderedDict()
        for j, width in enumerate(widths):
            if width == "M":
                stage["pool"] = nn.MaxPool2d(2)
            else:
                stage[str(j)] = conv_unit(cin, width, stride=stride if i and not j else 1, **unit)
                cin = width
        stages[f"layer{i}" if i else "stem"] = nn.Sequential(stage)
    return stages


def _vgg_head(width: int, num_classes: int, dropout: float) -> list[nn.Module]:
    hidden = [nn.Sequential(nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU()) for _ in range(2)]
    return [*hidden, nn.Linear(width, num_classes)]


def _assemble(normalize: Normalize, stages: dict, head: list[nn.Module], *, cells: int = 1) -> nn.Sequential:
    pooled, hidden = nn.Sequential(nn.AdaptiveAvgPool2d(cells), nn.Flatten()), head[:-1]
    stages |= {"pooled": pooled} | {f"fc{i + 1}": layer for i, layer in enumerate(hidden)}
    model = nn.Sequential(OrderedDict(normalize=normalize, **stages, logits=head[-1]))
    he_init(model)
    return model
