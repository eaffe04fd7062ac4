"""Threat models as wrappers: an adaptive attack is the same attack on another model, `pgd(bpda(restorer, classifier), x, y, eps=eps)`.

`bpda` puts a stand-in derivative behind a transformation, `through` attacks another model in its place, `eot` averages a random defence, `smooth`
gives ReLU, max-pooling and sign a backward pass that does not vanish, and `aware` with `undetected` and `unflagged` attacks a classifier and its
detector together."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab.attacks import core
from advlab.attacks.core import Loss, Model


def straight_through(value: Tensor, stand_in: Tensor) -> Tensor:
    """`value` in the forward pass, the derivative of `stand_in` (same shape) in the backward pass."""
    return stand_in + (value - stand_in).detach()


def _hold(model: Model) -> Model:
    """A plain function as a module, so that wrappers keep the modules they are given among their own (and attacks can freeze them)."""
    if isinstance(model, nn.Module):
        return model
    held = nn.Module()
    held.forward = model
    return held


class bpda(nn.Module):
    """Backward pass differentiable approximation (Athalye et al., arXiv 1802.00420): model(transform(x)), whose backward pass runs
    through `backward` instead of `transform`.

    transform maps images (B, C, H, W) to images of the same shape, backward is any differentiable stand-in for it, by default the identity.
    The transformation itself runs without a graph and need not be differentiable. Raises ValueError where the two shapes differ."""

    def __init__(self, transform: Model, model: Model, backward: Model | None = None):
        super().__init__()
        self.transform, self.model = _hold(transform), _hold(model)
        self.stand_in = nn.Identity() if backward is None else _hold(backward)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value = self.transform(x)
        stand_in = self.stand_in(x)
        if value.shape != stand_in.shape:
            raise ValueError(f"the transformation gives {tuple(value.shape)} and its stand-in {tuple(stand_in.shape)}; they must agree")
        return self.model(straight_through(value, stand_in))


def through(surrogate: Model, attack: Callable) -> Callable:
    """The attack (model, x, y) as one that differentiates `surrogate`, whatever model it is given."""
    return lambda _, x, y: attack(surrogate, x, y)


class eot(nn.Module):
    """Expectation over transformation (Athalye et al., arXiv 1707.07397): one model out of `n` draws of a random one.

    over="logits" averages the logits, so that a loss is taken of the mean; over="probabilities" returns the logarithm of the mean
    softmax, whose cross-entropy is that of the expected probability. The n draws run as one batch of n B images, `chunk` images at a
    time when given; apart=True makes them n passes of B images, for a model that draws once a pass and not once an image."""

    def __init__(self, model: Model, n: int, *, over: str = "logits", chunk: int | None = None, apart: bool = False):
        super().__init__()
        core.check_steps(n=n)
        core.check_choice("over", over, ("logits", "probabilities"))
        self.model, self.n, self.over, self.chunk, self.apart = _hold(model), n, over, chunk, apart

    def forward(self, x: Tensor) -> Tensor:
        many = x.repeat_interleave(1 if self.apart else self.n, 0)
        parts = many.split(self.chunk) if self.chunk else (many,)
        if self.apart:
            logits = torch.stack([torch.cat([self.model(part) for part in parts]) for _ in range(self.n)], 1)
        else:
            logits = torch.cat([self.model(part) for part in parts]).unflatten(0, (len(x), self.n))
        if self.over == "logits":
            return logits.mean(1)
        return logits.log_softmax(2).logsumexp(1) - torch.tensor(float(self.n), device=x.device).log()


# --- smooth backward passes ------------------------------------------------------------


def soft_sign(v: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """sign(v) with the derivative of tanh(v / temperature)."""
    return straight_through(v.sign(), torch.tanh(v / temperature))


class SoftReLU(nn.Module):
    """ReLU forward; backward the derivative of temperature * softplus(v / temperature), the logistic function of v / temperature."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, v: Tensor) -> Tensor:
        return straight_through(F.relu(v), F.softplus(v, beta=1 / self.temperature))


