"""Reading and checking data sets that come as files, `NAME.npz` or a folder of images; `advlab.data.load` is the way in. Nothing is written."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advlab.paths import UserError

LAZY_BYTES = 4 * 2**30  # decoded images above this many bytes stay encoded until they are asked for
DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSES = {"mnist": DIGITS, "fashion_mnist": FASHION, "cifar10": CIFAR10, "svhn": DIGITS}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


class DataError(UserError):
    """A data set that is unknown, absent, damaged or of the wrong form."""


class LazyImages:
    """Encoded images that look like a (N,3,H,W) uint8 tensor: `len`, `shape`, `device`, and indexing by whatever indexes a tensor's first axis.

    `sources` are paths, or uint8 arrays that hold an encoded file. With `size`, an image that is not yet size x size has its shorter side resized
    to 8/7 of it and the centre cut out; without, all must measure the same, else DataError.
    """

    device = torch.device("cpu")

    def __init__(self, sources: Sequence[Path | np.ndarray], size: int | None = None):
        self.sources, self.size = sources, size
        self.shape = (len(sources), *decode(sources[0], size).shape)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        chosen = torch.arange(len(self))[index]
        out = torch.empty(chosen.numel(), *self.shape[1:], dtype=torch.uint8)

        def fill(start: int) -> None:
            for i, source in enumerate(chosen.flatten()[start : start + 64].tolist(), start):
                image = decode(self.sources[source], self.size)
                if image.shape != out.shape[1:]:
                    raise DataError(f"images differ in size ({image.shape} and {self.shape[1:]}): pass size=, for instance size=224")
                out[i] = image

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(fill, range(0, len(out), 64)))
        return out.reshape(*chosen.shape, *self.shape[1:])

    def take(self, chosen: slice | Tensor) -> "LazyImages":
        return LazyImages([self.sources[i] for i in torch.arange(len(self))[chosen].tolist()], self.size)

    def chunks(self) -> Iterator[bytes]:
        """What identifies the images without decoding them: a file's class, name and length, or the encoded bytes."""
        for s in self.sources:
            yield f"{s.parent.name}/{s.name} {s.stat().st_size}\n".encode() if isinstance(s, Path) else s.tobytes()


