"""S2SNet: a structure-to-signal autoencoder A in front of a frozen classifier f (Folz et al., arXiv 1803.07994).

Stage 1 trains A on reconstruction (A_S); stage 2 freezes the encoder and trains the decoder on f's cross-entropy (A_f). R and I are the two
classifiers, and "R o A_R" is f(A(x)), `chain(restorer, classifier)` here.

The paper is silent about, and this module chose:
- optimiser, epochs, augmentation: RECIPES. Stage 1 counts errors in units of the channels' standard deviation, on the task's own images (the paper
  has 92 million others), so its encoder is class-agnostic but not task-agnostic; stage 2 keeps the encoder in eval mode, bit for bit the same.
- one pooling less than SegNet-3 for 32 px at smoke and quick. (SegNet-3 at full width compresses in name only: 3,072 numbers to 4,096.)
- BIM's eps is the length of a step and nothing is projected ("up to 10 eps"): a ball of radius steps * eps never binds.
- CW: lambda_f = 10 weighs the margin against ||x - x_adv||^2 in units of [0, 1]. (In 8-bit units the distance outweighs any margin after a step or
  two and nothing is fooled, which contradicts the paper's curves.) Steps of plain gradient descent have the Euclidean length eps in 8-bit units,
  after the paper's hint at a re-weighted gradient; `attacks.cw` with search_steps=1 is the variant with Adam. Labels are the true ones.
- the cast to 8 bits rounds a change half away from zero, so that eps = 0.5 becomes 1; rounding pixels would undo every negative half."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab import training, zoo
from advlab.attacks import bim, core, fgsm, margin, pgd
from advlab.attacks.adaptive import bpda
from advlab.attacks.core import Model
from advlab.attacks.ensemble import predict
from advlab.data import Dataset
from advlab.gradients import cosine, input_gradient, magnitude, reconstruction_gradient
from advlab.models import segnet

RECIPES = {  # SegNet's width and its stages at 32 px; what training.load_or_fit takes in each stage of training
    "smoke": {"width": 2, "stages": 2, "reconstruct": {"epochs": 1, "lr": 1e-2}, "finetune": {"epochs": 1, "lr": 1e-3}},
    "quick": {"width": 8, "stages": 2, "reconstruct": {"epochs": 6, "lr": 1e-2, "batch_size": 32},
              "finetune": {"epochs": 2, "lr": 2e-3, "batch_size": 32}},
    "standard": {"width": 16, "stages": 3, "reconstruct": {"epochs": 5, "lr": 1e-2, "batch_size": 64, "amp": True},
                 "finetune": {"epochs": 2, "lr": 2e-3, "batch_size": 64, "amp": True}},
    "paper": {"width": 64, "stages": 3, "reconstruct": {"epochs": 100, "lr": 1e-3, "schedule": "cosine", "amp": True},
              "finetune": {"epochs": 20, "lr": 1e-4, "schedule": "milestones", "milestones": (0.75,), "amp": True}},
}


def reconstruct(model, x, y, generator):
    """Stage 1: mean squared error of A(x) in units of the channels' standard deviation; labels are not looked at. mse: the same in pixels."""
    error = x - model(x).float()
    return (error / model.normalize.std).square().mean(), {"mse": error.detach().square().mean()}


def finetune(model, x, y, generator):
    """Stage 2 (Eq. 2): cross-entropy of f(A(x)). mse: how far reconstructions have drifted."""
    out = model.restorer(x).float()
    logits = model.classifier(out).float()
    return F.cross_entropy(logits, y), {"mse": (x - out).detach().square().mean(), "accuracy": (logits.detach().argmax(1) == y).float().mean()}


