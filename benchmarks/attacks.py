"""Speed and memory of every attack beside its peers' and beside the bare passes: `python benchmarks/attacks.py [--quick] [--variants] [--overhead]`.

Within an attack, rounds go through all contestants in turn, and through the bare replay of the passes that each was seen to make: the same batches,
forward and backward, with frozen parameters and nothing else. `ratio_bare` is the median over rounds of seconds over that replay's, taken next to
it, and the verdict the median over rounds of ours over the fastest peer's, with quartiles. Short attacks get more rounds, as the machine may have
other work. A peer that took over 1.6 times as long as ours in one round, or 1.3 times in two, rests. Memory is the peak of what is allocated at one
time during a short run, over that of one bare forward and backward pass.

--overhead measures something else, which other work on the machine hardly touches: a run's seconds over those spent inside its own passes, beside
the same ratio of bare passes."""

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
from peers import Budget, Events, Run, absent, calibrate, call, correct, count, installed, lineup, network, options, passes, quartiles
from torch import Tensor, nn

from advlab import report
from advlab.attacks import core
from advlab.models import folded

NETWORKS = {  # architecture: width, shape of an image, and just enough training for margins that look like a classifier's
    "resnet18": (16, (3, 32, 32), {"limit": 2000, "epochs": 2, "batch_size": 50}),
    "vgg0": (16, (1, 28, 28), {"epochs": 3, "batch_size": 64}),
}
ATTACKS = {
    "fgsm": Budget(steps=1), "bim": Budget(steps=10), "mim": Budget(steps=10), "pgd": Budget(steps=10), "pgd-best": Budget(steps=10),
    "apgd-ce": Budget(steps=10), "deepfool": Budget(steps=50), "cw": Budget(steps=50), "ddn": Budget(steps=50), "fmn-l2": Budget(steps=20),
    "square": Budget(queries=100),
}  # fmt: skip
L2 = ("deepfool", "cw", "ddn", "fmn-l2")
VARIABLE = ("apgd-ce", "deepfool", "square")  # images leave, so that their steps are not fixed
STOPS_EARLY = (("cw", "torchattacks"),)  # it does less, so it is timed but runs in no race
SPENT = 8.0  # seconds on ours over all rounds, where that leaves more rounds than the fewest
RESTS = (1.6, 1.3)  # times our seconds, after one round and after two


def pair(x: Tensor) -> Events:
    return ("forward", len(x)), ("backward", len(x))


# --- passes, time, memory -------------------------------------------------------------------------------------------------------------------


def bare(model: nn.Module, x: Tensor, events: Events, longest: int = 8) -> tuple[Callable[[], None], float]:
    """A function that makes those passes and nothing else, and how many times over they were made: of equal pairs only the first few are replayed."""
    part = events[:longest] if len(set(events)) == 2 and events[0] != events[1] else events

    def replay():
        with core.attacking(model):
            for (kind, n), (after, _) in zip(part, (*part[1:], part[0])):
                if kind == "query":
                    with torch.no_grad():
                        model(x[:n])
                elif kind == "forward":
                    images = x[:n].detach().requires_grad_()
                    out = model(images)
                else:
                    torch.autograd.grad(out.sum(), images, retain_graph=after == "backward")

    return replay, len(events) / len(part)


def clock(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def time_of(f: Callable[[], object], model: nn.Module, on: Tensor, calls: int) -> float:
    """Mean over calls; seeding and clearing what a peer leaves on the parameters are not timed."""
    total = 0.0
    for _ in range(calls):
        torch.manual_seed(0)
        start = clock(on)
        f()
        total += clock(on) - start
        model.zero_grad(set_to_none=True)
    return total / calls


def own(f: Callable[[], object], model: nn.Module, on: Tensor, calls: int) -> float:
    """Seconds of f() over those of them that went into the model's forward passes and into autograd. Both come from the same calls, so that other
    work on the machine changes the ratio little. Bare passes are a little above 1: what they leave behind is freed outside."""
    moments = []  # at which passes begin and end, in turn

    def note(*_):
        moments.append(clock(on))

    def timed(function):
        def run(*arguments, **options):
            note()
            try:
                return function(*arguments, **options)
            finally:
                note()
        return run

    backward = {name: timed(getattr(torch.autograd, name)) for name in ("grad", "backward")}
    with model.register_forward_pre_hook(note), model.register_forward_hook(note), patch.multiple(torch.autograd, **backward):
        total = calls * time_of(f, model, on, calls)
    return total / sum(end - begin for begin, end in zip(moments[::2], moments[1::2]))


def peak(f: Callable[[], object], x: Tensor) -> int:
    """The most bytes that tensors held at one time beyond what was there before: on the CPU from the profiler's record of the allocator."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        f()
        return torch.cuda.max_memory_allocated(x.device) - before
    gc.collect()  # cycles that a run before has left would be freed in this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        f()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


# --- one attack -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A contestant: its attack on a model and images, the passes it makes, and its seconds and its bare replay's, one of each a round."""

    name: str
    run: Run
    model: nn.Module
    x: Tensor
    events: Events = ()
    seconds: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)


