"""The classifiers that the whole series shares: trained once, in notebook 00 or by whoever asks first, and cached.

A recipe belongs to a profile and a role: `target` is the classifier that every defence protects, `adversarial` the same architecture trained
adversarially, the yardstick of every claim; `partner` and `second_partner` are other networks (HGD's ensemble, S2S's second classifier),
`holdout` one that no defence ever sees. Networks and budgets are those of the README's table of profiles."""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch import nn

from advlab import parallel, series, training
from advlab.data import Dataset, load, random_crop, random_flip
from advlab.models import classifier

# architecture, its width, and what training.load_or_fit takes; `method` names a step of advlab.training
RECIPES = {
    "smoke": {
        "target": {"arch": "small_cnn", "width": 8, "epochs": 1, "optimizer": "adam", "lr": 3e-3},
        "adversarial": {"arch": "small_cnn", "width": 8, "epochs": 1, "optimizer": "adam", "lr": 3e-3, "method": "fast_fgsm"},
        "partner": {"arch": "small_cnn", "width": 6, "epochs": 1, "optimizer": "adam", "lr": 3e-3},
        "second_partner": {"arch": "small_cnn", "width": 4, "epochs": 1, "optimizer": "adam", "lr": 3e-3},
        "holdout": {"arch": "small_cnn", "width": 5, "epochs": 1, "optimizer": "adam", "lr": 3e-3},
    },
    "quick": {
        "target": {"arch": "small_cnn", "width": 8, "epochs": 12, "optimizer": "adam", "lr": 3e-3, "weight_decay": 1e-4},
        "adversarial": {"arch": "small_cnn", "width": 8, "epochs": 10, "optimizer": "adam", "lr": 3e-3, "weight_decay": 1e-4, "method": "fast_fgsm"},
        "partner": {"arch": "small_cnn", "width": 10, "epochs": 4, "optimizer": "adam", "lr": 3e-3},
        "second_partner": {"arch": "small_cnn", "width": 6, "epochs": 6, "optimizer": "adam", "lr": 3e-3},
        "holdout": {"arch": "small_cnn", "width": 12, "epochs": 4, "optimizer": "adam", "lr": 3e-3},
    },
    "standard": {
        "target": {"arch": "resnet18", "width": 16, "epochs": 8, "lr": 0.2},
        "adversarial": {"arch": "resnet18", "width": 16, "epochs": 6, "lr": 0.2, "method": "fast_fgsm"},
        "partner": {"arch": "vgg11", "width": 16, "batch_norm": True, "epochs": 8, "lr": 0.1, "amp": True},
        "second_partner": {"arch": "small_cnn", "width": 32, "epochs": 8, "optimizer": "adam", "lr": 3e-3, "amp": True},
        "holdout": {"arch": "vgg0", "width": 16, "epochs": 10, "optimizer": "adam", "lr": 2e-3, "amp": True},
    },
    "paper": {
        "target": {"arch": "resnet18", "width": 64, "epochs": 60, "lr": 0.1, "amp": True},
        "adversarial": {"arch": "resnet18", "width": 64, "epochs": 30, "lr": 0.1, "method": "pgd_at", "steps": 10},
        "partner": {"arch": "vgg11", "width": 64, "batch_norm": True, "epochs": 60, "lr": 0.05, "amp": True},
        "second_partner": {"arch": "small_cnn", "width": 64, "epochs": 60, "optimizer": "adam", "lr": 3e-3, "amp": True},
        "holdout": {"arch": "vgg0", "width": 64, "epochs": 60, "optimizer": "adam", "lr": 1e-3, "amp": True},
    },
}
FOR_DATA = {("standard", "target", "cifar10"): {"amp": True}}  # Fashion-MNIST's was trained, and its results published, in float32
ONE_WAY = ("mnist", "fashion_mnist", "svhn")  # no flips: a digit and a shoe point one way
SPARED = 512  # training images held out to watch fast adversarial training for collapse


