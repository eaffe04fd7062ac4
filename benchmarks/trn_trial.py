"""What moves TRN's robustness to attackers who see it: `python benchmarks/trn_trial.py [--quick]`.

An earlier trial of TRN (one block, width 16, Fashion-MNIST, MIM) fell lower in the white box than notebook 43's rerun of it, at equal accuracy on
clean images and under the oblivious attack. Here the same network is trained in variants, each with one choice changed that the trial's description
leaves open, and shorter (150 steps for its 561), so that variants compare with the row "as in notebook 43" and not with the trial. The variant
"all three" makes the changes that lowered the robustness at once, at the trial's own length and number of test images, so that it does compare."""

import time
from dataclasses import replace
from functools import partial

import torch
from peers import options
from torch.nn import functional as F

from advlab import data, evaluation, report, zoo
from advlab.attacks import bpda, pgd
from advlab.defenses import trn
from advlab.models import folded

EPS = 8 / 255


def variants(pixels: int, long: dict) -> dict[str, dict]:
    """What each changes in `trn.trained`, and by how much it pads the images or how many it tests; pixels: the numbers in an image, over which the
    pixel loss is a mean; long: the length of the trial itself."""
    summed, padded, late = {"weight": float(pixels)}, {"pad": 2}, {"milestones": (0.9, 0.97)}
    return {"as in notebook 43": {}, "pixel loss summed over the image": summed, "padded to 32 pixels, as the trial": padded,
            "late drops of the learning rate": late, "all three, as long as the trial": {**summed, **padded, **late, **long},
            "another seed": {"seed": 1}, "maps over their largest entry": {"scale": "max"}, "maps not scaled": {"scale": "none"}}


def padded(images: data.Dataset, pad: int) -> data.Dataset:
    """The images with `pad` black pixels on every side; the classifier, which ends in a mean over places and was trained on shifted images, stays."""
    return replace(images, x=F.pad(images.x, (pad,) * 4), digest=f"{images.digest} padded by {pad}") if pad else images


def attacked(target: torch.nn.Module, defence: torch.nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> dict[str, dict]:
    """Row fields of accuracy by attack, named as in notebook 43."""
    short, long = (partial(pgd, eps=EPS, steps=steps, step_size=size / 255) for steps, size in ((10, 1), (40, 2)))
    ways = {"maps constant, 10 of 1/255": (short, trn.constant(defence)), "everything, 20": (partial(pgd, eps=EPS, steps=20), defence),
            "identity, 40 of 2/255": (long, bpda(defence.restorer, target))}
    return {"clean": evaluation.accuracy(defence, x, y), "PGD-10 on the target": evaluation.accuracy(defence, short(target, x, y), y),
            **{name: evaluation.robustness(defence, attack, x, y, surrogate=seen) for name, (attack, seen) in ways.items()}}


def kept(profile: str, settings: dict) -> tuple[list[dict], float]:
    """The rows of an earlier run with these settings, whose variants are not run again, and the seconds that it took."""
    try:
        found = report.load_results("trn_trial", profile=profile, dataset="benchmark")
    except FileNotFoundError:
        return [], 0.0
    return (found["rows"], found["run"]["seconds"]) if found["run"]["parameters"] == settings else ([], 0.0)


def main() -> None:
    given, started = options("Train variants of the TRN trial and attack them."), time.time()
    dataset, profile, images, n = ("skimage10", "smoke", 128, 16) if given.quick else ("fashion_mnist", "standard", 9600, 100)
    long = {"images": 192, "n": 20} if given.quick else {"images": 35904, "n": 200}
    train, test = (data.load(dataset, split) for split in ("train", "test"))
    target = folded(zoo.shared("target", train, profile, progress=False)[0].to(given.device))
    recipe = {"attack": "MIM", "images": images, "batch_size": 64, "width": 16, "blocks": 1, "progress": False}
    settings = {"dataset": dataset, "images": images, "n": n, "quick": given.quick}
    rows, before = kept(profile, settings)
    for name, changes in variants(train.images(slice(1)).numel(), long).items():
        if any(r["system"] == name for r in rows):
            continue
        pad, many = changes.pop("pad", 0), changes.pop("n", n)
        x, y = padded(test, pad).images(slice(many), device=given.device), test.y[:many].to(given.device)
        defence, record = trn.trained(target, padded(train, pad), **recipe | changes)
        last = record["history"][-1]
        print(f"{name}: {record['seconds']:.0f} s, pixel loss {last['pixel']:.4f}, right on the attacked {last['robust_accuracy']:.1%}", flush=True)
        for attack, r in attacked(target, defence, x, y).items():
            eps, seed = 0.0 if attack == "clean" else EPS, changes.get("seed", 0)
            rows.append(report.row(exhibit="study", system=name, attack=attack, norm="linf", eps=eps, seed=seed, **r))
            print(f"  {attack:28} {r['value']:6.1%} [{r['low']:.1%}, {r['high']:.1%}]", flush=True)
        info = report.run_info(settings, 0, started - before, device=given.device)
        where = report.save_results("trn_trial", rows, run=info, profile=profile, dataset="benchmark")  # after each, so that a stop loses one at most
        print(f"{len(rows)} rows in {where}, after {info['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
