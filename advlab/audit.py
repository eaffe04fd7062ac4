"""The ladder against any defence: `python -m advlab audit package.module:builder --data NAME`.

`builder`, called without arguments, returns a network x -> logits (B, L) on images (B, C, H, W) in [0, 1], normalisation inside. What else an
adversary may know comes along: a network whose two children are `restorer` and `classifier`, the tuple (restorer, classifier) or (network, Parts), or
a dict of `defence` and the fields of evaluation.Parts. A ready-made network in place of a builder will do.

The report lies in runs/audit/NAME/: report.html (and .md), figures, and the rows as audit.json in the results schema."""

import difflib
import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from advlab import evaluation, paths, plots, report, sanity
from advlab.attacks import core
from advlab.attacks.adaptive import bpda, eot
from advlab.attacks.gradient import pgd
from advlab.evaluation import Budget, Ladder, Parts

PLAIN = {  # what a failed check means
    "eps = 0 is clean": "an attack that may change nothing changes the accuracy: the defence answers differently each time, or remembers",
    "falls to chance": "even a budget that can turn every image grey does not bring it to chance: the gradients lead nowhere, or labels leak",
    "no rise with eps": "a larger budget leaves more: the attack is led astray, or the defence answers from something else than the image",
    "no rise with steps": "more steps leave more: the attack is led astray",
    "no rise with restarts": "more restarts leave more: the defence answers differently each time, or remembers",
    "noise is harmless": "random noise of the same size does half of what the attack does: a brittle defence, or a blind attack",
    "gradients": "input gradients vanish or are not finite: an attack by gradients sees nothing; give `restorer` and `classifier`, so that BPDA can",
    "random output is declared": "the defence draws at random and was judged over one draw",
    "outputs are logits": "the outputs are probabilities, which flatten the loss",
    "no gradients inside forward": "the defence takes gradients itself: an attack must differentiate through them, or it sees a constant",
    "white box is strongest": "images that stood every white-box attack fell to queries or transfer: the white box is too weak, the gradients masked",
}
ENOUGH = 16  # images behind the checks: of fewer, hardly any outcome lies outside the others' intervals
WARNING = ("no gradients inside forward",)  # tells how to attack, not that the attack failed


class AuditError(paths.UserError):
    """A defence that cannot be audited; the message says why, and what to do."""


@dataclass(frozen=True)
class Audit:
    """climbed: the ladder. curves: rows of PGD against eps and against steps, `curve` says which. checks: rows of advlab.sanity, on `probed` images.
    finished: False after an interrupt, which keeps the rungs that were done. worst: the last row."""

    name: str
    climbed: Ladder
    curves: list[dict]
    checks: list[dict]
    x: Tensor
    finished: bool = True
    probed: int = 0

    @property
    def worst(self) -> dict:
        return self.climbed.rows[-1]

    def verdict(self) -> str:
        """The worst case and whether the checks let it stand, in a sentence."""
        r, bad = self.worst, [c for c in self.checks if not c["passed"] and c["check"] not in WARNING]
        few = f" on {self.probed} images" + (", which are too few to tell" if self.probed < ENOUGH else "")
        trust = ("The run was interrupted: what has not run may leave less." if not self.finished else f"No check failed{few}." if not bad else
                 f"{len(bad)} check{'s' * (len(bad) > 1)} failed, so that this is an upper bound that a better attack will lower.")
        return f"{100 * r['value']:.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}] of {r['n']} images stand the worst case. {trust}"


# --- what comes in ------------------------------------------------------------


