"""Minimum-norm attacks: deepfool, cw, ddn and fmn look for the nearest image that fools the model, with no budget to fill.

Each takes a model that maps images in [0, 1] to logits, a batch x (B, C, H, W) and labels y (B,), or, with targeted=True, the classes to
reach. An image comes back unchanged if it is misclassified already (targeted: classified as the target), after one pass, or if no fooling
image was found: judge the answers with the model to tell the two from success. Nothing is drawn at random; `generator` is there for the
sake of one signature."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from advlab.attacks import core
from advlab.attacks.core import Loss, Model, margin

SHRINK = 0.9  # cw starts black and white pixels at tanh(w) = -0.9 and 0.9, where tanh has a slope, and not at 0.999999, where it has none


def deepfool(model: Model, x: Tensor, y: Tensor, *, steps: int = 50, norm: str = "l2", overshoot: float = 0.02, candidates: int | None = 10,
             generator: torch.Generator | None = None) -> Tensor:
    """Steps to the nearest face of the linearised decision region (Moosavi-Dezfooli et al., arXiv 1511.04599); untargeted, l2 or linf.

    Each step goes 1 + overshoot times the distance to the nearest of the boundaries between the label and its `candidates` - 1 likeliest
    rivals on x (None: all), and the image that is returned has crossed one. A step costs one forward pass, and one backward pass a rival,
    on the images that still stand; where some have just fallen, one forward pass more without them if that is less than their share of the
    backward passes."""
    _check(x, y, norm, steps=steps)
    core.check_budget(overshoot, x, "overshoot")
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
                if not logits.requires_grad:
                    raise ValueError("the model's output carries no gradient to its input; wrap it with bpda, or attack by queries")
                rivals = core.others(logits.detach(), y).topk(min(candidates or logits.shape[1], logits.shape[1]) - 1).indices
            done = core.fooled(logits.detach(), y)
            out[alive[done]] = x_t.detach()[done]
            on = (~done).nonzero().squeeze(1)
            alive, y, rivals = alive[on], y[on], rivals[on]
            if t == steps or not len(on):
                break
            if (len(done) - len(on)) * rivals.shape[1] > len(on):
                x_t = x_t.detach()[on].requires_grad_()
                logits, on = model(x_t), torch.arange(len(on), device=x.device)
            length, normal = torch.full_like(y, torch.inf, dtype=x.dtype), None
            for k in range(rivals.shape[1]):
                gap = logits[on, rivals[:, k]] - logits[on, y]
                grad = torch.autograd.grad(gap.sum(), x_t, retain_graph=k + 1 < rivals.shape[1])[0][on]
                away = -gap.detach() / _size(grad, _DUAL[norm])
                nearest = away < length
                length = torch.where(nearest, away, length)
                normal = grad if normal is None else torch.where(core.rows(nearest), grad, normal)
            # 1e-4, as in the authors' code: without it images creep up to a curved boundary for many steps
            step = (1 + overshoot) * (length + (1e-4 if t else 0))
            x_t = (x_t.detach()[on] + core.rows(step) * core.steepest(normal, norm)).clamp_(0, 1)
            core.finish(x_t)
    return out


def cw(model: Model, x: Tensor, y: Tensor, *, steps: int = 100, search_steps: int = 5, c: float = 0.1, lr: float = 0.01, kappa: float = 0.0,
       targeted: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Adam on |x_adv - x|^2 + c max(-margin, -kappa) in tanh space, l2 (Carlini and Wagner, arXiv 1608.04644, section VI).

    For each image the weight, at first `c`, grows tenfold until a search step fools the model, and is bisected from then on. An answer's
    margin is kappa or more; the nearest of all iterates is returned. A search step costs steps + steps passes, the one on x itself being
    shared by all. Departures: a search step goes on from where the one before it ended, so that lr * steps does not bound how far an image
    can go, and x_adv = x + (tanh(w) - tanh(w_0)) / 2 starts exactly at x, though w_0 keeps clear of the flat ends of tanh."""
    _check(x, y, "l2", steps=steps, search_steps=search_steps)
    _check_positive(c=c, lr=lr)
    core.check_budget(kappa, x, "kappa")
    objective, x = _upwards(margin, targeted), x.detach()
    out = x.clone()
    with core.attacking(model):
        alive, x, y, value, grad = _stand(model, x, y, objective, targeted)
        if not len(alive):
            return out
        best, least = x, torch.full_like(value, torch.inf)
        low, high, weight = torch.zeros_like(value), torch.full_like(value, torch.inf), torch.full_like(value, c)
        w_0, one = torch.atanh((2 * x - 1) * SHRINK), x.new_ones(())
        tanh_0 = w_0.tanh()
        x_t, delta, w, tanh, hit = x, torch.zeros_like(x), w_0, tanh_0, torch.zeros_like(alive, dtype=torch.bool)
        for _ in range(search_steps):
            mean, square, won = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(hit)
            for t in range(1, steps):
                g = torch.addcmul(delta, core.rows(weight * ~hit), grad, value=-0.5).mul_(torch.addcmul(one, tanh, tanh, value=-1))
                mean.lerp_(g, 0.1)
                square.mul_(0.999).addcmul_(g, g, value=0.001)
                scale = math.sqrt(1 - 0.999**t)
                w = w.addcdiv(mean, square.sqrt().add_(1e-8 * scale), value=-lr * scale / (1 - 0.9**t))
                tanh = w.tanh()
                x_t = torch.add(x, tanh - tanh_0, alpha=0.5).clamp_(0, 1)
                delta = x_t - x
                logits, value, grad = core.gradient(model, x_t, y, objective)
                hit = core.fooled(logits, y, targeted) & (value >= kappa)
                won = won | hit
                best, least = _nearer(best, least, x_t, hit, _size(delta, 2))
            core.finish(x_t)
            low, high = torch.where(won, low, weight), torch.where(won, weight, high)
            weight = torch.where(high.isinf(), 10 * weight, (low + high) / 2)
    out[alive] = best
    return out


