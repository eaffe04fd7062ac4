"""The common ground of the five papers: every system under the same ladder, on the same test images, at eps 8/255, in rows of the exhibit
"comparison". The yardsticks, no defence and adversarial training, are climbed once a profile and read from data/checkpoints afterwards."""

import json
import time
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from advlab import checkpoints, evaluation, paths, report, zoo
from advlab.data import Dataset
from advlab.evaluation import BUDGETS, Budget, Parts

EPS = 8 / 255
VERSION = 2  # raise it when ladder or attacks change, so that kept yardsticks are climbed anew


def climb(defence: nn.Module, parts: Parts, profile: str, x: Tensor, y: Tensor, *, system: str, seed: int = 0, eps: float = EPS) -> evaluation.Ladder:
    """The ladder of a profile's budget on its first images, with rows of the exhibit "comparison"."""
    return evaluation.ladder(defence, parts, BUDGETS[profile], x, y, eps=eps, system=system, seed=seed, exhibit="comparison")


def yardsticks(train: Dataset, test: Dataset, profile: str, *, seed: int = 0, eps: float = EPS, progress: bool = False) -> list[dict]:
    """The rows of "no defence" (the profile's target) and "AT" (its adversarially trained twin), each with the other as a transfer surrogate."""
    models = {role: zoo.shared(role, train, profile, seed=seed, progress=progress)[0] for role in ("target", "adversarial")}
    rows = []
    for (role, system), other in zip((("target", "no defence"), ("adversarial", "AT")), ("adversarial", "target")):
        rows += _kept(models[role], models[other], system, test, BUDGETS[profile], seed, eps)
    return rows


def _kept(model: nn.Module, other: nn.Module, system: str, test: Dataset, budget: Budget, seed: int, eps: float) -> list[dict]:
    config = {"version": VERSION, "system": system, "budget": asdict(budget), "eps": eps, "seed": seed}
    key = checkpoints.fingerprint(config | {"models": checkpoints.describe([model, other]), "data": checkpoints.describe(test)})
    file = paths.checkpoints() / f"ladder-{key[:12]}.json"

    def read() -> dict:
        if (document := json.loads(file.read_bytes()))["key"] != key:
            raise ValueError("it belongs to another ladder")
        return document

    if kept := checkpoints.trusted(read, file):
        return kept["rows"]
    where = next(model.parameters()).device
    x, y = test.images(slice(budget.images)).to(where), test.y[: budget.images].to(where)
    rows = evaluation.ladder(model, Parts(surrogates=[other]), budget, x, y, eps=eps, system=system, seed=seed, exhibit="comparison").rows
    checkpoints.write(file, json.dumps({"key": key, "rows": rows}).encode())
    return rows


def costs(defence: nn.Module, classifier: nn.Module, x: Tensor, *, system: str, seconds: float, seed: int = 0,
          repeats: int = 7) -> list[dict]:
    """Rows of what a system costs beyond the classifier that it protects: training seconds, parameters, and the time of one prediction of the batch
    x relative to the bare classifier's (median of interleaved repeats)."""
    def clock(model: nn.Module) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(x)[0, 0].item()
        return time.perf_counter() - start

    clock(defence), clock(classifier)
    ratios = sorted(clock(defence) / clock(classifier) for _ in range(repeats))
    own = {id(p) for p in classifier.parameters()}
    row = partial(report.row, exhibit="comparison", system=system, threat="cost", n=len(x), seed=seed)
    return [row(attack="training", value=seconds, unit="s"), row(attack="inference", value=ratios[repeats // 2], unit="times the classifier's"),
            row(attack="parameters", value=float(sum(p.numel() for p in defence.parameters() if id(p) not in own)), unit="parameters")]
