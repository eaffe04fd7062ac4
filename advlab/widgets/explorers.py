"""One explorer for each thing that the papers look at: attacks, gradient maps for every label (TRN), error amplification (HGD), input sensitivity
(GRED), similarity of gradients (S2S), and the adversarial transformation."""

from collections.abc import Mapping, Sequence

import torch
from ipywidgets import FloatSlider, IntSlider, Layout, Select
from torch import Tensor, nn
from torch.nn import functional as F

from advlab.attacks import apgd, bim, core, ddn, ffgsm, fgsm, mim, pgd
from advlab.attacks.core import Model
from advlab.attacks.ensemble import predict
from advlab.plots import perturbation
from advlab.widgets.base import ImageExplorer, Job, choice, figure, line, only_where, options, picture, place, slider

ATTACKS = {"pgd": pgd, "fgsm": fgsm, "ffgsm": ffgsm, "bim": bim, "mim": mim, "apgd": apgd}
ONE_STEP = "fgsm", "ffgsm"
_NARROW = Layout(width="250px")


def _eps(value: float = 8.0, high: float = 32.0) -> FloatSlider:
    return slider(FloatSlider, "ε (of 255)", "The most that the attack may change a pixel, in 255ths", value, 0.0, high, 0.5)


def _attack(job: Job, model: Model, x: Tensor, y: Tensor, eps: float, name: str = "pgd", steps: int = 10, **more) -> Tensor:
    """The images under an attack of ATTACKS with eps in 255ths; each forward pass is a step of the job."""
    job.total = job.done + (1 if name in ONE_STEP else steps)
    return ATTACKS[name](job.watch(model), x, y, eps=eps / 255, **more, **({} if name in ONE_STEP else {"steps": steps}))


class AttackExplorer(ImageExplorer):
    """An image, what an attack adds to it, and what the model then sees: attack, eps, steps and target are at hand."""

    def __init__(self, models: Model | Mapping[str, Model], x: Tensor, y: Tensor, classes: Sequence[str] | None = None):
        super().__init__(models, x, y, classes, {
            "attack": choice("Attack", list(ATTACKS), "Which attack"), "eps": _eps(),
            "steps": slider(IntSlider, "Steps", "Steps of the iterative attacks", 10, 1, 100, 1),
            "target": choice("Target", ["none"], "The class that the attack is to reach; none: any but the true one")})
        only_where(self.controls["steps"], self.controls["attack"], lambda name: name not in ONE_STEP)

    def _adopt(self, models, x, y, classes, controls) -> None:
        super()._adopt(models, x, y, classes, controls)
        options(controls["target"], ["none", *self.classes])

    def draw(self, job, *, model, image, attack, eps, steps, target):
        f, x, y = self.models[model], self.x[image : image + 1], self.y[image : image + 1]
        aim = None if target == "none" else torch.full_like(y, self.classes.index(target))
        if aim is not None and bool(aim == y):
            raise ValueError(f"the image's label is {target} already; choose another target")
        more = {} if aim is None else {"targeted": True}
        x_adv = _attack(job, f, x, y if aim is None else aim, eps, attack, steps, **more)
        before, after = f(x), f(x_adv)
        delta, scale = x_adv - x, (x_adv - x).abs().max().item()
        fig = figure(2.75)
        true = self.classes[int(y)]
        picture(fig, x[0], 0.05, 0.2, 2.15, f"original: {self.said(before)}")
        picture(fig, perturbation(delta[0]), 2.3, 0.2, 2.15, f"change, enlarged {0.5 / scale:.0f} times" if scale else "no change")
        picture(fig, x_adv[0], 4.55, 0.2, 2.15, f"adversarial: {self.said(after)}")
        _bars(fig, 7.85, before[0], after[0], self.classes)
        fell = int(after.argmax()) != int(y) if aim is None else int(after.argmax()) == int(aim)
        status = (f"{attack} with ε = {eps:g}/255: the model {'is fooled' if fell else 'stands'}. True label {true}; it says {self.said(before)} "
                  f"before and {self.said(after)} after. Largest change {255 * scale:.1f}/255, l2 norm {core.l2(delta).item():.2f}.")
        return fig, f"Original image, enlarged change, adversarial image, and the five likeliest classes before and after. {status}", status


