"""Data sets: what they hold by construction, that bad files are refused with one sentence and left alone, and that nothing needs a network."""

import hashlib
import io
import os
import threading
import urllib.request
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from advlab import _archives, _download, _skimage10, data
from advlab.data import DataError, LazyImages, batches, load, random_crop, random_flip

X = np.random.RandomState(0).randint(0, 256, (7, 4, 6, 3), dtype=np.uint8)  # H and W differ, so that a transposed image shows
Y = np.array([0, 1, 2, 2, 1, 0, 1], np.uint8)


def png(image):
    Image.fromarray(image).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def encoded(images, suffix=""):
    blobs = [png(image) for image in images]
    return {f"encoded{suffix}": np.frombuffer(b"".join(blobs), np.uint8), f"offsets{suffix}": np.cumsum([0, *map(len, blobs)])}


def chw(images):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


@pytest.fixture
def save(tmp_path):
    def write(name="mine", **arrays):
        np.savez_compressed(tmp_path / f"{name}.npz", **arrays)
        return partial(load, name, root=tmp_path)

    return write


@pytest.fixture
def folder(tmp_path):
    for part, classes in {"train": "abc", "val": "bc"}.items():
        for c in classes:
            (tmp_path / "pets" / part / c).mkdir(parents=True)
            for i in range(3):
                (tmp_path / "pets" / part / c / f"{i}.PNG").write_bytes(png(np.full((16, 32, 3), 40 * "abc".index(c) + i, np.uint8)))
    return tmp_path / "pets"


