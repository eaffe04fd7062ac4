"""Several attacks as one: the per-image worst case, and AutoAttack (Croce and Hein, arXiv 2003.01690)."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from advlab.attacks import core
from advlab.attacks.adaptive import eot
from advlab.attacks.blackbox import square
from advlab.attacks.core import Model, cross_entropy, dlr_or_margin, margin
from advlab.attacks.gradient import apgd
from advlab.attacks.minimal import fmn

Attack = Callable[..., Tensor]


def predict(model: Model, x: Tensor, batch_size: int = 256) -> Tensor:
    """Logits (B, L) of images (B, C, H, W), without a graph, batch_size at a time."""
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(batch_size)])


def strongest(model: Model, x: Tensor, y: Tensor, *, attacks: Mapping[str, Attack], batch_size: int = 256, targeted: bool = False,
              trace: list | None = None) -> Tensor:
    """The per-image worst case of several attacks, (B, C, H, W): each runs only on the images that the ones before left standing.

    An image that the model misclassifies already comes back unchanged. attacks maps names to functions of (model, x, y); `trace`, a
    list, gets one (name, images tried, images that fell) for each of them."""
    core.check_images(x, y)
    core.check_mode(model)
    if not attacks:
        raise ValueError("no attack was given; pass attacks={'pgd': partial(pgd, eps=8 / 255)}")
    x = x.detach()
    out, logits = x.clone(), predict(model, x, batch_size)
    core.check_logits(logits, x, y)
    alive = (~core.fooled(logits, y, targeted)).nonzero().squeeze(1)
    for name, attack in attacks.items():
        if not len(alive):
            break
        x_adv = torch.cat([attack(model, x[part], y[part]) for part in alive.split(batch_size)])
        fell = core.fooled(predict(model, x_adv, batch_size), y[alive], targeted)
        out[alive[fell]] = x_adv[fell]
        if trace is not None:
            trace.append((name, len(alive), int(fell.sum())))
        alive = alive[~fell]
    return out


def autoattack(model: Model, x: Tensor, y: Tensor, *, eps, norm: str = "linf", version: str = "standard", steps: int = 100,
               targets: int = 9, queries: int = 5000, samples: int = 20, batch_size: int = 256, trace: list | None = None,
               targeted: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """AutoAttack without parameters to tune; every stage runs only on the images that still stand.

    version="standard": APGD-CE, APGD-T towards the `targets` likeliest wrong classes, a minimal-norm stage and Square with `queries`.
    The minimal-norm stage is FMN, which serves as the equal of FAB (see advlab.attacks.minimal.fmn); benchmarks/strength.py compares the
    two. version="rand", for random defences: APGD-CE and APGD-DLR on the mean logits of `samples` draws. norm is "linf" or "l2", eps one
    number; untargeted only. `trace` as for `strongest`."""
    core.check_choice("version", version, ("standard", "rand"))
    if targeted:
        raise ValueError("autoattack is untargeted; for a targeted attack use apgd(..., targeted=True)")
    core.check_images(x, y)
    core.check_budget(eps, x)
    if torch.as_tensor(eps).ndim:
        raise ValueError("autoattack takes one eps for the whole batch; run it once for each budget")
    generator = core.default_generator(x, generator)
    common = {"norm": norm, "generator": generator}
    if version == "rand":
        model = eot(model, samples)
        stages = {"apgd-ce": partial(apgd, steps=steps, loss=cross_entropy, **common),
                  "apgd-dlr": partial(apgd, steps=steps, loss=dlr_or_margin, **common)}
    else:
        stages = {"apgd-ce": partial(apgd, steps=steps, loss=cross_entropy, **common),
                  "apgd-t": partial(apgd_targets, steps=steps, targets=targets, **common),
                  "fmn": partial(fmn_targets, steps=steps, targets=targets, norm=norm),
                  "square": partial(square, queries=queries, **common)}
    stages = {name: partial(stage, eps=eps) for name, stage in stages.items()}
    return strongest(model, x, y, attacks=stages, batch_size=batch_size, trace=trace)


def apgd_targets(model: Model, x: Tensor, y: Tensor, *, eps, targets: int = 9, generator: torch.Generator | None = None,
                 **options) -> Tensor:
    """APGD-T: apgd towards the likeliest wrong class, then the next for the images that still stand, `targets` of them.

    With fewer than four classes, for which the targeted difference of logits ratio is not defined, the margin is used instead."""
    core.check_mode(model)
    generator = core.default_generator(x, generator)
    if predict(model, x[:1]).shape[1] < 4:
        return apgd(model, x, y, eps=eps, loss=margin, generator=generator, **options)

    def attack(x: Tensor, y: Tensor, target: Tensor, eps: Tensor) -> Tensor:
        return apgd(model, x, y, eps=eps, targets=target, generator=generator, **options)

    return _one_class_after_another(attack, model, x, y, targets, eps)


def fmn_targets(model: Model, x: Tensor, y: Tensor, *, eps: float, targets: int = 9, norm: str = "linf", steps: int = 100) -> Tensor:
    """The minimal-norm stage of autoattack: fmn towards the likeliest wrong classes in turn, as FAB-T (arXiv 1907.02044) does, for the images
    that still stand. Answers further away than eps come back as the image itself."""
    core.check_mode(model)

    def attack(x: Tensor, y: Tensor, target: Tensor, eps: Tensor) -> Tensor:
        x_adv = fmn(model, x, target, steps=steps, norm=norm, targeted=True)
        delta = (x_adv - x).flatten(1)
        near = (delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)) <= eps * (1 + 1e-6)
        return torch.where(core.rows(near), core.project(x_adv, x, core.check_budget(eps, x), norm), x)

    return _one_class_after_another(attack, model, x, y, targets, eps)


def _one_class_after_another(attack: Attack, model: Model, x: Tensor, y: Tensor, targets: int, eps: float | Tensor) -> Tensor:
    x = x.detach()
    logits, out, eps = predict(model, x), x.clone(), core.check_budget(eps, x).flatten()
    ranked = core.others(logits, y).argsort(1, descending=True)
    alive = torch.arange(len(x), device=x.device)
    for k in range(min(targets, logits.shape[1] - 1)):
        out[alive] = attack(x[alive], y[alive], ranked[alive, k], eps[alive])
        alive = alive[~core.fooled(predict(model, out[alive]), y[alive])]
        if not len(alive):
            break
    return out
