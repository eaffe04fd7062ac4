"""Attacks are functions: `x_adv = pgd(model, x, y, eps=8/255)`. The contract stands in advlab/attacks/core.py and gradient.py."""

from advlab.attacks.adaptive import bpda, eot, smooth, through
from advlab.attacks.blackbox import genattack, hopskipjump, spsa, square, transfer
from advlab.attacks.core import cross_entropy, dlr, margin
from advlab.attacks.ensemble import autoattack, strongest
from advlab.attacks.gradient import apgd, bim, ffgsm, fgsm, mim, pgd
from advlab.attacks.minimal import cw, ddn, deepfool, fmn

__all__ = ["apgd", "autoattack", "bim", "bpda", "cross_entropy", "cw", "ddn", "deepfool", "dlr", "eot", "ffgsm", "fgsm", "fmn", "genattack"]
__all__ += ["hopskipjump", "margin", "mim", "pgd", "smooth", "spsa", "square", "strongest", "through", "transfer"]