def ddn(model: Model, x: Tensor, y: Tensor, *, steps: int = 100, gamma: float = 0.05, init_norm: float = 1.0, levels: int | None = None,
        targeted: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Decoupled direction and norm, l2 (Rony et al., arXiv 1811.09600, algorithm 1); n + n passes.

    Iterates lie at distance eps from x, at first init_norm, which shrinks by the share gamma where the image is fooled and grows by it
    where it is not; their direction follows the gradient, with steps annealed from 1 to 0.01. The gradient starts as the cross-entropy's,
    to which it stays parallel in the paper, and ends as the margin's (see `_soft_margin`). levels: round the pixels to that many equally
    spaced values (256: what an 8-bit image can hold)."""
    _check_positive(gamma=gamma, init_norm=init_norm)
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be 2 or more, or None for no rounding, got {levels}")

    def move(decay, x, delta, eps, far, value, grad, hit, least):
        eps = torch.minimum(eps * torch.where(hit, 1 - gamma, 1 + gamma).to(eps.dtype), far)
        delta = delta + (0.01 + 0.99 * decay) * core.steepest(grad, "l2")
        x_t = (x + delta * (core.rows(eps) / core.l2(delta).clamp_min(1e-12))).clamp_(0, 1)
        return eps, x_t if levels is None else x_t.mul_(levels - 1).round_().div_(levels - 1)

    return _walk(model, x, y, steps, "l2", targeted, init_norm, move)


def fmn(model: Model, x: Tensor, y: Tensor, *, steps: int = 100, norm: str = "l2", step_size: float = 0.3, gamma: float = 0.05,
        targeted: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Fast minimum-norm attack, l2 or linf (Pintor et al., arXiv 2102.12827, algorithm 1); n + n passes.

    Gradient steps inside a ball whose radius eps is the distance to the linearised boundary until the image is fooled, and from then on
    shrinks by the share gamma where it is and grows by it where it is not; gamma is annealed to 0.001, the step, step_size * eps, to a
    hundredth. Departures: steps in proportion to eps and along the norm's own steepest direction (no scale to tune); gamma is added before
    the first success too, since the estimate alone closes in on the boundary from inside and may never cross it; the gradient weighs all
    rivals at first (see `_soft_margin`).

    It takes FAB's place (arXiv 1907.02044) in AutoAttack: both close in on the boundary's point nearest to x, FAB for two forward passes
    and a backward pass a class and step, fmn for 1 + 1. Mean norms on a VGG for digits (127 images; l2, linf): 0.475 and 0.0930 in 100
    steps, 0.463 and 0.0916 in 20 steps with targeted=True towards each class in turn, nearest answer kept; FAB-T in 20 steps a class,
    twice the forward passes: 0.466 and 0.0928."""
    core.check_choice("norm", norm, core.NORMS)
    _check_positive(step_size=step_size, gamma=gamma)

    def move(decay, x, delta, eps, far, value, grad, hit, least):
        share = 0.001 + (gamma - 0.001) * decay
        boundary = _size(delta, _PRIMAL[norm]) + value.abs() / _size(grad, _DUAL[norm])
        eps = torch.where(hit, torch.minimum(eps * (1 - share), least), (1 + share) * torch.where(least.isinf(), boundary, eps))
        eps = torch.minimum(eps, far)
        radius = core.rows(eps)
        return eps, core.project(x + delta + step_size * (0.01 + 0.99 * decay) * radius * core.steepest(grad, norm), x, radius, norm)

    return _walk(model, x, y, steps, norm, targeted, torch.inf, move)


def _walk(model: Model, x: Tensor, y: Tensor, steps: int, norm: str, targeted: bool, eps: float, move: Callable) -> Tensor:
    """What ddn and fmn share, n + n passes: let `move` choose eps and the next iterate, judge it, keep the nearest that fools."""
    _check(x, y, norm, steps=steps)
    objective, x = _upwards(partial(_soft_margin, heat=1.0), targeted), x.detach()
    out = x.clone()
    with core.attacking(model):
        alive, x, y, value, grad = _stand(model, x, y, objective, targeted)
        if not len(alive):
            return out
        delta, best, hit = torch.zeros_like(x), x, torch.zeros_like(alive, dtype=torch.bool)
        least, eps = torch.full_like(value, torch.inf), torch.full_like(value, eps)
        far = _size(torch.maximum(x, 1 - x), _PRIMAL[norm])
        for t in range(steps - 1):
            decay = (1 + math.cos(math.pi * t / steps)) / 2
            objective = _upwards(partial(_soft_margin, heat=decay), targeted)
            eps, x_t = move(decay, x, delta, eps, far, value, grad, hit, least)
            delta = x_t - x
            logits, value, grad = core.gradient(model, x_t, y, objective)
            hit = core.fooled(logits, y, targeted)
            best, least = _nearer(best, least, x_t, hit, _size(delta, _PRIMAL[norm]))
        core.finish(delta)
    out[alive] = best
    return out


_PRIMAL, _DUAL = {"l2": 2, "linf": math.inf}, {"l2": 2, "linf": 1}


def _size(v: Tensor, p: float) -> Tensor:
    """The p-norm of each image, (B,), at least 1e-12 so that one can divide by it."""
    return v.flatten(1).norm(p, dim=1).clamp_min(1e-12)


def _soft_margin(logits: Tensor, y: Tensor, heat: float) -> Tensor:
    """The margin, with the gradient of its smooth form heat * log-sum-exp(z / heat): at heat 1 it is parallel to the cross-entropy's and
    follows all rivals, so that a search is not caught by the first it meets; as the heat cools it becomes the margin's own."""
    soft = heat * (core.others(logits, y) / heat).logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)
    return soft + (margin(logits, y) - soft).detach()


def _upwards(loss: Loss, targeted: bool) -> Loss:
    """The loss with the sign that an attack ascends."""
    return (lambda logits, y: -loss(logits, y)) if targeted else loss


def _stand(model: Model, x: Tensor, y: Tensor, objective: Loss, targeted: bool) -> tuple[Tensor, ...]:
    """One pass on x: the indices of the images that do not fool the model as they are, and their x, y, loss and gradient."""
    logits, value, grad = core.gradient(model, x, y, objective, check=y)
    alive = (~core.fooled(logits, y, targeted)).nonzero().squeeze(1)
    return alive, *(v[alive] for v in (x, y, value, grad))


def _nearer(best: Tensor, least: Tensor, x_t: Tensor, hit: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    nearer = hit & (size < least)
    return torch.where(core.rows(nearer), x_t, best), torch.where(nearer, size, least)


def _check(x: Tensor, y: Tensor, norm: str, **counts: int) -> None:
    core.check_images(x, y)
    core.check_steps(**counts)
    core.check_choice("norm", norm, core.NORMS)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < (1 if name == "gamma" else math.inf):
            raise ValueError(f"{name} must be positive and {'less than 1' if name == 'gamma' else 'finite'}, got {value}")
