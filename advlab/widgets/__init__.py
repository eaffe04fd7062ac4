"""Explorers for JupyterLab: move a slider, see what an attack or a defence does to an image. Each takes any model(x) -> logits in eval mode and
images x (N, C, H, W) in [0, 1] with labels y (N,), as in `AttackExplorer(model, x, y)`; notebook 95 opens them all."""

from advlab.widgets.base import Explorer, Job
from advlab.widgets.comparison import ComparisonBrowser, saved_rows
from advlab.widgets.explorers import (
    AmplificationExplorer,
    AttackExplorer,
    GradientMapExplorer,
    SensitivityExplorer,
    SimilarityExplorer,
    TransformExplorer,
)  # fmt: skip

__all__ = ["AmplificationExplorer", "AttackExplorer", "ComparisonBrowser", "Explorer", "GradientMapExplorer", "Job", "SensitivityExplorer"]
__all__ += ["SimilarityExplorer", "TransformExplorer", "saved_rows"]