# --- skimage10 ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _skimage10.PHOTOGRAPHS)
def test_no_source_pixel_serves_both_splits(name):
    width, height = _skimage10.photograph(name).size
    used, owned = {}, {}
    for split, n in _skimage10.COUNTS.items():
        used[split], owned[split] = np.zeros((height, width), int), np.zeros((height, width), int)
        for (left, top, right, bottom), _ in _skimage10.crops(name, split, n // 10):
            used[split][top:bottom, left:right] += 1
        for left, top, right, bottom in _skimage10.tiles(width, height, split):
            owned[split][top:bottom, left:right] += 1
        assert used[split].any() and not used[split][owned[split] == 0].any()
    assert not ((used["train"] > 0) & (used["test"] > 0)).any()
    assert (owned["train"] + owned["test"] == 1).all()
    quadrants = [owned["test"][y : y + height // 2, x : x + width // 2] for y in (0, height // 2) for x in (0, width // 2)]
    assert all(0.1 < quadrant.mean() < 0.5 for quadrant in quadrants)


@pytest.mark.parametrize("size", [32, 64])
def test_an_image_comes_from_the_pixels_of_its_box_alone(size):
    name = "coffee"
    image, label = np.asarray(_skimage10.photograph(name)), list(_skimage10.PHOTOGRAPHS).index(name)
    x = load("skimage10", "test", size=size, limit=40).x
    for i, ((left, top, right, bottom), _) in enumerate(_skimage10.crops(name, "test", 4)):
        alone = np.zeros_like(image)
        alone[top:bottom, left:right] = image[top:bottom, left:right]
        expected = _skimage10.render(Image.fromarray(alone), (left, top, right, bottom), size)
        assert torch.equal(x[10 * i + label], chw(expected[None])[0])


def test_skimage10_is_balanced_deterministic_and_cut_short_without_change():
    first, again, short = (load("skimage10", "test", limit=n) for n in (60, 60, 25))
    assert first.x.shape == (60, 3, 32, 32) and first.x.dtype == torch.uint8 and first.y.dtype == torch.int64
    assert first.y.bincount().tolist() == [6] * 10 and len(first.classes) == first.num_classes == 10
    assert torch.equal(first.x, again.x) and first.digest == again.digest
    assert torch.equal(first.x[:25], short.x) and first.take(25).digest == short.digest != first.digest
    assert first.x.float().std(dim=(2, 3)).amax(1).min() >= _skimage10.CONTRAST
    assert load("skimage10", "train", limit=60).digest != first.digest
    boxes = [[box for box, _ in _skimage10.crops("ihc", "train", 5, size)] for size in _skimage10.SIZES]
    assert boxes[0] == boxes[1]


def test_skimage10_at_full_length():
    train, test = load("skimage10"), load("skimage10", "test", limit=5000)
    assert train.y.bincount().tolist() == [600] * 10 and test.y.bincount().tolist() == [100] * 10


# --- archives -----------------------------------------------------------------------------------------------------------------------------


def test_arrays_in_the_keras_convention(save):
    get = save(x_train=X, y_train=Y[:, None], x_test=X[:3, :, :, 0], y_test=Y[:3])
    train, test = get(), get("test")
    assert torch.equal(train.x, chw(X)) and train.y.tolist() == Y.tolist() and train.shape == (3, 4, 6)
    assert torch.equal(test.x, torch.from_numpy(X[:3, None, :, :, 0].copy()))
    assert train.classes == test.classes == ("0", "1", "2") and (train.name, train.split, len(train)) == ("mine", "train", 7)
    assert torch.equal(get(limit=2).x, train.x[:2]) and get(limit=99).digest == train.digest == get().digest


def test_the_first_classes_keep_their_images_in_order(save):
    get = save(x_train=X, y_train=Y, x_test=X[:3], y_test=Y[:3])
    whole, two = get(), get(classes=2)
    assert torch.equal(two.x, whole.x[whole.y < 2]) and torch.equal(two.y, whole.y[whole.y < 2]) and two.classes == ("0", "1")
    assert get(classes=2, limit=3).digest == two.take(3).digest != two.digest != whole.digest == get(classes=3).digest
    with pytest.raises(DataError, match="mine has 3 classes, 3 of them in its train split: no first 4"):
        get(classes=4)


def test_encoded_archives(save):
    many = np.random.RandomState(1).randint(0, 256, (150, 4, 6, 3), dtype=np.uint8)  # more than one thread's share
    get = save(**encoded(many, "_train"), y_train=np.arange(150) % 3, **encoded(X[:, :, :, 0], "_val"), y_val=Y, words=["cat", "dog", "eel"])
    assert torch.equal(get().x, chw(many)) and get().classes == ("cat", "dog", "eel")
    assert torch.equal(get("test").x, chw(np.repeat(X[:, :, :, :1], 3, axis=3)))  # greyscale becomes RGB
    single = save("single", **encoded(X), y=Y)
    assert torch.equal(single("test").x, chw(X))
    with pytest.raises(DataError, match="no train split"):
        single("train")


def test_encoded_images_of_several_sizes_need_a_size(save):
    wide = np.arange(16 * 32 * 3, dtype=np.uint32).reshape(16, 32, 3).astype(np.uint8)
    blobs = [png(wide), png(wide[:14, :14])]
    get = save(encoded=np.frombuffer(b"".join(blobs), np.uint8), offsets=np.cumsum([0, *map(len, blobs)]), y=[0, 1])
    with pytest.raises(DataError, match="size=224"):
        get("test")
    x = get("test", size=14).x  # 8/7 of 14 is 16, the shorter side: nothing to resize, only the centre to cut out
    assert torch.equal(x, chw(np.stack([wide[1:15, 9:23], wide[:14, :14]])))


GOOD = dict(x_train=X, y_train=Y)
ENCODED = {**encoded(X, "_train"), "y_train": Y}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": X}, "no train split.*x_train.*found images"),
        ({"x_train": X}, "not y_train"),
        ({"encoded_train": ENCODED["encoded_train"], "y_train": Y}, "not offsets_train"),
        (GOOD | {"x_train": X / 255}, "uint8.*float64"),
        (GOOD | {"x_train": X[0, 0]}, r"shape \(6, 3\)"),
        (GOOD | {"x_train": X[..., :2]}, r"shape \(7, 4, 6, 2\)"),
        (GOOD | {"y_train": Y[:5]}, "7 images but 5 labels"),
        (GOOD | {"y_train": Y.astype(np.float32)}, "integers, not float32"),
        (GOOD | {"y_train": Y[:0]}, "y_train must be a vector"),
        (GOOD | {"y_train": Y.astype(int) - 1}, "label -1 .* out of range"),
        (GOOD | {"class_names": ["a", "b"]}, "label 2 .* out of range.* 0 to 1"),
        (GOOD | {"y_train": np.array([None] * 7)}, "damaged or no .npz archive"),
        (ENCODED | {"offsets_train": ENCODED["offsets_train"][::-1]}, "offsets must rise"),
        (ENCODED | {"offsets_train": ENCODED["offsets_train"] + 1}, "offsets must rise"),
        (ENCODED | {"offsets_train": ENCODED["offsets_train"] / 1}, "offsets an integer vector"),
        (ENCODED | {"offsets_train": ENCODED["offsets_train"][:-1]}, "6 images but 7 labels"),
        (ENCODED | {"encoded_train": ENCODED["encoded_train"][::-1]}, "cannot be decoded"),
    ],
)
def test_a_bad_archive_is_refused_and_left_alone(save, tmp_path, arrays, message):
    get = save("bad", **arrays)
    before = (tmp_path / "bad.npz").read_bytes()
    with pytest.raises(DataError, match=message):
        get("train")
    assert (tmp_path / "bad.npz").read_bytes() == before


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"<html>not here</html>", lambda b: b[:60] + b"\0" * 40 + b[100:]])
def test_a_damaged_archive_is_refused_and_left_alone(save, tmp_path, damage):
    get, path = save("mnist", **GOOD), tmp_path / "mnist.npz"  # a public name: what is there is never replaced by a download
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"mnist.npz is damaged"):
        get("train")
    assert path.read_bytes() == damaged and os.listdir(tmp_path) == ["mnist.npz"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(name="cifra10"), "unknown data set 'cifra10': known are cifar10, .*mine.*skimage10"),
        (dict(name="/no/such/set"), "no data set at /no/such/set"),
        (dict(name="skimage10", size=48), "size 48 .* 32 and 64"),
        (dict(name="mine", size=32), "size 32 .* 4x6"),
        (dict(name="mine", split="valid"), "unknown split 'valid'"),
        (dict(name="mine", limit=0), "limit must be a positive integer, not 0"),
        (dict(name="mine", size=2.5), "size must be a positive integer, not 2.5"),
    ],
)
def test_bad_arguments(save, tmp_path, args, message):
    save(**GOOD)
    with pytest.raises(DataError, match=message):
        load(**{"root": tmp_path} | args)


