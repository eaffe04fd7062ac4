"""What every attack shares: the checks at the door, one forward-and-backward pass, norms and balls, and the losses.

Losses return one value an image, (B,), larger meaning further from the label: an untargeted attack ascends them, a targeted one
descends. Cross-entropy is written so that its gradient keeps its relative precision for images that the model classifies with great
confidence, where softmax minus one-hot in float32 rounds to zero."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Success = Callable[[Tensor, Tensor, bool], Tensor]
NORMS = ("linf", "l2")


# --- losses: (B, L) logits, (B,) labels -> (B,) ------------------------------------------------------------


def others(logits: Tensor, y: Tensor) -> Tensor:
    """The logits (B, L) with that of the label y (B,) set to minus infinity."""
    return logits.scatter(1, y[:, None], -torch.inf)


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    """log sum_{j != y} exp(z_j - z_y), (B,): the log odds of any other class against the label."""
    return others(logits, y).logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """log(1 + sum_{j != y} exp(z_j - z_y)), (B,): cross-entropy, with a gradient that stays exact where softmax saturates."""
    return F.softplus(log_odds(logits, y))


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y, (B,): positive exactly where the image is misclassified (Carlini and Wagner, arXiv 1608.04644)."""
    return others(logits, y).amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, (B,): the margin over the gap between first and third logit (Croce and Hein, arXiv 2003.01690)."""
    if logits.shape[1] < 3:
        raise ValueError(f"dlr compares the first and third logit, and this model has {logits.shape[1]} classes; use loss=margin")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_or_margin(logits: Tensor, y: Tensor) -> Tensor:
    """`dlr`, or for two classes, which have no third logit, the margin."""
    return dlr(logits, y) if logits.shape[1] > 2 else margin(logits, y)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio, (B,), to be ascended: z_target - z_y over z_(1) - (z_(3) + z_(4)) / 2 (arXiv 2003.01690)."""
    if logits.shape[1] < 4:
        raise ValueError(f"dlr_targeted needs at least 4 classes, and this model has {logits.shape[1]}; use a targeted margin")
    top = logits.topk(4, dim=1).values
    gap = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
    return gap.squeeze(1) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


# --- the door ------------------------------------------------------------


