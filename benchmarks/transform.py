"""Speed of the adversarial transformation beside the passes that it is made of: `python benchmarks/transform.py [--quick]`.

g makes N + 1 = 14 forward and 13 backward passes of f_b. In turn, rounds time: 13 bare forward and backward passes of f_b as it was given (frozen, in
eval mode, batch norm and dropout layers in place); g; f_a(g(x)), a pass of f_a being added; and the mean of k draws, which must cost k times one.
Networks are drawn at random, which does not change what a pass costs. `ratio` rows: seconds over seconds in each round, median and quartiles."""

import time
from collections.abc import Callable

import torch
from peers import options, quartiles
from torch import Tensor, nn

from advlab import report
from advlab.attacks import core, eot
from advlab.defenses.transform import Transform
from advlab.models import classifier, seeded

SHAPES = {"3x32x32": (3, 32, 4), "1x28x28": (1, 28, 4), "3x64x64": (3, 64, 5)}  # channels, side, stages of f_b
STEPS, DRAWS = 13, 5


def bare(f_b: nn.Module, x: Tensor) -> None:
    """STEPS forward and backward passes with frozen parameters, and nothing else."""
    y = torch.zeros(len(x), dtype=torch.long, device=x.device)
    with core.attacking(f_b):
        for _ in range(STEPS):
            core.gradient(f_b, x, y, core.cross_entropy)


def answer(model: Callable, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def seconds(run: Callable, *arguments) -> float:
    x = arguments[-1]
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    run(*arguments)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def measure(name: str, *, batch: int, rounds: int, width: int, device: str) -> list[dict]:
    channels, side, stages = SHAPES[name]
    with seeded(0):
        f_b = classifier("vgg0", channels=channels, width=width, stages=stages).eval().to(device, memory_format=torch.channels_last)
        f_a = classifier("resnet18", channels=channels, width=width).eval().to(device, memory_format=torch.channels_last)
    x = torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    g = Transform(f_b, steps=STEPS).to(device)
    runs = {f"{STEPS} bare passes of f_b": (bare, f_b), "g": (answer, g), "f_a(g(x))": (answer, nn.Sequential(g, f_a)), "f_a": (answer, f_a),
            f"mean of {DRAWS} draws": (answer, eot(nn.Sequential(g, f_a), DRAWS, chunk=batch))}
    for run, model in runs.values():
        run(model, x)
    taken = {what: [] for what in runs}
    for _ in range(rounds):
        for what, (run, model) in runs.items():
            taken[what].append(seconds(run, model, x))
    nets = f"vgg0 w{width}, resnet18 w{width}, {name}"
    base = {"exhibit": "benchmark", "n": batch, "steps": STEPS, "seed": 0, "repetitions": rounds, "network": nets}
    rows = [report.row(**base, system=what, unit="images/s", **quartiles([batch / t for t in times])) for what, times in taken.items()]
    for what, over, by in (("g / bare passes", "g", f"{STEPS} bare passes of f_b"), ("f_a(g(x)) / f_a", "f_a(g(x))", "f_a"),
                           (f"{DRAWS} draws / {DRAWS} times one", f"mean of {DRAWS} draws", "f_a(g(x))")):
        times = DRAWS if over.startswith("mean") else 1
        rows.append(report.row(**base, system=what, unit="ratio", **quartiles([a / b / times for a, b in zip(taken[over], taken[by])])))
    return rows


def main() -> None:
    given, started = options("Time g and f_a(g(x)) beside bare passes of f_b."), time.time()
    size = {"batch": 16, "rounds": 2, "width": 8} if given.quick else {"batch": 64, "rounds": 9, "width": 16}
    rows = []
    for name in SHAPES:
        new = measure(name, device=given.device, **size)
        print(f"\n{new[0]['network']}, batch {size['batch']}, {torch.get_num_threads()} threads")
        for r in new:
            print(f"  {r['system']:26} {r['value']:9.2f} [{r['low']:.2f}, {r['high']:.2f}] {r['unit']}")
        rows += new
    info = report.run_info({**size, "quick": given.quick}, 0, started, device=given.device)
    where = report.save_results("transform", rows, run=info, profile="smoke" if given.quick else "standard", dataset="benchmark")
    print(f"\n{len(rows)} rows in {where}, after {info['seconds']:.0f} s")


if __name__ == "__main__":
    main()
