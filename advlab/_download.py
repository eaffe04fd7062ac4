"""Finding data sets, and fetching the public ones.

A public set is fetched by torchvision, which verifies checksums, and written as `NAME.npz`, so that there is one way to read. Nothing here changes
a file it did not make; a new one appears whole or not at all.
"""

import os
import shutil
import socket
import tarfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from advlab import paths
from advlab._archives import DAMAGE, DataError

IDX = [f"{s}-{part}-ubyte.gz" for s in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]
PUBLIC = {  # torchvision's class, and the publisher's files at the places where torchvision keeps them
    "mnist": ("MNIST", [f"MNIST/raw/{f}" for f in IDX]),
    "fashion_mnist": ("FashionMNIST", [f"FashionMNIST/raw/{f}" for f in IDX]),
    "cifar10": ("CIFAR10", ["cifar-10-python.tar.gz"]),
    "svhn": ("SVHN", ["train_32x32.mat", "test_32x32.mat"]),
    "tiny_imagenet": ("", ["tiny-imagenet-200.zip"]),  # not in torchvision
}
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def folders_of(root: str | os.PathLike | None) -> list[Path]:
    return [Path(root).expanduser()] if root else paths.archives()


def find(name: str, root: str | os.PathLike | None = None) -> Path | None:
    """Where the archive or folder of `name`, which may be a path, lies; None for skimage10 and for a public set still to be fetched. DataError for
    a set that nobody knows."""
    if os.sep in name or name.startswith("~"):
        if not (path := Path(name).expanduser()).exists():
            raise DataError(f"no data set at {path}: give an existing .npz archive or image folder")
        return path
    folders = folders_of(root)
    for folder in folders if name != "skimage10" else ():
        if (archive := folder / f"{name}.npz").is_file():
            return archive
        if any((folder / name / split).is_dir() for split in ("train", "val", "test")):
            return folder / name
    if name in PUBLIC or name == "skimage10":
        return None
    known = {"skimage10", *PUBLIC, *(path.stem for folder in folders for path in folder.glob("*.npz"))}
    where = " or ".join(map(str, folders))
    raise DataError(f"unknown data set {name!r}: known are {', '.join(sorted(known))}; or put {name}.npz or a folder {name} into {where}")


def fetch(name: str, root: str | os.PathLike | None = None, *, download: bool = True) -> Path:
    """Write NAME.npz into `root` (default data/raw), from the publisher's files where a folder has them, else from the network."""
    folders, (kind, wanted) = folders_of(root), PUBLIC[name]
    target = folders[-1]
    advice = f"put {name}.npz, or the publisher's {' and '.join(wanted)}, into {target}"
    found = {file: folder / file for folder in reversed(folders) for file in wanted if (folder / file).is_file()}
    if not download and len(found) < len(wanted):
        raise DataError(f"{name} is not in {' or '.join(map(str, folders))} and download is off: {advice}")
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)  # torchvision sets none: a silent network would hang for ever
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{name}-", dir=target) as scratch:
            for file, path in found.items():
                (Path(scratch) / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, Path(scratch) / file)
            arrays = _torchvision(kind, scratch) if kind else _tiny_imagenet(scratch)
            np.savez(f"{scratch}/{name}.npz", **arrays)
            os.replace(f"{scratch}/{name}.npz", target / f"{name}.npz")
    except (*DAMAGE, tarfile.TarError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name} could not be downloaded ({type(error).__name__}: {reason}): {advice}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return target / f"{name}.npz"


def _torchvision(kind: str, folder: str) -> dict[str, np.ndarray]:
    from torchvision import datasets

    arrays = {}
    for split in ("train", "test"):
        which = {"split": split} if kind == "SVHN" else {"train": split == "train"}
        data = getattr(datasets, kind)(folder, download=True, **which)
        arrays[f"x_{split}"] = np.moveaxis(data.data, 1, -1) if kind == "SVHN" else np.asarray(data.data)
        arrays[f"y_{split}"] = np.asarray(data.labels if kind == "SVHN" else data.targets, np.uint8)
    return arrays


def _tiny_imagenet(folder: str) -> dict[str, np.ndarray]:
    """The JPEG files as distributed, behind offsets; labels are positions among the sorted WordNet ids, the validation set is "val"."""
    from torchvision.datasets.utils import download_url

    download_url(TINY_URL, folder, "tiny-imagenet-200.zip", TINY_MD5)
    with zipfile.ZipFile(f"{folder}/tiny-imagenet-200.zip") as archive:
        base = "tiny-imagenet-200/"
        lines = {f: archive.read(base + f).decode().splitlines() for f in ("wnids.txt", "words.txt", "val/val_annotations.txt")}
        wnids, words = sorted(lines["wnids.txt"]), dict(line.split("\t", 1) for line in lines["words.txt"])
        label = {wnid: i for i, wnid in enumerate(wnids)}
        train = [f for f in archive.namelist() if f.startswith(f"{base}train/") and f.endswith(".JPEG")]
        train = [train[i] for i in np.random.RandomState(0).permutation(len(train))]
        val = [line.split("\t")[:2] for line in lines["val/val_annotations.txt"]]
        pairs = {"train": [(f, label[f.split("/")[2]]) for f in train], "val": [(f"{base}val/images/{f}", label[w]) for f, w in val]}
        arrays = {"words": np.array([words[w] for w in wnids])}
        for split, rows in pairs.items():
            blobs = [archive.read(f) for f, _ in rows]
            arrays[f"encoded_{split}"] = np.frombuffer(b"".join(blobs), np.uint8)
            arrays[f"offsets_{split}"] = np.cumsum([0, *map(len, blobs)])
            arrays[f"y_{split}"] = np.array([y for _, y in rows], np.uint8)
    return arrays
