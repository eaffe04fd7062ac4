"""Attacks are functions: `x_adv = pgd(model, x, y, eps=8/255)`. The contract stands in advlab/attacks/core.py and gradient.py."""

from advlab.attacks.core import cross_entropy, dlr, margin
from advlab.attacks.gradient import apgd, bim, ffgsm, fgsm, mim, pgd

__all__ = ["apgd", "bim", "cross_entropy", "dlr", "ffgsm", "fgsm", "margin", "mim", "pgd"]
