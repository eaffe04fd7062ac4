"""The defences that the papers compare themselves with, as restorers (images (B, C, H, W) in [0, 1] to images) or training steps.

Two of TRN's rows have no published weights or need a library that is not here, and are stand-ins. "SR" (Mustafa et al., arXiv 1901.01677: wavelet
denoising, then a deep super-resolution network) is Haar wavelet shrinkage, averaged over shifts, followed by bicubic enlargement and reduction.
"NRP" (Naseer et al., arXiv 2006.04924) is a U-Net trained without labels to undo perturbations that distort a classifier's features; the original
has a larger network and an adversarial critic. Parameters that the papers do not print are the cited originals' or stated at the class.

Jpeg and BitDepth have no useful gradient: attack them by `bpda`. RandomResizePad draws at random: attack it by `eot`."""

import io
from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab import training
from advlab.attacks import core, pgd
from advlab.models import features, unet


class Jpeg(nn.Module):
    """JPEG at `quality` 1 to 100 (Guo et al., arXiv 1711.00117, used 75; so does this), one or three channels, on the CPU; carries no gradient."""

    def __init__(self, quality: int = 75):
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEG's quality lies between 1 and 100, got {quality}")
        self.quality = quality

    def forward(self, x: Tensor) -> Tensor:
        import numpy as np
        from PIL import Image

        out = []
        for image in (x.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).squeeze(3).cpu().numpy():
            Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=self.quality)
            out.append(torch.from_numpy(np.array(Image.open(file))))
        return torch.stack(out).view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2).to(x) / 255


class BitDepth(nn.Module):
    """Pixels rounded to 2^bits levels (Xu et al., arXiv 1704.01155), whose gradient is zero."""

    def __init__(self, bits: int = 5):
        super().__init__()
        core.check_steps(bits=bits)
        self.levels = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.levels).round() / self.levels


class Median(nn.Module):
    """The median of size x size windows, edges reflected (Xu et al., arXiv 1704.01155, who use 2 x 2): the lower median where size is even."""

    def __init__(self, size: int = 2):
        super().__init__()
        core.check_steps(size=size)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        before, after = (self.size - 1) // 2, self.size // 2
        windows = F.pad(x, (before, after, before, after), mode="reflect").unfold(2, self.size, 1).unfold(3, self.size, 1)
        return windows.flatten(4).median(4).values


def feature_squeezing(bits: int = 5, size: int = 2) -> nn.Sequential:
    """Both squeezers of Xu et al., one after the other, as a purifier (the original is a detector)."""
    return nn.Sequential(BitDepth(bits), Median(size))


class RandomResizePad(nn.Module):
    """Random resizing and padding (Xie et al., arXiv 1711.01991): each image, bilinearly resized to a side from H to `side` - 1, lies at a random
    place on zeros of `side` x `side` (default 9/8 H, about the original's 331/299), which is what comes out. Draws come from an own generator.
    ValueError for images that are not square, or not smaller than `side`."""

    def __init__(self, side: int | None = None, seed: int = 0):
        super().__init__()
        self.side, self.generator = side, torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        b, h, side = len(x), x.shape[2], self.side or x.shape[2] * 9 // 8
        if x.shape[3] != h or side <= h:
            raise ValueError(f"random resize and pad takes square images smaller than {side} pixels, got {tuple(x.shape[2:])}")
        to = torch.randint(h, side, (b,), generator=self.generator)
        at = (torch.rand(2, b, generator=self.generator) * (side - to + 1)).floor()  # its upper left corner
        theta = torch.diag_embed((side / to)[:, None].expand(b, 2))  # from canvas to image, both in [-1, 1]
        theta = torch.cat([theta, ((side - to - 2 * at) / to).flip(0).T[:, :, None]], 2)
        grid = F.affine_grid(theta.to(x), [b, x.shape[1], side, side], align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class WaveletSR(nn.Module):
    """Stand-in for SR (above): Haar detail coefficients of 2 x 2 blocks shrunk by `threshold` (for pixels in [0, 1]; 0.04 = 10/255 is the original's
    sigma), averaged over the four shifts, then enlarged twice by cubic interpolation and reduced again with antialiasing; differentiable."""

    def __init__(self, threshold: float = 0.04):
        super().__init__()
        if threshold < 0:
            raise ValueError(f"the threshold must not be negative, got {threshold}")
        self.threshold = threshold
        a = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
        self.register_buffer("haar", torch.einsum("ij,kl->ikjl", a, a).reshape(4, 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), flat = x.shape, F.pad(x, (1, 1, 1, 1), mode="reflect").reshape(-1, 1, x.shape[2] + 2, x.shape[3] + 2)
        haar = self.haar.to(x)  # like its siblings it needs no move to the device of the images
        z = F.conv2d(flat, haar)  # every shift at once
        z = torch.cat([z[:, :1], F.softshrink(z[:, 1:], self.threshold)], 1)
        smooth = (F.conv_transpose2d(z, haar) / 4)[:, :, 1:-1, 1:-1].reshape(b, c, h, w)
        large = F.interpolate(smooth, scale_factor=2, mode="bicubic", align_corners=False)
        return F.interpolate(large, size=(h, w), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def purifier(model: nn.Module, *, channels: int, widths=(8, 16, 32)) -> nn.Sequential:
    """NRP's stand-in in front of a classifier, children `restorer` and `classifier`."""
    return nn.Sequential(OrderedDict(restorer=nn.Sequential(unet(channels=channels, widths=widths), nn.Hardtanh(0, 1)), classifier=model))


def nrp_step(model, x, y, generator, *, eps: float, layer: str = "layer2", steps: int = 10, weight: float = 1.0):
    """Self-supervised: x_adv, within eps of x, moves the features at `layer` as far as it can; the restorer learns to bring back features (mean
    absolute error) and, by `weight`, pixels (mean square error). No label is used."""
    def look(v: Tensor) -> Tensor:
        return features(model.classifier, v, [layer])[layer].flatten(1).float()

    with torch.no_grad():
        clean = look(x)
    x_adv = pgd(look, x, torch.zeros_like(y), eps=eps, steps=steps, loss=lambda z, _: (z - clean).square().mean(1), generator=generator)
    restored = model.restorer[0](x_adv).float()
    pixel, feature = F.mse_loss(restored, x), F.l1_loss(look(restored.clamp(0, 1)), clean)
    return weight * pixel + feature, {"pixel": pixel.detach(), "feature": feature.detach()}


def nrp(target: nn.Module, data, *, eps: float, widths=(8, 16, 32), **settings) -> tuple[nn.Sequential, dict]:
    """The NRP-like purifier of a classifier, trained on a Dataset; settings are those of training.load_or_fit."""
    model = partial(purifier, target, channels=data.shape[0], widths=widths)
    settings = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "train_modules": ["restorer"]} | settings
    return training.load_or_fit(f"nrp-{data.name}", model, partial(nrp_step, eps=eps), data, **settings)


def attack_at(model, x, y, generator, *, attack):
    """Adversarial training with any attack: cross-entropy on attack(model, x, y) (Madry et al., arXiv 1706.06083)."""
    with training.evaluating(model), torch.autocast(x.device.type, enabled=False):
        x_adv = attack(model, x, y, generator=generator)
    return training.on_adversarial(model, x_adv, y)


def tuned(name: str, model: nn.Module, step, data, **settings) -> tuple[nn.Module, dict]:
    """A copy of a trained classifier, trained on with another step (label smoothing, adversarial training): a short cut to training anew."""
    return training.load_or_fit(f"{name}-{data.name}", model, step, data, **{"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-4} | settings)
