"""HGD, the high-level representation guided denoiser (Liao et al., arXiv 1712.02976): a denoiser in front of a frozen classifier, trained on
ready-made attacks so that the classifier's upper layers, not the pixels, come out as on the clean image.

The paper calls its pixel guided denoiser PGD; here it is PixGD. Open in the paper, chosen here: one training pair an image, its kind of attack
drawn uniformly from Table 1's seven plus clean and uniform-noise pairs (the released sample list has both, the paper's table neither); the
ensemble's loss without auxiliary heads, which our classifiers do not have; attacks use the attacked models' own prediction as label, as the released
code does, so that single steps do not leak the true one. Pairs are not mirrored, so that each clean target is computed once; the weights are those of
the last epoch, at a tenth of the rate, where the paper keeps the epoch of lowest validation loss (the history tells both)."""

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab import checkpoints, paths, training
from advlab.attacks import core
from advlab.attacks.blackbox import ensemble
from advlab.attacks.gradient import bim, pgd
from advlab.data import Dataset
from advlab.models import features, unet

# what each denoiser is trained to match on the clean image (sections 3.1 and 3.2)
GUIDES = {"DAE": "pixels", "PixGD": "pixels", "FGD": "features", "LGD": "logits", "CGD": "labels"}
WIDTHS = {"imagenet": (64, 128, 256, 256, 256), "small": (64, 128, 256, 256), "xs": (32, 64, 128, 128), "narrow": (8, 16, 32, 32)}
STEPS = {"fgsm": 1, "ifgsm2": 2, "ifgsm4": 4, "ifgsm8": 8}
FIT = {"optimizer": "adam", "schedule": "milestones", "milestones": (2 / 3,), "weight_decay": 0.0, "train_modules": ["restorer"]}
EXTRA = ("clean", "noise")
POOL = (*(("fgsm", i) for i in range(3)), *((attack, None) for attack in STEPS))  # Table 1; None is the ensemble of three


def denoiser(name: str, *, channels: int = 3, widths: Sequence[int] = WIDTHS["small"], mean=0.5, std=0.25) -> nn.Module:
    """The untrained restorer (B, C, H, W) -> the same for a name of `GUIDES`: the residual DUNET, the identity at first, or for "DAE" the same
    without residual and lateral connections (section 3.1.1). WIDTHS["imagenet"] is the paper's, for 64 px and above; sizes from 28 to 299 px go."""
    core.check_choice("denoiser", name, tuple(GUIDES))
    plain = name == "DAE"
    return unet(channels, widths, residual=not plain, lateral=not plain, mean=mean, std=std)


# --- attacks of Table 1 ---------------------------------------------------------------------------------------------------------------------


def oblivious(model: nn.Module | Sequence[nn.Module], x: Tensor, *, attack: str, eps, batch_size: int = 256) -> Tensor:
    """Images x (N, C, H, W) attacked by FGSM or IFGSM-n (n steps of eps / n, no random start) on one classifier, or on the mean logits of several;
    away from the label that their summed softmax predicts. eps: one number or (N,), of 1."""
    core.check_choice("attack", attack, tuple(STEPS))
    models = [model] if isinstance(model, nn.Module) else list(model)
    together, where = ensemble(models), next(models[0].parameters()).device
    eps, out = torch.as_tensor(eps, dtype=x.dtype).expand(len(x)), torch.empty_like(x)
    for part in torch.arange(len(x)).split(batch_size):
        images = x[part].to(where)
        with torch.no_grad():
            label = sum(m(images).softmax(1) for m in models).argmax(1)
        out[part] = bim(together, images, label, eps=eps[part].to(where), steps=STEPS[attack]).to(x.device)
    return out


def test_sets(models: Sequence[nn.Module], holdout: nn.Module, x: Tensor, *, eps: Sequence[float]) -> dict[tuple[str, float], dict[str, Tensor]]:
    """Table 1's test sets from clean images x (N, C, H, W), at each eps (of 1): (threat, eps) to attack to x_adv. The white set ("oblivious") holds
    FGSM on the target, models[0], and IFGSM4 on the ensemble; the black set ("transfer") both on a classifier that no training saw."""
    attacked = {"oblivious": {"fgsm": models[0], "ifgsm4": models}, "transfer": {"fgsm": holdout, "ifgsm4": holdout}}
    return {(threat, e): {attack: oblivious(model, x, attack=attack, eps=e) for attack, model in who.items()}
            for threat, who in attacked.items() for e in eps}


