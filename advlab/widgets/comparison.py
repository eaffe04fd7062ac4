"""The comparison browser: what the results files say of a defence under a threat, and the images that fell, attacked on the spot."""

from collections.abc import Iterable, Mapping, Sequence

from ipywidgets import IntSlider
from torch import Tensor

from advlab import evaluation, paths, report
from advlab.attacks import pgd
from advlab.attacks.core import Model
from advlab.attacks.ensemble import predict
from advlab.plots import LOOKS
from advlab.widgets.base import ImageExplorer, Job, choice, figure, line, options, picture, place, slider

LIVE = "PGD-20, run now"
GRID = 0.0, 1.0, 2.0, 4.0, 8.0, 16.0  # of 255


def saved_rows(profile: str, dataset: str) -> list[dict]:
    """The rows of every notebook's results file for a profile and data set, [] where none has run; ValueError for a damaged file."""
    files = sorted((paths.stored("results", profile) / dataset).glob("[0-9][0-9]_*.json"))
    return [r | {"notebook": file.stem[:2]} for file in files for r in report.load_results(file.stem, profile=profile, dataset=dataset)["rows"]]


class ComparisonBrowser(ImageExplorer):
    """Accuracy against eps with 95 % intervals for a defence and a threat, from results rows, and the images of x that fall at a chosen eps.

    Rows hold counts, not images. So the images come from PGD-20 end to end through the defence's network, run when they are shown, where `models`
    has one of that name; the same attack gives the curve of the threat "PGD-20, run now", on all images given."""

    def __init__(self, rows: Iterable[dict], models: Mapping[str, Model], x: Tensor, y: Tensor, classes: Sequence[str] | None = None):
        self.rows = [r for r in rows if r["unit"] == "accuracy" and r["threat"] and None not in (r["eps"], r["low"], r["high"])
                     and r["norm"] in ("linf", None) and r.get("rounded") is not False]  # one curve, one axis
        threat = choice("Threat", [""], "What the attacker knows and does")
        super().__init__(models, x, y, classes, {
            "threat": threat, "eps": slider(IntSlider, "ε (of 255)", "The budget at which images fall", 4, 0, 16, 1)})
        self.controls["image"].layout.display = "none"  # all that fell are shown
        self.controls["model"].observe(lambda change: options(threat, self.threats(change["new"])), "value")

    def _adopt(self, models, x, y, classes, controls) -> None:
        super()._adopt(models, x, y, classes, controls)
        controls["model"].description = "Defence"
        options(controls["model"], list(dict.fromkeys([*self.models, *(r["system"] for r in self.rows)])))
        options(controls["threat"], self.threats(controls["model"].value))

    def threats(self, system: str) -> list[str]:
        saved = dict.fromkeys(r["threat"] for r in self.rows if r["system"] == system and r["eps"])
        return [*([LIVE] if system in self.models else []), *saved]

    def fallen(self, job: Job, system: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Attacked images, what the defence answers to them, and which fell, each for all images."""
        f = self.models[system]
        right = self.remember(system, lambda: predict(f, self.x).argmax(1) == self.y)
        x_adv = self.x.clone()
        x_adv[right] = pgd(job.watch(f), self.x[right], self.y[right], eps=eps / 255, steps=20) if eps and right.any() else self.x[right]
        answer = predict(f, x_adv).argmax(1)
        return x_adv, answer, right & (answer != self.y)

    def curves(self, job: Job, system: str, threat: str, eps: float) -> dict[str, list[tuple[float, float, float, float]]]:
        """Points (eps in 255ths, accuracy, low, high) for each attack, those with the most points first."""
        found: dict[str, list] = {}
        if threat == LIVE:
            job.total = 20 * len({*GRID, eps})
            right = self.remember(system, lambda: predict(self.models[system], self.x).argmax(1) == self.y)
            for e in sorted({*GRID, eps}):
                fell = self.remember((system, e), lambda e=e: self.fallen(job, system, e))[2]
                score = evaluation.score((right & ~fell)[None])
                found.setdefault("PGD-20", []).append((e, score["value"], score["low"], score["high"]))
            return found
        for r in self.rows:
            if r["system"] == system and (r["threat"] == threat or (not r["eps"] and r["threat"] == "none" and r["exhibit"] == "comparison")):
                key = f"{r['attack']}, notebook {r.get('notebook', '?')}, {r['exhibit']}"
                found.setdefault(key, []).append((255 * r["eps"], r["value"], r["low"], r["high"]))
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def draw(self, job, *, model, image, threat, eps):
        if threat not in self.threats(model):
            raise ValueError(f"nothing is known of {model} under this threat; run its notebook")
        curves, fig = self.curves(job, model, threat, float(eps)), figure(3.3)
        ax = place(fig, 0.55, 0.6, 3.3, 2.35, f"{model}: {threat}")
        for k, (name, points) in enumerate(list(curves.items())[: len(LOOKS)]):
            at, value, low, high = zip(*sorted(points))
            line(ax, k, at, [100 * v for v in value], name.split(", notebook")[0])
            ax.vlines(at, [100 * v for v in low], [100 * v for v in high], color=LOOKS[k][0], linewidth=1.2)
        ax.axvline(eps, color="#999999", linewidth=6, alpha=0.35, zorder=0)
        ax.set(xlim=(-0.5, max(16.0, *(p[0] for points in curves.values() for p in points)) + 0.5), ylim=(0, 102))
        ax.set_xlabel("ε (of 255)", fontsize=8.5, labelpad=1)
        ax.set_ylabel("accuracy (%)", fontsize=8.5, labelpad=1)
        ax.legend(fontsize=7.5, frameon=False)
        least = min(value for points in curves.values() for _, value, *_ in points)
        said = f"{model}, threat {threat}: {len(curves)} attack{'s' * (len(curves) != 1)}, the lowest accuracy {least:.0%}. "
        if model not in self.models:
            status = said + "No network of this defence was given, so its fallen images cannot be shown."
            return fig, f"Accuracy against eps. {status}", status
        x_adv, answer, fell = self.remember((model, float(eps)), lambda: self.fallen(job, model, float(eps)))
        for k, i in enumerate(fell.nonzero().squeeze(1)[:8].tolist()):
            words = f"{self.classes[int(self.y[i])][:10]} →\n{self.classes[int(answer[i])][:10]}"
            picture(fig, x_adv[i], 4.15 + 1.27 * (k % 4), 1.75 - 1.6 * (k // 4), 1.15, words, size=8.5)
        status = f"{said}{int(fell.sum())} of {len(fell)} images fell to PGD-20 at ε = {eps}/255, run now; the first eight are shown."
        return fig, f"Left: accuracy against eps. Right: images that fell. {status}", status
