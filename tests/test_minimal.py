"""Minimum-norm attacks against linear models whose nearest adversarial point is known, and the contract that they all keep."""

from functools import partial

import pytest
import torch
from helpers import PassCounter, assert_pure, closest, linear_model, size
from torch import nn

from advlab.attacks.core import margin
from advlab.attacks.minimal import _soft_margin, cw, ddn, deepfool, fmn

L2 = {"deepfool": deepfool, "cw": partial(cw, steps=60), "ddn": partial(ddn, gamma=0.02, steps=150), "fmn": partial(fmn, steps=60)}
LINF = {"deepfool, linf": partial(deepfool, norm="linf"), "fmn, linf": partial(fmn, norm="linf", steps=60)}
ALL = L2 | LINF
TARGETED = [name for name in ALL if "deepfool" not in name]
SHAPES = [(1, 4, 6), (3, 5, 7)]


def norm_of(name):
    return "linf" if "linf" in name else "l2"


def images(model, shape, n, spread, seed=1):
    """Images round the middle of the box, where the model's boundaries meet; spread 1 fills the box."""
    x = 0.5 + spread * (torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) - 0.5)
    return x, model(x).argmax(1)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("name", ALL)
def test_answers_are_as_near_as_can_be(name, n, shape, classes):
    model = linear_model(shape, classes)
    x, y = images(model, shape, n, spread=0.6)
    x_adv, exact = ALL[name](model, x, y), closest(model, x, y, norm_of(name))
    assert (model(x_adv).argmax(1) != y).all()
    ratio = size(x_adv - x, norm_of(name)) / exact
    print(name, ratio)
    assert (ratio >= 1 - 1e-4).all() and (ratio <= 1.05).all()
