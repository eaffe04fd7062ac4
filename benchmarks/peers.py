"""What the benchmarks share: their options, and every attack of ours and its counterparts in the peer libraries, behind one call and at one budget.

Budgets are made equal in steps, step sizes, starts (one random start, or none) and queries, and every answer is judged outside the attacks.
Where a library's own idea of a budget differs, the comment beside its line says so. Ours and theirs get the model as a user would pass it, in
eval mode with live parameters. Traps that would flatter or wrong a peer:
- foolbox's C&W returns black images where it failed (here: the clean image, a failure); its L2 FMN never projects; its MI-FGSM adds up signs.
- torchattacks' DeepFool takes one image at a time; its C&W has no search over c and stops when the batch's loss rises; its AutoAttack runs 10 steps
  of APGD whatever is asked (here: its parts with the steps asked). Its backward passes, and those of pyautoattack's FAB, fill the parameters' .grad.
- The Squares of torchattacks and pyautoattack make up to three queries more than asked, their APGD two forward passes and one backward.
- adv-lib's PGD never judges its last step (here: it gets one step more), and returns the clean image where no iterate fooled the model."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from statistics import quantiles
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from advlab import data, report, training
from advlab.attacks import apgd, bim, core, dlr, fgsm, mim, pgd
from advlab.attacks.blackbox import square
from advlab.attacks.ensemble import apgd_targets, autoattack, predict
from advlab.attacks.minimal import cw, ddn, deepfool, fmn
from advlab.models import classifier

Answer = TypeVar("Answer")
Run = Callable[[Tensor, Tensor], Tensor]
Events = tuple[tuple[str, int], ...]  # ("forward" | "query" | "backward", images): a query is a forward pass without a graph
SHARE = 2.5  # PGD's step size, in shares of eps / steps, for all
C = 0.1  # C&W's first weight, for all that search over it
LIBRARIES = {"advlab": "advlab", "foolbox": "foolbox", "torchattacks": "torchattacks", "pyautoattack": "pyautoattack", "adv-lib": "adv_lib"}


@dataclass(frozen=True)
class Budget:
    """eps of the fixed-budget attacks (l_inf), steps, C&W's search steps, queries, target classes of APGD-T and FAB-T, seed."""

    eps: float = 8 / 255
    steps: int = 10
    search: int = 1
    queries: int = 100
    targets: int = 9
    seed: int = 0


def options(description: str, attacks: Sequence[str] = (), **flags: str) -> argparse.Namespace:
    """A benchmark's command line: quick, threads (already set), device, attack where there are any to choose from, and flags with their help."""
    parser = argparse.ArgumentParser(description=description)
    for name, text in {"quick": "tiny sizes, to see that everything runs; rows go to runs/", **flags}.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--device", default="cpu")
    if attacks:
        parser.add_argument("--attack", nargs="*", choices=list(attacks), default=list(attacks))
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    return given


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"low": low, "value": middle, "high": high}


def installed() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the libraries that can be imported, and why the others cannot."""
    if "visdom" not in sys.modules and importlib.util.find_spec("visdom") is None:  # adv-lib imports it for plots only
        sys.modules["visdom"] = ModuleType("visdom")
    versions, missing = {}, {}
    for name, module in LIBRARIES.items():
        try:
            importlib.import_module(module)
            versions[name] = metadata.version(name)
        except Exception as error:  # a peer that breaks on import is as good as absent
            missing[name] = f"{type(error).__name__}: {error}"
    return versions, missing


def absent(missing: dict[str, str]) -> list[dict]:
    """Say which libraries are left out, and a row for each of them."""
    for name, why in missing.items():
        print(f"{name} cannot be imported and is left out: {why}")
    return [report.row(exhibit="benchmark", system=name, value=0.0, unit="installed", library=name, reason=why) for name, why in missing.items()]


def lineup(attack: str, model: nn.Module, budget: Budget, libraries) -> dict[str, Run]:
    """The contestants of one attack, ours first: "advlab", "foolbox", ..., or "torchattacks FAB" where a library stands in with another attack."""
    contestants = {}
    for library in (name for name in LIBRARIES if name in libraries):
        for name, run in TABLES[library](model, budget).items():
            which, _, label = name.partition(" ")
            if which == attack:
                contestants[f"{library} {label}".strip()] = run
    return contestants


def call(run: Run, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> Tensor:
    """The attack's answer, drawn from a seeded global generator that is put back; gradients that it left on the parameters are cleared."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = run(x, y)
    model.zero_grad(set_to_none=True)
    return out.detach()


