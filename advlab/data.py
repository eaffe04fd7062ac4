"""Named data sets as uint8 tensors, and batches that are slices of them: no DataLoader, no worker processes, nothing decoded twice."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from advlab import _archives, _download, _skimage10
from advlab._archives import DataError, LazyImages
from advlab._download import find

__all__ = ["DataError", "Dataset", "LazyImages", "batches", "find", "load", "random_crop", "random_flip"]


@dataclass(frozen=True)
class Dataset:
    """Images `x` (N,C,H,W) uint8, a tensor or LazyImages, labels `y` (N,) int64, class names, and a SHA-256 of pixels and labels (of the
    encoded bytes, or of file names and lengths, where the pixels stay encoded)."""

    name: str
    split: str
    x: Tensor | LazyImages
    y: Tensor
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.x.shape[1:])

    def images(self, index: int | slice | Tensor = slice(None), device: torch.device | str | None = None) -> Tensor:
        """Images as floats in [0,1]: (C,H,W) for an integer index, else (n,C,H,W)."""
        return _unit(self.x[index].to(device=device))

    def take(self, n: int) -> "Dataset":
        """The first `n` images, with a digest of their own."""
        return self._part(slice(n))

    def first_classes(self, k: int, limit: int | None = None) -> "Dataset":
        """The images of the first `k` classes, at most the first `limit` of them, with a digest of their own. DataError where there are fewer
        classes or none of their images."""
        chosen = (self.y < k).nonzero().squeeze(1)[:limit]
        if k > self.num_classes or not len(chosen):
            raise DataError(f"{self.name} has {self.num_classes} classes, {len(self.y.unique())} of them in its {self.split} split: no first {k}")
        return replace(self._part(chosen), classes=self.classes[:k])

    def _part(self, chosen: slice | Tensor) -> "Dataset":
        x = self.x.take(chosen) if isinstance(self.x, LazyImages) else self.x[chosen]
        return replace(self, x=x, y=self.y[chosen], digest=_digest(x, self.y[chosen]))

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel in units of [0,1], exact, over every image."""
        counts = torch.zeros(self.shape[0], 256, dtype=torch.float64)
        for start in range(0, len(self), 1000):
            for channel, pixels in enumerate(self.x[start : start + 1000].unbind(1)):
                counts[channel] += torch.bincount(pixels.flatten(), minlength=256).cpu()
        weights, levels = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
        mean = (weights * levels).sum(1)
        return mean.tolist(), ((weights * levels**2).sum(1) - mean**2).clamp(min=0).sqrt().tolist()


def load(name: str | os.PathLike, split: str = "train", *, size: int | None = None, limit: int | None = None, classes: int | None = None,
         root: str | os.PathLike | None = None, download: bool = True) -> Dataset:
    """One split, "train" or "test", of a data set.

    `name` is `skimage10` (made on the spot; `size` 32, the default, or 64), a public set (`mnist`, `fashion_mnist`, `cifar10`, `svhn`,
    `tiny_imagenet`: downloaded into data/raw, checksums verified, when it is not there and `download` allows), the name of an archive NAME.npz or of
    an image folder in `root` (default `$ADVLAB_DATA`, then data/raw), or a path to either. data/README.md describes the forms. `size` resizes
    encoded images and image files to size x size; arrays come as they are. `classes` keeps the first so many classes, and `limit` the first so many
    of the images. Images that would take more than 4 GiB decoded stay encoded (LazyImages). Raises DataError, with what to do, for anything unknown,
    absent, damaged or of the wrong form."""
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}: it is 'train' or 'test'")
    for key, value in {"size": size, "limit": limit, "classes": classes}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise DataError(f"{key} must be a positive integer, not {value!r}")
    name = os.fspath(name)
    if name == "skimage10":
        if (size or 32) not in _skimage10.SIZES:
            raise DataError(f"size {size} is not supported: skimage10 comes in sizes {' and '.join(map(str, _skimage10.SIZES))}")
        images, labels = _skimage10.generate(split, size or 32, None if classes else limit)
        x, y = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
        names = tuple(_skimage10.PHOTOGRAPHS)
    else:
        path = find(name, root) or _download.fetch(name, root, download=download)
        read = _archives.read_folder if path.is_dir() else _archives.read_npz
        x, y, names = read(path, split, size, None if classes else limit)
    found = Dataset(Path(name).stem, split, x, y, names, _digest(x, y))
    return found.first_classes(classes, limit) if classes else found


def batches(x: Tensor | LazyImages, y: Tensor, batch_size: int, *, shuffle: bool = False, generator: Generator | None = None,
            augment: Callable[..., Tensor] | None = None, device: torch.device | str | None = None,
            drop_last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: pairs of images (B,C,H,W), floats in [0,1], and labels (B,), on `device` (default: where x is). Images are sliced and moved as
    they are, uint8 as a rule; `augment(images, generator=generator)`, such as `partial(random_crop, pad=4)`, works on the moved batch. `generator`
    determines the epoch; without it, a fresh one is seeded by the operating system, and the global one is left alone. `drop_last` leaves out a
    last batch that is not full. ValueError for unequal lengths."""
    if len(x) != len(y) or batch_size < 1:
        raise ValueError(f"batches need one label per image and batch_size of 1 or more, not {len(x)} images, {len(y)} labels, {batch_size}")
    generator = _generator(generator) if shuffle or augment else None
    order = torch.randperm(len(y), generator=generator, device=generator.device) if shuffle else None

    def batch(start: int) -> tuple[Tensor, Tensor]:
        index = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        images, labels = (t[index if order is None else index.to(t.device)].to(device=device) for t in (x, y))
        return _unit(augment(images, generator=generator) if augment else images), labels

    return map(batch, range(0, len(y) - (batch_size - 1) * drop_last, batch_size))


def random_crop(x: Tensor, pad: int, generator: Generator | None = None) -> Tensor:
    """Each image (B,C,H,W) shifted by up to `pad` pixels either way in both directions, zeros moving in (arXiv 1512.03385, section 4.2)."""
    generator, (b, c, h, w) = _generator(generator), x.shape
    shift = torch.randint(2 * pad + 1, (2, b, 1), generator=generator, device=generator.device).to(x.device)
    rows, columns = shift[0] + torch.arange(h, device=x.device), shift[1] + torch.arange(w, device=x.device)
    image, channel = torch.arange(b, device=x.device).view(b, 1, 1, 1), torch.arange(c, device=x.device).view(1, c, 1, 1)
    return F.pad(x, (pad,) * 4)[image, channel, rows.view(b, 1, h, 1), columns.view(b, 1, 1, w)]


def random_flip(x: Tensor, generator: Generator | None = None) -> Tensor:
    """Each image (B,C,H,W) mirrored left to right with probability 1/2."""
    generator = _generator(generator)
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=generator.device).to(x.device) < 0.5
    return torch.where(flip, x.flip(-1), x)


def _generator(generator: Generator | None) -> Generator:
    if generator is None:
        generator = Generator()
        generator.seed()
    return generator


def _unit(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float().div_(255)


def _digest(x: Tensor | LazyImages, y: Tensor) -> str:
    digest = hashlib.sha256()
    for chunk in x.chunks() if isinstance(x, LazyImages) else [x.contiguous().numpy()]:
        digest.update(chunk)
    digest.update(y.numpy())
    return digest.hexdigest()
