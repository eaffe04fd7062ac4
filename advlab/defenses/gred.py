"""GRED: a detector that reads pixels and input sensitivity, and a rectifier for what it flags (Li, Wang, Wu and Zhou, arXiv 2002.12527).

Input sensitivity (InSen) is S = |d CE(f(x), argmax f(x)) / dx|. Two binary CNNs, on the image and on S, are trained on pairs of a clean and an
adversarial image; the one whose answer has the lower entropy speaks (eqs. 8-12). Flagged images go to f_rec, a copy of f fine-tuned on adversarial
images whose most sensitive pixels were replaced at random (eqs. 13-14), the others to f. What the paper leaves silent, and what was chosen:
- Pairs are images that f gets right and whose attack succeeds after rounding to 8 bits, with their clean sources: its Table 7, where f alone has
  exactly 0 and 50 %, forces this reading. Splits are by source. The last epoch is kept; the accuracy on a spared tenth is only logged.
- The detectors see S on a fixed logarithmic scale, 0 at 1e-12 and 1 at 1, never normalised by image, since its size is the signal.
- alpha of eq. 13 is a threshold, and masks less the larger it is, yet text and Fig. 5 treat it as a masking rate: `suspects` has both, the rate is
  the default. Random values have mean and deviation of the image over all channels and replace a suspect with probability 1/2.
- Both are trained with a weight decay of 5e-4.
- Its untargeted white box is "a two-stage scheme" without details: `two_stage`.
- f_rec answers with the mean softmax over 10 fresh masks. DET_sal (Zhang et al. 2018) is our reading: |gradient| of the predicted logit at stages 2
  and 4 of f, mean over channels, stacked with the image."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab import paths, training
from advlab.attacks import core, cw, ddn, deepfool, fgsm, pgd
from advlab.attacks.adaptive import aware, bpda, rejecting, straight_through, undetected
from advlab.attacks.core import Loss, Model, rows
from advlab.attacks.ensemble import predict
from advlab.checkpoints import describe, fingerprint, seal, trusted, unseal, write
from advlab.gradients import log_odds_gradient, log_sensitivity
from advlab.models import classifier, features


def attacks(*, eps: float, steps: int, step_size: float | None = None, search: int = 5, cw_steps: int = 100, c: float = 0.1, ddn_steps: int = 100,
            dfool_steps: int = 50) -> dict[str, Callable]:
    """The paper's eight attacks by name; those that end in -T take the class to reach in place of the label. eps is the l_inf budget in [0, 1]."""
    out = {"FGSM-U": partial(fgsm, eps=eps), "DeepFool-U": partial(deepfool, steps=dfool_steps),
           "PGD-U": partial(pgd, eps=eps, steps=steps, step_size=step_size), "CW-U": partial(cw, search_steps=search, steps=cw_steps, c=c),
           "DDN-U": partial(ddn, steps=ddn_steps)}
    return out | {f"{name}-T": partial(out[f"{name}-U"], targeted=True) for name in ("PGD", "CW", "DDN")}


@dataclass(frozen=True)
class Pairs:
    """Successful attacks with their sources: x, x_adv (8-bit) and raw (as the attack gave it) (n, C, H, W), y and `index`, the place among the
    images offered, (n,); how many images that f gets right were tried, and how many of those fell."""

    x: Tensor
    x_adv: Tensor
    raw: Tensor
    y: Tensor
    index: Tensor
    tried: int
    fell: int


def round8(x: Tensor) -> Tensor:
    """The nearest image that eight bits can hold."""
    return (x * 255).round() / 255