def _bars(fig, left: float, before: Tensor, after: Tensor, classes: Sequence[str]) -> None:
    """The five likeliest classes under attack, and what they were before."""
    top = after.topk(min(5, len(after))).indices.tolist()
    ax, at = place(fig, left, 0.5, 9.1 - left, 1.85), range(len(top))
    for shift, logits, colour, name in ((0.2, after, "#D55E00", "adversarial"), (-0.2, before, "#56B4E9", "original")):
        ax.barh([k + shift for k in at], logits.softmax(0)[top].tolist(), 0.38, color=colour, label=name)
    ax.set_yticks(list(at), [classes[k][:11] for k in top])
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    ax.invert_yaxis()
    ax.set_xlabel("probability", fontsize=8, labelpad=1)
    ax.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.02, 0.98), ncol=2, handlelength=1.2, columnspacing=0.8)


class GradientMapExplorer(ImageExplorer):
    """The gradient of the loss for every label (TRN, Fig. 3), the ten likeliest where there are more; eps = 0 shows the clean image's."""

    def __init__(self, models: Model | Mapping[str, Model], x: Tensor, y: Tensor, classes: Sequence[str] | None = None):
        super().__init__(models, x, y, classes, {
            "eps": _eps(), "scale": choice("Scale", ["own", "shared"], "Each map on its own scale, or all on one"),
            "show": choice("Show", ["colours", "size"], "The signed gradient of each colour, or its length at each pixel")})

    def draw(self, job, *, model, image, eps, scale, show):
        from advlab.gradients import gradient_maps, magnitude

        f, x, y = self.models[model], self.x[image : image + 1], self.y[image : image + 1]
        x = _attack(job, f, x, y, eps) if eps else x
        logits = f(x)
        order = logits[0].argsort(descending=True)[:10].tolist()
        wide = logits.shape[1] > 10
        maps = gradient_maps(f, x, top=10 if wide else None)[0]
        order = order if wide else sorted(order)
        norms = maps.flatten(1).norm(dim=1)
        size = maps.abs().amax((1, 2, 3)) if scale == "own" else maps.abs().max().expand(len(maps))
        units = maps / size.clamp_min(1e-30)[:, None, None, None]
        fig = figure(3.65)
        picture(fig, x[0], 0.05, 0.8, 1.9, f"{'attacked' if eps else 'clean'}: {self.said(logits)}")
        for k, label in enumerate(order):
            mark = " (pred.)" if label == int(logits.argmax()) else " (true)" if label == int(y) else ""
            shown = perturbation(units[k], 1.0) if show == "colours" else magnitude(units[k : k + 1])[0] / (3**0.5 if len(maps[k]) > 1 else 1)
            words = {"title": f"{self.classes[label][:10]}{mark}", "below": f"norm {norms[k]:.2g}"}
            picture(fig, shown, 2.15 + 1.42 * (k % 5), 2.05 - 1.8 * (k // 5), 1.28, size=8.5, **words)
        own = order.index(int(logits.argmax()))
        rest = torch.cat([norms[:own], norms[own + 1 :]]).median()
        status = (f"{'Attacked with PGD at ε = ' + format(eps, 'g') + '/255' if eps else 'Clean image'}, predicted {self.said(logits)}, true "
                  f"{self.classes[int(y)]}. The predicted label's map has norm {norms[own]:.2g}, the others a median of {rest:.2g}.")
        return fig, f"The image and the gradient maps of {len(order)} labels, {scale} scale. {status}", status


class AmplificationExplorer(ImageExplorer):
    """How an error grows from layer to layer (HGD, Fig. 5), attacked and after each restorer, and what a layer's channels look like. Models are
    nn.Modules here, as their layers are read; restorers are denoisers x -> x' by name. layers: names of submodules, by default those of
    models.layer_names, else all that have no children."""

    def __init__(self, models: nn.Module | Mapping[str, nn.Module], x: Tensor, y: Tensor, restorers: Mapping[str, Model] | None = None,
                 classes: Sequence[str] | None = None, layers: Sequence[str] | None = None):
        self.restorers, self.given = dict(restorers or {}), layers
        names = ["none", *self.restorers]
        super().__init__(models, x, y, classes, {
            "restorer": choice("Denoiser", names, "Whose features are shown, and whom the informed attacker knows"), "eps": _eps(8.0),
            "attacker": choice("Attacker", ["knows the model only", "knows the denoiser too"], "What the PGD attack differentiates"),
            "layer": Select(options=["pixels"], description="Layer", tooltip="The layer whose channels are shown", rows=5, layout=_NARROW)})
        self.controls["restorer"].value = names[-1]
        only_where(self.controls["attacker"], self.controls["restorer"], lambda name: name != "none")

    def _adopt(self, models, x, y, classes, controls) -> None:
        super()._adopt(models, x, y, classes, controls)
        options(controls["layer"], ["pixels", *self.layers(next(iter(self.models.values())))])

    def layers(self, model: nn.Module) -> list[str]:
        from advlab.models import layer_names

        return list(self.given or layer_names(model) or [name for name, m in model.named_modules() if name and not list(m.children())])

    def draw(self, job, *, model, image, restorer, eps, attacker, layer):
        from advlab.gradients import error_amplification
        from advlab.models import features

        f, x, y = self.models[model], self.x[image : image + 1], self.y[image : image + 1]
        informed = attacker.endswith("too") and restorer != "none"
        x_adv = _attack(job, (lambda v: f(self.restorers[restorer](v))) if informed else f, x, y, eps)
        names = self.layers(f)
        layer = layer if layer in ("pixels", *names) else "pixels"
        noise = (x + (x_adv - x).norm() * F.normalize(core.gaussian(x, torch.Generator().manual_seed(0)).flatten(), dim=0).view_as(x)).clamp(0, 1)
        seen = {"attacked": x_adv, "noise of equal size": noise} | {name: r(x_adv) for name, r in self.restorers.items()}
        fig = figure(3.6)
        ax = place(fig, 0.6, 0.9, 3.6, 2.4, "relative change E of each layer")
        for k, (name, v) in enumerate(seen.items()):
            level = error_amplification(f, x, v, names)
            line(ax, k, range(len(level)), [e.item() for e in level.values()], name)
        ax.set_xticks(range(len(level)), list(level), rotation=60, fontsize=7.5, ha="right", rotation_mode="anchor")
        ax.axvline(list(level).index(layer), color="#999999", linewidth=6, alpha=0.35, zorder=0)
        ax.set_ylim(0, None)
        ax.legend(fontsize=8, frameon=False)
        shown = {"clean": x, "attacked": x_adv} | ({restorer: seen[restorer]} if restorer != "none" else {})
        maps = {name: v if layer == "pixels" else features(f, v, [layer])[layer] for name, v in shown.items()}
        _channels(fig, {name: m[0] for name, m in maps.items()}, layer)
        status = (f"PGD-10 at ε = {eps:g}/255 by one who {attacker}; true label {self.classes[int(y)]}. "
                  + "; ".join(f"{name}: {self.said(f(v))}" for name, v in ({"clean": x} | seen).items()))
        return fig, f"Left: error by layer for {', '.join(seen)}. Right: the channels of layer {layer} that the attack changes most. {status}", status


def _channels(fig, maps: Mapping[str, Tensor], layer: str) -> None:
    """The four channels that differ most between the first two of maps (C, H, W), a row for each map; bars for vectors (C,)."""
    first, second = list(maps.values())[:2]
    side, left = 0.94, 4.95
    if first.ndim < 3:
        ax = place(fig, left, 0.6, 4.1, 2.7, f"{layer}: {first.numel()} values")
        for k, (name, v) in enumerate(maps.items()):
            line(ax, k, range(v.numel()), v.flatten().tolist(), name)
        ax.legend(fontsize=8, frameon=False)
        return
    change = (second - first).flatten(1).abs().sum(1)
    best = change.topk(min(4, len(change))).indices.sort().values.tolist()
    for i, (name, m) in enumerate(maps.items()):
        for j, k in enumerate(best):
            low, high = first[k].min().item(), first[k].max().item()
            picture(fig, m[k], left + j * 1.05, 2.28 - i * 1.13, side, f"{name}, {k}", size=8, scale=(low, high))
    fig.text((left + 2.05) / 9.2, 0.985, f"{layer}: the channels that change most", fontsize=10, ha="center", va="top")


class SensitivityExplorer(ImageExplorer):
    """Input sensitivity (GRED): its map, its size among other images', what the two detectors say, and what is left after masking.

    org, sen: binary detectors x -> (B, 2), benign and adversarial, on pixels and on the sensitivity; rectifier: the network that reads masked images.
    All three may be missing. n images, attacked in the same way, make the histogram."""

    def __init__(self, models: Model | Mapping[str, Model], x: Tensor, y: Tensor, *, org: Model | None = None, sen: Model | None = None,
                 rectifier: Model | None = None, classes: Sequence[str] | None = None, n: int = 64):
        self.org, self.sen, self.rectifier, self.n = org, sen, rectifier, n
        super().__init__(models, x, y, classes, {
            "attack": choice("Attack", ["ddn", "pgd", "fgsm", "none"], "What was done to the image; DDN goes no further than it must"), "eps": _eps(),
            "rate": slider(IntSlider, "Masked (%)", "Share of the most sensitive elements that are replaced", 40, 0, 100, 5)})
        only_where(self.controls["eps"], self.controls["attack"], lambda name: name in ATTACKS)

    def attacked(self, job: Job, model: str, attack: str, eps: float, index: slice) -> Tensor:
        from advlab.defenses.gred import round8

        x, y = self.x[index], self.y[index]
        if attack == "ddn":
            job.total = job.done + 30
            found = ddn(job.watch(self.models[model]), x, y, steps=30)
            return round8((x + 1.05 * (found - x)).clamp(0, 1))  # on the boundary itself rounding would bring some images back
        return x if attack == "none" else round8(_attack(job, self.models[model], x, y, eps, attack))

    def draw(self, job, *, model, image, attack, eps, rate):
        from advlab.defenses import gred
        from advlab.gradients import log_sensitivity

        f, many = self.models[model], slice(min(self.n, len(self.x)))
        x = self.attacked(job, model, attack, eps, slice(image, image + 1))
        clean = self.remember(model, lambda: log_sensitivity(f, self.x[many], norm=True))
        key = (model, attack, 0.0 if attack in ("ddn", "none") else eps)
        moved = self.remember(key, lambda: log_sensitivity(f, self.attacked(job, model, attack, eps, many), norm=True))
        s, size = log_sensitivity(f, x), log_sensitivity(f, x, norm=True).item()
        mask = gred.mask_of(f, x, rate=rate / 100)
        masked = gred.randomise(x, mask, torch.Generator().manual_seed(0))
        fig = figure(2.75)
        picture(fig, x[0], 0.05, 0.25, 2.1, f"{'clean' if attack == 'none' else attack}: {self.said(f(x))}")
        top = s.amax(1)[0]
        picture(fig, top, 2.25, 0.25, 2.1, "sensitivity (log scale)", cmap="cividis", scale=(top.quantile(0.01).item(), top.max().item()))
        ax = place(fig, 4.75, 0.55, 2.1, 1.8, "log10 of its norm")
        every = torch.cat([clean, moved, clean.new_tensor([size])])
        bins = torch.linspace(every.min().item(), every.max().item() + 0.01, 24)
        for v, colour, name in ((clean, "#56B4E9", "clean"), (moved, "#D55E00", attack))[: 1 if attack == "none" else 2]:
            ax.hist(v.cpu().numpy(), bins=bins.numpy(), color=colour, alpha=0.6, label=name)
        ax.axvline(size, color="black", linestyle="--", linewidth=1.5, label="this image")
        ax.set_ylabel("images", fontsize=8)
        ax.locator_params(axis="y", integer=True, nbins=5)
        ax.legend(fontsize=8, frameon=False)
        picture(fig, masked[0], 7.05, 0.25, 2.1, f"masked: {self.said(self.answer(f, x, rate))}")
        status = (f"True label {self.classes[int(self.y[image])]}. The model says {self.said(f(x))}. {self.verdict(x)}With {rate} % masked, the "
                  f"{'rectifier' if self.rectifier else 'model'} says {self.said(self.answer(f, x, rate))}.")
        return fig, f"The image, its sensitivity map, the histogram of its norm, and the masked image. {status}", status

    def answer(self, f: Model, x: Tensor, rate: int) -> Tensor:
        """The logarithm of the mean softmax over ten fresh masks, (1, L)."""
        from advlab.defenses.gred import Recover

        return Recover(f, self.rectifier or f, rate=rate / 100)(x)

    def verdict(self, x: Tensor) -> str:
        from advlab.defenses.gred import entropy

        branches = {name: net(x) for name, net in (("pixels", self.org), ("sensitivity", self.sen)) if net is not None}
        if not branches:
            return "No detector was given. "
        said = [f"{name} {z.softmax(1)[0, 1]:.0%} (entropy {entropy(z).item():.2f} bits)" for name, z in branches.items()]
        surer = min(reversed(branches), key=lambda name: entropy(branches[name]).item())  # the sensitivity's where they tie
        z = branches[surer]
        return f"Probability of an attack by branch: {', '.join(said)}; the {surer} branch is surer: {'flagged' if z[0, 1] > z[0, 0] else 'passed'}. "


class SimilarityExplorer(ImageExplorer):
    """The gradient magnitude maps of two systems on one image and their SSIM (S2S, Table 1), beside the SSIM of all images given. Systems are the
    models, by the gradient of their cross-entropy, and restorers x -> x', by that of their reconstruction error."""

    def __init__(self, models: Model | Mapping[str, Model], x: Tensor, y: Tensor, restorers: Mapping[str, Model] | None = None,
                 classes: Sequence[str] | None = None):
        self.restorers = dict(restorers or {})
        super().__init__(models, x, y, classes, {
            "second": choice("Second", [""], "The system to compare with"),
            "scaling": choice("Scaling", ["max", "clip", "rank"], "Maps divided by their maximum, cut at the 99th percentile first, or ranked"),
            "label": choice("Label", ["true", "another"], "The label whose loss is differentiated for the second system")})
        only_where(self.controls["label"], self.controls["second"], lambda name: name not in self.restorers)

    def _adopt(self, models, x, y, classes, controls) -> None:
        super()._adopt(models, x, y, classes, controls)
        for name in ("model", "second"):
            options(controls[name], [*self.models, *self.restorers])
        controls["model"].description = "First"

    def maps(self, job: Job, system: str, other: bool) -> Tensor:
        from advlab.gradients import input_gradient, magnitude, reconstruction_gradient

        y, out, parts = (self.y + 1) % len(self.classes) if other else self.y, [], torch.arange(len(self.x)).split(32)
        job.total = job.done + len(parts)
        for part in parts:
            job.tick()
            x = self.x[part]
            reconstructs = system in self.restorers
            out.append(reconstruction_gradient(self.restorers[system], x) if reconstructs else input_gradient(self.models[system], x, y[part]))
        return magnitude(torch.cat(out))

    def draw(self, job, *, model, image, second, scaling, label):
        from advlab.gradients import scaled, ssim

        pair = ((model, False), (second, label == "another" and second not in self.restorers))
        a, b = (scaled(self.remember(key, lambda key=key: self.maps(job, *key)), scaling) for key in pair)
        value = ssim(a, b, **({"sigma": 1.5} if a.shape[-1] >= 64 else {"window": 7}))
        fig = figure(2.75)
        picture(fig, self.x[image], 0.05, 0.2, 2.15, f"image: {self.classes[int(self.y[image])]}")
        for left, m, (name, other) in ((2.3, a, pair[0]), (4.55, b, pair[1])):
            picture(fig, m[image].sqrt(), left, 0.2, 2.15, f"{name}{', another label' if other else ''}")
        ax = place(fig, 7.1, 0.5, 1.95, 1.85, f"SSIM of {len(value)} images")
        ax.hist(value.cpu().numpy(), bins=20, color="#56B4E9")
        ax.axvline(value[image].item(), color="black", linestyle="--", linewidth=1.5, label="this image")
        ax.legend(fontsize=8, frameon=False)
        status = (f"SSIM of the gradient maps of {model} and {second}{' for another label' if pair[1][1] else ''}: {value[image]:.2f} on this image, "
                  f"{value.mean():.2f} on average over {len(value)}. Brightness is the square root of the scaled map.")
        return fig, f"The image, the gradient map of {model}, that of {second}, and a histogram of SSIM. {status}", status


class TransformExplorer(ImageExplorer):
    """The adversarial transformation g of an image by an external network f_b (the models here): one draw, the mean of many, how far the mean lies
    from the image, beside its noise floor. classifier: f_a, which reads g(x); it may be missing."""

    def __init__(self, models: nn.Module | Mapping[str, nn.Module], x: Tensor, y: Tensor, classifier: Model | None = None,
                 classes: Sequence[str] | None = None):
        self.classifier = classifier
        super().__init__(models, x, y, classes, {
            "steps": slider(IntSlider, "Steps N", "Steps that g takes down f_b's loss", 13, 0, 30, 1),
            "delta": slider(FloatSlider, "Radius Δ", "How far g may move a pixel, in [0, 1]", 0.2, 0.0, 0.5, 0.02),
            "draws": slider(IntSlider, "Draws", "Draws of g(x), for its mean and for f_a's vote", 20, 2, 200, 2)})
        self.controls["model"].description = "f_b"

    def draw(self, job, *, model, image, steps, delta, draws):
        from advlab.defenses.transform import Transform

        x, f_b = self.x[image : image + 1], self.models[model]
        g = Transform(f_b, steps=steps, delta=delta)
        parts, job.total = torch.arange(draws).split(10), -(-draws // 10)
        every = []
        for part in parts:
            job.tick()
            every.append(g(x.expand(len(part), -1, -1, -1), part.to(x.device)))
        g_x = torch.cat(every)
        mean = g_x.mean(0)
        away, floor = mean - x[0], (g_x[0::2].mean(0) - g_x[1::2].mean(0)) / 2
        fig = figure(2.75)
        shown = {f"image: {self.said(f_b(x))}": x[0], f"one draw of g(x): {self.said(f_b(g_x[:1]))}": g_x[0], f"mean of {draws} draws": mean,
                 f"mean less image, largest {away.abs().max():.3f}": perturbation(away)}
        for k, (title, v) in enumerate(shown.items()):
            picture(fig, v, 0.05 + 2.3 * k, 0.2, 2.15, title)
        votes = ""
        if self.classifier is not None:
            p = predict(self.classifier, g_x).argmax(1)
            votes = f" f_a reads {self.classes[int(self.y[image])]} in {(p == self.y[image]).double().mean():.0%} of the draws."
        far, noise = away.abs(), floor.abs()
        status = (f"N = {steps}, Δ = {delta:g}. Distance of the image from the mean of {draws} draws: {far.max():.3f} at the largest pixel, "
                  f"{far.mean():.3f} on average; noise floor, half the distance of two half means: {noise.max():.3f} and "
                  f"{noise.mean():.3f}. The words above the pictures are what f_b sees.{votes}")
        return fig, f"The image, one draw of its transformation, the mean of {draws} draws, and the difference. {status}", status