def check_images(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless x is a non-empty float batch (B, C, H, W) in [0, 1] without NaN, and y holds B labels on its device."""
    if x.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(x.shape)}; add the missing dimension, as in x[None]")
    if not x.is_floating_point():
        raise ValueError(f"images must be floats in [0, 1], got {x.dtype}; divide uint8 pixels by 255")
    if x.numel() == 0:
        raise ValueError(f"the batch is empty: shape {tuple(x.shape)}; pass at least one image")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"labels must be an int64 tensor of shape ({len(x)},), got {y.dtype} of shape {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"images are on {x.device} and labels on {y.device}; move both to one device")
    low, high, first = torch.stack([*x.aminmax(), y.min().to(x.dtype)]).tolist()
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(f"images must lie in [0, 1] without NaN, got {low:g} to {high:g}; normalisation belongs inside the model")
    if first < 0:
        raise ValueError(f"labels must not be negative, got {int(first)}")


def check_budget(eps: float | Tensor, x: Tensor, name: str = "eps") -> Tensor:
    """eps as a tensor (B, 1, 1, 1) that broadcasts over x; a ValueError if it is negative, not finite, or no number nor B numbers."""
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if eps.ndim > 1 or (eps.ndim == 1 and len(eps) != len(x)):
        raise ValueError(f"{name} must be one number or one for each of the {len(x)} images, got shape {tuple(eps.shape)}")
    worst = eps.min().item()
    if not (worst >= 0 and torch.isfinite(eps).all()):
        raise ValueError(f"{name} must be finite and not negative, got {worst:g}")
    return eps.expand(len(x)).view(-1, 1, 1, 1)


def check_steps(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")


def check_logits(logits: Tensor, x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless the model gave one row of L > max(y) scores an image, and those are not probabilities already."""
    if logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ValueError(f"the model must return logits of shape ({len(x)}, classes) for two classes or more, got {tuple(logits.shape)}")
    with torch.no_grad():
        normal = (logits.amin() >= 0) & ((logits.sum(1) - 1).abs().amax() < 1e-3)
        top, normal = torch.stack([y.max(), normal.long()]).tolist()
    if top >= logits.shape[1]:
        raise ValueError(f"label {top} is out of range: the model has {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}")
    if normal:
        raise ValueError("the model returns probabilities (every row sums to 1); attacks need logits: leave out the softmax")


def check_mode(model: Model) -> None:
    """Raise ValueError for a model with batch norm or dropout in training mode, before a pass through it moves its buffers."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    live = [m for m in modules if m.training and isinstance(m, _NormBase | _DropoutNd)]
    if live:
        raise ValueError(f"the model has {len(live)} layers such as {type(live[0]).__name__} in training mode; call model.eval() first")


@contextmanager
def attacking(model: Model) -> Iterator[None]:
    """Freeze the parameters for the length of an attack, so that no gradient of theirs is ever computed, and put them back afterwards.

    Raises ValueError for a model with batch norm or dropout left in training mode: its answers would depend on the rest of the batch and
    its buffers would drift. A callable that is no nn.Module is used as it is."""
    check_mode(model)
    thawed = [p for p in (model.parameters() if isinstance(model, nn.Module) else ()) if p.requires_grad]
    for p in thawed:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in thawed:
            p.requires_grad_(True)


# --- passes, norms and balls ------------------------------------------------------------


def gradient(model: Model, x: Tensor, y: Tensor, loss: Loss, *, check: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and one backward pass: logits (B, L), loss (B,), and the gradient of its sum over x (B, C, H, W), all detached.

    check: the labels (B,) with which to check the logits before the loss sees them (see check_logits)."""
    x = x.detach().requires_grad_()
    logits = model(x)
    if check is not None:
        check_logits(logits, x, check)
    value = loss(logits, y)
    if not value.requires_grad:
        raise ValueError("the model's output carries no gradient to its input (a detached graph?); wrap it with bpda, or attack by queries")
    (grad,) = torch.autograd.grad(value.sum(), x)
    return logits.detach(), value.detach(), grad


def fooled(logits: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """(B,) bool: the prediction is the target y, or, untargeted, differs from the label y."""
    return (logits.argmax(1) == y) if targeted else (logits.argmax(1) != y)


def rows(v: Tensor) -> Tensor:
    """A value an image (B,) as (B, 1, 1, 1)."""
    return v.view(-1, 1, 1, 1)


def select(on: Tensor, *values: Tensor) -> Iterator[Tensor]:
    """Of each tensor the rows where `on` (B,) holds: one look at the mask for all of them, which on a GPU is one wait instead of one each."""
    index = on.nonzero().squeeze(1)
    return (v.index_select(0, index) for v in values)


def l2(v: Tensor) -> Tensor:
    """Euclidean norm of each image, (B, 1, 1, 1)."""
    return rows(v.flatten(1).norm(dim=1))


def project(x_adv: Tensor, x: Tensor, eps: Tensor, norm: str) -> Tensor:
    """x_adv brought back into the ball of radius eps (B, 1, 1, 1) round x and into [0, 1] (for l2: first the ball, then the box)."""
    return within(x_adv, *ball(x, eps, norm), norm)


def ball(x: Tensor, eps: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """What `within` takes: for linf the lower and upper bound of every pixel, so that one clamp brings an image back; for l2 centre and radius."""
    return ((x - eps).clamp_(min=0), (x + eps).clamp_(max=1)) if norm == "linf" else (x, eps)


def within(x_adv: Tensor, low: Tensor, high: Tensor, norm: str) -> Tensor:
    """`project` into a ball that was worked out before: its bounds, or for l2 its centre and radius."""
    if norm == "linf":
        return torch.clamp(x_adv, low, high)
    delta = x_adv - low
    return (low + delta * (high / l2(delta).clamp_min(1e-12)).clamp_max(1)).clamp_(0, 1)


def steepest(grad: Tensor, norm: str) -> Tensor:
    """The direction of unit norm along which a linear function with this gradient grows fastest; NaN where the gradient is not finite."""
    return grad.sign() + 0 * grad if norm == "linf" else grad / l2(grad).clamp_min(1e-12)  # sign alone would turn NaN into 0


def default_generator(x: Tensor, generator: torch.Generator | None) -> torch.Generator:
    """The generator given, or a fresh one with seed 0: the same call gives the same answer, and the global generator is left alone."""
    return generator if generator is not None else torch.Generator(x.device).manual_seed(0)


def uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise in [-1, 1] of x's shape, drawn where the generator lives."""
    return torch.rand(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device) * 2 - 1


def gaussian(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of x's shape, drawn where the generator lives."""
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)


def random_start(x: Tensor, eps: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """A point drawn uniformly from the ball of radius eps (B, 1, 1, 1) round x, clipped to [0, 1]."""
    if norm == "linf":
        return (x + eps * uniform(x, generator)).clamp_(0, 1)
    noise = gaussian(x, generator)
    radius = torch.rand(len(x), generator=generator, device=generator.device, dtype=x.dtype).to(x.device) ** (1 / x[0].numel())
    return (x + eps * rows(radius) * noise / l2(noise)).clamp_(0, 1)


def finish(x_adv: Tensor) -> Tensor:
    """The attack's answer, detached; a ValueError if a NaN in the gradient has reached it."""
    if not torch.isfinite(x_adv.sum(dtype=torch.float32)):  # in half precision a sum overflows
        raise ValueError("the attack met NaN or infinite gradients; look for a square root, logarithm or division of zero in the model")
    return x_adv.detach()