def passes(f: Callable[[], Answer], model: nn.Module) -> tuple[Answer, Events]:
    """What f() returns, and the passes it makes through the model, by hooks."""
    events: list[tuple[str, int]] = []

    def forward(module, inputs, out):
        events.append(("forward" if out.requires_grad else "query", len(out)))
        if out.requires_grad:
            out.register_hook(lambda grad: events.append(("backward", len(grad))))

    handle = model.register_forward_hook(forward)
    try:
        return f(), tuple(events)
    finally:
        handle.remove()


def count(events: Events, n: int) -> dict[str, float]:
    """Passes forward and backward an image, as row fields, for a batch of n."""
    forward, backward = (sum(m for kind, m in events if (kind == "backward") is which) / n for which in (False, True))
    return {"forward_passes": forward, "backward_passes": backward}


# --- the tables: attack (and a label), in the order of the benchmarks -> a function of images and labels ------------------------------------


def _advlab(model: nn.Module, b: Budget) -> dict[str, Run]:
    def drawn(attack, **options) -> Run:
        return lambda x, y: attack(model, x, y, generator=torch.Generator(x.device).manual_seed(b.seed), **options)

    fixed = {"eps": b.eps, "steps": b.steps}
    return {
        "fgsm": partial(fgsm, model, eps=b.eps),
        "bim": partial(bim, model, **fixed),
        "mim": partial(mim, model, **fixed),
        "pgd": drawn(pgd, **fixed),
        "pgd-best": drawn(pgd, keep="best", **fixed),
        "apgd-ce": drawn(apgd, **fixed),
        "apgd-dlr": drawn(apgd, loss=dlr, **fixed),
        "apgd-t": drawn(apgd_targets, targets=b.targets, **fixed),
        "square": drawn(square, eps=b.eps, queries=b.queries),
        "autoattack": drawn(autoattack, targets=b.targets, queries=b.queries, **fixed),
        "deepfool": partial(deepfool, model, steps=b.steps),
        "cw": partial(cw, model, steps=b.steps, search_steps=b.search, c=C),
        "ddn": partial(ddn, model, steps=b.steps),
        "fmn-l2": partial(fmn, model, steps=b.steps, norm="l2"),
        "fmn-l2 x6": partial(fmn, model, steps=6 * b.steps, norm="l2"),  # the passes of FAB, which makes 2 forward and 10 backward a step
        "fmn-linf": partial(fmn, model, steps=b.steps, norm="linf"),
        "fmn-linf x6": partial(fmn, model, steps=6 * b.steps, norm="linf"),
    }


