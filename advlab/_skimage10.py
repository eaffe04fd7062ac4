"""The embedded data set: crops of ten photographs that ship inside scikit-image's wheel, so that a fresh clone has real images and no network.

A class is a photograph. Each photograph is cut into a grid of tiles, every fourth tile (on shifted diagonals, so that they are spread evenly)
belongs to the test split and the others to the train split; a crop lies wholly inside one tile, hence no source pixel serves both splits.
"""

from collections.abc import Iterator
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
}
SIZES = (32, 64)
COUNTS = {"train": 6000, "test": 1000}
GRID = 6  # tiles along the shorter side of a photograph
SCALE = (0.6, 1.0)  # side of a crop in units of its tile's
CONTRAST = 8.0  # least standard deviation (of 255) of a crop's liveliest channel: an evenly coloured patch says nothing of its class

Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are exclusive


@cache
def photograph(name: str) -> Image.Image:
    """The photograph of class `name`, RGB."""
    with (files("skimage") / "data" / PHOTOGRAPHS[name]).open("rb") as file:
        return Image.open(file).convert("RGB")


def tiles(width: int, height: int, split: str) -> list[Box]:
    """The boxes of a photograph that belong to `split`; those of "train" and "test" together cover it exactly once."""
    side = min(width, height) / GRID
    columns, rows = round(width / side), round(height / side)
    xs = [width * c // columns for c in range(columns + 1)]
    ys = [height * r // rows for r in range(rows + 1)]
    return [
        (xs[c], ys[r], xs[c + 1], ys[r + 1])
        for r in range(rows)
        for c in range(columns)
        if ((r + 2 * c) % 4 == 1) == (split == "test")
    ]


def crops(name: str, split: str, n: int, size: int = 32) -> Iterator[tuple[Box, np.ndarray]]:
    """The first `n` square boxes of a class and their pixels: random tile, side and position, low contrast left out. Boxes are the same for every
    size."""
    image = photograph(name)
    candidates = tiles(*image.size, split)
    random = np.random.RandomState(2 * list(PHOTOGRAPHS).index(name) + (split == "test"))  # a stream NumPy has frozen
    while n:
        left, top, right, bottom = candidates[random.randint(len(candidates))]
        full = min(right - left, bottom - top)
        side = random.randint(int(SCALE[0] * full), int(SCALE[1] * full) + 1)
        x, y = random.randint(left, right - side + 1), random.randint(top, bottom - side + 1)
        box = (x, y, x + side, y + side)
        pixels = render(image, box, 32)
        if pixels.std((0, 1)).max() >= CONTRAST:
            yield box, pixels if size == 32 else render(image, box, size)
            n -= 1


def render(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """One crop as (size, size, 3) uint8. Cut first, then resized: `resize(box=...)` would let the filter reach over the edge."""
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def generate(split: str, size: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size, 3) uint8 and labels (N,), the ten classes in turn, so that the first n images are balanced whatever n is."""
    n = min(limit or COUNTS[split], COUNTS[split])
    x = np.empty((-(-n // 10), 10, size, size, 3), np.uint8)
    for label, name in enumerate(PHOTOGRAPHS):
        for i, (_, pixels) in enumerate(crops(name, split, len(x), size)):
            x[i, label] = pixels
    return x.reshape(-1, size, size, 3)[:n], np.arange(n) % 10
