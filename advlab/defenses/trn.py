"""TRN, the two-stream restoration network (Hong, Hong and Kong, "An eye for an eye", arXiv 2202.01117).

A network of B fusion blocks makes from an image x' and the gradients of a frozen classifier's loss at x' for every label (GMEM) the restored image
that the classifier then sees. The paper gives the block's wiring in prose and no sizes. Chosen here: 3x3 convolutions of width w with bias and
without batch norm, ReLU but for g5 and i6, squeeze-and-excitation with a sixteenth of the channels (at least 4); the last layers start at zero,
so that TRN starts as the identity; the last block has no g5, which nobody would read. Also silent, and chosen: the maps of an image are divided by
their common root mean square; the restored image is clamped before the classifier, not in the pixel loss, which is the mean square, weight 1;
batches hold as many clean as attacked images. The learning rate falls to a tenth every 30 epochs (section 4.1), of how many the paper does not say:
90 at the paper's scale, with crops and flips on CIFAR-10, a choice; shorter runs drop it at 60 and 85 % and see every image as it is."""

import copy
from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab import zoo
from advlab.attacks import bim, core, ffgsm, fgsm, mim, pgd
from advlab.attacks.adaptive import smooth, straight_through
from advlab.gradients import gradient_maps
from advlab.training import load_or_fit

STREAMS = ("both", "image", "gradient")
SCALES = ("rms", "max", "map", "sign", "none")


def attacks(eps: float, *, steps: int = 10, step_size: float | None = None) -> dict:
    """The paper's five attacks, which train and test TRN: 10 steps of eps / 8 (1/255 at 8/255; SVHN's are 3/255 at 12/255) unless said otherwise."""
    pgd_, bim_, mim_ = (partial(f, eps=eps, steps=steps, step_size=eps / 8 if step_size is None else step_size) for f in (pgd, bim, mim))
    return {"PGD": pgd_, "BIM": bim_, "FGSM": partial(fgsm, eps=eps), "MIM": mim_, "FFGSM": partial(ffgsm, eps=eps)}


class GradientMaps(nn.Module):
    """GMEM, eq. 5: images (B, C, H, W) to the classifier's gradient maps for all labels in order (or for the `top` likeliest), (B, n C, H, W).

    scale: what maps are divided by: their image's common root mean square ("rms", which keeps the labels' sizes) or maximum ("max"), their own
    ("map"), or nothing; "sign" keeps signs only. differentiable: whether an attacker's gradient passes through. ValueError for another scale."""

    def __init__(self, classifier: nn.Module, *, scale: str = "rms", top: int | None = None, differentiable: bool = True, chunk: int = 256):
        super().__init__()
        core.check_choice("scale", scale, SCALES)
        self.classifier, self.scale, self.top, self.differentiable, self.chunk = classifier, scale, top, differentiable, chunk

    def forward(self, x: Tensor) -> Tensor:
        through = self.differentiable and torch.is_grad_enabled() and x.requires_grad
        maps = gradient_maps(self.classifier, x, top=self.top, differentiable=through, chunk=self.chunk)
        if self.scale in ("rms", "map"):
            maps = maps / (maps.square().mean((2, 3, 4) if self.scale == "map" else (1, 2, 3, 4), keepdim=True) + 1e-24).sqrt()
        elif self.scale == "max":
            maps = maps / maps.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(1e-12)
        elif self.scale == "sign":
            maps = maps.sign()
        return maps.flatten(1, 2).contiguous(memory_format=torch.channels_last)  # in which small convolutions run half as long


class ChannelAttention(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507): each channel times a number in (0, 1) worked out from all channels' means."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(4, channels // 16)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        return z * self.gate(z)


def _conv(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.ReLU())


def _last(cin: int, cout: int) -> nn.Conv2d:
    layer = nn.Conv2d(cin, cout, 3, padding=1)
    layer.weight.data.zero_(), layer.bias.data.zero_()
    return layer


