"""Strength of every attack beside its peers': `python benchmarks/strength.py [--quick]`.

On two classifiers of skimage10, one of them trained adversarially, all contestants attack the same test images, which the network gets right. Fixed
budgets: robust accuracy at equal steps, step sizes, starts and queries, at an eps where our attack leaves at most 45 %; the verdict is ours minus the
strongest peer's, in points. Minimal norms: the mean over the images fooled, at equal steps; the verdict is ours over the best peer's, over the images
that both fooled, for peers that fool 95 % or more. Answers are judged here, after a projection into ball and box that undoes rounding."""

import time
from dataclasses import replace
from functools import partial

import torch
from peers import Budget, absent, calibrate, call, correct, count, installed, lineup, nan_to_clean, network, options, passes
from torch import Tensor, nn

from advlab import data, report, zoo
from advlab.attacks import core
from advlab.attacks.ensemble import predict
from advlab.data import random_flip
from advlab.evaluation import score

FIXED = {
    "fgsm": Budget(steps=1), "pgd": Budget(steps=20), "pgd-best": Budget(steps=20), "mim": Budget(steps=20), "apgd-ce": Budget(steps=20),
    "apgd-dlr": Budget(steps=20), "apgd-t": Budget(steps=20), "autoattack": Budget(steps=20, queries=100), "square": Budget(queries=200),
}  # fmt: skip
MINIMAL = {"deepfool": Budget(steps=50), "cw": Budget(steps=100, search=5), "ddn": Budget(steps=100), "fmn-l2": Budget(steps=20),
           "fmn-linf": Budget(steps=20)}
DRAWS = {"pgd": 2, "apgd-ce": 2, "apgd-dlr": 2}  # seeds over which accuracies are averaged, where that is cheap
# Far weaker or stronger than PGD, at whose eps they would leave nearly all or nearly nothing: an eps of their own, sought from this share of PGD's.
OWN_EPS = {"fgsm": 1.0, "square": 1.0, "apgd-t": 0.3, "autoattack": 0.3}
BATCH = 125


def networks(quick: bool, device: str) -> dict[str, nn.Module]:
    few = {"limit": 500, "epochs": 1} if quick else {"epochs": 10}
    plain = network("small_cnn" if quick else "vgg0", 8 if quick else 16, optimizer="adam", lr=3e-3, augment=random_flip, progress=False,
                    device=device, **few)
    robust, _ = zoo.shared("adversarial", data.load("skimage10", limit=500 if quick else None), "smoke" if quick else "quick", progress=False)
    return {"small_cnn" if quick else "vgg0": plain, "small_cnn, adversarially trained": robust.to(device)}


def contest(attack: str, budget: Budget, model: nn.Module, x: Tensor, y: Tensor, versions: dict, draws: int = 1) -> dict[str, tuple]:
    """Each contestant's answers (draws, B, C, H, W), its passes an image, and seconds. One that fails is left out."""
    found = {}
    for name in lineup(attack, model, budget, versions):
        start, answers, events = time.perf_counter(), [], ()
        try:
            for seed in range(draws):
                run = lineup(attack, model, replace(budget, seed=seed), versions)[name]
                for part in zip(x.split(BATCH), y.split(BATCH)):
                    x_adv, made = passes(partial(call, run, model, *part, seed=seed), model)
                    answers.append(nan_to_clean(x_adv, part[0]))
                    events += made
        except Exception as error:
            print(f"{attack}: {name} failed: {type(error).__name__}: {error}")
            continue
        found[name] = torch.cat(answers).unflatten(0, (draws, len(x))), count(events, draws * len(x)), round(time.perf_counter() - start, 1)
    return found


def fixed(attack: str, budget: Budget, model: nn.Module, x: Tensor, y: Tensor, versions: dict, draws: int, **extra) -> list[dict]:
    """Rows of robust accuracy, and the verdict."""
    eps, rows = core.check_budget(budget.eps, x), []
    base = {"exhibit": "benchmark", "attack": attack, "norm": "linf", "eps": budget.eps, "seed": 0, **extra,
            "steps": budget.queries if attack == "square" else budget.steps}
    for name, (answers, spent, seconds) in contest(attack, budget, model, x, y, versions, draws).items():
        standing = torch.stack([predict(model, core.project(x_adv, x, eps, "linf")).argmax(1) == y for x_adv in answers])
        rows.append(entry(name, versions, spent, **base, **score(standing), seconds=seconds))
    ours, peers = [r for r in rows if r["library"] == "advlab"], [r for r in rows if r["library"] != "advlab"]
    if ours and peers:
        best = min(peers, key=lambda r: r["value"])
        points = 100 * (ours[0]["value"] - best["value"])
        rows.append(report.row(**base, n=len(x), system="advlab - strongest peer", value=points, unit="points", peer=best["system"],
                               strongest_peer_leaves=best["value"], passed=points <= 1 + 1e-9))
    return rows