def test_archives_are_found_in_the_environments_folder_first(save, tmp_path, monkeypatch):
    save(**GOOD)
    monkeypatch.setenv("ADVLAB_DATA", str(tmp_path))
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path / "home"))
    assert data.find("mine") == tmp_path / "mine.npz" and data.find("mnist") is data.find("skimage10") is None
    assert load("mine").digest == load(tmp_path / "mine.npz").digest
    monkeypatch.delenv("ADVLAB_DATA")
    with pytest.raises(DataError, match=r"put mine\.npz or a folder mine into .*home/data/raw"):
        load("mine")


# --- folders ------------------------------------------------------------------------------------------------------------------------------


def test_image_folders(folder):
    train, test = load(folder), load("pets", "test", root=folder.parent)
    assert train.classes == test.classes == ("a", "b", "c") and train.shape == (3, 16, 32)
    assert sorted(train.y.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and set(test.y.tolist()) == {1, 2}
    for d in (train, test):
        assert torch.equal(d.x[:, 0, 0, 0] // 40, d.y)  # pixels and labels stay together, also where the test split lacks a class
    assert load(folder, size=8).shape == (3, 8, 8)


def test_lazy_images_behave_like_the_tensor(folder, monkeypatch):
    eager = load(folder)
    monkeypatch.setattr(_archives, "LAZY_BYTES", 3 * 16 * 32 * 2 - 1)
    lazy = load(folder)
    assert isinstance(lazy.x, LazyImages) and len(lazy.x) == 9 and lazy.shape == eager.shape and torch.equal(lazy.y, eager.y)
    for index in (3, slice(2, 5), torch.tensor([8, 0, 0]), eager.y == 1):
        assert torch.equal(lazy.x[index], eager.x[index])
    assert lazy.mean_std() == eager.mean_std() and torch.equal(lazy.images(), eager.images())
    assert torch.equal(lazy.first_classes(2).x[:], eager.first_classes(2).x)
    assert len(lazy.take(2).x) == 2 and lazy.take(2).digest == load(folder, limit=2).digest != lazy.digest
    for (x, y), (u, v) in zip(*(batches(d.x, d.y, 4, shuffle=True, generator=torch.Generator().manual_seed(0)) for d in (lazy, eager)), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_bad_folders(folder):
    with pytest.raises(DataError, match="no train split"):
        load(folder / "train")
    (folder / "val" / "z").mkdir()
    with pytest.raises(DataError, match="classes that train has not: z"):
        load(folder, "test")
    broken = folder / "train" / "a" / "0.PNG"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=r"0\.PNG cannot be decoded"):
        load(folder)
    for file in (folder / "train").rglob("*.PNG"):
        file.unlink()
    with pytest.raises(DataError, match="holds no images"):
        load(folder)


# --- downloads ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder, and the address under which this machine serves it."""
    (tmp_path / "served").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield tmp_path / "served", f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def svhn(server, monkeypatch):
    """Two made .mat files in the form of SVHN's, served, with their true checksums; the folder of the files comes back."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    where, address = server
    images = np.random.RandomState(2).randint(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    files = {}
    for split in ("train", "test"):
        path = where / f"{split}_32x32.mat"
        savemat(path, {"X": np.moveaxis(images, 0, -1), "y": np.array([[1], [10], [9], [10], [2]], np.uint8)})
        files[split] = [f"{address}/{path.name}", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", files)
    return where, images


def test_svhn_is_downloaded_once_and_kept_as_an_archive(svhn, tmp_path, monkeypatch):
    where, images = svhn
    raw = tmp_path / "raw"
    train = load("svhn", root=raw)
    assert torch.equal(train.x, chw(images)) and train.y.tolist() == [1, 0, 9, 0, 2]  # the files call the digit 0 "10"
    assert train.classes == tuple("0123456789") and os.listdir(raw) == ["svhn.npz"]
    for file in where.iterdir():
        file.unlink()
    assert load("svhn", "test", root=raw).digest == train.digest


def test_the_publishers_files_will_do_without_a_network(svhn, no_network):
    where, images = svhn
    assert torch.equal(load("svhn", root=where, download=False).x, chw(images))
    assert sorted(os.listdir(where)) == ["svhn.npz", "test_32x32.mat", "train_32x32.mat"]


def test_a_truncated_download_is_refused(svhn, tmp_path):
    for file in svhn[0].iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"svhn could not be downloaded .*corrupted.*put svhn\.npz"):
        load("svhn", root=tmp_path / "raw")
    assert os.listdir(tmp_path / "raw") == []


def test_tiny_imagenet_from_a_made_zip(server, tmp_path, monkeypatch):
    where, address = server
    base, images = "tiny-imagenet-200/", {}
    with zipfile.ZipFile(where / "tiny.zip", "w") as archive:
        archive.writestr(base + "wnids.txt", "n2\nn1\n")
        archive.writestr(base + "words.txt", "n0\tentity\nn1\tcat, true cat\nn2\tdog\n")
        archive.writestr(base + "val/val_annotations.txt", "val_0.JPEG\tn2\t0\t0\t9\t9\nval_1.JPEG\tn1\t0\t0\t9\t9\n")
        for i, name in enumerate(["train/n1/images/n1_0.JPEG", "train/n1/images/n1_1.JPEG", "train/n2/images/n2_0.JPEG"]):
            archive.writestr(base + name, png(np.full((64, 64, 3), images.setdefault(name, 10 * i), np.uint8)))
        for i in range(2):
            archive.writestr(base + f"val/images/val_{i}.JPEG", png(np.full((64, 64), 100 + i, np.uint8)))
    monkeypatch.setattr(_download, "TINY_URL", f"{address}/tiny.zip")
    monkeypatch.setattr(_download, "TINY_MD5", hashlib.md5((where / "tiny.zip").read_bytes()).hexdigest())
    train, test = (load("tiny_imagenet", split, root=tmp_path / "raw") for split in ("train", "test"))
    assert train.classes == ("cat, true cat", "dog") and train.shape == (3, 64, 64)
    assert sorted(zip(train.x[:, 0, 0, 0].tolist(), train.y.tolist())) == [(0, 0), (10, 0), (20, 1)]
    assert test.x[:, 0, 0, 0].tolist() == [100, 101] and test.y.tolist() == [1, 0]


@pytest.mark.parametrize("name", _download.PUBLIC)
@pytest.mark.parametrize("download", [True, False])
def test_without_a_network_the_message_names_folder_and_file(no_network, tmp_path, name, download):
    with pytest.raises(DataError) as error:
        load(name, root=tmp_path, download=download)
    assert f"put {name}.npz" in str(error.value) and f"into {tmp_path}" in str(error.value) and "\n" not in str(error.value)
    assert ("no route to host" in str(error.value)) == download and os.listdir(tmp_path) == []


# --- batches ------------------------------------------------------------------------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


IMAGES = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 5, 7).contiguous() * 25


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_serve_every_image_once(shuffle, drop_last):
    y = torch.arange(10)
    got = list(batches(IMAGES, y, 4, shuffle=shuffle, generator=seeded(), drop_last=drop_last))
    assert [len(labels) for _, labels in got] == [4, 4, 2][: 3 - drop_last]
    served = torch.cat([labels for _, labels in got]).tolist()
    assert len(set(served)) == len(served) and (served == sorted(served)) == (not shuffle)
    for x, labels in got:
        assert x.dtype == torch.float32 and torch.equal(x, IMAGES[labels] / 255)


def test_the_generator_alone_determines_batches():
    augment = partial(random_crop, pad=2)
    before = torch.get_rng_state()
    first, again, other, free = (
        torch.cat([x for x, _ in batches(IMAGES, torch.arange(10), 3, shuffle=True, generator=g, augment=augment)])
        for g in (seeded(), seeded(), seeded(1), None)
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and free.shape == first.shape
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_of_unequal_lengths_are_refused_at_once():
    with pytest.raises(ValueError, match="10 images, 9 labels"):
        batches(IMAGES, torch.arange(9), 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_random_crop_is_a_window_of_the_padded_image(dtype):
    x = torch.randint(1, 256, (40, 2, 5, 7), generator=seeded()).to(dtype)
    out, padded = random_crop(x, 2, seeded()), torch.nn.functional.pad(x, (2, 2, 2, 2))
    assert out.dtype == dtype and out.shape == x.shape
    shifts = set()
    for image, source in zip(out, padded):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, source[:, i : i + 5, j : j + 7])]
        assert len(fits) == 1
        shifts.update(fits)
    assert len(shifts) > 10  # each image has its own
    assert torch.equal(random_crop(x, 0), x)


def test_a_random_flip_is_the_image_or_its_mirror():
    x = torch.rand(200, 3, 4, 5, generator=seeded())
    out = random_flip(x, seeded(1))
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert ((out == x).flatten(1).all(1) ^ mirrored).all() and 60 < mirrored.sum() < 140


def test_mean_std_and_images(save):
    d = save(**GOOD)()
    mean, std = d.mean_std()
    exact = torch.from_numpy(X).double().flatten(0, 2) / 255
    assert mean == pytest.approx(exact.mean(0).tolist()) and std == pytest.approx(exact.std(0, correction=0).tolist())
    assert torch.equal(d.images([1, 0]), chw(X[[1, 0]]) / 255) and d.images(3).shape == (3, 4, 6)


@pytest.mark.parametrize(
    ("name", "n", "means", "stds"),
    [
        ("mnist", 60000, [0.1307], [0.3081]),
        ("fashion_mnist", 60000, [0.2860], [0.3530]),
        ("cifar10", 50000, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_published_pixel_statistics(name, n, means, stds):
    archive = Path(os.environ.get("ADVLAB_DATA", "")) / f"{name}.npz"
    if not archive.is_file():
        pytest.skip(f"$ADVLAB_DATA holds no {name}.npz")
    train = load(archive, download=False)
    assert 0.99 * n <= len(train) <= n and train.num_classes == 10
    for found, published in zip(train.mean_std(), (means, stds)):
        assert found == pytest.approx(published, abs=5e-4)