def entries(attack: str, budget: Budget, models: dict[str, nn.Module], x: Tensor, versions: dict) -> list[Entry]:
    """Ours first, then ours on the variants of the model, then the peers. models: label ("" for the model itself) to network."""
    found = [Entry(name, run, models[""], x) for name, run in lineup(attack, models[""], budget, versions).items() if " " not in name]
    for label, model in models.items():
        if label:
            found.insert(1, Entry(f"advlab {label}", lineup(attack, model, budget, ["advlab"])["advlab"], model, x))
    return found


def race(entered: list[Entry], y: Tensor, *, rounds: int, least: float) -> list[Entry]:
    """Those that did not fail, timed. Each reading lasts at least `least` seconds; the run that records the passes is the first where it does."""
    racers, first = [], {}
    for entry in entered:
        try:
            bare(entry.model, entry.x, pair(entry.x))[0]()  # warms up
            start = clock(y)
            _, entry.events = passes(partial(call, entry.run, entry.model, entry.x, y), entry.model)
            first[entry.name] = clock(y) - start
            racers.append(entry)
        except Exception as error:
            if entry.name == "advlab":
                raise
            print(f"{entry.name} failed: {type(error).__name__}: {error}")
    ours, long = racers[0], first[racers[0].name] >= least
    if least:
        rounds = min(max(rounds, round(SPENT / max(first[ours.name], least))), 8 * rounds)
    for k in range(rounds):
        bares = {}
        for entry in racers:
            if k and entry is not ours and median(entry.seconds) > RESTS[k > 1] * median(ours.seconds):
                continue
            calls = max(1, math.ceil(least / first[entry.name]))
            run = partial(entry.run, entry.x, y)
            entry.seconds.append(first[entry.name] if long and not k else time_of(run, entry.model, y, calls))
            key = (id(entry.model), entry.events)
            if key not in bares:  # contestants that make the same passes share a replay; those of the peers alone are timed twice
                if k > 1 and key not in [(id(e.model), e.events) for e in racers if e.name.startswith("advlab")]:
                    continue
                replay, times = bare(entry.model, entry.x, entry.events)
                bares[key] = times * time_of(replay, entry.model, y, max(1, math.ceil(least * times / first[entry.name])))
            entry.bare.append(bares[key])
    return racers


def overhead(attack: str, budget: Budget, model: nn.Module, x: Tensor, y: Tensor, *, network: str, rounds: int, least: float) -> dict:
    """A row: what a run of ours costs over its own passes made bare, each first related to the seconds inside its own passes (`own`); median and
    quartiles over rounds of at least `least` seconds each, after one to warm up."""
    run = partial(lineup(attack, model, budget, ["advlab"])["advlab"], x, y)
    replay, _ = bare(model, x, passes(run, model)[1])
    calls, again = (max(1, math.ceil(least / time_of(f, model, y, 1))) for f in (run, replay))
    ratios = quartiles([own(run, model, y, calls) / own(replay, model, y, again) for _ in range(rounds)])
    print(f"{attack:9} {network:22} {ratios['value']:.3f} [{ratios['low']:.3f}, {ratios['high']:.3f}] times its own passes")
    return report.row(exhibit="benchmark", system="advlab", attack=attack, unit="ratio", n=len(x), seed=budget.seed, network=network,
                      repetitions=rounds, **ratios)


def measure(attack: str, budget: Budget, models: dict[str, nn.Module], x: Tensor, y: Tensor, versions: dict, *, network: str, rounds: int,
            least: float) -> list[dict]:
    """One attack on one network: a row for each contestant, and the verdict."""
    racers = race(entries(attack, budget, models, x, versions), y, rounds=rounds, least=least)
    short = {e.name: e for e in entries(attack, replace(budget, steps=min(budget.steps, 3), queries=3), models, x, versions)}
    one = peak(bare(models[""], x, pair(x))[0], x)
    base = {"exhibit": "benchmark", "attack": attack, "norm": "l2" if attack in L2 else "linf", "eps": None if attack in L2 else budget.eps,
            "steps": budget.queries if attack == "square" else budget.steps, "n": len(x), "seed": budget.seed, "network": network}
    rows = []
    for entry in racers:
        brief, library = short[entry.name], entry.name.split()[0]
        memory = peak(partial(call, brief.run, brief.model, brief.x, y), x)
        rows.append(report.row(
            **base, **count(entry.events, len(x)), **quartiles(entry.seconds), system=entry.name, unit="seconds", library=library,
            library_version=versions[library], repetitions=len(entry.seconds), peak_ratio=memory / one,
            ratio_bare=median([a / b for a, b in zip(entry.seconds, entry.bare)])))
    if peers := [e for e in racers if not e.name.startswith("advlab") and (attack, e.name) not in STOPS_EARLY]:
        ours, fastest = racers[0], min(peers, key=lambda e: median(e.seconds))
        ratio = quartiles([a / b for a, b in zip(ours.seconds, fastest.seconds)])
        rows.append(report.row(**base, **ratio, system="advlab / fastest peer", unit="ratio", peer=fastest.name,
                               passed=ratio["value"] <= 1.03 or ratio["low"] <= 1))
    return rows