def shared(role: str, data: Dataset, profile: str, *, eps: float = 8 / 255, seed: int = 0, progress: bool = True) -> tuple[nn.Module, dict]:
    """The classifier of a role (above) for a training set and a profile, in eval mode, and its record (see load_or_fit).

    It is trained on first use and read from data/checkpoints afterwards. eps is the l_inf budget of adversarial training. ValueError for an
    unknown profile or role."""
    if profile not in RECIPES or role not in RECIPES[profile]:
        raise ValueError(f"no recipe for role {role!r} in profile {profile!r}; profiles: {', '.join(RECIPES)}; roles: {', '.join(RECIPES['quick'])}")
    recipe = RECIPES[profile][role] | FOR_DATA.get((profile, role, data.name), {})
    method = recipe.pop("method", "standard")
    mean, std = data.mean_std()
    options = {"batch_norm": recipe.pop("batch_norm")} if "batch_norm" in recipe else {}
    build = partial(classifier, recipe.pop("arch"), **options, num_classes=data.num_classes, channels=data.shape[0], width=recipe.pop("width"),
                    mean=mean, std=std)
    settings = {"augment": augmentation(data), "batch_size": 128, "seed": seed, "progress": progress}
    if method == "standard":
        step, train = training.standard, data
    else:
        step = partial(getattr(training, method), eps=eps, **{k: recipe.pop(k) for k in ("steps",) if k in recipe})
        spare, train = (data.x[:SPARED], data.y[:SPARED]), (data.x[SPARED:], data.y[SPARED:])
        if len(train[0]) < SPARED:  # smoke: too few images to spare any
            train = data
        settings |= {"evaluate": partial(training.pgd_accuracy, x=spare[0], y=spare[1], eps=eps), "guard": "pgd_accuracy"}
    return training.load_or_fit(f"{profile}-{data.name}-{role}-{seed}", build, step, train, **recipe, **settings)


def side_by_side(roles: Sequence[str], data: Dataset, profile: str, **options) -> None:
    """Train the classifiers of these roles on the CPU, as many at a time as its cores have room for with this process's number of threads each, so
    that `shared`, which takes the same options, finds them in data/checkpoints: the same bits as one after another. It does nothing on a GPU, or
    where there is room for one only."""
    room = min(series.cores() // torch.get_num_threads(), len(roles))
    if room > 1 and not torch.cuda.is_available():
        with ProcessPoolExecutor(room, multiprocessing.get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
            list(pool.map(partial(_train, data, profile, **options), roles))


def _train(data: Dataset, profile: str, role: str, **options) -> None:
    shared(role, data, profile, **options | {"progress": False})


def prepare(roles: Sequence[str], profile: str, dataset: str | None = None, given: Mapping | None = None) -> None:
    """Train the classifiers of these roles, each with the data and parameters of notebook 00 in a profile, and print where they lie in the cache."""
    if unknown := [role for role in roles if role not in RECIPES["quick"]]:
        raise series.SeriesError(f"unknown role {unknown[0]!r}; choose from {', '.join(RECIPES['quick'])}")
    ((name, changes),) = series.plan(["00"], profile, dataset, given or {})
    values = series.parameters(name) | changes
    train = load(values["dataset"], limit=values["limit"] or None)
    for role in roles:
        _, record = shared(role, train, profile, eps=values["eps"] / 255, seed=values["seed"])
        if not parallel.processes()[0]:
            print(role, record["path"])
    parallel.leave()


def augmentation(data: Dataset):
    """Random shifts of an eighth of the side, and flips where left and right mean the same; skimage10, made of random crops, is only flipped."""
    pad = data.shape[1] // 8
    if data.name == "skimage10":
        return random_flip
    return partial(random_crop, pad=pad) if data.name in ONE_WAY else partial(_crop_and_flip, pad=pad)


def _crop_and_flip(x, *, pad: int, generator=None):
    return random_flip(random_crop(x, pad, generator), generator)