def autoencoder(data: Dataset, profile: str, *, unpool: str = "indices", seed: int = 0, **changes) -> tuple[nn.Module, dict]:
    """A_S and its record (see load_or_fit): the profile's SegNet, a stage deeper above 32 px and again above 64 px. changes: settings of
    training.fit. ValueError for an unknown profile or unpool."""
    settings, (mean, std) = _settings("reconstruct", data, profile, seed) | changes, data.mean_std()
    stages = RECIPES[profile]["stages"] + sum(data.shape[1] > side for side in (32, 64))
    build = partial(segnet, data.shape[0], stages, RECIPES[profile]["width"], unpool, mean=mean, std=std)
    return training.load_or_fit(f"{profile}-{data.name}-segnet-{unpool}-{seed}", build, reconstruct, data, **settings)


def s2snet(restorer: nn.Module, classifier: nn.Module, data: Dataset, profile: str, *, seed: int = 0, **changes) -> tuple[nn.Sequential, dict]:
    """f o A_f and its record: `restorer` (copied) with its decoder fine-tuned for a frozen classifier; parts .restorer and .classifier.
    train_modules=["restorer"] among the changes trains the encoder as well, which the paper does not."""
    settings = {"train_modules": ["restorer.decoder"]} | _settings("finetune", data, profile, seed) | changes
    return training.load_or_fit(f"{profile}-{data.name}-s2snet-{seed}", chain(restorer, classifier), finetune, data, **settings)


def chain(restorer: nn.Module, classifier: nn.Module) -> nn.Sequential:
    """f o A in eval mode."""
    return nn.Sequential(OrderedDict(restorer=restorer, classifier=classifier)).eval()


def _settings(stage: str, data: Dataset, profile: str, seed: int) -> dict:
    if profile not in RECIPES:
        raise ValueError(f"no recipe for profile {profile!r}; choose one of {', '.join(RECIPES)}")
    return {"optimizer": "adam", "weight_decay": 0.0, "augment": zoo.augmentation(data), "seed": seed} | RECIPES[profile][stage]


def cw_descent(model: Model, x: Tensor, y: Tensor, *, eps: float, steps: int = 100, weight: float = 10.0, kappa: float = 0.0,
               generator: torch.Generator | None = None) -> Tensor:
    """Gradient descent on ||x_adv - x||^2 + weight * max(-kappa, z_y - max z_j), l2, each step of Euclidean length eps (in [0, 1]).

    Returns the nearest image that fools the model with a margin of kappa, or else the last iterate; an image that is wrong already, unchanged.
    steps + 1 forward and backward passes. ValueError for bad input, as in every attack."""
    core.check_images(x, y)
    core.check_steps(steps=steps)
    eps, x_t = core.check_budget(eps, x), x.detach()
    best, least = x_t.clone(), torch.full(x.shape[:1], torch.inf, dtype=x.dtype, device=x.device)
    with core.attacking(model):
        for t in range(steps + 1):
            logits, value, grad = core.gradient(model, x_t, y, margin, check=y if t == 0 else None)
            far, hit = core.l2(x_t - x).flatten(), core.fooled(logits, y) & (value >= kappa)
            best, least = torch.where(core.rows(hit & (far < least)), x_t, best), torch.where(hit, torch.minimum(far, least), least)
            if t < steps:
                x_t = (x_t - eps * core.steepest(2 * (x_t - x) - weight * grad * core.rows(value < kappa), "l2")).clamp(0, 1)
    return core.finish(torch.where(core.rows(least.isinf()), x_t, best))


def paper_attack(name: str, eps: float, *, steps: int | None = None) -> Callable:
    """The paper's "fgsm", "bim" (10 steps) or "cw" (100 steps) with its eps in 8-bit units, as attack(model, x, y). ValueError for another name."""
    core.check_choice("attack", name, ("fgsm", "bim", "cw"))
    steps = steps or {"fgsm": 1, "bim": 10, "cw": 100}[name]
    return {"fgsm": partial(fgsm, eps=eps / 255), "bim": partial(bim, eps=steps * eps / 255, steps=steps, step_size=eps / 255),
            "cw": partial(cw_descent, eps=eps / 255, steps=steps)}[name]


