"""How a defence is judged: accuracy with its interval, robustness under one attack, and the ladder, which tries every attack that applies and
keeps the worst answer for each image. An image that the victim misclassifies already counts as wrong and is never attacked.

Rows are plain dicts with the fields of advlab.report.FIELDS, ready for a results file."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from advlab.attacks import core
from advlab.attacks.adaptive import bpda, eot, smooth
from advlab.attacks.blackbox import square, transfer
from advlab.attacks.core import Model, dlr_or_margin, margin
from advlab.attacks.ensemble import apgd_targets, fmn_targets, predict
from advlab.attacks.gradient import apgd, pgd


@dataclass(frozen=True)
class Budget:
    """How much an evaluation may spend: images judged, steps and restarts of PGD, EOT samples, queries an image."""

    images: int
    steps: int
    restarts: int
    samples: int
    queries: int


BUDGETS = {
    "smoke": Budget(24, 5, 1, 2, 20),
    "quick": Budget(64, 20, 1, 5, 200),
    "standard": Budget(200, 100, 2, 20, 1000),
    "paper": Budget(1000, 200, 5, 50, 5000),
}


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share of correct out of n, 95 % by default (Wilson 1927). ValueError unless 0 <= correct <= n and n >= 1."""
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"an interval needs n of at least 1 and 0 <= correct <= n, got {correct} of {n}")
    p, z2 = correct / n, z * z
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == n else middle + half)


def judge(victim: Model, x: Tensor, y: Tensor, *, draws: int = 1, batch_size: int = 256) -> Tensor:
    """(draws, B) bool: which images a victim gets right in each of several passes; one pass is enough for a deterministic one."""
    return torch.stack([predict(victim, x, batch_size).argmax(1) == y for _ in range(draws)])


def score(right: Tensor) -> dict:
    """The judgement (draws, B) as row fields: value is the accuracy, with its Wilson interval. Several draws: their mean accuracy, its spread
    (standard deviation over draws) and the accuracy of the majority vote; `correct` is then left empty."""
    draws, n = right.shape
    total = right.double().mean(1)
    low, high = wilson(min(total.mean().item() * n, n), n)
    row = {"n": n, "correct": int(right.sum()) if draws == 1 else None, "value": total.mean().item(), "unit": "accuracy", "low": low, "high": high}
    if draws > 1:
        majority = right.double().mean(0) > 0.5
        row |= {"draws": draws, "spread": total.std().item(), "majority": majority.double().mean().item()}
    return row


def pooled(right: Sequence[Tensor]) -> dict:
    """How a system fares under several attacks on the same images, as row fields: `score` of the judgements (1, B), one for each attack. The
    value is the mean over the attacks and n the number of images, as two attacks on one image are not two draws; `pooled_attacks` counts them."""
    fields = score(torch.cat(list(right)))
    return {k: v for k, v in fields.items() if k not in ("draws", "spread", "majority")} | {"pooled_attacks": len(right)}


def accuracy(victim: Model, x: Tensor, y: Tensor, *, draws: int = 1, batch_size: int = 256) -> dict:
    """Accuracy on images (B, C, H, W) in [0, 1], as the row fields of `score`."""
    core.check_images(x, y)
    return score(judge(victim, x, y, draws=draws, batch_size=batch_size))