def pool(models: Sequence[nn.Module], x: Tensor, *, extra: Sequence[str] = EXTRA, eps: tuple[int, int] = (1, 16), seed: int = 0,
         folder: str | Path | None = None) -> dict:
    """One training pair for each image x (N, C, H, W) in [0, 1]: x_adv, `kind` (N,) into names, `eps` (N,) drawn from the integers low..high of 255,
    names, and seconds of crafting. models: the three classifiers that Table 1 attacks, the target first; kinds are drawn uniformly from POOL and
    `extra` ("clean", "noise": uniform in +-eps). All on the CPU, kept in data/checkpoints (or folder) and found again; ValueError for a kind in
    `extra` that is not one of EXTRA, and if an image left its ball."""
    for name in extra:
        core.check_choice("extra kind", name, EXTRA)
    x = x.cpu()
    config = checkpoints.describe({"models": list(models), "x": x, "extra": list(extra), "eps": list(eps), "seed": seed, "pool": 1})
    key = checkpoints.fingerprint(config)
    file = Path(folder or paths.checkpoints()) / f"pool-{key[:12]}.pt"
    if saved := checkpoints.trusted(partial(checkpoints.unseal, file, key), file):
        return saved
    g, start = torch.Generator().manual_seed(seed), time.perf_counter()
    names = [f"{attack} on {'ensemble' if i is None else f'f{i + 1}'}" for attack, i in POOL] + list(extra)
    kind = torch.randint(len(names), (len(x),), generator=g)
    budget = torch.randint(eps[0], eps[1] + 1, (len(x),), generator=g) / 255
    x_adv = (x + core.rows(budget) * core.uniform(x, g)).clamp(0, 1)
    for k, name in enumerate(names):
        index = (kind == k).nonzero().squeeze(1)
        if name == "clean":
            x_adv[index] = x[index]
        elif k < len(POOL) and len(index):
            attack, i = POOL[k]
            x_adv[index] = oblivious(models if i is None else models[i], x[index], attack=attack, eps=budget[index])
    if ((x_adv - x).abs().flatten(1).amax(1) > budget + 1e-6).any():
        raise ValueError("an image of the pool lies outside its ball of radius eps")
    made = {"key": key, "x_adv": x_adv, "kind": kind, "eps": budget, "names": names, "seconds": time.perf_counter() - start}
    checkpoints.write(file, checkpoints.seal(made))
    return made


# --- guidance ---------------------------------------------------------------------------------------------------------------------------------


def last_stage(classifier: nn.Module) -> str:
    """The name of the last convolutional stage, before global pooling, whose output guides FGD. That of VGG11 ends with a pool of its own: at 28 and
    32 pixels one place is left, so that its FGD compares the pooled feature, a weaker guide than the paper's."""
    names = [name for name, _ in classifier.named_children()]
    return names[names.index("pooled") - 1]


def represent(classifier: nn.Module, x: Tensor, guide: str) -> Tensor:
    """What a guide compares: the pixels x (B, C, H, W), the last stage's features, or the logits, which the guide "labels" needs too."""
    core.check_choice("guide", guide, tuple(GUIDES.values()))
    if guide == "pixels":
        return x
    return features(classifier, x, [last := last_stage(classifier)])[last] if guide == "features" else classifier(x)


def loss(found: Tensor, target: Tensor) -> Tensor:
    """The mean absolute difference (equation 3 up to scale), or cross-entropy where the target is labels (B,)."""
    return F.cross_entropy(found.float(), target) if target.ndim == 1 else (found.float() - target).abs().mean()


def guided(model: nn.Module, x_adv: Tensor, target: Tensor, generator, *, guide: str) -> tuple[Tensor, dict]:
    """Training step: model.restorer repairs x_adv; its representation in model.classifier is pulled to the clean image's."""
    return loss(represent(model.classifier, model.restorer(x_adv), guide), target), {}


def online(model: nn.Module, x: Tensor, y: Tensor, generator, *, eps: float, steps: int) -> tuple[Tensor, dict]:
    """Training step of the control: LGD's loss on images that PGD finds end to end against the denoiser as it is now, with the true labels."""
    with training.evaluating(model):
        x_adv = pgd(model, x, y, eps=eps, steps=steps, generator=generator)
    with torch.no_grad():
        target = model.classifier(x)
    return loss(model(x_adv), target), {}


