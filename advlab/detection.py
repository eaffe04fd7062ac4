"""How well a score tells two groups apart: the ROC curve, its area, and the true positive rate at a given false positive rate.

Scores are numbers, larger for more suspicious; an image is flagged where its score exceeds a threshold. Tied scores move together."""

import torch
from torch import Tensor


def roc(negative: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ROC curve of scores (n,) of harmless images and (m,) of those to be found: false positive rate, true positive rate and threshold,
    from nothing flagged (threshold infinity) to everything, one point for each distinct score.

    A point's rates count the scores that are at least its threshold. ValueError for an empty group or a NaN."""
    negative, positive = _checked(negative, "negative"), _checked(positive, "positive")
    thresholds = torch.cat([negative.new_tensor([torch.inf]), torch.cat([negative, positive]).unique().flip(0)])
    fpr, tpr = (1 - torch.searchsorted(group.sort().values, thresholds).double() / len(group) for group in (negative, positive))
    fpr[0] = tpr[0] = 0.0  # a score may be infinite itself
    return fpr, tpr, thresholds


def auc(negative: Tensor, positive: Tensor) -> float:
    """The area under the ROC curve: the chance that a positive scores higher than a negative, ties counting half."""
    fpr, tpr, _ = roc(negative, positive)
    return torch.trapezoid(tpr, fpr).item()


def tpr_at(negative: Tensor, positive: Tensor, fpr: float) -> tuple[float, float]:
    """The greatest true positive rate with a false positive rate of at most fpr, and the threshold that gives it: flag scores of at least that.

    No interpolation: the pair is one that the detector can be set to. ValueError for an fpr outside [0, 1]."""
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr is a share between 0 and 1, got {fpr}")
    false, true, thresholds = roc(negative, positive)
    at = int((false <= fpr + 1e-12).sum()) - 1  # both rates rise along the curve
    return true[at].item(), thresholds[at].item()


def best_threshold(negative: Tensor, positive: Tensor) -> float:
    """The threshold at which the true positive rate exceeds the false one by most (Youden's index): flag scores of at least that."""
    false, true, thresholds = roc(negative, positive)
    return thresholds[(true - false).argmax()].item()


def _checked(scores: Tensor, name: str) -> Tensor:
    scores = torch.as_tensor(scores).detach().double().flatten()
    if not len(scores) or scores.isnan().any():
        raise ValueError(f"the {name} group has {len(scores)} scores, which must be at least one and none NaN")
    return scores