def find(spec: str) -> Callable:
    """The builder named "package.module:name"; AuditError where there is none."""
    module, sign, name = spec.partition(":")
    if not (sign and module and name):
        raise AuditError(f"a defence is named package.module:builder, got {spec!r}")
    try:
        held = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise AuditError(f"cannot import {module!r}: {error}; start from the folder that holds it, or set PYTHONPATH") from None
    if not hasattr(held, name):
        close = difflib.get_close_matches(name, dir(held), 1)
        raise AuditError(f"{module} has no {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if isinstance(builder := getattr(held, name), nn.Module):
        return lambda: builder
    if not callable(builder):
        raise AuditError(f"{spec} is no builder but a {type(builder).__name__}; give a function without arguments that returns the defence")
    return builder


def opened(built) -> tuple[nn.Module, Parts]:
    """The defence and what is known of it, from whatever a builder may return (above)."""
    known = {f.name for f in fields(Parts)}
    if isinstance(built, dict):
        if stray := set(built) - known - {"defence"}:
            raise AuditError(f"a builder's dict has no entry {min(stray)!r}; it takes defence, {', '.join(sorted(known))}")
        built = (built.get("defence"), Parts(**{k: v for k, v in built.items() if k in known}))
    defence, parts = built if isinstance(built, tuple) and len(built) == 2 else (built, Parts())
    if not isinstance(parts, Parts):
        defence, parts = None, Parts(classifier=parts, restorer=defence)
    if defence is None and isinstance(parts.restorer, nn.Module) and isinstance(parts.classifier, nn.Module):
        defence = nn.Sequential(OrderedDict(restorer=parts.restorer, classifier=parts.classifier))
    if not isinstance(defence, nn.Module):
        raise AuditError(f"the builder returned {type(built).__name__}, not a network, (restorer, classifier), (network, Parts) or a dict of them")
    if parts.classifier is None and [name for name, _ in defence.named_children()] == ["restorer", "classifier"]:
        parts = replace(parts, classifier=defence.classifier, restorer=defence.restorer)
    return defence, parts


def examined(defence: nn.Module, parts: Parts, x: Tensor, y: Tensor, classes: int) -> Parts:
    """The parts, with what a few images tell: does the defence draw at random, does a gradient come through? AuditError for a defence that is in
    training mode, fails, answers in another shape than (B, classes), with NaN or with probabilities, or is not classifier(restorer(x))."""
    x, y = x[:8], y[:8]
    try:
        with core.attacking(defence), torch.no_grad():
            z, again, twice = defence(x), defence(x), defence(torch.cat([x, x]))
    except ValueError as error:
        raise AuditError(str(error)) from None
    except (RuntimeError, TypeError) as error:
        raise AuditError(f"the defence fails on images of shape {tuple(x.shape)}: {error}") from None
    if not isinstance(z, Tensor) or z.shape != (len(x), classes):
        got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise AuditError(f"the defence answers {got} to {len(x)} images; it must give logits of shape ({len(x)}, {classes}), a column for each class")
    if not z.isfinite().all():
        raise AuditError("the defence answers NaN or infinity on clean images")
    if not sanity.outputs(defence, x)["passed"]:
        raise AuditError("the defence answers probabilities; attacks need logits: leave out the last softmax")
    parts = replace(parts, random=parts.random or not torch.equal(z, again))
    once = parts.random and not torch.equal(z, again) and torch.allclose(*twice.chunk(2), atol=1e-5, rtol=1e-4)
    parts = replace(parts, per_call=parts.per_call or once)
    if parts.restorer is not None and not parts.random:
        with torch.no_grad():
            if not torch.allclose(parts.classifier(parts.restorer(x)), z, atol=1e-3, rtol=1e-3):
                raise AuditError("the defence is not classifier(restorer(x)), so that BPDA would attack something else; give other parts, or none")
    if parts.differentiable and not _differentiable(defence, x, y):
        parts = replace(parts, differentiable=False)
    if parts.classifier is not None and not _differentiable(parts.classifier, x, y):
        parts = replace(parts, classifier=None, restorer=None)  # neither the oblivious attack nor BPDA has a gradient to follow
    return parts


def _differentiable(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether a backward pass comes through, be its gradient zero."""
    try:
        with core.attacking(model):
            core.gradient(model, x, y, core.cross_entropy)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError):
        return False
    return True


# --- the audit ------------------------------------------------------------


def audit(defence: nn.Module, parts: Parts, x: Tensor, y: Tensor, budget: Budget, *, eps: float, classes: int, norm: str = "linf",
          name: str = "defence", seed: int = 0, draws: int = 10, probe: int = 64, batch_size: int = 256, say: Callable[[str], None] = print) -> Audit:
    """Everything that applies to a defence on the first budget.images of x (B, C, H, W): the ladder, then PGD by eps and by steps and the sanity
    checks on `probe` images. An interrupt keeps what is done. `say` gets a line of progress for each rung."""
    core.check_images(x, y)
    x, y = x[: budget.images], y[: budget.images]
    parts = examined(defence, parts, x, y, classes)
    last, curves, checks, finished = None, [], [], True
    spent = {"eps": eps, "norm": norm, "seed": seed, "draws": draws if parts.random else 1}
    number = len(evaluation.rungs(defence, parts, budget, eps=eps, norm=norm))

    def watch(state: Ladder) -> None:
        nonlocal last
        last, r = state, state.rows[-1]
        say(f"{name}: rung {r['rung']} of {number}, {r['threat']}, {r['attack']}: {r['value']:.1%} left ({r['seconds']:.1f} s)")

    try:
        last = evaluation.ladder(defence, parts, budget, x, y, system=name, batch_size=batch_size, watch=watch, **spent | {"draws": draws})
        x_few, y_few, ways = x[:probe], y[:probe], _ways(defence, parts, budget)
        say(f"{name}: curves and checks on {len(x_few)} images")
        curves.extend(_curves(defence, ways, budget, x_few, y_few, name=name, batch_size=batch_size, **spent))
        at = {r["system"]: r["value"] for r in curves if r["curve"] == "eps" and r["eps"] == eps}
        if ways:
            best = ways[min(reversed(at), key=at.get)]
            checks = sanity.sanity(defence, x_few, y_few, surrogate=best, steps=budget.steps, ladder=last, **spent)
        else:  # no gradient to check an attack with
            checks = [sanity.gradients(defence, x_few, y_few), sanity.outputs(defence, x_few), sanity.black_box(last)]
    except KeyboardInterrupt:
        if last is None:
            raise
        finished = False
        say(f"{name}: interrupted; {min(last.rows[-1]['rung'], number)} of {number} rungs are kept")
    if last.rows[-1]["threat"] != "worst case":
        end = {"threat": "worst case", "attack": "all", "rung": len(last.rows), "worst": last.standing.double().mean().item()}
        last.rows.append(last.rows[-1] | evaluation.score(last.standing[None]) | end)
    return Audit(name, last, curves, checks, x, finished, min(probe, len(x)))


def _ways(defence: nn.Module, parts: Parts, budget: Budget) -> dict[str, nn.Module]:
    """What gradient attacks may differentiate: the defence, and the classifier at its restored image; a random one's mean."""
    ways = {"end to end": defence} if parts.differentiable else {}
    if parts.restorer is not None and parts.classifier is not None:
        ways["bpda identity"] = bpda(parts.restorer, parts.classifier)
    return {name: eot(model, budget.samples, apart=parts.per_call) if parts.random else model for name, model in ways.items()}


def _curves(defence, ways, budget: Budget, x, y, *, eps: float, norm: str, seed: int, draws: int, name: str, batch_size: int) -> Iterator[dict]:
    """Rows of PGD through each of the ways, at 0 to 2 eps, and at eps with one step to twice the budget's."""
    points = [("eps", k * eps, budget.steps) for k in (0, 0.25, 0.5, 1, 2)]
    points += [("steps", eps, n) for n in sorted({1, max(1, budget.steps // 4), budget.steps, 2 * budget.steps})]
    for way, model in ways.items():
        for curve, at, steps in points:
            attack = partial(pgd, eps=at, norm=norm, steps=steps, keep="first" if draws == 1 else "last",
                             generator=torch.Generator(x.device).manual_seed(seed))
            r = evaluation.robustness(defence, attack, x, y, surrogate=model, draws=draws, batch_size=batch_size)
            yield report.row(exhibit="ladder", system=way, threat="curve", attack="pgd", norm=norm, eps=at, steps=steps, seed=seed, curve=curve,
                             audited=name, **r)


# --- the report ------------------------------------------------------------


def figures(found: Audit) -> dict:
    """The report's figures by name: accuracy against eps and steps, and images that fell, where there are any."""
    drawn = {}
    for curve in ("eps", "steps"):
        if rows := [r for r in found.curves if r["curve"] == curve]:
            drawn[curve] = plots.accuracy_curves(rows, x=curve, title=f"{found.name}: PGD by {curve}, {rows[0]['n']} images")
    fell = [i for i, why in enumerate(found.climbed.fell_to) if why not in ("", "clean")][:8]
    if fell:
        clean, adversarial = found.x[fell].cpu(), found.climbed.x_adv[fell].cpu()
        why = [found.climbed.fell_to[i].replace(": ", "\n") for i in fell]
        drawn["fell"] = plots.image_grid([clean, adversarial, plots.perturbation(adversarial - clean)], ["clean", "attacked", "change"],
                                         captions=[[""] * len(fell), why, [""] * len(fell)])
    return drawn


def text(found: Audit, about: str = "") -> str:
    """The report in Markdown; figures are the files audit-NAME.png beside it."""
    rungs = [[str(r["rung"]), r["threat"], r["attack"], report.share(r), f"{r['fell']} of {r['tried']}" if "fell" in r else ""]
             for r in found.climbed.rows]
    bad = [c for c in found.checks if not c["passed"]]
    lines = [f"# Audit of {found.name}", about, found.verdict(), "## The ladder",
             "Each rung attacks the images that the defence, or some draw of it, still gets right.",
             report.markdown(("rung", "attacker", "attack", "left", "fell"), rungs), "## Checks"]
    lines += [f"- **{c['check']}** ({'warning' if c['check'] in WARNING else 'failed'}): {PLAIN.get(c['check'], '')} ({c['reading']})" for c in bad]
    passed = f"{len(found.checks) - len(bad)} of {len(found.checks)} checks passed, on {found.probed} images."
    lines.append(passed if found.checks else "The checks have not run.")
    titles = {"eps": "Accuracy against the budget", "steps": "Accuracy against the steps", "fell": "Images that fell, and to what"}
    return "\n\n".join([*lines, *(f"## {titles[name]}\n\n![{titles[name]}](audit-{name}.png)" for name in figures(found))]) + "\n"


def write(found: Audit, *, run: dict, profile: str, dataset: str, about: str = "", where: Path | None = None) -> Path:
    """Write report.html, report.md, the figures and audit.json to `where`, by default runs/audit/<name>; returns the page's path."""
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    where = where or paths.runs("audit", found.name)
    for name, fig in figures(found).items():
        plots.save_figure(fig, "audit", name, profile=profile, dataset=dataset, where=where)
    checks = [report.row(exhibit="ladder", system=found.name, threat="check", attack=c["check"], value=c["value"], unit="see reading",
                         passed=c["passed"], reading=c["reading"]) for c in found.checks]
    report.save_results("audit", [*found.climbed.rows, *found.curves, *checks], run=run, profile=profile, dataset=dataset, where=where)
    page = text(found, about)
    report.write_atomic(where / "report.md", page.encode())
    style = ("body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td,th{padding:.2em .8em;text-align:left}"
             "img{max-width:100%}.anchor-link{display:none}")
    html = f'<!doctype html><meta charset="utf-8"><title>Audit of {found.name}</title><style>{style}</style>{markdown2html_mistune(page)}'
    return report.write_atomic(where / "report.html", html.encode())


def run(spec: str, *, dataset: str, profile: str = "quick", n: int | None = None, eps: float = 8.0, norm: str = "linf", seed: int = 0,
        surrogates: Sequence[str] = ("target", "adversarial"), name: str | None = None, spend: dict | None = None) -> Path:
    """Audit what `spec` builds on the first n test images of a data set with a profile's budget (changed by `spend`) and write the report; eps in
    255ths (l_inf) or in pixels of [0, 1] (l_2). surrogates: roles of zoo.shared to transfer from, trained on first use."""
    import time

    from advlab import data, training, zoo

    started, builder, device = time.time(), find(spec), training.device()
    test, budget = data.load(dataset, "test"), replace(evaluation.BUDGETS[profile], **{k: v for k, v in (spend or {}).items() if v})
    budget = replace(budget, images=n or budget.images)
    defence, parts = opened(builder())
    x, y = test.images(slice(budget.images), device), test.y[: budget.images].to(device)
    for part in (parts.classifier, parts.restorer, *parts.surrogates):
        if isinstance(part, nn.Module):
            part.to(device)
    examined(defence.to(device), parts, x, y, test.num_classes)  # before anything is trained
    train = data.load(dataset, "train") if surrogates else None
    parts = replace(parts, surrogates=[*parts.surrogates, *(zoo.shared(role, train, profile, seed=seed)[0] for role in surrogates)])
    name = name or spec.partition(":")[2]
    unit = 255 if norm == "linf" else 1
    found = audit(defence, parts, x, y, budget, eps=eps / unit, classes=test.num_classes, norm=norm, name=name, seed=seed)
    about = f"`{spec}` on the first {len(x)} test images of {test.name}, {norm} {eps:g}{'/255' * (norm == 'linf')}, budget `{profile}`."
    info = report.run_info({"spec": spec, "eps": eps, "norm": norm, "surrogates": ", ".join(surrogates)}, seed, started, device=device)
    page = write(found, run=info, profile=profile, dataset=test.name, about=about)
    print(found.verdict(), page, sep="\n")
    return page