def _foolbox(model: nn.Module, b: Budget) -> dict[str, Run]:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    attacks, share = foolbox.attacks, 1 / b.steps

    def fixed(attack) -> Run:
        return lambda x, y: attack.run(wrapped, x, y, epsilon=b.eps)

    def free(attack) -> Run:
        def run(x, y):
            x_adv = attack.run(wrapped, x, y)
            return torch.where(x_adv.flatten(1).any(1).view(-1, 1, 1, 1), x_adv, x)  # black: a failure
        return run

    return {
        "fgsm": fixed(attacks.LinfFastGradientAttack()),
        "bim": fixed(attacks.LinfBasicIterativeAttack(rel_stepsize=share, steps=b.steps)),
        "mim": fixed(attacks.LinfMomentumIterativeFastGradientMethod(rel_stepsize=share, steps=b.steps)),
        "pgd": fixed(attacks.LinfPGD(rel_stepsize=SHARE * share, steps=b.steps)),
        "deepfool": free(attacks.L2DeepFoolAttack(steps=b.steps)),
        "cw": free(attacks.L2CarliniWagnerAttack(binary_search_steps=b.search, steps=b.steps, initial_const=C, abort_early=False)),
        "ddn": free(attacks.DDNAttack(steps=b.steps)),
        "fmn-l2": free(attacks.L2FMNAttack(steps=b.steps)),
        "fmn-linf": free(attacks.LInfFMNAttack(steps=b.steps)),
    }


def _torchattacks(model: nn.Module, b: Budget) -> dict[str, Run]:
    import torchattacks as ta

    step, common = b.eps / b.steps, {"eps": b.eps, "steps": b.steps, "seed": b.seed}
    classes = b.targets + 1

    def whole(x, y):
        parts = [ta.APGD(model, **common), ta.APGDT(model, n_classes=classes, **common),
                 ta.FAB(model, multi_targeted=True, n_classes=classes, **common), ta.Square(model, eps=b.eps, n_queries=b.queries, seed=b.seed)]
        return ta.MultiAttack(parts)(x, y)

    return {
        "fgsm": ta.FGSM(model, eps=b.eps),
        "bim": ta.BIM(model, eps=b.eps, alpha=step, steps=b.steps),
        "mim": ta.MIFGSM(model, eps=b.eps, alpha=step, steps=b.steps),
        "pgd": ta.PGD(model, eps=b.eps, alpha=SHARE * step, steps=b.steps),
        "apgd-ce": ta.APGD(model, loss="ce", **common),
        "apgd-dlr": ta.APGD(model, loss="dlr", **common),
        "apgd-t": ta.APGDT(model, n_classes=classes, **common),
        "square": ta.Square(model, eps=b.eps, n_queries=b.queries, seed=b.seed),
        "autoattack": whole,
        "deepfool": ta.DeepFool(model, steps=b.steps),
        "cw": ta.CW(model, c=1, steps=b.steps * b.search),  # no search: one run of as many steps with its own default for c
    }


def _pyautoattack(model: nn.Module, b: Budget) -> dict[str, Run]:
    from pyautoattack import AutoAttack
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    common = {"n_iter": b.steps, "norm": "Linf", "eps": b.eps, "seed": b.seed}
    aimed = APGDAttack_targeted(model, n_target_classes=b.targets, **common)
    searched = SquareAttack(model, n_queries=b.queries, eps=b.eps, seed=b.seed)

    def fab(norm: str) -> Run:  # drops what lies beyond its eps; torchattacks' is the same code and gives the same images
        return FABAttack_PT(model, norm=norm, n_iter=b.steps, eps=1e3, seed=b.seed).perturb

    def whole(x, y):
        attack = AutoAttack(model, eps=b.eps, seed=b.seed, device=x.device)
        attack.apgd, attack.apgd_targeted, attack.square = APGDAttack(model, **common), aimed, searched
        attack.fab.n_iter, attack.fab.n_target_classes = b.steps, b.targets
        return attack.run_standard_evaluation(x, y, batch_size=len(x))[0]

    return {
        "apgd-ce": APGDAttack(model, loss="ce", **common).perturb,
        "apgd-dlr": APGDAttack(model, loss="dlr", **common).perturb,
        "apgd-t": aimed.perturb,
        "square": searched.perturb,
        "autoattack": whole,
        "fmn-l2 FAB": fab("L2"),
        "fmn-linf FAB": fab("Linf"),
    }