class SoftMaxPool(nn.Module):
    """Max-pooling forward, with places where it gives them; backward the mean of each window weighted by softmax(v / temperature)."""

    def __init__(self, pool: nn.MaxPool2d, temperature: float):
        super().__init__()
        self.pool, self.temperature = pool, temperature

    def forward(self, v: Tensor) -> Tensor:
        pool = self.pool
        value, *places = pool(v) if pool.return_indices else (pool(v),)
        b, c, h, w = value.shape
        windows = F.unfold(v, pool.kernel_size, pool.dilation, pool.padding, pool.stride).view(b, c, -1, h, w)
        out = straight_through(value, (windows * (windows / self.temperature).softmax(2)).sum(2))
        return (out, *places) if places else out


def smooth(model: nn.Module, temperature: float = 0.1) -> nn.Module:
    """A copy of the model, sharing its parameters and buffers, whose nn.ReLU and nn.MaxPool2d layers have the smooth backward passes above. It gives
    the same output, unless the model takes gradients in its forward pass: bpda(model, nn.Identity(), smooth(model)) answers as the model. Raises
    ValueError for a temperature that is not positive, or a model that has no such layer."""
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    if isinstance(twin, nn.ReLU):
        return SoftReLU(temperature)
    count = 0
    for path, child in [*twin.named_modules(remove_duplicate=False)]:  # a layer that is used twice has two names
        before, _, name = path.rpartition(".")
        parent = twin.get_submodule(before)
        if isinstance(child, nn.ReLU):
            parent.add_module(name, SoftReLU(temperature))
        elif isinstance(child, nn.MaxPool2d) and not child.ceil_mode:
            parent.add_module(name, SoftMaxPool(child, temperature))
        else:
            continue
        count += 1
    if not count:
        raise ValueError(f"found no nn.ReLU or nn.MaxPool2d layer to smooth in {type(model).__name__}; give those operations as modules")
    return twin


# --- detectors ------------------------------------------------------------


class aware(nn.Module):
    """A classifier and its detector as one model: (B, L + 1), the L logits and then score(x) - threshold, positive for a flagged image.

    score maps images (B, C, H, W) to (B,), larger for more suspicious ones. Attack it with loss=undetected(...) and success=unflagged."""

    def __init__(self, classifier: Model, score: Model, threshold: float = 0.0):
        super().__init__()
        self.classifier, self.score, self.threshold = _hold(classifier), _hold(score), threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.classifier(x), (self.score(x) - self.threshold)[:, None]], 1)


def undetected(loss: Loss, *, weight: float = 1.0, slack: float = 0.0, targeted: bool = False) -> Loss:
    """A loss for `aware` models: loss of the classes minus (plus, when it will be descended) weight * relu(flag + slack)."""
    sign = -1.0 if targeted else 1.0
    return lambda logits, y: loss(logits[:, :-1], y) - sign * weight * F.relu(logits[:, -1] + slack)


def unflagged(logits: Tensor, y: Tensor, targeted: bool = False) -> Tensor:
    """(B,) bool: an `aware` model is fooled and raises no flag."""
    return core.fooled(logits[:, :-1], y, targeted) & (logits[:, -1] < 0)


def rejecting(model: Model) -> Callable[[Tensor], Tensor]:
    """An `aware` model as one of L + 1 classes whose last one wins exactly where the image is flagged (Carlini and Wagner, arXiv
    1705.07263), its flag above 0: with the logits shifted to be positive, its value is (flag + 1) times the largest of them."""

    def forward(x: Tensor) -> Tensor:
        out = model(x)
        z = out[:, :-1] - out[:, :-1].amin(1, keepdim=True).detach() + 1
        return torch.cat([z, (out[:, -1:] + 1) * z.amax(1, keepdim=True)], 1)

    wrapped = _hold(forward)
    wrapped.model = _hold(model)
    return wrapped