def eight_bit(x_adv: Tensor, x: Tensor) -> Tensor:
    """x_adv as an 8-bit image can hold it: x to the nearest level, the change to whole levels, half ones away from zero, then cut to [0, 1]."""
    delta = 255 * (x_adv - x)
    return (((255 * x).round() + delta.sign() * (delta.abs() + 0.5 + 1e-3).floor()) / 255).clamp(0, 1)  # 1e-3: half a level comes back as 0.49999


def normalised_l2(x_adv: Tensor, x: Tensor) -> Tensor:
    """||x - x_adv|| / ||x|| of each image, (B,), on raw pixels (section 3.2, after Guo et al. 2018)."""
    return (x_adv - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp_min(1e-12)


def strength(victim: Model, attack: Callable, x: Tensor, y: Tensor, *, surrogate: Model | None = None, common: Tensor | None = None,
             batch_size: int = 256) -> list[tuple[dict, Tensor]]:
    """Defence strength: over the victim's true positives TP, mean and median normalised l2 of an attack through `surrogate` (by default the victim),
    and who is still right: (row fields, right (TP,)), for images rounded to 8 bits and as they are. common (B,) bool: the fields also say which share
    of these is still right. ValueError where TP is empty."""
    core.check_images(x, y)
    before = predict(victim, x, batch_size).argmax(1) == y
    if not before.any():
        raise ValueError(f"the victim gets none of {len(x)} images right, so there is no true positive to attack")
    x_adv, out = x.clone(), []
    for part in before.nonzero().squeeze(1).split(batch_size):
        x_adv[part] = attack(victim if surrogate is None else surrogate, x[part], y[part])
    for rounded, moved in ((True, eight_bit(x_adv, x)), (False, x_adv)):
        right, far = (predict(victim, moved, batch_size).argmax(1) == y) & before, normalised_l2(moved, x)[before]
        shared = right[common].double().mean().item() if common is not None and common.any() else None
        out.append(({"rounded": rounded, "l2": far.mean().item(), "l2_median": far.median().item(), "common": shared,
                     "clean": before.double().mean().item()}, right[before]))
    return out


def gradient_maps(classifier: nn.Module, a_s: nn.Module, a_f: nn.Module, x: Tensor, y: Tensor, *, detach_target: bool = False,
                  batch_size: int = 256) -> dict[str, Tensor]:
    """Table 1's five gradient magnitude maps, each (B, H, W): cross-entropy for R, R o A_R and R o A_S, reconstruction error for A_R and A_S."""
    models = {"R": classifier, "R o A_R": chain(a_f, classifier), "R o A_S": chain(a_s, classifier)}
    ways = {name: partial(input_gradient, model) for name, model in models.items()}
    ways |= {name: lambda x, y, a=a: reconstruction_gradient(a, x, detach_target=detach_target) for name, a in {"A_R": a_f, "A_S": a_s}.items()}
    return {name: torch.cat([magnitude(way(*part)) for part in zip(x.split(batch_size), y.split(batch_size))]) for name, way in ways.items()}


def masking(restorer: nn.Module, classifier: nn.Module, x: Tensor, y: Tensor, *, noise: float = 1 / 255,
            generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Signs of a masked gradient, each (B,): see the keys. noise: size of the uniform noise, in [0, 1]."""
    model, moved = chain(restorer, classifier), (x + noise * core.uniform(x, core.default_generator(x, generator))).clamp(0, 1)
    grad, identity, near = input_gradient(model, x, y), input_gradient(bpda(restorer, classifier), x, y), input_gradient(model, moved, y)
    return {"cosine with the identity gradient": cosine(grad, identity), "cosine after small noise": cosine(grad, near),
            "share of zero entries": (grad == 0).flatten(1).double().mean(1), "gradient norm": grad.flatten(1).norm(dim=1)}


def code_attack(model: nn.Sequential, x: Tensor, y: Tensor, *, pool: Tensor, labels: Tensor, count: int = 5, eps: float, steps: int = 100,
                places: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """PGD (l_inf) on the encoder alone: brings the code of each image to that of a guide, an image of `pool` (N, C, H, W) with another of `labels`
    (N,), one after the other of its `count` nearest (see `guides`) until the model errs.

    places: weight of a hinge on the places of the maxima, the other half of what the encoder hands on: how far the value at the guide's place lies
    below its window's maximum, squared and summed like the distance of the codes. ValueError for bad input, as in every attack and in `guides`."""
    core.check_images(x, y)
    encoder, out, alive = model.restorer.encoder, x.clone(), torch.arange(len(x), device=x.device)
    with core.attacking(model):
        for index in guides(model.restorer, x, y, pool, labels, count=count):
            with torch.no_grad():
                goal, at = encoder(_padded(model.restorer, pool[index[alive]]))

            def nearness(v: Tensor, goal=goal, at=at) -> Tensor:
                z, short = _padded(model.restorer, v), 0.0
                for stage, wanted in zip(encoder.stages, at):
                    full = stage(z)
                    z = F.max_pool2d(full, 2)
                    if places:
                        short = short + (z.flatten(2) - full.flatten(2).gather(2, wanted.flatten(2))).square().sum((1, 2))
                near = -(z - goal).flatten(1).square().sum(1) - places * short
                return torch.stack([near, torch.zeros_like(near)], 1)  # no logits: pgd climbs the first column

            out[alive] = pgd(nearness, x[alive], torch.zeros_like(y[alive]), eps=eps, steps=steps, loss=lambda z, _: z[:, 0], generator=generator)
            alive = alive[predict(model, out[alive]).argmax(1) == y[alive]]
            if not len(alive):
                break
    return out


def guides(restorer: nn.Module, x: Tensor, y: Tensor, pool: Tensor, labels: Tensor, *, count: int = 5, batch_size: int = 256) -> Tensor:
    """Where in `pool` (N, C, H, W) lie the images of another class whose codes are nearest to that of each image, (count, B), nearest first.
    ValueError where an image has fewer than `count` of them."""
    if ((labels != y[:, None]).sum(1) < count).any():
        raise ValueError(f"an image has fewer than {count} images of other classes among {len(pool)}; give more, or ask for fewer")
    with torch.no_grad():
        near, far = (torch.cat([restorer.encoder(_padded(restorer, v))[0].flatten(1) for v in part.split(batch_size)]) for part in (x, pool))
    return torch.cdist(near, far).masked_fill(labels == y[:, None], torch.inf).topk(count, largest=False).indices.T


def _padded(restorer: nn.Module, v: Tensor) -> Tensor:
    return restorer.pad(restorer.normalize(v))


def interval(values: Tensor, others: Tensor | None = None) -> tuple[float, float, float]:
    """The mean of values (N,), or how far it lies above that of `others` (M,), other images, and its normal 95 % interval: (mean, low, high). NaN
    where either has less than two."""
    parts = [v.double() for v in (values, others) if v is not None]
    if min(map(len, parts)) < 2:
        return (torch.nan,) * 3
    mean = (parts[0].mean() - sum(v.mean() for v in parts[1:])).item()
    half = 1.959964 * sum(v.var() / len(v) for v in parts).sqrt().item()
    return mean, mean - half, mean + half


def decide(*found: tuple[float, float, float], least: float = -torch.inf, most: float = torch.inf, digits: int = 1) -> tuple[str, str]:
    """Whether every (value, low, high) found lies above `least` and below `most`: "held" where all intervals lie inside, "not held" where one lies
    outside, else "undecided"; and the intervals as text."""
    inside = all(low > least and high < most for _, low, high in found)
    outside = any(high < least or low > most for _, low, high in found)
    text = " and ".join(f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]" for value, low, high in found)
    return "held" if inside else "not held" if outside else "undecided", text


def told(found: dict[str, tuple[str, str]]) -> str:
    """Statements and what `decide` makes of them as a verdict's text."""
    return "; ".join(f"{text}: {answer} ({numbers})" for text, (answer, numbers) in found.items())
