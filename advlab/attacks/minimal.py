"""Minimum-norm attacks: deepfool, cw, ddn and fmn look for the nearest image that fools the model, with no budget to fill.

Each takes a model that maps images in [0, 1] to logits, a batch x (B, C, H, W) and labels y (B,), or, with targeted=True, the classes to reach.
An image comes back unchanged if it is misclassified already (targeted: classified as the target) or if no fooling image was found near it; judge
the answer with the model to tell the two from success. Nothing is drawn at random; `generator` is there for the sake of one signature."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from advlab.attacks import core
from advlab.attacks.core import Loss, Model, cross_entropy, margin


def deepfool(model: Model, x: Tensor, y: Tensor, *, steps: int = 50, norm: str = "l2", overshoot: float = 0.02, candidates: int | None = 10,
             generator: torch.Generator | None = None) -> Tensor:
    """Steps to the nearest face of the linearised decision region (Moosavi-Dezfooli et al., arXiv 1511.04599); untargeted, l2 or linf.

    Each step goes 1 + overshoot times the distance to the nearest of the boundaries between the label and its `candidates` - 1 likeliest rivals on
    x (None: all), and the image that is returned has crossed one. A step costs one forward pass, and one backward pass a rival, on the images that
    still stand; one forward pass more, without those that have just fallen, where that saves more backward passes."""
    core.check_images(x, y)
    core.check_steps(steps=steps)
    core.check_choice("norm", norm, core.NORMS)
    _check_positive(overshoot=overshoot, zero=True)
    if candidates is not None and candidates < 2:
        raise ValueError(f"candidates counts the label and its rivals, got {candidates}; choose 2 or more, or None for all classes")
    x_t = x.detach()
    out, alive = x_t.clone(), torch.arange(len(x), device=x.device)
    with core.attacking(model):
        for t in range(steps + 1):
            x_t.requires_grad_()
            logits = model(x_t)
            if t == 0:
                core.check_logits(logits, x, y)
                classes = logits.shape[1]
                rivals = core.others(logits.detach(), y).topk(min(candidates or classes, classes) - 1).indices
            done = core.fooled(logits.detach(), y)
            out[alive[done]] = x_t.detach()[done]
            on = (~done).nonzero().squeeze(1)
            alive, y, rivals = alive[on], y[on], rivals[on]
            if t == steps or not len(on):
                break
            if (len(done) - len(on)) * rivals.shape[1] > len(on):
                x_t = x_t.detach()[on].requires_grad_()
                logits, on = model(x_t), torch.arange(len(on), device=x.device)
            length = torch.full(y.shape, torch.inf, dtype=x.dtype, device=x.device)
            for k in range(rivals.shape[1]):
                gap = logits[on, rivals[:, k]] - logits[on, y]
                (grad,) = torch.autograd.grad(gap.sum(), x_t, retain_graph=k + 1 < rivals.shape[1])
                grad = grad[on]
                away = -gap.detach() / _dual(grad, norm).clamp_min(1e-12)
                nearest = away < length
                length = torch.where(nearest, away, length)
                normal = grad if k == 0 else torch.where(core.rows(nearest), grad, normal)
            # 1e-4 as in the authors' code: a point on the boundary still moves
            x_t = (x_t.detach()[on] + core.rows((1 + overshoot) * (length + 1e-4)) * core.steepest(normal, norm)).clamp_(0, 1)
    core.finish(x_t)
    return core.finish(out)


def cw(model: Model, x: Tensor, y: Tensor, *, steps: int = 100, search_steps: int = 5, c: float = 1.0, lr: float = 0.1, kappa: float = 0.0,
       targeted: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Adam on |x_adv - x|^2 + c max(-margin, -kappa) in tanh space, l2 (Carlini and Wagner, arXiv 1608.04644, section VI).

    c starts at `c` and is searched for each image `search_steps` times: ten times larger until the image is fooled, then by bisection. kappa is the
    margin between the logits that an answer must reach. steps + steps passes for every search step; the nearest iterate of all is returned."""
    core.check_images(x, y)
    core.check_steps(steps=steps, search_steps=search_steps)
    _check_positive(c=c, lr=lr)
    _check_positive(kappa=kappa, zero=True)
    objective, x = _upwards(margin, targeted), x.detach()
    out = x.clone()
    with core.attacking(model):
        w_0 = None
        for search in range(search_steps):
            for t in range(steps):
                if t == 0:
                    x_t = x
                logits, value, grad = core.gradient(model, x_t, y, objective, check=y if w_0 is None else None)
                hit = core.fooled(logits, y, targeted)
                if w_0 is None:
                    alive = (~hit).nonzero().squeeze(1)
                    if not len(alive):
                        return out
                    x, y, x_t, value, grad, hit = (v[alive] for v in (x, y, x_t, value, grad, hit))
                    best, least = x.clone(), torch.full_like(value, torch.inf)
                    low, high, weight = torch.zeros_like(value), torch.full_like(value, torch.inf), torch.full_like(value, c)
                    w_0 = torch.atanh((2 * x - 1) * SHRINK)
                if t == 0:
                    w, th, m, v, won = w_0.clone(), w_0.tanh(), torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(hit)
                    th_0 = th
                hit &= value >= kappa
                won |= hit
                delta = x_t - x
                best, least = _keep_nearer(best, least, x_t, hit, core.l2(delta).flatten())
                g = (2 * delta - core.rows(weight * ~hit) * grad) * (1 - th * th) / 2
                m.lerp_(g, 0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                w -= lr / (1 - 0.9 ** (t + 1)) * m / ((v / (1 - 0.999 ** (t + 1))).sqrt_() + 1e-8)
                th = w.tanh()
                x_t = (x + (th - th_0) / 2).clamp_(0, 1)
            high, low = torch.where(won, weight, high), torch.where(won, low, weight)
            weight = torch.where(high.isinf(), 10 * weight, (low + high) / 2)
        out[alive] = best
    core.finish(x_t)
    return core.finish(out)


SHRINK = 1 - 1e-6


def ddn(model: Model, x: Tensor, y: Tensor, *, steps: int = 100, gamma: float = 0.05, init_norm: float = 1.0, levels: int | None = None,
        targeted: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Decoupled direction and norm, l2 (Rony et al., arXiv 1811.09600, algorithm 1): n + n passes.

    Every iterate lies at distance eps, at first init_norm, which shrinks by gamma where the image is fooled and grows by gamma where it is not; the
    direction follows the gradient of the cross-entropy with steps annealed from 1 to 0.01. levels: round the pixels to so many equidistant values
    (256: what an 8-bit image can hold)."""
    def move(t, x, delta, eps, grad, value, hit, size, least):
        eps = torch.minimum(eps * torch.where(hit, 1 - gamma, 1 + gamma), _farthest(x, "l2"))
        delta = delta + (0.01 + 0.99 * _cosine(t, steps)) * core.steepest(grad, "l2")
        x_t = (x + delta * (core.rows(eps) / core.l2(delta).clamp_min(1e-12))).clamp_(0, 1)
        return eps, x_t if levels is None else x_t.mul_(levels - 1).round_().div_(levels - 1)

    _check_positive(gamma=gamma, init_norm=init_norm)
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be 2 or more, or None for no rounding, got {levels}")
    return _walk(model, x, y, steps, "l2", cross_entropy, targeted, init_norm, move)


def fmn(model: Model, x: Tensor, y: Tensor, *, steps: int = 100, norm: str = "l2", step_size: float = 1.0, gamma: float = 0.05,
        targeted: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Fast minimum-norm attack, l2 or linf (Pintor et al., arXiv 2102.12827, algorithm 1): n + n passes."""
    def move(t, x, delta, eps, grad, value, hit, size, least):
        shrink, step = 0.001 + (gamma - 0.001) * _cosine(t, steps), step_size * (0.01 + 0.99 * _cosine(t, steps))
        boundary = size + value.abs() / _dual(grad, norm).clamp_min(1e-12)
        eps = torch.where(hit, torch.minimum(eps * (1 - shrink), least), (1 + shrink) * torch.where(least.isinf(), boundary, eps))
        eps = torch.minimum(eps, _farthest(x, norm))
        return eps, core.project(x + delta + step * core.steepest(grad, "l2"), x, core.rows(eps), norm)

    return _walk(model, x, y, steps, norm, margin, targeted, torch.inf, move)


def _walk(model: Model, x: Tensor, y: Tensor, steps: int, norm: str, loss: Loss, targeted: bool, eps: float, move: Callable) -> Tensor:
    """What ddn and fmn share: judge the iterate, keep it where it is the nearest that fools, and let `move` choose the next; n + n passes."""
    core.check_images(x, y)
    core.check_steps(steps=steps)
    core.check_choice("norm", norm, core.NORMS)
    objective, x_t = _upwards(loss, targeted), x.detach()
    out = x_t.clone()
    with core.attacking(model):
        for t in range(steps):
            logits, value, grad = core.gradient(model, x_t, y, objective, check=y if t == 0 else None)
            hit = core.fooled(logits, y, targeted)
            if t == 0:
                alive = (~hit).nonzero().squeeze(1)
                if not len(alive):
                    return out
                y, x_t, value, grad, hit = (v[alive] for v in (y, x_t, value, grad, hit))
                x, best, least, eps = x_t, x_t, torch.full_like(value, torch.inf), torch.full_like(value, eps)
            delta = x_t - x
            size = _size(delta, norm)
            best, least = _keep_nearer(best, least, x_t, hit, size)
            eps, x_t = move(t, x, delta, eps, grad, value, hit, size, least)
    core.finish(x_t)
    out[alive] = best
    return out


def _upwards(loss: Loss, targeted: bool) -> Loss:
    """The loss with the sign that an attack ascends."""
    return (lambda logits, y: -loss(logits, y)) if targeted else loss


def _keep_nearer(best: Tensor, least: Tensor, x_t: Tensor, hit: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    nearer = hit & (size < least)
    return torch.where(core.rows(nearer), x_t, best), torch.where(nearer, size, least)


def _size(delta: Tensor, norm: str) -> Tensor:
    return delta.flatten(1).norm(2 if norm == "l2" else torch.inf, dim=1)


def _dual(grad: Tensor, norm: str) -> Tensor:
    return grad.flatten(1).norm(2 if norm == "l2" else 1, dim=1)


def _farthest(x: Tensor, norm: str) -> Tensor:
    """The norm of the longest perturbation that leaves x inside [0, 1]."""
    return _size(torch.maximum(x, 1 - x), norm)


def _cosine(t: int, steps: int) -> float:
    return (1 + math.cos(math.pi * t / steps)) / 2


def _check_positive(zero: bool = False, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 or (zero and value == 0)) or not math.isfinite(value):
            raise ValueError(f"{name} must be finite and {'not negative' if zero else 'positive'}, got {value}")
