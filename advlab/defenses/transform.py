"""Adversarial transformation (Xiao and Zheng, arXiv 1911.11219): f_a(g(x)), where g attacks a fixed external model f_b with a large radius Delta.

y_L = argmin f_b(x);  o_0 = Delta u, u ~ U[-1, 1];  o_t = clip(o_(t-1) - eta sign(grad CE(f_b(x + o_(t-1)), y_L)), -Delta, Delta);  g(x) = x + o_N,
N = 13, eta = Delta / 6, Delta = 0.2 (equations 2 and 3). f_a is trained on g(x), drawn anew for every batch (equation 1).

What the paper leaves silent, and what was chosen. g(x) is not clipped to [0, 1] (`clip01` does). The layers of f_b are in an appendix that we do
not have: `models.vgg0`, adversarially trained at 8/255. Table 1's epochs are runs of constant learning rate, which agree on their common epochs. f_b
is stored with batch norm folded into its convolutions and without dropout, so that neither train() nor a training of f_a can change it. Where f_a
trains in bfloat16, g stays in float32. An image's start is a hash of (seed, its number, its pixel), and images are numbered as they
pass through g: a seed gives the same g(x) however a batch is split, and no two passes of one g share a draw (a copy counts on from where it was
made). Training numbers images by its own generator.

Derivatives. The offset o_N is constant in x while no sign and no y_L flips, so that dg/dx is the identity almost everywhere: autograd through
`Transform`, automatic differentiation of the raw loop, and BPDA with the identity (BPDA-I) are one thing. `Unrolled` is the paper's other BPDA."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab import training, zoo
from advlab.attacks import core
from advlab.attacks.adaptive import bpda, smooth, straight_through
from advlab.attacks.ensemble import predict
from advlab.attacks.gradient import pgd
from advlab.checkpoints import describe
from advlab.data import Dataset
from advlab.models import classifier, folded, seeded

STARTS, KINDS = ("random", "fixed", "none", "signs"), ("tanh", "soft sign")
VARIANTS = {  # options of Transform; "repo" is what the released notebook does, but for its drop of the learning rate; "noise", random corners of the
    # ball, is the control that needs no f_b
    "paper": {}, "repo": {"targeted": False, "step": 1 / 10}, "no_start": {"start": "none"}, "fixed_start": {"start": "fixed"},
    "clip01": {"clip01": True}, "noise": {"start": "signs", "steps": 0}}
RELEASED_STEP = 0.003  # of the released attack, in pixels of [0, 1]
ADAM = {"optimizer": "adam", "lr": 3e-3}
RECIPES = {  # f_b: width, PGD steps and settings of its adversarial training; f_a: `warm` epochs on "noise", then `epochs` on g(x), and settings
    "smoke": {"width": 8, "pgd": 1, "at": {"epochs": 1, **ADAM}, "warm": 1, "epochs": 1, "fit": ADAM},
    "quick": {"width": 8, "pgd": 1, "at": {"epochs": 3, **ADAM, "lr": 2e-3}, "warm": 30, "epochs": 1, "fit": {**ADAM, "lr": 6e-3}},
    "standard": {"width": 16, "pgd": 3, "at": {"epochs": 5, **ADAM, "lr": 2e-3}, "warm": 0, "epochs": 3, "fit": {"lr": 0.1, "amp": True}},
    "paper": {"width": 64, "pgd": 10, "at": {"epochs": 80, "lr": 0.1, "schedule": "milestones", "milestones": (0.625, 0.875)}, "warm": 0,
              "epochs": 80, "fit": {"lr": 0.1, "schedule": "constant", "weight_decay": 0.0, "amp": True}}}


def starts(number: Tensor, shape: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform noise in [-1, 1), (B, *shape), from a hash of the seed, each image's number (B,) int64 and the pixel; 2^24 different values."""
    def mix(v: Tensor) -> Tensor:  # MurmurHash3's finaliser on the low 32 bits of int64
        v = v & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            v = ((v ^ (v >> shift)) * factor) & 0xFFFFFFFF
        return v ^ (v >> 16)

    pixel = torch.arange(torch.Size(shape).numel(), device=number.device)
    key = mix(mix(torch.as_tensor(seed, device=number.device)) + 0x9E3779B9 * number)
    return ((mix(key[:, None] + 0x9E3779B9 * pixel) >> 8).to(dtype) / 2**23 - 1).view(-1, *shape)