def minimal(attack: str, budget: Budget, model: nn.Module, x: Tensor, y: Tensor, versions: dict, **extra) -> list[dict]:
    """Rows of mean norms, and the verdict."""
    norm = "linf" if attack.endswith("linf") else "l2"
    base = {"exhibit": "benchmark", "attack": attack, "norm": norm, "steps": budget.steps * budget.search, "n": len(x), "seed": 0, **extra}
    rows, found, success = [], {}, {}
    for name, ((x_adv,), spent, seconds) in contest(attack, budget, model, x, y, versions).items():
        size = (x_adv - x).flatten(1).norm(float("inf") if norm == "linf" else 2, dim=1)
        size[predict(model, x_adv).argmax(1) == y] = torch.inf
        found[name], success[name] = size, size.isfinite().double().mean().item()
        if not success[name]:
            print(f"{attack}: {name} fooled no image")
            continue
        mean = size[size.isfinite()].mean()
        rows.append(entry(name, versions, spent, **base, value=mean, unit=f"mean {norm}", success=success[name], seconds=seconds))
    for ours in (name for name in found if name.startswith("advlab")):
        ratios = {}
        for peer in (name for name in found if not name.startswith("advlab") and success[name] >= 0.95):
            both = found[ours].isfinite() & found[peer].isfinite()
            if both.any():
                ratios[peer] = (found[ours][both].mean() / found[peer][both].mean()).item()
        if not ratios:
            print(f"{attack}: no verdict on {ours}: no peer fools 95 % and an image that it fools too")
        else:
            peer = max(ratios, key=ratios.get)
            rows.append(report.row(**base, system=f"{ours} / best peer", value=ratios[peer], unit="ratio", peer=peer, success=success[ours],
                                   passed=ratios[peer] <= 1.02 and success[ours] == 1))
    return rows


def entry(name: str, versions: dict, spent: dict, **fields) -> dict:
    library = name.split()[0]
    return report.row(system=name, library=library, library_version=versions[library], **spent, **fields)


def show(rows: list[dict]) -> None:
    for r in rows:
        if "peer" in r:
            against = r["peer"] + (f", which leaves {r['strongest_peer_leaves']:.1%}" if r["unit"] == "points" else "")
            print(f"{r['attack']:10} {r['system']:24} {r['value']:+8.3f} {r['unit']} ({against})  {'ok' if r['passed'] else 'WEAKER'}", flush=True)
        else:
            what = f"{r['value']:7.1%} standing" if r["unit"] == "accuracy" else f"{r['value']:8.4f} {r['unit']}, {r['success']:6.1%} fooled"
            print(f"{r['attack']:10} {r['system']:24} {what}  passes {r['forward_passes']:6.1f} + {r['backward_passes']:6.1f}  {r['seconds']:5.1f} s")


def main() -> None:
    given, started = options("Weigh every attack beside its peers at equal budgets.", [*FIXED, *MINIMAL]), time.time()
    quick = given.quick
    n, n_minimal = (24, 8) if quick else (500, 200)
    versions, missing = installed()
    rows = absent(missing)
    for name, model in networks(quick, given.device).items():
        x, y = correct(model, (3, 32, 32), n)
        few = partial(calibrate, model=model, x=x[:128], y=y[:128])
        common = few("pgd", budget=Budget(steps=20))
        print(f"\n{name}: {len(x)} images (minimal norms: {len(x[:n_minimal])}), eps {255 * common:.2f}/255, {torch.get_num_threads()} threads")
        for attack in given.attack:
            budget = (FIXED | MINIMAL)[attack]
            if quick:
                budget = replace(budget, steps=min(budget.steps, 3), search=min(budget.search, 2), queries=10, targets=3)
            if attack in FIXED:
                budget = replace(budget, eps=few(attack, budget=budget, start=OWN_EPS[attack] * common, growth=1.2) if attack in OWN_EPS else common)
                new = fixed(attack, budget, model, x, y, versions, 1 if quick else DRAWS.get(attack, 1), network=name)
            else:
                new = minimal(attack, budget, model, x[:n_minimal], y[:n_minimal], versions, network=name)
            show(new)
            rows += new
    parameters = {"quick": quick, "images": n, "images_minimal": n_minimal, "libraries": ", ".join(f"{k} {v}" for k, v in versions.items()),
                  "missing": ", ".join(missing) or None}
    info = report.run_info(parameters, 0, started, device=given.device)
    profile = "standard" if not quick and set(given.attack) == {*FIXED, *MINIMAL} else "smoke"  # a part is not published
    where = report.save_results("attacks_strength", rows, run=info, profile=profile, dataset="benchmark")
    print(f"{len(rows)} rows in {where}, after {info['seconds']:.0f} s")


if __name__ == "__main__":
    main()
