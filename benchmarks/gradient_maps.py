"""Gradient maps for all labels beside what they must cost: `python benchmarks/gradient_maps.py [--quick]`.

For each network, and for the same with batch norm folded, in rounds that go through all contestants in turn: one bare forward and backward pass with
frozen parameters; the bare passes that the maps need, one forward and n - 1 backward and nothing else; `gradient_maps`, with its graph kept too
(differentiable), and in chunks of a quarter of the batch; and n separate forward and backward passes, the naive way. Goals: at most 5.5 bare
passes for n = 10, and at most 1.1 times its own passes. Memory is the peak of what is allocated at one time, over that of one bare pass.
SSIM of 1,000 pairs of maps of 32 x 32 is timed as well, with a goal of 2 seconds."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from attacks import NETWORKS, bare, pair, peak, time_of
from peers import correct, network, options, quartiles
from torch import Tensor, nn

from advlab import report
from advlab.attacks import core
from advlab.gradients import gradient_maps, input_gradient, ssim
from advlab.models import folded

GOALS = {"bare pass": 5.5, "own passes": 1.1}
SSIM_GOAL = 2.0  # seconds


def own_passes(model: nn.Module, x: Tensor, n: int) -> None:
    """One forward and n - 1 backward passes, nothing kept."""
    with core.attacking(model):
        images = x.detach().requires_grad_()
        logits = model(images)
        for i in range(n - 1):
            torch.autograd.grad(logits, images, torch.ones_like(logits), retain_graph=i < n - 2)


def separate(model: nn.Module, x: Tensor, n: int) -> None:
    """What GMEM's definition says: one gradient of the loss a label."""
    for i in range(n):
        input_gradient(model, x, torch.full((len(x),), i, device=x.device))


def measure(model: nn.Module, x: Tensor, *, name: str, rounds: int, n: int = 10) -> list[dict]:
    """A row of seconds for each contestant, and one of the ratio of the maps to each of the two goals."""
    contestants: dict[str, Callable] = {
        "bare pass": bare(model, x, pair(x))[0], "own passes": partial(own_passes, model, x, n), "maps": partial(gradient_maps, model, x),
        "maps, differentiable": lambda: gradient_maps(model, x.detach().requires_grad_(), differentiable=True),
        "maps, four chunks": partial(gradient_maps, model, x, chunk=max(1, len(x) // 4)), "separate passes": partial(separate, model, x, n)}
    taken: dict[str, list[float]] = {what: [] for what in contestants}
    for k in range(rounds + 1):
        for what, run in contestants.items():
            seconds = time_of(run, model, x, 1)
            if k:  # the first round warms up
                taken[what].append(seconds)
    base, rows = {"exhibit": "benchmark", "attack": "gradient maps", "n": len(x), "seed": 0, "network": name, "labels": n}, []
    one = peak(contestants["bare pass"], x)
    for what, run in contestants.items():
        times = median(a / b for a, b in zip(taken[what], taken["bare pass"]))
        rows.append(report.row(**base, system=what, unit="seconds", **quartiles(taken[what]), ratio_bare=times, peak_ratio=peak(run, x) / one))
    for goal, most in GOALS.items():
        ratio = quartiles([a / b for a, b in zip(taken["maps"], taken[goal])])
        rows.append(report.row(**base, **ratio, system=f"maps / {goal}", unit="ratio", goal=most, passed=ratio["value"] <= most))
    return rows


def similarity(pairs: int, rounds: int, device) -> dict:
    """Seconds for SSIM (window 7) of so many pairs of maps of 32 x 32."""
    a, b = torch.rand(2, pairs, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    spread = quartiles([time_of(partial(ssim, a, b), nn.Identity(), b, 1) for _ in range(rounds + 1)][1:])
    return report.row(exhibit="benchmark", attack="SSIM", system=f"SSIM of {pairs:,} pairs", network="32x32", unit="s", n=pairs, seed=0, **spread,
                      goal=SSIM_GOAL, passed=spread["value"] <= SSIM_GOAL)


def main() -> None:
    given, started = options("Time the gradient maps for all labels beside their bare passes."), time.time()
    batch, rounds, rows = (8, 2, []) if given.quick else (64, 7, [])
    for arch, (width, shape, training) in NETWORKS.items():
        if given.quick:
            width, training = 8, {"limit": 200, "epochs": 1, "batch_size": 50}
        model = network(arch, width, shape, optimizer="adam", lr=3e-3, progress=False, device=given.device, **training)
        x, _ = correct(model, shape, batch)
        for label, variant in {"": model, " folded": folded(model).to(memory_format=torch.channels_last)}.items():
            rows += measure(variant, x, name=f"{arch} w{width}{label} {'x'.join(map(str, shape))}", rounds=rounds)
    rows.append(similarity(100 if given.quick else 1000, rounds, given.device))
    for r in rows:
        timed = r["unit"] == "seconds"
        end = f"x{r['ratio_bare']:.2f} bare, peak {r['peak_ratio']:.2f}" if timed else f"goal {r['goal']}: {'ok' if r['passed'] else 'MISSED'}"
        print(f"{r['network']:28} {r['system']:22} {r['value']:8.4f} [{r['low']:.4f}, {r['high']:.4f}] {end}")
    info = report.run_info({"quick": given.quick, "rounds": rounds, "batch": batch}, 0, started, device=given.device)
    where = report.save_results("gradient_maps", rows, run=info, profile="smoke" if given.quick else "standard", dataset="benchmark")
    print(f"{len(rows)} rows in {where}, after {info['seconds']:.0f} s")


if __name__ == "__main__":
    main()