def pairs(generator, *, source: Dataset, models: Sequence[nn.Module], classifier: nn.Module, guide: str, images: int, start: int = 0,
          classes: Sequence[int] | None = None, extra: Sequence[str] = EXTRA, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """What `guided` trains on: x_adv (N, C, H, W) of the pool over images start..start+images of `source`, those of `classes` where given, and their
    targets, computed once from the clean images. A function of an (unused) generator, as training.fit wants its data."""
    span = slice(start, start + images)
    x, y = source.images(span), source.y[span]
    x_adv, where = pool(models, x, extra=extra, seed=start)["x_adv"], next(classifier.parameters()).device
    on = torch.isin(y, torch.tensor(classes)) if classes else torch.ones(len(y), dtype=torch.bool)
    x, y, x_adv = x[on], y[on], x_adv[on]
    if guide in ("pixels", "labels"):
        return x_adv, (x if guide == "pixels" else y)
    with training.evaluating(classifier), torch.no_grad():
        return x_adv, torch.cat([represent(classifier, part.to(where), guide).to(x.device) for part in x.split(batch_size)])


def validation(model: nn.Module, *, held: Callable, guide: str, batch_size: int = 500) -> dict[str, float]:
    """Mean loss on pairs held out of the training."""
    x_adv, target = held(None)
    where, total = next(model.parameters()).device, 0.0
    for x, t in zip(x_adv.split(batch_size), target.split(batch_size)):
        total += len(x) * loss(represent(model.classifier, model.restorer(x.to(where)), guide), t.to(where)).item()
    return {"validation": total / len(x_adv)}


def assemble(name: str, classifier: nn.Module, **options) -> nn.Sequential:
    """The defence: `denoiser(name, **options)` as `restorer`, then the frozen `classifier`."""
    return nn.Sequential(OrderedDict(restorer=denoiser(name, **options), classifier=classifier))


def train(name: str, classifier: nn.Module, models: Sequence[nn.Module], source: Dataset, *, label: str, images: int, held: int, epochs: int,
          widths: Sequence[int] = WIDTHS["small"], classes: Sequence[int] | None = None, extra: Sequence[str] = EXTRA,
          batch_size: int = 128, lr: float = 1e-3, seed: int = 0, progress: bool = True) -> tuple[nn.Module, dict]:
    """The defence of a name of GUIDES before `classifier`, which also guides it, trained on the first `images` of `source` (Adam, lr, a tenth
    after two thirds), watched on the last `held`, cached by training.load_or_fit. models: the three that the pool attacks. Returns (model, info);
    ValueError where the two sets of images would overlap."""
    if images + held > len(source):
        raise ValueError(f"{images} images for training and {held} held out overlap: {source.name!r} has {len(source)}")
    guide, (mean, std) = GUIDES[name], source.mean_std()
    common = {"source": source, "models": list(models), "classifier": classifier, "guide": guide, "classes": classes, "extra": list(extra)}
    build = partial(assemble, name, classifier, channels=source.shape[0], widths=list(widths), mean=mean, std=std)
    watch = partial(validation, held=partial(pairs, images=held, start=len(source) - held, **common), guide=guide)
    return training.load_or_fit(f"hgd-{label}-{name}", build, partial(guided, guide=guide), partial(pairs, images=images, **common), epochs=epochs,
                                batch_size=batch_size, lr=lr, amp=True, evaluate=watch, seed=seed, progress=progress, **FIT)


def train_online(classifier: nn.Module, source: Dataset, *, label: str, images: int, epochs: int, eps: float, steps: int,
                 widths: Sequence[int] = WIDTHS["small"], batch_size: int = 128, lr: float = 1e-3, seed: int = 0,
                 progress: bool = True) -> tuple[nn.Module, dict]:
    """The control: LGD trained by `online` (PGD of so many steps) on the first `images` of `source`, adversarial training of the denoiser alone.
    Returns (model, info)."""
    mean, std = source.mean_std()
    build = partial(assemble, "LGD", classifier, channels=source.shape[0], widths=list(widths), mean=mean, std=std)
    return training.load_or_fit(f"hgd-{label}-online", build, partial(online, eps=eps, steps=steps), source.take(images), epochs=epochs,
                                batch_size=batch_size, lr=lr, seed=seed, progress=progress, **FIT)


# --- what a denoiser does to a perturbation ---------------------------------------------------------------------------------------------------


def cancellation(x: Tensor, x_adv: Tensor, x_hat: Tensor) -> dict[str, float]:
    """Fig. 7's fit over all pixels of dx_hat = x_adv - x_hat against dx = x_adv - x: slope k = sum(dx dx_hat) / sum(dx^2), Pearson's r and the
    residual's standard deviation in 255ths; a perfect denoiser has k = 1, r = 1 and residual 0. ValueError where nothing was perturbed."""
    dx, dx_hat = ((x_adv - other).double().flatten() for other in (x, x_hat))
    if not dx.any():
        raise ValueError("x_adv equals x, so that there is no perturbation to cancel")
    k = (dx @ dx_hat / (dx @ dx)).item()
    r = torch.corrcoef(torch.stack([dx, dx_hat]))[0, 1].nan_to_num().item()
    return {"k": k, "r": r, "residual": 255 * (dx_hat - k * dx).std().item()}


def shares(model: nn.Module, x_adv: Tensor, target: Tensor, *, guide: str, repeats: int = 20) -> dict[str, float]:
    """Milliseconds an image of one training step's forward and backward pass, in the denoiser alone and in the classifier behind it, on the model's
    device, for a batch and in the modes and precision that `train` uses."""
    where = next(model.parameters()).device
    x_adv, target, restorer = x_adv.to(where), target.to(where), copy.deepcopy(model.restorer).train()

    def wait() -> None:
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    def clock(f: Callable[[], Tensor], inputs) -> float:
        times = []
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            with torch.autocast(where.type, torch.bfloat16, enabled=training.fast_bfloat16(where), cache_enabled=False):
                out = f().sum()
            torch.autograd.grad(out, inputs)
            wait()
            times.append(1e3 * (time.perf_counter() - start) / len(x_adv))
        return sorted(times)[repeats // 2]

    z = x_adv.clone().requires_grad_()
    with core.attacking(model.classifier):
        alone = clock(lambda: restorer(x_adv), list(restorer.parameters()))
        behind = 0.0 if guide == "pixels" else clock(lambda: loss(represent(model.classifier, z, guide), target), [z])
    return {"denoiser": alone, "classifier": behind}
