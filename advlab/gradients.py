"""Input gradients, on which all five defences are built: what the loss says about each pixel."""

from torch import Tensor

from advlab.attacks import core
from advlab.attacks.core import Loss, Model, cross_entropy


def input_gradient(model: Model, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy) -> Tensor:
    """The gradient of each image's own loss over its pixels, (B, C, H, W), for images x in [0, 1] and labels y (B,).

    The losses are summed, so that an image's gradient does not depend on the size of its batch. Bad input raises ValueError as in an attack."""
    core.check_images(x, y)
    with core.attacking(model):
        return core.gradient(model, x, y, loss, check=y)[2]


def magnitude(gradient: Tensor) -> Tensor:
    """Euclidean norm over channels at each pixel: (B, C, H, W) to (B, H, W)."""
    return gradient.norm(dim=1)


def own_scale(maps: Tensor) -> Tensor:
    """Maps (B, H, W) each divided by its own maximum, for display; an all-zero map stays zero."""
    return maps / maps.flatten(1).amax(1).clamp_min(1e-30)[:, None, None]