def decode(source: Path | np.ndarray, size: int | None) -> Tensor:
    """One encoded image as (3,H,W) uint8; greyscale becomes RGB."""
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        where = source if isinstance(source, Path) else "an image of the archive"
        raise DataError(f"{where} cannot be decoded ({error}): get the file again, or remove it") from error
    if size and image.size != (size, size):
        scale = round(size * 8 / 7) / min(image.size)
        w, h = (max(size, round(scale * side)) for side in image.size)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def _archive(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            archive.files  # noqa: B018  a lone .npy array that is called .npz has none
            yield archive
    except DataError:
        raise
    except (*DAMAGE, AttributeError, TypeError) as error:
        raise DataError(f"{path} is damaged or no .npz archive ({error}): get it again, or remove it") from error


def read_npz(path: Path, split: str, size: int | None, limit: int | None) -> tuple[Tensor | LazyImages, Tensor, tuple[str, ...]]:
    """Images, labels and class names of one split of an archive, checked: keys, dtypes, shapes, offsets, labels."""
    with _archive(path) as archive:
        keys = set(archive.files)
        suffixes = ("_train",) if split == "train" else ("_test", "_val", "")
        image_keys = [kind + suffix for suffix in suffixes for kind in ("x", "encoded") if kind + suffix in keys]
        if not image_keys:
            raise DataError(f"{path} has no {split} split: want x{suffixes[0]} or encoded{suffixes[0]}, found {', '.join(sorted(keys))}")
        kind, _, part = image_keys[0].partition("_")
        suffix = part and f"_{part}"
        if missing := {f"y{suffix}", *[f"offsets{suffix}"] * (kind == "encoded")} - keys:
            raise DataError(f"{path} has {image_keys[0]} but not {' and '.join(sorted(missing))}: add it")
        y = _labels(archive[f"y{suffix}"], f"{path}: y{suffix}")
        names = next((np.atleast_1d(archive[k]) for k in ("class_names", "words", "names_all", "names") if k in keys), CLASSES.get(path.stem))
        if names is None:
            every = [_labels(archive[k], f"{path}: {k}") for k in ("y_train", "y_test", "y_val", "y") if k in keys]
            names = range(1 + max(int(labels.max()) for labels in every))
        pixels = archive[image_keys[0]]
        offsets = archive[f"offsets{suffix}"] if kind == "encoded" else None
    if y.max() >= len(names):
        raise DataError(f"{path}: label {y.max()} in y{suffix} is out of range: there are {len(names)} class names, so 0 to {len(names) - 1}")
    images = _arrays(pixels, size, path) if offsets is None else _encoded(pixels, offsets, path)
    if len(images) != len(y):
        raise DataError(f"{path}: {len(images)} images but {len(y)} labels in the {split} split: they must go one to one")
    images, y = images[:limit], torch.from_numpy(y[:limit].astype(np.int64))
    return images if offsets is None else _eager(LazyImages(images, size)), y, tuple(map(str, names))


def _labels(y: np.ndarray, where: str) -> np.ndarray:
    y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y  # Keras gives CIFAR-10's as (N,1)
    if y.dtype.kind not in "iu" or y.ndim != 1 or not len(y):
        raise DataError(f"{where} must be a vector of integers, not {y.dtype} of shape {y.shape}")
    if y.min() < 0:
        raise DataError(f"{where}: label {y.min()} is out of range: labels start at 0")
    return y


def _arrays(x: np.ndarray, size: int | None, path: Path) -> Tensor:
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)) or 0 in x.shape:
        raise DataError(f"{path}: images must be uint8 of shape (N,H,W) or (N,H,W,C), C 1 or 3, not {x.dtype} of shape {x.shape}")
    if size is not None and x.shape[1:3] != (size, size):
        raise DataError(f"size {size} is not supported: the images of {path} are {x.shape[1]}x{x.shape[2]}; leave size out")
    return torch.from_numpy(x).unsqueeze(1) if x.ndim == 3 else torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def _encoded(pool: np.ndarray, offsets: np.ndarray, path: Path) -> list[np.ndarray]:
    if pool.dtype != np.uint8 or pool.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        found = f"{pool.dtype} {pool.shape} and {offsets.dtype} {offsets.shape}"
        raise DataError(f"{path}: encoded must be a uint8 vector and offsets an integer vector, not {found}")
    edges = offsets.astype(np.int64)
    if edges[0] < 0 or edges[-1] > len(pool) or (np.diff(edges) <= 0).any():
        raise DataError(f"{path}: offsets must rise from 0 to at most {len(pool)}, the length of encoded; they run from {edges[0]} to {edges[-1]}")
    return [pool[a:b] for a, b in pairwise(edges)]


def _eager(images: LazyImages) -> Tensor | LazyImages:
    return images if np.prod(images.shape, dtype=np.int64) > LAZY_BYTES else images[:]


def read_folder(path: Path, split: str, size: int | None, limit: int | None) -> tuple[Tensor | LazyImages, Tensor, tuple[str, ...]]:
    """Images, labels and class names of SPLIT/CLASS/*.jpg. Order is shuffled, always the same way, so that the first n are a fair sample."""
    def classes_of(part: str) -> list[str]:
        return sorted(d.name for d in (path / part).iterdir() if d.is_dir()) if (path / part).is_dir() else []

    part = next((p for p in (("train",) if split == "train" else ("test", "val")) if classes_of(p)), None)
    if part is None:
        raise DataError(f"{path} has no {split} split: want folders {'train' if split == 'train' else 'test (or val)'}/CLASS/ with images in them")
    classes = classes_of("train") or classes_of(part)  # the train split rules: a test folder that lacks a class must not shift the labels
    if unknown := set(classes_of(part)) - set(classes):
        raise DataError(f"{path / part} has classes that train has not: {', '.join(sorted(unknown))}")
    files = [(f, y) for y, c in enumerate(classes) for f in sorted((path / part / c).rglob("*")) if f.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"{path / part} holds no images ({' '.join(SUFFIXES)})")
    files = [files[i] for i in np.random.RandomState(0).permutation(len(files))[:limit]]
    return _eager(LazyImages([f for f, _ in files], size)), torch.tensor([y for _, y in files]), tuple(classes)
