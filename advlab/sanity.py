"""Checks that tell whether an evaluation can be trusted (Carlini et al., arXiv 1902.06705, and the warnings of AutoAttack).

A failed check means that the attack is weak or the gradients are masked, not that the defence is strong. Each check is a plain row: `check`,
`passed`, `value`, `bound` and `reading`, a sentence with the numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from advlab.attacks import core
from advlab.attacks.core import Model
from advlab.attacks.ensemble import predict
from advlab.attacks.gradient import pgd
from advlab.evaluation import BLACK, Ladder, accuracy, robustness


def row(check: str, passed: bool, value: float, bound: float, reading: str) -> dict:
    return {"check": check, "passed": bool(passed), "value": float(value), "bound": float(bound), "reading": reading}


def sanity(defence: Model, x: Tensor, y: Tensor, *, eps: float, surrogate: Model | None = None, steps: int = 20, restarts: int = 2,
           norm: str = "linf", draws: int = 1, seed: int = 0, ladder: Ladder | None = None) -> list[dict]:
    """All checks on images x (B, C, H, W) and labels y, with projected PGD that keeps its last iterate, through `surrogate` where one is given.

    A random defence is judged over `draws` passes. `ladder`, where it was climbed, adds the comparison of white box and black box. The
    tolerance of every comparison is the overlap of 95 % Wilson intervals."""
    def attacked(budget: float, *, n: int = steps, starts: int = 1) -> dict:
        if budget == 0:
            return accuracy(defence, x, y, draws=draws)
        attack = partial(pgd, eps=budget, norm=norm, steps=n, restarts=starts, generator=torch.Generator(x.device).manual_seed(seed))
        return robustness(defence, attack, x, y, surrogate=surrogate, draws=draws)

    wide = 0.5 if norm == "linf" else 0.5 * x[0].numel() ** 0.5
    clean, at_eps = accuracy(defence, x, y, draws=draws), attacked(eps)
    chance = 1 / predict(defence, x[:1]).shape[1]
    rows = [zero_eps(defence, x, y, norm, surrogate, draws, clean), floor(attacked(wide), chance, wide)]
    rows.append(falling("eps", [(0, clean), (eps / 2, attacked(eps / 2)), (eps, at_eps), (2 * eps, attacked(2 * eps))]))
    few = max(1, steps // 4)
    rows.append(falling("steps", [(few, attacked(eps, n=few)), (steps, at_eps), (2 * steps, attacked(eps, n=2 * steps))]))
    rows.append(falling("restarts", [(1, at_eps), (restarts, attacked(eps, starts=restarts))]))
    rows.append(noise(defence, x, y, eps, norm, seed, draws, clean, at_eps))
    rows += [gradients(surrogate or defence, x, y), randomness(defence, x, draws), outputs(defence, x), dynamic(defence, x)]
    return rows + ([black_box(ladder)] if ladder is not None else [])


def zero_eps(defence, x, y, norm, surrogate, draws, clean) -> dict:
    """An attack with eps = 0 changes no pixel, so accuracy must be the clean one."""
    with_zero = robustness(defence, partial(pgd, eps=0.0, norm=norm, steps=1), x, y, surrogate=surrogate, draws=draws)
    same = with_zero["correct"] == clean["correct"] if draws == 1 else with_zero["high"] >= clean["low"]
    return row("eps = 0 is clean", same and with_zero["linf"] == 0, with_zero["value"], clean["value"],
               f"accuracy {with_zero['value']:.1%} at eps 0, {clean['value']:.1%} clean")


def floor(result: dict, chance: float, eps: float) -> dict:
    """With a budget that can turn any image into grey, accuracy must fall to chance."""
    return row("falls to chance", result["low"] <= chance, result["value"], chance,
               f"accuracy {result['value']:.1%} at eps {eps:g}, chance is {chance:.1%}")


def falling(what: str, results: list[tuple[float, dict]]) -> dict:
    """Accuracy must not rise by more than the intervals allow as the attacker gets more of something."""
    rises = [(b["value"] - a["value"], b["low"] > a["high"]) for (_, a), (_, b) in pairwise(results)]
    path = ", ".join(f"{at:.3g}: {r['value']:.1%}" for at, r in results)
    return row(f"no rise with {what}", not any(bad for _, bad in rises), max(rise for rise, _ in rises), 0.0, f"accuracy by {what}: {path}")


def noise(defence, x, y, eps, norm, seed, draws, clean, at_eps) -> dict:
    """Random noise of the same size must cost at most 5 points beyond the clean interval, or half of what the attack costs."""
    generator = torch.Generator(x.device).manual_seed(seed)
    budget = core.check_budget(eps, x)
    delta = core.uniform(x, generator).sign() if norm == "linf" else core.gaussian(x, generator)
    noisy = (x + budget * (delta if norm == "linf" else delta / core.l2(delta))).clamp(0, 1)
    result = accuracy(defence, noisy, y, draws=draws)
    bound = min(clean["low"] - 0.05, clean["value"] - (clean["value"] - at_eps["value"]) / 2)
    return row("noise is harmless", result["high"] >= bound, result["value"], bound,
               f"accuracy {result['value']:.1%} under random noise of this size, {clean['value']:.1%} clean, {at_eps['value']:.1%} attacked")


def gradients(model: Model, x: Tensor, y: Tensor) -> dict:
    """The input gradient of every image must be finite and not all zero; the share of exact zeros is told."""
    with core.attacking(model):
        try:
            _, _, grad = core.gradient(model, x, y, core.cross_entropy)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            return row("gradients", False, 0.0, 1.0, str(error))
    usable = (torch.isfinite(grad).flatten(1).all(1) & (grad.flatten(1) != 0).any(1)).double().mean().item()
    zeros = (grad == 0).double().mean().item()
    return row("gradients", usable == 1, usable, 1.0,
               f"{usable:.1%} of the images have a finite gradient that is not zero; {zeros:.1%} of all entries are 0")


def randomness(defence: Model, x: Tensor, draws: int) -> dict:
    """Two passes over the same batch agree, unless the defence is judged as a random one."""
    with torch.no_grad():
        gap = (defence(x) - defence(x)).abs().max().item()
    declared = gap == 0 or draws > 1
    return row("random output is declared", declared, gap, 0.0,
               f"two passes differ by {gap:.2g}; judged over {draws} draw{'s' * (draws > 1)}" + ("" if declared else ": use eot and draws > 1"))


def outputs(defence: Model, x: Tensor) -> dict:
    """The outputs are logits, not probabilities: rows that are positive and sum to 1 flatten the loss."""
    with torch.no_grad():
        z = defence(x)
    off = (z.sum(1) - 1).abs().max().item() if z.min() >= 0 else 1.0
    return row("outputs are logits", off > 1e-3, off, 1e-3,
               f"outputs range from {z.min():.3g} to {z.max():.3g}" + "; they are probabilities" * (off <= 1e-3))


@contextmanager
def _counting_autograd() -> Iterator[list]:
    calls: list[str] = []
    grad, backward = torch.autograd.grad, torch.autograd.backward

    def counted(function, name):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)
        return call

    torch.autograd.grad, torch.autograd.backward = counted(grad, "grad"), counted(backward, "backward")
    try:
        yield calls
    finally:
        torch.autograd.grad, torch.autograd.backward = grad, backward


def dynamic(defence: Model, x: Tensor) -> dict:
    """Does the forward pass take gradients itself? Then end-to-end attacks must differentiate through them, and the reader must know."""
    with _counting_autograd() as calls, torch.no_grad():
        defence(x[:1])
    return row("no gradients inside forward", not calls, len(calls), 0,
               f"{len(calls)} gradient calls in one forward pass" + ("; an attack has to see through them" if calls else ""))


def black_box(ladder: Ladder) -> dict:
    """Images that stood every white-box rung must not fall to transfer or queries: at most one of them, or 1 %."""
    fell = sum(name.split(":")[0] in BLACK for name in ladder.fell_to)
    bound = max(1, round(0.01 * len(ladder.fell_to)))
    return row("white box is strongest", fell <= bound, fell, bound, f"{fell} of {len(ladder.fell_to)} images fell to transfer or queries alone")


def failed(rows: list[dict]) -> list[str]:
    """The failed checks in words."""
    return [f"{r['check']}: {r['reading']}" for r in rows if not r["passed"]]
