"""Building blocks that the networks share, and named layers of any network by forward hooks.

ReLUs are never in place: double backward and feature hooks must see what the layer before them gave out. The exception is torchvision's Inception v3,
whose units call a function in place: its stages can be read, a batch norm inside them cannot, and `attacks.adaptive.smooth` finds no ReLU there.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Statistic = float | Sequence[float]
_LISTED = re.compile(r"(^|\.)(stem|layer\d+\.\d+|pooled|fc\d+|logits)$")


class Normalize(nn.Module):
    """(x - mean) / std for images x (..., C, H, W) in [0,1]; ``mean`` and ``std`` are one number or one for each channel.

    They are buffers, so that a checkpoint carries its normalisation and eps keeps its meaning in pixels. ValueError when
    a std is not above 0, or when an image's channels do not match (broadcasting would turn grey into colour unnoticed).
    """

    def __init__(self, mean: Statistic = 0.5, std: Statistic = 0.25):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1))
        if not (torch.tensor(std, device="cpu") > 0).all():
            raise ValueError(f"Normalize: std must be above 0 in every channel, got {std}.")

    def forward(self, x: Tensor) -> Tensor:
        channels = max(len(self.mean), len(self.std))
        if channels not in (1, x.shape[-3]):
            raise ValueError(f"Normalize has {channels} channels, the images have {x.shape[-3]} (shape {tuple(x.shape)}).")
        return (x - self.mean) / self.std

    def inverse(self, z: Tensor) -> Tensor:
        return z * self.std + self.mean


class Pad(nn.Module):
    """Centres images (B,C,H,W) in the smallest ones whose sides are multiples of ``multiple``; ``mode`` as in `F.pad`.

    The default fills with 0, which after Normalize is the mean colour.
    """

    def __init__(self, multiple: int, mode: str = "constant"):
        super().__init__()
        self.multiple, self.mode = multiple, mode

    def forward(self, z: Tensor) -> Tensor:
        rows, columns = -z.shape[-2] % self.multiple, -z.shape[-1] % self.multiple
        return F.pad(z, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), self.mode)


class Units(nn.Sequential):
    """A Sequential that computes a convolution and the batch norm behind it as one convolution where that is the same up to rounding: on the CPU, in
    eval mode, when no gradient of their parameters is wanted and nobody hooks either. An attack then takes 0.66 to 0.81 of the time (64 images on one
    core: HGD's denoiser, SegNet, small CNN). A GPU would only have more and smaller kernels to launch."""

    def forward(self, z: Tensor) -> Tensor:
        done = None
        for module, behind in zip_longest(self, list(self)[1:]):
            if module is done:
                continue
            if type(module) is nn.Conv2d and type(behind) is nn.BatchNorm2d and _frozen(module, behind, z):
                scale = behind.weight * (behind.running_var + behind.eps).rsqrt()
                shift = behind.bias - behind.running_mean * scale
                z = module._conv_forward(z, module.weight * scale.view(-1, 1, 1, 1), shift if module.bias is None else shift + module.bias * scale)
                done = behind
            else:
                z = module(z)
        return z


def _frozen(convolution: nn.Conv2d, norm: nn.BatchNorm2d, z: Tensor) -> bool:
    if z.device.type != "cpu" or norm.training or not norm.affine or not norm.track_running_stats:
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for m in (convolution, norm) for p in m.parameters()):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in (convolution, norm))


def conv_unit(cin: int, cout: int, *, stride: int = 1, bias: bool = False, batch_norm: bool = True) -> nn.Sequential:
    """3x3 convolution with padding 1, batch normalisation, ReLU."""
    norm = [nn.BatchNorm2d(cout)] if batch_norm else []
    return Units(nn.Conv2d(cin, cout, 3, stride, 1, bias=bias), *norm, nn.ReLU())


def conv_units(cin: int, widths: Sequence[int], *, stride: int = 1, **unit) -> nn.Sequential:
    """Conv units in a row; the first takes the stride."""
    return nn.Sequential(
        *(conv_unit(c, w, stride=1 if i else stride, **unit) for i, (c, w) in enumerate(zip([cin, *widths], widths)))
    )


def he_init(model: nn.Module) -> None:
    """He et al.'s normal initialisation (arXiv 1502.01852) of every convolution, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Networks built inside draw their weights from ``seed``; torch's global generator is afterwards as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPUs
        yield


def layer_names(model: nn.Module) -> list[str]:
    """The layers worth comparing, in forward order, each after its activation and none twice.

    Every classifier here has ``stem``, ``layer1.0`` (stage 1, first unit or block), ..., ``pooled``, for the VGGs ``fc1``
    and ``fc2``, and ``logits``; inside a larger model the names carry its prefix.
    """
    return [name for name, _ in model.named_modules() if _LISTED.search(name)]


def features(model: nn.Module, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Outputs of the named layers in one forward pass on x (B,C,H,W), in the order of ``names``, differentiable.

    Any submodule's name will do: those of `layer_names`, or a whole stage such as ``layer4``. The hooks are removed
    whatever happens. ValueError for an unknown name.
    """
    names, modules, outputs = list(names), dict(model.named_modules()), {}
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"No layer named {', '.join(map(repr, unknown))}; known: {', '.join(layer_names(model))}.")

    def keep(name: str):
        return lambda _module, _inputs, output: outputs.update({name: output})

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: outputs[name] for name in names}


def folded(model: nn.Module) -> nn.Module:
    """A copy for attacks on a frozen model: each batch norm that directly follows a convolution is folded into it, in eval mode.

    The logits are the same up to rounding and a pass is cheaper (the README's benchmark says by how much). ValueError in training mode, where
    batch norm does not use the statistics that would be folded.
    """
    if any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        raise ValueError("folding uses batch norm's running statistics; call model.eval() first.")
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for (name, first), (after, second) in pairwise(list(parent.named_children())):
            if isinstance(parent, nn.Sequential) and isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(first, second))
                setattr(parent, after, nn.Identity())
    return twin