def craft(victim: Model, attack: Callable, x: Tensor, y: Tensor, *, surrogate: Model | None = None, draws: int = 1, batch_size: int = 256,
          targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Attack the images that the victim gets right in any of its draws. Returns the images (B, C, H, W), the judgement of them (draws, B), in which
    with a single draw images that were wrong already stay wrong (several draws are fresh ones, as those before were), and the share of draws that
    were right before the attack, (B,).

    surrogate is what the attacker differentiates, by default the victim itself. targets (B,): a targeted attack, judged by whether the label still
    wins; ValueError where a target equals its label, or an attack leaves [0, 1]."""
    core.check_images(x, y)
    if targets is not None and (targets == y).any():
        raise ValueError(f"a target equals its label at image {int((targets == y).nonzero()[0])}; draw targets with random_targets")
    before = judge(victim, x, y, draws=draws, batch_size=batch_size).double().mean(0)
    index, x = before.nonzero().squeeze(1), x.detach()
    out = x.clone()
    for part in _parts(index, batch_size):
        out[part] = attack(victim if surrogate is None else surrogate, x[part], (y if targets is None else targets)[part])
        _check_range("given", out[part])
    right = judge(victim, out, y, draws=draws, batch_size=batch_size)
    return out, right & (before > 0) if draws == 1 else right, before


def _check_range(name: str, x_adv: Tensor) -> None:
    low, high = torch.stack(x_adv.aminmax()).tolist()
    if not (low >= 0 and high <= 1):  # NaN would count as a fall
        raise ValueError(f"the attack {name!r} gave pixels from {low:g} to {high:g}, outside [0, 1]: it must clip, and give no NaN")


def _parts(index: Tensor, size: int) -> tuple[Tensor, ...]:
    return index.split(size) if len(index) else ()


def robustness(victim: Model, attack: Callable, x: Tensor, y: Tensor, *, surrogate: Model | None = None, draws: int = 1, batch_size: int = 256,
               targets: Tensor | None = None) -> dict:
    """Accuracy under attack, as row fields: those of `score`, the share right before (`clean`), the largest l_inf and the mean l2 change over
    the attacked images, and seconds. Options as in `craft`."""
    start = time.perf_counter()
    x_adv, right, before = craft(victim, attack, x, y, surrogate=surrogate, draws=draws, batch_size=batch_size, targets=targets)
    delta = (x_adv - x)[before > 0].flatten(1)
    linf, l2 = (delta.abs().max().item(), delta.norm(dim=1).mean().item()) if len(delta) else (0.0, 0.0)
    return score(right) | {"clean": before.mean().item(), "linf": linf, "l2": l2, "seconds": round(time.perf_counter() - start, 3)}


def random_targets(y: Tensor, classes: int, *, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly drawn wrong class for each label, (B,)."""
    generator = core.default_generator(y, generator)
    return (y + torch.randint(1, classes, y.shape, generator=generator, device=generator.device).to(y.device)) % classes


# --- the ladder ------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What an adversary knows of a defence beyond its logits. Everything is optional; what is missing leaves out the rungs that need it.

    classifier: the undefended classifier, attacked by one who does not know the defence. restorer: with classifier, the defence is
    classifier(restorer(x)), which BPDA takes apart. surrogates: models to transfer from, robust ones too. random: the defence draws at
    random, per_call: once a pass and not once an image. paper: the paper's own white-box attacks, name to function of (model, x, y); adaptive:
    further ones made for this defence. differentiable=False leaves out end-to-end gradients."""

    classifier: nn.Module | None = None
    restorer: nn.Module | None = None
    surrogates: Sequence[nn.Module] = ()
    random: bool = False
    per_call: bool = False
    differentiable: bool = True
    paper: Mapping[str, Callable] = field(default_factory=dict)
    adaptive: Mapping[str, Callable] = field(default_factory=dict)


@dataclass(frozen=True)
class Ladder:
    """rows: one for each rung, then the worst case. standing (B,): images that no attack felled. x_adv: the image that did, or that
    fooled a random defence most often, or x. fell_to: the rung that felled each image ("clean" where it was wrong before, "" where it stands)."""

    rows: list[dict]
    standing: Tensor
    x_adv: Tensor
    fell_to: list[str]


BLACK = ("transfer", "query")


def rungs(defence: Model, parts: Parts, budget: Budget, *, eps: float, norm: str = "linf",
          generator: torch.Generator | None = None) -> list[tuple[str, str, Callable, Model | None]]:
    """The attacks that apply, cheapest and weakest first: (threat, name, attack, surrogate)."""
    def strong(loss=core.cross_entropy):
        keep = "last" if parts.random else "first"  # or an image would leave at the first lucky draw
        return partial(pgd, eps=eps, norm=norm, steps=budget.steps, restarts=budget.restarts, loss=loss, keep=keep, generator=generator)

    def averaged(model: Model) -> Model:
        return eot(model, budget.samples, apart=parts.per_call) if parts.random else model

    steps: list[tuple[str, str, Callable, Model | None]] = []
    if parts.classifier is not None:
        steps.append(("oblivious", "pgd", partial(pgd, eps=eps, norm=norm, steps=budget.steps, generator=generator), parts.classifier))
    steps += [("paper", name, attack, None) for name, attack in parts.paper.items()]
    steps += [("adaptive", name, attack, None) for name, attack in parts.adaptive.items()]
    if parts.random and parts.differentiable:
        steps += [("end to end", "pgd-ce x1", strong(), defence)]
    if parts.differentiable:
        steps += [("end to end", "pgd-ce", strong(), averaged(defence)), ("end to end", "pgd-margin", strong(margin), averaged(defence))]
    if parts.restorer is not None and parts.classifier is not None:
        identity = averaged(bpda(parts.restorer, parts.classifier))
        steps += [("bpda", "pgd-ce identity", strong(), identity), ("bpda", "pgd-margin identity", strong(margin), identity)]
    if parts.differentiable and isinstance(defence, nn.Module) and any(isinstance(m, nn.ReLU) for m in defence.modules()):
        steps.append(("bpda", "pgd-ce smooth", strong(), averaged(bpda(defence, nn.Identity(), smooth(defence)))))  # judged by the defence itself
    if parts.differentiable:
        common = {"eps": eps, "norm": norm, "steps": min(100, budget.steps), "generator": generator}
        steps.append(("autoattack", "apgd-ce", partial(apgd, **common), averaged(defence)))
        if parts.random:
            steps.append(("autoattack", "apgd-dlr", partial(apgd, loss=dlr_or_margin, **common), averaged(defence)))
        else:
            steps += [("autoattack", "apgd-t", partial(apgd_targets, **common), defence),
                      ("autoattack", "fmn", partial(fmn_targets, eps=eps, norm=norm, steps=common["steps"]), defence)]
    sources = {str(i): [surrogate] for i, surrogate in enumerate(parts.surrogates, 1)}
    sources |= {"all": list(parts.surrogates)} if len(sources) > 1 else {}
    crafted = partial(transfer, eps=eps, norm=norm, steps=budget.steps, generator=generator)
    steps += [("transfer", f"mim-di from {name}", partial(crafted, surrogates=some), None) for name, some in sources.items()]
    steps.append(("query", "square", partial(square, eps=eps, norm=norm, queries=budget.queries, generator=generator), averaged(defence)))
    return steps


def ladder(defence: Model, parts: Parts, budget: Budget, x: Tensor, y: Tensor, *, eps: float, norm: str = "linf", drop: bool = True,
           system: str = "defence", seed: int = 0, batch_size: int = 256, draws: int = 10, exhibit: str = "ladder",
           watch: Callable[[Ladder], None] | None = None) -> Ladder:
    """Climb the rungs that apply to a defence on the first budget.images of x (B, C, H, W), and keep the worst answer for each image.

    drop=True attacks only the images that still stand, and each row's value is the accuracy left after its rung; `tried` and `fell` count its
    own work. drop=False lets every rung face all images, so that a row's value is that attack's own strength, `worst` the accuracy left. A random
    defence (parts.random) stands where the majority of `draws` fresh draws is right; an image is attacked as long as any of them is, the attack that
    leaves it the fewest right answers is kept, and the last row is the mean accuracy over fresh draws of those. `watch` is shown the ladder as it
    stands after each rung. ValueError where an attack leaves the ball or the range [0, 1]."""
    core.check_images(x, y)
    core.check_mode(defence)
    x, y = x[: budget.images], y[: budget.images]
    draws = draws if parts.random else 1

    def share(images: Tensor, labels: Tensor) -> Tensor:
        return judge(defence, images, labels, draws=draws, batch_size=batch_size).double().mean(0)

    generator = torch.Generator(x.device).manual_seed(seed)
    least = share(x, y)  # of the draws that answer right, over all rungs
    clean, open_to = least > 0.5, least > 0
    standing, worst, fell_to = clean.clone(), x.clone(), ["" if ok else "clean" for ok in clean.tolist()]
    base = {"exhibit": exhibit, "system": system, "norm": norm, "eps": eps, "seed": seed, "paper": None}
    rows = [base | {"threat": "none", "attack": "clean", "eps": 0.0, "steps": 0, "rung": 0} | accuracy(defence, x, y, draws=draws)]
    for number, (threat, name, attack, model) in enumerate(rungs(defence, parts, budget, eps=eps, norm=norm, generator=generator), 1):
        start, index = time.perf_counter(), (least > 0 if drop else open_to).nonzero().squeeze(1)
        own, stood = clean.clone(), standing.clone() if drop else clean
        for part in _parts(index, batch_size):
            x_adv = attack(defence if model is None else model, x[part], y[part])
            delta = (x_adv - x[part]).flatten(1)
            moved = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
            if not moved[i := int(moved.argmax())] <= eps * 1.0001 + 1e-6:  # NaN fails too
                raise ValueError(f"attack {name!r} moved image {int(part[i])} by {moved[i]:.4g} in {norm}, beyond eps = {eps:g}: it must project")
            _check_range(name, x_adv)
            right = share(x_adv, y[part])
            own[part] = up = right > 0.5
            lower = right < least[part]
            worst[part[lower]], least[part[lower]] = x_adv[lower], right[lower]
            new = part[~up & standing[part]]
            standing[new] = False
            for i in new.tolist():
                fell_to[i] = f"{threat}: {name}"
        kept = standing if drop else own
        row = score(kept[None]) | {"worst": standing.double().mean().item(), "tried": len(index), "fell": int((stood & ~kept).sum())}
        spent = {} if threat in ("paper", "adaptive") else attack.keywords  # those bring their own
        steps = spent.get("queries", spent.get("steps"))
        rows.append(base | {"threat": threat, "attack": name, "steps": steps, "rung": number} | row
                    | {"seconds": round(time.perf_counter() - start, 3)})
        if watch is not None:
            watch(Ladder(rows, standing, worst, fell_to))
    final = judge(defence, worst, y, draws=draws, batch_size=batch_size) if parts.random else standing[None]
    rows.append(base | {"threat": "worst case", "attack": "all", "steps": budget.steps, "rung": len(rows)} | score(final)
                | {"worst": standing.double().mean().item()})
    return Ladder(rows, standing, worst, fell_to)