class FusionBlock(nn.Module):
    """Section 3.2 and Fig. 4: an image (B, C, H, W) and gradient maps (B, M, H, W) to better ones. streams "image" or "gradient" leaves the other
    stream out, as for Table 4; `last` leaves out the refined maps."""

    def __init__(self, channels: int, maps: int, width: int, *, streams: str = "both", last: bool = False):
        super().__init__()
        w, image, gradient = width, streams != "gradient", streams != "image"
        self.i = nn.ModuleList(_conv(channels + k * w, w) for k in range(5 * image))
        if gradient:
            mixed = maps + (3 if image else 2) * w
            self.g1, self.g2, self.attention = _conv(maps, w), _conv(maps + w, w), ChannelAttention(mixed)
            self.g3, self.g4 = _conv(mixed, w), _conv(mixed + w, w)
            self.g5 = None if last else nn.Sequential(_last(mixed + 2 * w, maps), ChannelAttention(maps))
        self.gradient, self.i6 = gradient, _last((channels + 5 * w) * image + w * gradient, channels)

    def forward(self, x: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dense = [x]
        for layer in self.i:
            dense.append(layer(torch.cat(dense, 1)))
        used = dense if len(self.i) else []
        if self.gradient:
            g1 = self.g1(maps)
            early = [maps, g1, self.g2(torch.cat([maps, g1], 1)), *dense[2:3]]  # with i2, where there is an image stream
            mixed = self.attention(torch.cat(early, 1))
            g3 = self.g3(mixed)
            g4 = self.g4(torch.cat([mixed, g3], 1))
            used = [*used, g4]
            maps = maps if self.g5 is None else maps + self.g5(torch.cat([mixed, g3, g4], 1))
        return x + self.i6(torch.cat(used, 1)), maps


class TwoStream(nn.Module):
    """B fusion blocks in a row: image (B, C, H, W) and maps (B, M, H, W; None for the image stream alone) to the restored image, not clamped.
    ValueError for an unknown choice of streams or fewer than one block."""

    def __init__(self, channels: int, maps: int, *, blocks: int = 3, width: int = 64, streams: str = "both"):
        super().__init__()
        core.check_choice("streams", streams, STREAMS)
        core.check_steps(blocks=blocks, width=width)
        self.blocks = nn.ModuleList(FusionBlock(channels, maps, width, streams=streams, last=k == blocks - 1) for k in range(blocks))

    def forward(self, x: Tensor, maps: Tensor | None) -> Tensor:
        for block in self.blocks:
            x, maps = block(x, maps)
        return x


class Restorer(nn.Module):
    """x' (B, C, H, W) in [0, 1] to the restored image, clamped to [0, 1], through a network and its estimate of the gradient maps."""

    def __init__(self, network: TwoStream, estimate: nn.Module):
        super().__init__()
        self.network, self.estimate = network, estimate

    def raw(self, x: Tensor) -> Tensor:  # before the clamp
        return self.network(x, self.estimate(x) if self.network.blocks[0].gradient else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.raw(x).clamp(0, 1)


def build(classifier: nn.Module, *, channels: int, classes: int, blocks: int = 3, width: int = 64, streams: str = "both", scale: str = "rms",
          top: int | None = None) -> nn.Sequential:
    """The defence, children `restorer` and `classifier`, round the classifier given (not a copy of it)."""
    restorer = TwoStream(channels, (top or classes) * channels, blocks=blocks, width=width, streams=streams)
    return nn.Sequential(OrderedDict(restorer=Restorer(restorer, GradientMaps(classifier, scale=scale, top=top)), classifier=classifier))


def matched_width(streams: str, width: int, *, channels: int, classes: int, blocks: int) -> int:
    """The width at which TRN of these streams comes nearest in parameters to the two-stream network of `width`: the control for Table 4."""
    def size(streams: str, width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in TwoStream(channels, classes * channels, blocks=blocks, width=width, streams=streams).parameters())

    wanted = size("both", width)
    return min(range(width, 4 * width + 1), key=lambda w: abs(size(streams, w) - wanted))


def step(model: nn.Sequential, x: Tensor, y: Tensor, generator: torch.Generator, *, attack, weight: float = 1.0):
    """Algorithm 1 and eq. 4 on the batch and its adversarial images: weight * mean square error to the clean image, plus cross-entropy."""
    with torch.autocast(x.device.type, enabled=False):
        x_adv = attack(model.classifier, x, y, generator=generator)
    restored = model.restorer.raw(torch.cat([x_adv, x])).float()
    logits = model.classifier(restored.clamp(0, 1)).float()
    pixel, right = F.mse_loss(restored, torch.cat([x, x])), (logits.detach().argmax(1) == torch.cat([y, y])).float()
    loss = weight * pixel + F.cross_entropy(logits, torch.cat([y, y]))
    return loss, {"pixel": pixel.detach(), "robust_accuracy": right[: len(x)].mean(), "accuracy": right[len(x) :].mean()}


def trained(classifier: nn.Module, data, *, attack: str = "MIM", eps: float = 8 / 255, step_size: float | None = None, images: int = 0,
            epochs: int = 1, batch_size: int = 64, lr: float = 1e-3, milestones=(0.6, 0.85), augment: bool = False, weight: float = 1.0,
            seed: int = 0, progress: bool = True, **options) -> tuple[nn.Sequential, dict]:
    """The defence of a classifier trained on `images` of a Dataset (0: all) with one of `attacks`, and its record (see training.load_or_fit).
    milestones: the shares of the run after which the learning rate falls to a tenth (the paper: every 30 epochs). augment: images are moved as in
    the classifier's own training (zoo.augmentation) before they are attacked. options are those of `build`. ValueError for an unknown attack."""
    known = attacks(eps, step_size=step_size)
    core.check_choice("attack", attack, tuple(known))
    model = partial(build, classifier, channels=data.shape[0], classes=data.num_classes, **options)
    return load_or_fit(f"trn-{data.name}-{attack}-{seed}", model, partial(step, attack=known[attack], weight=weight),
                       data.take(images) if images else data, epochs=epochs, batch_size=batch_size, optimizer="adam", lr=lr, weight_decay=0.0,
                       schedule="milestones", milestones=tuple(milestones), augment=zoo.augmentation(data) if augment else None, seed=seed,
                       train_modules=["restorer.network"], amp=False, progress=progress)


def _twin(defence: nn.Sequential, estimate=None) -> nn.Sequential:
    """A copy that shares parameters and buffers; estimate: another function from images to maps."""
    twin = copy.deepcopy(defence, {id(t): t for t in [*defence.parameters(), *defence.buffers()]})
    if estimate is not None:
        twin.restorer.estimate = nn.Module()
        twin.restorer.estimate.forward = estimate
    return twin


def constant(defence: nn.Sequential) -> nn.Sequential:
    """W-const: the maps are worked out anew at every step, and their derivative is left out: the gradient goes through the image stream."""
    twin = _twin(defence)
    twin.restorer.estimate.differentiable = False
    return twin


def frozen(attack, defence: nn.Sequential, x: Tensor, y: Tensor, **options) -> Tensor:
    """An attack on the defence whose maps stay those of the clean images; `attack` must not drop images (keep="last")."""
    maps = defence.restorer.estimate(x)
    return attack(_twin(defence, lambda _: maps), x, y, **options)


def image_stream(defence: nn.Sequential) -> nn.Sequential:
    """Table 3 read to the letter: besides the maps, what the gradient stream hands to i6 has no derivative either."""
    twin = constant(defence)
    for block in twin.restorer.network.blocks:
        block.g4.register_forward_hook(lambda module, inputs, output: output.detach())
    return twin


def soft_maps(defence: nn.Sequential, temperature: float = 0.05) -> nn.Sequential:
    """W-soft: the maps are exact, and their derivative is that of maps taken with the derivative of softplus in place of ReLU's steps (see
    attacks.adaptive.smooth), so that the attacker sees activations about to flip, to which W-full is blind."""
    exact = constant(defence).restorer.estimate
    soft = GradientMaps(smooth(defence.classifier, temperature), scale=exact.scale, top=exact.top)
    return _twin(defence, lambda x: straight_through(exact(x), soft(x)) if torch.is_grad_enabled() else exact(x))


def radial_spectrum(delta: Tensor) -> Tensor:
    """Mean power of perturbations (B, C, H, W) at each radial frequency 0, 1, ..., H // 2 (cycles an image): a grid shows as a peak."""
    power = torch.fft.fft2(delta).abs().square().mean((0, 1)).flatten() / delta[0, 0].numel()
    down, across = (torch.fft.fftfreq(s, 1 / s, device=delta.device) for s in delta.shape[-2:])
    radius = (down[:, None] ** 2 + across**2).sqrt().round().long().flatten()
    total = torch.zeros(int(radius.max()) + 1, dtype=power.dtype, device=delta.device).index_add(0, radius, power)
    return (total / radius.bincount())[: delta.shape[-2] // 2 + 1]


def peaks(spectrum: Tensor, *, start: int = 8, ratio: float = 2.0) -> tuple[list[int], float, int]:
    """Where a spectrum of `radial_spectrum` shows a grid: the frequencies from `start` on with more than `ratio` times the mean power of their two
    neighbours (the last: of its one neighbour), then the largest such quotient and its frequency. A smooth decay has none. ValueError for a spectrum
    that ends before `start`."""
    if len(spectrum) <= start:
        raise ValueError(f"a spectrum up to frequency {len(spectrum) - 1} has no peak from {start} on; give larger images, or a lower start")
    neighbours = torch.cat([(spectrum[:-2] + spectrum[2:]) / 2, spectrum[-2:-1]])
    quotients = (spectrum[1:] / neighbours.clamp_min(1e-30))[start - 1 :]
    found = (quotients > ratio).nonzero().squeeze(1) + start
    return found.tolist(), quotients.max().item(), int(quotients.argmax()) + start