def _adv_lib(model: nn.Module, b: Budget) -> dict[str, Run]:
    from adv_lib import attacks

    inf = float("inf")
    adaptive = {"eps": b.eps, "norm": inf, "n_iter": b.steps}

    def best(x, y):
        return attacks.pgd_linf(model, x, y, b.eps, steps=b.steps + 1, relative_step_size=SHARE / b.steps)

    return {
        "pgd-best": best,
        "apgd-ce": partial(attacks.apgd, model, loss_function="ce", **adaptive),
        "apgd-dlr": partial(attacks.apgd, model, loss_function="dlr", **adaptive),
        "apgd-t": partial(attacks.apgd_targeted, model, num_targets=b.targets, **adaptive),
        "deepfool": partial(attacks.df, model, steps=b.steps),
        "cw": partial(attacks.carlini_wagner_l2, model, initial_const=C, binary_search_steps=b.search, max_iterations=b.steps, abort_early=False),
        "ddn": partial(attacks.ddn, model, steps=b.steps, levels=None),
        "fmn-l2": partial(attacks.fmn, model, norm=2, steps=b.steps),
        "fmn-linf": partial(attacks.fmn, model, norm=inf, steps=b.steps),
        "fmn-l2 FAB": partial(attacks.fab, model, norm=2, n_iter=b.steps),
        "fmn-linf FAB": partial(attacks.fab, model, norm=inf, n_iter=b.steps),
    }


TABLES = {"advlab": _advlab, "foolbox": _foolbox, "torchattacks": _torchattacks, "pyautoattack": _pyautoattack, "adv-lib": _adv_lib}


# --- networks and budgets -------------------------------------------------------------------------------------------------------------------


def crops(split: str, shape: tuple[int, int, int], limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images of skimage10, uint8, and labels; made grey and cut to the middle where the shape asks for that."""
    part = data.load("skimage10", split, limit=limit)
    cut = (part.shape[1] - shape[1]) // 2
    x = part.x if shape[0] == 3 else part.x.float().mean(1, keepdim=True).byte()
    return x[:, :, cut : cut + shape[1], cut : cut + shape[2]].contiguous(), part.y


def network(arch: str, width: int, shape: tuple[int, int, int] = (3, 32, 32), *, limit: int | None = None, **settings) -> nn.Module:
    """A classifier of skimage10's crops in that shape, in eval mode, cached among the checkpoints."""
    build = partial(classifier, arch, channels=shape[0], width=width)
    name = f"bench-{arch}-w{width}-{'x'.join(map(str, shape))}"
    return training.load_or_fit(name, build, training.standard, crops("train", shape, limit), **settings)[0]


def correct(model: nn.Module, shape: tuple[int, int, int], n: int) -> tuple[Tensor, Tensor]:
    """The first n test images in [0, 1] (as many as there are) that the model classifies correctly, and their labels."""
    x, y = crops("test", shape)
    device = next(model.parameters()).device
    x, y = (x.float() / 255).to(device), y.to(device)
    right = (predict(model, x).argmax(1) == y).nonzero().squeeze(1)[:n]
    return x[right], y[right]


def calibrate(attack: str, model: nn.Module, x: Tensor, y: Tensor, budget: Budget, *, share: float = 0.45, start: float = 0.25 / 255,
              growth: float = 1.4) -> float:
    """The first eps of start, start * growth, start * growth^2, ... at which our attack leaves at most this share of the images standing."""
    eps = start
    while eps < 0.25:
        run = lineup(attack, model, Budget(**{**vars(budget), "eps": eps}), ["advlab"])["advlab"]
        if (predict(model, call(run, model, x, y)).argmax(1) == y).float().mean() <= share:
            break
        eps *= growth
    return eps


def nan_to_clean(x_adv: Tensor, x: Tensor) -> Tensor:
    """The answer, but the clean image where it has a NaN; inside [0, 1]."""
    return torch.where(core.rows(x_adv.flatten(1).isfinite().all(1)), x_adv, x).clamp(0, 1)
