"""U-Net and SegNet, the image-to-image networks of HGD and S2S: (B,C,H,W) in [0,1] -> the same shape, without a clamp.

Both normalise, work in normalised space as the papers' code does, and return pixels, so that a restorer and a classifier
chain freely. Any size from 28 to 299 px goes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Normalize, Pad, Statistic, conv_units, he_init


class UNet(nn.Module):
    """HGD's denoiser (arXiv 1712.02976), one scale for each of ``widths``: 2 conv units at the first, 3 at the others.

    DUNET predicts the noise, starts as the identity (its last layer is zero) and joins encoder and decoder; the DAE is
    ``residual=False, lateral=False``. The paper's 299 px network has widths (64, 128, 256, 256, 256), right for 64 px too;
    the default, one scale less, is our choice for 28-32 px. ValueError for fewer than two scales.
    """

    def __init__(
        self, channels: int = 3, widths: Sequence[int] = (64, 128, 256, 256), *, residual: bool = True,
        lateral: bool = True, mean: Statistic = 0.5, std: Statistic = 0.25,
    ):  # fmt: skip
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"A U-Net needs at least two widths, one for each scale; got {tuple(widths)}.")
        self.residual, self.lateral, self.normalize = residual, lateral, Normalize(mean, std)
        self.down, self.up, cin = nn.ModuleList(), nn.ModuleList(), channels
        for i, width in enumerate(widths):
            self.down.append(conv_units(cin, [width] * (3 if i else 2), stride=2 if i else 1))
            cin = width
        for i, width in list(enumerate(widths[:-1]))[::-1]:
            self.up.append(conv_units(cin + width * lateral, [width] * (3 if i else 2)))
            cin = width
        self.final = nn.Conv2d(cin, channels, 1, bias=False)
        he_init(self)
        if residual:
            nn.init.zeros_(self.final.weight)

    def forward(self, x: Tensor) -> Tensor:
        z, laterals = self.normalize(x), []
        for down in self.down:
            z = down(z)
            laterals.append(z)
        for up, lateral in zip(self.up, laterals[-2::-1]):
            # To the stored size, not by a factor of 2: an odd size was halved with rounding up.
            z = F.interpolate(z, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            z = up(torch.cat([z, lateral], dim=1) if self.lateral else z)
        z = self.final(z)
        return x + z * self.normalize.std if self.residual else self.normalize.inverse(z)


class SegNet(nn.Module):
    """S2S's autoencoder (arXiv 1803.07994; layers of SegNet, arXiv 1511.00561), stage widths w, 2w, 4w, 8w, 8w.

    ``stages``: 5 in the paper; our choice is 3 for 28-32 px and 4 for 64 px. ``unpool``: "indices" puts each value back where
    the pooling found it, "nearest" and "bilinear" carry no position across. ``encoder`` and ``decoder`` can be frozen and
    trained apart. Sizes that 2**stages does not divide are reflected at the borders and cropped. ValueError for other
    ``stages`` or ``unpool``.
    """

    def __init__(
        self, channels: int = 3, stages: int = 3, width: int = 64, unpool: str = "indices",
        *, mean: Statistic = 0.5, std: Statistic = 0.25,
    ):  # fmt: skip
        super().__init__()
        if stages not in range(1, 6):
            raise ValueError(f"SegNet has 1 to 5 stages, got {stages}.")
        widths, units = [width * m for m in (1, 2, 4, 8, 8)[:stages]], (2, 2, 3, 3, 3)[:stages]
        self.normalize, self.pad = Normalize(mean, std), Pad(2**stages, "reflect")
        self.encoder, self.decoder = Encoder(channels, widths, units), Decoder(channels, widths, units, unpool)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), z = x.shape[-2:], self.pad(self.normalize(x))
        top, left = (z.shape[-2] - height) // 2, (z.shape[-1] - width) // 2
        z = self.decoder(*self.encoder(z))
        return self.normalize.inverse(z[..., top : top + height, left : left + width])


class Encoder(nn.Module):
    """Stages of conv units, each ended by 2x2 max pooling: (B,C,H,W) -> (code, places of the maxima in every stage)."""

    def __init__(self, channels: int, widths: Sequence[int], units: Sequence[int]):
        super().__init__()
        stages = (conv_units(c, [w] * n, bias=True) for c, w, n in zip([channels, *widths], widths, units))
        self.stages, self.pool = nn.ModuleList(stages), nn.MaxPool2d(2, return_indices=True)

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        indices = []
        for stage in self.stages:
            z, index = self.pool(stage(z))
            indices.append(index)
        return z, indices


class Decoder(nn.Module):
    """The encoder's mirror image, ended by a linear 1x1 convolution; ``unpool`` may be changed later, no weight depends on it."""

    def __init__(self, channels: int, widths: Sequence[int], units: Sequence[int], unpool: str):
        super().__init__()
        if unpool not in ("indices", "nearest", "bilinear"):
            raise ValueError(f"Unknown unpool {unpool!r}; choose indices, nearest or bilinear.")
        self.unpool = unpool
        layout = list(zip(widths, units, [widths[0], *widths]))[::-1]
        self.stages = nn.ModuleList(conv_units(w, [w] * (n - 1) + [cout], bias=True) for w, n, cout in layout)
        self.final = nn.Conv2d(widths[0], channels, 1)

    def forward(self, z: Tensor, indices: list[Tensor]) -> Tensor:
        for stage, index in zip(self.stages, reversed(indices)):
            z = stage(unpool(z, index, self.unpool))
        return self.final(z)


def unpool(z: Tensor, index: Tensor, mode: str = "indices") -> Tensor:
    """Doubles the sides of z (B,C,H,W): values at the ``index`` of a 2x2 max pooling and zeros, or interpolation."""
    if mode != "indices":
        return F.interpolate(z, scale_factor=2, mode=mode)
    batch, channels, height, width = z.shape
    # A scatter and not max_unpool2d, which refuses to run on GPUs under deterministic algorithms.
    flat = z.new_zeros(batch, channels, 4 * height * width).scatter(-1, index.flatten(2), z.flatten(2))
    return flat.view(batch, channels, 2 * height, 2 * width)


unet, segnet = UNet, SegNet
