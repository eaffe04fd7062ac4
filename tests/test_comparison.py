"""The common comparison: yardsticks climbed once and then read, and what a system costs."""

import pytest
import torch
from torch import nn

from advlab import comparison, data, evaluation


@pytest.fixture(scope="module")
def sets():
    return data.load("skimage10", "train", limit=128), data.load("skimage10", "test", limit=64)


def test_yardsticks_are_climbed_once_for_a_profile_and_read_afterwards(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    monkeypatch.setattr(comparison, "BUDGETS", {"smoke": evaluation.Budget(6, 1, 1, 1, 2)})
    rows = comparison.yardsticks(*sets, "smoke")
    assert {r["exhibit"] for r in rows} == {"comparison"} and {r["system"] for r in rows} == {"no defence", "AT"}
    assert all(r["n"] == 6 and r["eps"] in (0.0, comparison.EPS) for r in rows)
    assert {r["attack"] for r in rows} >= {"clean", "pgd-ce", "square", "all"}

    def never(*args, **kwargs):
        raise AssertionError("climbed again")

    monkeypatch.setattr(evaluation, "ladder", never)
    assert comparison.yardsticks(*sets, "smoke") == rows
    with pytest.raises(AssertionError, match="climbed again"):  # another budget, another ladder
        comparison.yardsticks(*sets, "smoke", eps=4 / 255)
    for file in (tmp_path / "data" / "checkpoints").glob("ladder-*.json"):
        file.write_text("{}")
    with pytest.warns(UserWarning, match="not used"), pytest.raises(AssertionError, match="climbed again"):
        comparison.yardsticks(*sets, "smoke")


def test_costs_count_only_what_the_defence_adds():
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    defence = nn.Sequential(nn.Conv2d(3, 3, 1), classifier)
    rows = {r["attack"]: r for r in comparison.costs(defence, classifier, torch.rand(4, 3, 2, 2), system="s", seconds=2.5)}
    assert rows["parameters"]["value"] == 12 and rows["training"]["value"] == 2.5 and rows["training"]["unit"] == "s"
    assert rows["inference"]["value"] > 0 and rows["inference"]["n"] == 4