class Transform(nn.Module):
    """g: images (B, C, H, W) in [0, 1] to images within l_inf distance delta of them, clipped to [0, 1] only with clip01.

    f_b: a classifier, copied and frozen. delta: radius in pixels of [0, 1]; steps: N, 0 for the start alone; step: eta as a share of delta. start:
    "random", "fixed" (one noise for all images and calls), "none", or "signs" (corners of the ball). targeted: down towards the class that f_b
    finds least likely, else up from the one it predicts. A call costs N + 1 forward and N backward passes of f_b; gradients pass as through the
    identity. Works under no_grad. ValueError for a bad option, or for an f_b with batch norm that does not directly follow a convolution."""

    def __init__(self, f_b: nn.Module, *, delta: float = 0.2, steps: int = 13, step: float = 1 / 6, start: str = "random", targeted: bool = True,
                 clip01: bool = False, seed: int = 0):
        super().__init__()
        core.check_choice("start", start, STARTS)
        if not (delta >= 0 and step > 0 and isinstance(steps, int) and steps >= 0):
            raise ValueError(f"delta and steps must not be negative, step must be positive; got {delta}, {steps}, {step}")
        self.f_b = folded(copy.deepcopy(f_b).eval()).to(memory_format=torch.channels_last).requires_grad_(False)
        for parent in list(self.f_b.modules()):
            for name, child in parent.named_children():
                if isinstance(child, core._NormBase):
                    raise ValueError(f"batch norm {name!r} of f_b does not follow a convolution and cannot be folded into it; use another f_b")
                if isinstance(child, core._DropoutNd):
                    setattr(parent, name, nn.Identity())
        self.delta, self.steps, self.step, self.start = delta, steps, step, start
        self.targeted, self.clip01, self.seed, self._drawn = targeted, clip01, seed, 0

    def forward(self, x: Tensor, number: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        """number: (B,) int64, what tells each image's draw from others; by default images are counted over all calls. labels: (B,) int64, the classes
        to walk towards (from, where untargeted) instead of f_b's own choice, to see whether f_a reads them from the offset."""
        with torch.no_grad():
            offset = self.walk(x, number, labels)
        return self.cut(x + offset)

    def cut(self, out: Tensor) -> Tensor:
        """With clip01 the images clipped to [0, 1], with the derivative of the identity; else the images as they are."""
        return out.detach().clamp(0, 1) + (out - out.detach()) if self.clip01 else out

    def walk(self, x: Tensor, number: Tensor | None = None, labels: Tensor | None = None, *, soft: Callable | None = None,
             smoothed: nn.Module | None = None) -> Tensor:
        """The offset o_N, within delta. soft(v): what stands for sign(v) in the backward pass, which then unrolls all steps (see Unrolled)."""
        offset, y = self.delta * self.noise(x, number), labels
        if self.steps and labels is None:
            with torch.no_grad():
                y = self.f_b(x).argmin(1) if self.targeted else self.f_b(x).argmax(1)
        for _ in range(self.steps):
            sign = self._slope(self.f_b, (x + offset).detach(), y).sign()
            if soft is not None:
                sign = straight_through(sign, soft(self._slope(smoothed or self.f_b, x + offset, y, graph=True)))
            z = offset - self.step * self.delta * sign
            offset = z.clamp(-self.delta, self.delta)
            if soft is not None:  # equation 5, the projection's derivative
                offset = straight_through(offset, z * torch.where(z.abs() < self.delta, 1, (1 + z.abs()) ** -2).detach())
        return offset

    def noise(self, x: Tensor, number: Tensor | None = None) -> Tensor:
        """The start's offset from x in units of delta, (B, C, H, W)."""
        if number is None:
            number, self._drawn = torch.arange(self._drawn, self._drawn + len(x)), self._drawn + len(x)
        if self.start == "none":
            return torch.zeros_like(x)
        noise = starts((0 * number if self.start == "fixed" else number).to(x.device), x.shape[1:], seed=self.seed, dtype=x.dtype)
        return torch.where(noise < 0, -1.0, 1.0).to(x.dtype) if self.start == "signs" else noise

    def _slope(self, f_b: nn.Module, x: Tensor, y: Tensor, *, graph: bool = False) -> Tensor:
        """The gradient of each image's own cross-entropy over its pixels, down which g walks; negated where g is untargeted."""
        with torch.enable_grad():
            x = x if graph else x.requires_grad_()
            loss = core.cross_entropy(f_b(x).to(x.dtype), y).sum()
            return torch.autograd.grad(loss if self.targeted else -loss, x, create_graph=graph)[0]


class Unrolled(nn.Module):
    """g with a backward pass through all its steps, second derivatives of f_b included: the paper's BPDA (Section 4.1, Fig. 5). Its output is g(x).

    kind: sign(v) is differentiated as "tanh" or "soft sign", v / (1 + |v|), of v / tau. temperature: tau as a multiple of each image's median |v|, or
    None for the paper's tau = 1. mix: the weight of the identity beside it. smoothing: ReLU and pooling of f_b get `adaptive.smooth` backward passes
    of this temperature. N steps keep N graphs of f_b. ValueError for an unknown kind."""

    def __init__(self, g: Transform, *, kind: str = "tanh", temperature: float | None = None, mix: float = 0.0, smoothing: float | None = None):
        super().__init__()
        core.check_choice("kind", kind, KINDS)
        self.g, self.kind, self.temperature, self.mix = g, kind, temperature, mix
        self.smoothed = smooth(g.f_b, smoothing) if smoothing else None

    def forward(self, x: Tensor, number: Tensor | None = None) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.g(x, number)
        out = x + self.g.walk(x, number, soft=self.soft, smoothed=self.smoothed)
        return self.g.cut(straight_through(out.detach(), self.mix * x + (1 - self.mix) * out))

    def soft(self, v: Tensor) -> Tensor:
        if self.temperature is not None:
            v = v / (self.temperature * core.rows(v.detach().abs().flatten(1).median(1).values.clamp_min(1e-12)))
        return v.tanh() if self.kind == "tanh" else v / (1 + v.abs())


def external(data: Dataset, kind: int | str, *, profile: str, eps: float = 8 / 255, seed: int = 0, progress: bool = True) -> tuple[nn.Module, dict]:
    """f_b for a data set, and its record: untrained (0), after so many epochs of ordinary training, or "adversarial" (PGD training at eps)."""
    recipe, stages = RECIPES[profile], 5 if data.shape[1] > 32 else 4
    build = partial(classifier, "vgg0", num_classes=data.num_classes, channels=data.shape[0], width=recipe["width"], stages=stages)
    if kind == 0:
        with seeded(seed):
            return build().eval().to(training.device()), {"seconds": 0.0}
    step, settings = training.standard, {"epochs": kind, "optimizer": "adam", "lr": 1e-3, "schedule": "constant"}
    if kind == "adversarial":
        step, settings = partial(training.pgd_at, eps=eps, steps=recipe["pgd"]), recipe["at"]
    return training.load_or_fit(f"{profile}-{data.name}-f_b-{kind}-{seed}", build, step, data, augment=zoo.augmentation(data), seed=seed,
                                progress=progress, **settings)


def on_transformed(model, x, y, generator):
    """The step of f_a: cross-entropy of model.classifier on fresh draws of model.restorer(x) (equation 1)."""
    number = torch.randint(2**31, (len(x),), generator=generator, device=generator.device)
    with torch.autocast(x.device.type, enabled=False):
        moved = model.restorer(x, number)
    return training.standard(model.classifier, moved, y, generator)


def defended(data: Dataset, g: Transform, *, profile: str, epochs: int = 0, seed: int = 0, progress: bool = True) -> tuple[nn.Sequential, dict]:
    """The defence f_a(g(x)), Sequential(restorer=g, classifier=f_a), and its record; only f_a is trained, of the profile's target architecture,
    for `epochs` or the recipe's. Where that says `warm`, f_a starts from one network trained on "noise" of delta 0.2, which all share and whose
    seconds the record counts too."""
    recipe, target, (mean, std) = RECIPES[profile], zoo.RECIPES[profile]["target"], data.mean_std()
    settings = recipe["fit"] | {"train_modules": ["classifier"], "augment": zoo.augmentation(data), "seed": seed, "progress": progress}
    with seeded(seed):
        f_a = classifier(target["arch"], num_classes=data.num_classes, channels=data.shape[0], width=target["width"], mean=mean, std=std)

    def fitted(name: str, g: Transform, f_a: nn.Module, epochs: int) -> tuple[nn.Sequential, dict]:
        model = nn.Sequential(OrderedDict(restorer=g, classifier=f_a))
        return training.load_or_fit(f"{profile}-{data.name}-{name}-{seed}", model, on_transformed, data, epochs=epochs, **settings)

    if not recipe["warm"]:
        return fitted("f_a", g, f_a, epochs or recipe["epochs"])
    noisy, before = fitted("f_a-noise", Transform(nn.Identity(), **VARIANTS["noise"], seed=seed), f_a, recipe["warm"])
    if describe(g) == describe(noisy.restorer):
        return noisy, before
    model, record = fitted("f_a", g, noisy.classifier, epochs or recipe["epochs"])
    return model, record | {"seconds": before["seconds"] + record["seconds"]}


def expected(g: nn.Module, x: Tensor, *, samples: int, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """Two independent means of samples / 2 draws of g(x), (B, C, H, W) each: their mean estimates E g(x), half their distance is its noise floor."""
    core.check_steps(pairs=samples // 2)
    draws = predict(g, x.repeat_interleave(2 * (samples // 2), 0), batch_size)
    return tuple(draws.unflatten(0, (len(x), 2, -1)).mean(2).unbind(1))


def interval(values: Tensor) -> tuple[float, float]:
    """A 95 % interval for the mean of independent values (n,): 1.96 standard errors to either side, none for a single value."""
    mean, half = values.double().mean().item(), 1.96 * values.double().std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean - half, mean + half


def rises(series: Sequence[Tensor]) -> bool:
    """Whether a quantity of the same images, a tensor (n,) for each point, rises along the points: the last lies above the first by more than the
    95 % interval of their paired difference, and no neighbours fall by more than theirs."""
    return interval(series[-1] - series[0])[0] > 0 and all(interval(b - a)[1] >= 0 for a, b in pairwise(series))


def repo_bpda(defence: nn.Sequential, x: Tensor, y: Tensor, *, eps: float, steps: int = 20, step_size: float = RELEASED_STEP,
              generator: torch.Generator | None = None) -> Tensor:
    """The released attack with its faults: f_a sees x + g(x), and the label to leave is f_a's own on the raw x, not y. The division by the last loop
    index changes no sign, and the missing clip to [0, 1] is not copied. One sample, 20 steps of 0.003, random start."""
    g, f_a = defence.restorer, defence.classifier
    return pgd(bpda(lambda v: v + g(v), f_a), x, predict(f_a, x).argmax(1), eps=eps, steps=steps, step_size=step_size, generator=generator)


def imitate(model, x, y, generator):
    """The step of imitations: cross-entropy to soft labels y (B, L), or mean squared error to images y (B, C, H, W), for the paper's h_theta."""
    return (F.mse_loss if y.ndim == 4 else F.cross_entropy)(model(x).float(), y), {}


def student(defence: nn.Sequential, x: Tensor, *, eps: float, rounds: int = 3, draws: int = 10, epochs: int = 5, steps: int = 10) -> nn.Module:
    """A differentiable network that imitates the defence's mean softmax over draws, on x (B, C, H, W), on x with random signs of size eps and, each
    round after the first, on its own PGD images (adversarial distillation). It starts as f_a."""
    model, generator, images, soft = copy.deepcopy(defence.classifier), torch.Generator(x.device).manual_seed(0), [x], []
    images.append((x + eps * core.uniform(x, generator).sign()).clamp(0, 1))
    for _ in range(rounds):
        soft += [sum(predict(defence, v).softmax(1) for _ in range(draws)) / draws for v in images[len(soft):]]
        training.fit(model, imitate, (torch.cat(images), torch.cat(soft)), optimizer="adam", epochs=epochs, progress=False)
        images.append(pgd(model, x, soft[0].argmax(1), eps=eps, steps=steps, generator=generator))
    return model