def pairs(f: Model, x: Tensor, y: Tensor, attack: Callable, n: int, *, targets: Tensor | None = None) -> Pairs:
    """Up to n pairs of images x (B, C, H, W) in [0, 1] with labels y, in order: f is right on x and, after rounding to 8 bits, wrong on x_adv
    (given targets (B,): answers the target). Images are tried n / 4 at a time until n are found; ValueError where there is none."""
    found, tried, aim = [], 0, y if targets is None else targets
    for part in torch.arange(len(x), device=x.device).split(max(32, n // 4)):
        part = part[predict(f, x[part]).argmax(1) == y[part]]
        raw = attack(f, x[part], aim[part]) if len(part) else x[part]
        hit = core.fooled(predict(f, round8(raw)), aim[part], targets is not None)
        tried += len(part)
        found.append((x[part[hit]], round8(raw[hit]), raw[hit], y[part[hit]], part[hit]))
        if sum(len(row[0]) for row in found) >= n:
            break
    columns = [torch.cat(column) for column in zip(*found)]
    if not len(columns[0]):
        raise ValueError(f"the attack fooled f on none of {tried} images; give it more images or a larger budget")
    return Pairs(*(v[:n] for v in columns), tried, len(columns[0]))


def crafted(f: nn.Module, x: Tensor, y: Tensor, tries: Mapping[str, Callable], n: int, *, targets: Tensor, folder=None) -> dict[str, Pairs]:
    """`pairs` by each attack, those whose names end in -T with targets (B,), kept in data/checkpoints (or folder) under a name that the whole
    configuration, network and images included, determines."""
    out = {}
    for name, attack in tries.items():
        given = {"f": f, "x": x, "y": y, "attack": attack, "n": n, "targets": targets if name.endswith("-T") else None}
        path = (folder or paths.checkpoints()) / f"pairs-{name}-{(key := fingerprint(describe(given)))[:12]}.pt"
        if (state := trusted(partial(unseal, path, key), path)) is None:
            state = {"key": key, **vars(pairs(**given))}
            write(path, seal({k: v.cpu().contiguous() if isinstance(v, Tensor) else v for k, v in state.items()}))
        out[name] = Pairs(**{k: v.to(x.device) if isinstance(v, Tensor) else v for k, v in state.items() if k != "key"})
    return out


def pooled(every: Sequence[Pairs], n: int, *, seed: int = 0) -> Pairs:
    """The pairs of several attacks on the same images, in the order of their sources, thinned to n of them drawn at random, whatever the attack."""
    columns = [torch.cat(column) for column in zip(*((p.x, p.x_adv, p.raw, p.y, p.index) for p in every))]
    order = columns[4].argsort(stable=True)
    if n < len(order):
        kept = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        order = order[kept.to(order.device)]
    return Pairs(*(v[order] for v in columns), sum(p.tried for p in every), sum(p.fell for p in every))


def insen(f: nn.Module, x: Tensor, *, raw: float | None = None) -> Tensor:
    """The detectors' view of S, like x: clip((log10(S + 1e-12) + 12) / 12, 0, 1), differentiable; with `raw`, S times that constant, clipped."""
    s = math.log(10) * log_sensitivity(f, x, create_graph=torch.is_grad_enabled())
    if raw is not None:
        return (raw * s.exp()).clamp(0, 1)
    return (torch.logaddexp(s, s.new_tensor(-12 * math.log(10))) / math.log(10) / 12 + 1).clamp(0, 1)


def saliency(f: nn.Module, x: Tensor, *, layers: Sequence[str] = ("layer1", "layer3")) -> Tensor:
    """DET_sal's view: the image with the gradient sizes of its predicted logit at the layers, on InSen's scale, (B, C + 2, H, W); no gradient."""
    with core.attacking(f):
        seen = features(f, x.detach().requires_grad_(), [*layers, "logits"])
        grads = torch.autograd.grad(seen.pop("logits").amax(1).sum(), list(seen.values()))
    maps = [F.interpolate(g.abs().mean(1, keepdim=True), x.shape[2:], mode="bilinear") for g in grads]
    return torch.cat([x, *(((m + 1e-12).log10() / 12 + 1).clamp(0, 1) for m in maps)], 1)


VIEWS = {"org": lambda f, x: x, "IS": insen, "sal": saliency, "S": partial(insen, raw=1.0)}


class Detector(nn.Module):
    """A binary CNN on a view of the image by f ("org", "IS", "sal", or "S", InSen without its logarithm): (B, C, H, W) to logits (B, 2) of benign and
    adversarial."""

    def __init__(self, kind: str, f: nn.Module, net: nn.Module):
        super().__init__()
        self.kind, self.f, self.net = kind, f, net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(VIEWS[self.kind](self.f, x))


def load_or_fit_detector(name: str, kind: str, f: nn.Module, data: Pairs, *, arch: str, width: int, epochs: int, **options) -> tuple[Detector, dict]:
    """The Detector trained on pairs, and its record: Adam at 1e-3, a tenth of it for the last third of the epochs; the last tenth of the sources
    is spared and its accuracy logged."""
    core.check_choice("kind", kind, tuple(VIEWS))
    sources = data.index.unique()
    spared = data.index > sources[round(0.9 * len(sources)) - 1]
    images = [torch.cat([data.x[part], data.x_adv[part]]) for part in (~spared, spared)]
    seen = [predict(partial(VIEWS[kind], f), v) if len(v) else v for v in images]
    labels = [torch.arange(2, device=v.device).repeat_interleave(len(v) // 2) for v in images]
    build = partial(classifier, arch, num_classes=2, channels=seen[0].shape[1], width=width, **({"batch_norm": True} if arch == "vgg11" else {}))
    watch = {"evaluate": partial(_validation, x=seen[1], y=labels[1])} if len(seen[1]) else {}
    net, info = training.load_or_fit(name, build, training.standard, (seen[0], labels[0]), epochs=epochs, optimizer="adam", schedule="milestones",
                                     milestones=(2 / 3,), amp=False, **watch, **options)
    return Detector(kind, f, net).eval(), info


def _validation(model: nn.Module, *, x: Tensor, y: Tensor) -> dict[str, float]:
    return {"validation": (predict(model, x).argmax(1) == y).double().mean().item()}


def entropy(logits: Tensor) -> Tensor:
    """The entropy in bits, (B,), of softmax(logits) (B, 2), probabilities clamped to [1e-7, 1 - 1e-7] (eq. 11)."""
    p = logits.softmax(1).clamp(1e-7, 1 - 1e-7)
    return -(p * p.log2()).sum(1)


def select(org: Tensor, sen: Tensor) -> Tensor:
    """The logits (B, 2) of the branch with the lower entropy, InSen's where they tie (eq. 12)."""
    return torch.where((entropy(org) < entropy(sen))[:, None], org, sen)


class Suspicion(nn.Module):
    """x -> (B,): the log-odds that an image is adversarial, flagged above 0, of the only branch given or of the one that `select` lets speak.

    slack: the attacker's form, sum over branches of relu(log-odds + slack), less 1e-6. It is below 0 only where every branch is sure by `slack`
    that the image is benign, which no selection can then flag, and its gradient never loses sight of a branch."""

    def __init__(self, *branches: nn.Module, slack: float | None = None):
        super().__init__()
        self.branches, self.slack = nn.ModuleList(branches), slack

    def forward(self, x: Tensor) -> Tensor:
        return self.weigh([branch(x) for branch in self.branches], slack=self.slack)

    @staticmethod
    def weigh(logits: Sequence[Tensor], *, slack: float | None = None) -> Tensor:
        """What the branches' logits, each (B, 2), come to."""
        if slack is not None:
            return sum(F.relu(z[:, 1] - z[:, 0] + slack) for z in logits) - 1e-6
        z = logits[0] if len(logits) == 1 else select(*logits)
        return z[:, 1] - z[:, 0]


def suspects(s: Tensor, *, rate: float | None = None, alpha: float | None = None) -> Tensor:
    """Which elements of S (B, C, H, W), or of a positive multiple of it, are suspect, bool: the share `rate` of largest ones in each image, or
    those above alpha (max - min) + min (eq. 13). ValueError unless one of rate and alpha is given, within [0, 1]."""
    level = alpha if rate is None else rate
    if (rate is None) == (alpha is None) or not 0 <= level <= 1:
        raise ValueError(f"give either rate or alpha, between 0 and 1; got rate={rate} and alpha={alpha}")
    flat = s.flatten(1)
    if rate is None:
        low, high = flat.aminmax(dim=1, keepdim=True)
        return (flat > alpha * (high - low) + low).view_as(s)
    top = flat.argsort(dim=1, descending=True, stable=True)[:, : round(rate * flat.shape[1])]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, top, True).view_as(s)


def randomise(x: Tensor, mask: Tensor, generator: torch.Generator, *, p: float = 0.5) -> Tensor:
    """x (B, C, H, W) with each masked element replaced, with probability p, by a draw of its image's mean and deviation, in 8 bits (eq. 14)."""
    mean, std = (rows(v) for v in (x.detach().flatten(1).mean(1), x.detach().flatten(1).std(1)))
    draw = round8((mean + std * core.gaussian(x, generator)).clamp(0, 1))
    return torch.where(mask & (core.uniform(x, generator) < 2 * p - 1), draw, x)


def mask_of(f: nn.Module, x: Tensor, **how) -> Tensor:
    """The suspects of images x under f. The confidence factor of S, common to all pixels, is left out, so that it cannot underflow."""
    return suspects(log_odds_gradient(f, x)[2].abs(), **how)


def rectify(model, x, y, generator, *, copies: int = 4, p: float = 0.5):
    """Training step of f_rec: cross-entropy on `copies` fresh randomisations of each image. x holds images and masks, (B, 2C, H, W)."""
    image, mask = x.repeat_interleave(copies, 0).chunk(2, 1)
    return training.standard(model, randomise(image, mask > 0.5, generator, p=p), y.repeat_interleave(copies), generator)


def load_or_fit_rectifier(name: str, f: nn.Module, data: Pairs, *, rate: float = 0.4, copies: int = 4, epochs: int = 10,
                          **options) -> tuple[nn.Module, dict]:
    """f_rec: a copy of f fine-tuned by `rectify`, SGD at 1e-3, on the adversarial images of `data`, and its record."""
    masks = torch.cat([mask_of(f, part, rate=rate) for part in data.x_adv.split(256)]).to(data.x_adv)
    start, images = copy.deepcopy(f).requires_grad_(True), torch.cat([data.x_adv, masks], 1)
    return training.load_or_fit(name, start, partial(rectify, copies=copies), (images, data.y),
                                epochs=epochs, lr=1e-3, schedule="constant", amp=False, **options)


class Recover(nn.Module):
    """The flagged path, (B, C, H, W) to (B, L): log of f_rec's mean softmax over `copies` fresh masks, from its own generator, of the suspects
    under f. Masks are constants in the backward pass; through=True passes the gradient to replaced pixels too (straight through)."""

    def __init__(self, f: nn.Module, rectifier: nn.Module, *, rate: float = 0.4, copies: int = 10, seed: int = 0, through: bool = False):
        super().__init__()
        self.f, self.rectifier, self.rate, self.copies, self.through = f, rectifier, rate, copies, through
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        many, mask = x.repeat_interleave(self.copies, 0), mask_of(self.f, x, rate=self.rate).repeat_interleave(self.copies, 0)
        masked = randomise(many, mask, self.generator)
        z = self.rectifier(many + (masked - many).detach() if self.through else masked)
        return z.log_softmax(1).unflatten(0, (len(x), self.copies)).logsumexp(1) - math.log(self.copies)


class GRED(nn.Module):
    """The whole pipeline, (B, C, H, W) to logits (B, L): f's where suspicion(x) <= 0, recover's where the image is flagged."""

    def __init__(self, f: nn.Module, suspicion: nn.Module, recover: nn.Module):
        super().__init__()
        self.f, self.suspicion, self.recover = f, suspicion, recover

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            at = (self.suspicion(x) > 0).nonzero().squeeze(1)
        return self.f(x).index_put((at,), self.recover(x[at])) if len(at) else self.f(x)


class Pressed(nn.Module):
    """x -> (B, L + 2), f and a Suspicion as an attacker sees them: the logits, the attacker's form of the suspicion, which a loss can press down,
    and the suspicion itself, which `passing` judges by. backward: other branches, whose derivative stands in for that of the attacker's form."""

    def __init__(self, f: nn.Module, suspicion: Suspicion, *, slack: float = 0.1, backward: Suspicion | None = None):
        super().__init__()
        self.f, self.suspicion, self.slack, self.backward = f, suspicion, slack, backward

    def forward(self, x: Tensor) -> Tensor:
        logits = [branch(x) for branch in self.suspicion.branches]
        press = Suspicion.weigh(logits, slack=self.slack)
        if self.backward is not None:
            press = straight_through(press, Suspicion.weigh([branch(x) for branch in self.backward.branches], slack=self.slack))
        return torch.cat([self.f(x), press[:, None], Suspicion.weigh(logits)[:, None]], 1)


def pressing(loss: Loss, **how) -> Loss:
    """`undetected` for `Pressed` models."""
    inner = undetected(loss, **how)
    return lambda out, y: inner(out[:, :-1], y)


def passing(out: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """(B,) bool: the classifier of a `Pressed` model is fooled and its suspicion raises no flag."""
    return core.fooled(out[:, :-2], y, targeted) & (out[:, -1] <= 0)


class Merged(nn.Module):
    """A `rejecting` model of L + 1 classes as one of L, whose class `label` also stands for "flagged": an image that leaves it has another label and
    no flag."""

    def __init__(self, model: nn.Module, label: int):
        super().__init__()
        self.model, self.label = model, label

    def forward(self, x: Tensor) -> Tensor:
        z = self.model(x)
        return z[:, :-1].index_copy(1, torch.tensor([self.label], device=z.device), torch.maximum(z[:, self.label], z[:, -1])[:, None])


def leaving(model: nn.Module, attack: Callable, y: Tensor, *images: Tensor) -> Tensor:
    """An untargeted attack on a `rejecting` model that ends neither in "flagged" nor in the label: attack(model, *images, y), (B, C, H, W), label by
    label on `Merged` models."""
    out = images[0].clone()
    for label in y.unique().tolist():
        at = y == label
        out[at] = attack(Merged(model, label), *(v[at] for v in images), y[at])
    return out


def onwards(model: Model, start: Tensor, x: Tensor, y: Tensor, *, eps: float, steps: int, step_size: float | None = None,
            targeted: bool = False) -> Tensor:
    """l_inf PGD (default step 2.5 eps / steps) from `start`, inside the ball of radius eps round x; an image rests where it fools. n + n passes."""
    budget = core.check_budget(eps, x)
    step, x_t = 2.5 * budget / steps if step_size is None else step_size, core.project(start, x, budget, "linf")
    with core.attacking(model):
        for _ in range(steps):
            logits, _, grad = core.gradient(model, x_t, y, core.cross_entropy)
            moved = core.project(x_t + (-step if targeted else step) * core.steepest(grad, "linf"), x, budget, "linf")
            x_t = torch.where(rows(core.fooled(logits, y, targeted)), x_t, moved)
    return core.finish(x_t)


def bypassed(f: Model, suspicion: Model, x: Tensor, y: Tensor, *, targeted: bool = False) -> Tensor:
    """(B,) bool: f is fooled (targeted: answers y) and no flag is raised, the paper's success in the white box."""
    return core.fooled(predict(f, x), y, targeted) & (predict(suspicion, x) <= 0)


def nearest_passing(f: Model, suspicion: Model, x: Tensor, y: Tensor, answers: Sequence[Tensor], *,
                    targeted: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Several answers for each image, judged in 8 bits: the one nearest to x that passes (see `bypassed`), else the first, (B, C, H, W); whether it
    passes, (B,); whether an answer passes unrounded, (B,)."""
    eight = torch.stack([round8(v) for v in answers])
    won, raw = (torch.stack([bypassed(f, suspicion, v, y, targeted=targeted) for v in group]) for group in (eight, answers))
    far = (eight - x).flatten(2).norm(dim=2).masked_fill(~won, torch.inf)
    return eight[far.argmin(0), torch.arange(len(x), device=x.device)], won.any(0), raw.any(0)


def two_stage(f: nn.Module, suspicion: nn.Module, attack: partial, bare: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The paper's untargeted white box, our reading, (B, C, H, W): from `bare`, the answer to `attack` (one of `attacks`) on f, the same attack goes
    on against f and "flagged" (L + 1 classes, rounded to 8 bits) to the class that f sees in `bare`; where that fails, see `leaving`.

    Minimal-norm attacks look for the image nearest to `bare`, fgsm and pgd stay in the ball round x. DeepFool has no targeted form, and rounding
    would undo its small steps: it first leaves "flagged", unrounded."""
    guarded, seen, options = rejecting(aware(f, suspicion)), predict(f, bare), attack.keywords

    def go(model: nn.Module, start: Tensor, x: Tensor, y: Tensor, **how) -> Tensor:
        if attack.func not in (fgsm, pgd):
            return attack(model, start, y, **how)
        step = options["eps"] if attack.func is fgsm else options.get("step_size")
        return onwards(model, start, x, y, eps=options["eps"], steps=options.get("steps", 1), step_size=step, **how)

    if attack.func is deepfool:
        out = attack(guarded, bare, torch.full_like(y, seen.shape[1]))
    else:
        guarded = bpda(round8, guarded)
        out = go(guarded, bare, x, seen.argmax(1), targeted=True)
    left = ~bypassed(f, suspicion, round8(out), y)
    if left.any():
        out[left] = leaving(guarded, go, y[left], bare[left], x[left])
    return out


def selective(loss: Loss) -> Loss:
    """For `aware` models: the class loss until the image fools the classifier, then minus the flag (selective PGD, arXiv 2106.15023)."""
    return lambda out, y: torch.where(core.fooled(out[:, :-1], y), -out[:, -1], loss(out[:, :-1], y))


def orthogonal_pgd(model: Model, x: Tensor, y: Tensor, *, eps: float, steps: int, norm: str = "linf", loss: Loss = core.cross_entropy) -> Tensor:
    """Orthogonal PGD (Bryniarski et al., arXiv 2106.15023) on an `aware` model: up `loss` while the classifier stands, else down the flag, along
    the gradient of either less its part along the other's. Answers the least suspicious iterate that fools, else x; 1 + 2 passes a step."""
    budget, best, least, x_t = core.check_budget(eps, x), x.clone(), torch.full(x.shape[:1], torch.inf, device=x.device), x.detach()
    with core.attacking(model):
        for t in range(steps + 1):
            out = model(x_t.requires_grad_())
            up = torch.autograd.grad(loss(out[:, :-1], y).sum(), x_t, retain_graph=True)[0]
            down = torch.autograd.grad(-out[:, -1].sum(), x_t)[0]
            x_t, out, fooled = x_t.detach(), out.detach(), core.fooled(out[:, :-1].detach(), y)
            rank = torch.where(fooled, out[:, -1], torch.inf)
            best, least = torch.where(rows(rank < least), x_t, best), torch.minimum(rank, least)
            if t < steps:
                along, other = (torch.where(rows(fooled), a, b) for a, b in ((down, up), (up, down)))
                other = other / core.l2(other).clamp_min(1e-12)
                way = along - other * rows((along * other).flatten(1).sum(1))
                x_t = core.project(x_t + 2.5 * budget / steps * core.steepest(way, norm), x, budget, norm)
    return core.finish(best)