# --- variants of the model ------------------------------------------------------------------------------------------------------------------


def variants(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """The model (channels_last, as training.fit leaves it) with contiguous weights, and with batch norm folded into the convolution before it.
    Both must give the same logits."""
    found = {"contiguous": deepcopy(model).to(memory_format=torch.contiguous_format), "folded": folded(model).to(memory_format=torch.channels_last)}
    with torch.no_grad():
        for label, variant in found.items():
            torch.testing.assert_close(variant(x), model(x), rtol=1e-3, atol=1e-3, msg=lambda text, label=label: f"{label}: {text}")
    return found


# --- the whole run --------------------------------------------------------------------------------------------------------------------------


def show(rows: Sequence[dict]) -> None:
    for r in rows:
        if r["unit"] == "ratio":
            print(f"{r['attack']:9} advlab / {r['peer']:13} {r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]  {'ok' if r['passed'] else 'SLOWER'}")
        else:
            print(f"{r['attack']:9} {r['system']:21} {r['value']:9.4f} s  iqr {(r['high'] - r['low']) / r['value']:5.1%}  x{r['repetitions']}"
                  f"  passes {r['forward_passes']:6.1f} + {r['backward_passes']:6.1f}  / bare {r['ratio_bare']:5.2f}  peak {r['peak_ratio']:.2f}")


def main() -> None:
    given, started = options("Time every attack beside its peers and beside the bare passes.", ATTACKS,
                             variants="also pgd on the model with contiguous weights, and with batch norm folded",
                             overhead="only what ours cost over their own passes; attacks_overhead.json"), time.time()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of every start and stop
    quick = given.quick
    batch, rounds, least = (8, 2, 0.0) if quick else (64, 5, 0.25)
    versions, missing = installed()
    rows = [] if given.overhead else absent(missing)
    for arch, (width, shape, training) in NETWORKS.items():
        if quick:
            width, training = 8, {"limit": 200, "epochs": 1, "batch_size": 50}
        model = network(arch, width, shape, optimizer="adam", lr=3e-3, progress=False, device=given.device, **training)
        x, y = correct(model, shape, batch)
        net = f"{arch} w{width} {'x'.join(map(str, shape))}"
        eps = calibrate("pgd", model, x, y, Budget())
        print(f"\n{net}: batch of {len(x)}, eps {255 * eps:.2f}/255, {torch.get_num_threads()} threads")
        for attack in given.attack:
            budget = replace(ATTACKS[attack], eps=eps)
            if quick:
                budget = replace(budget, steps=min(budget.steps, 3), queries=5)
            if given.overhead:
                rows.append(overhead(attack, budget, model, x, y, network=net, rounds=rounds, least=least))
                continue
            models = {"": model} | (variants(model, x) if given.variants and attack == "pgd" else {})
            new = measure(attack, budget, models, x, y, versions, network=net, rounds=rounds, least=least)
            show(new)
            rows += new
    if fixed := [r for r in rows if r["system"] == "advlab" and r["attack"] not in VARIABLE and not given.overhead]:
        worst = max(fixed, key=lambda r: r["peak_ratio"])
        print(f"\npeak memory of our fixed-step attacks: at most {worst['peak_ratio']:.2f} times a forward and backward pass ({worst['attack']})")
    parameters = {"quick": quick, "rounds": rounds, "batch": batch, "libraries": ", ".join(f"{k} {v}" for k, v in versions.items()),
                  "missing": ", ".join(missing) or None}
    info = report.run_info(parameters, 0, started, device=given.device)
    profile = "standard" if not quick and set(given.attack) == set(ATTACKS) else "smoke"  # a part is not published
    where = report.save_results("attacks_overhead" if given.overhead else "attacks_speed", rows, run=info, profile=profile, dataset="benchmark")
    print(f"{len(rows)} rows in {where}, after {info['seconds']:.0f} s")


if __name__ == "__main__":
    main()
