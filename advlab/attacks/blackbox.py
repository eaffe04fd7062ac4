"""Attacks that see only the model's answers (square, spsa, genattack), only its decisions (hopskipjump), or another model (transfer).

None differentiates the victim, so no masked gradient stops them: a defence that falls here and not to the white box was met by a weak white box.
A query is one image sent through the model once. An image that is fooled already costs one query and comes back unchanged; the others leave the
batch as they fall. Without a generator a fresh one with seed 0 is used.

hopskipjump and genattack are not borrowed, because foolbox 3.3.4 does neither right. Its HopSkipJump scales probes and gradients by norms of the
whole batch (on a linear model 32 images end at 1.65 times the exact distance after 12 steps, each alone at 1.06), and gives up on all images when
one has no start or a random model changes its mind; its GenAttack subtracts a logit from a sum of exponentials and returns failures unmarked."""

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab.attacks import core
from advlab.attacks.adaptive import _hold
from advlab.attacks.core import Loss, Model, cross_entropy, margin, rows
from advlab.attacks.gradient import mim

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000 after which Square halves the share p of changed pixels


def _standing(model: Model, x: Tensor, y: Tensor, eps: Tensor, targeted: bool) -> Tensor:
    """One query an image: the positions of those that do not fool the model yet and may be changed at all."""
    logits = model(x)
    core.check_logits(logits, x, y)
    return (~core.fooled(logits, y, targeted) & (eps.flatten() > 0)).nonzero().squeeze(1)


def _integers(high: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """A whole number below `high` for each image, (B, 1)."""
    return torch.randint(high, (len(x), 1), generator=generator, device=generator.device).to(x.device)


def _coins(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Fair coins (bool) of the given shape, on x's device."""
    return torch.randint(2, shape, generator=generator, device=generator.device).to(x.device, torch.bool)


def _signs(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Fair signs, -1 or 1, of x's dtype and the given shape."""
    return _coins(x, shape, generator).to(x.dtype) * 2 - 1


def _share(x: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform draws from [0, 1] of x's shape."""
    return core.uniform(x, generator) / 2 + 0.5


# --- square -------------------------------------------------------------------------------------------------------------------------------


def square(model: Model, x: Tensor, y: Tensor, *, eps, norm: str = "linf", queries: int = 5000, p_init: float | None = None,
           restarts: int = 1, loss: Loss = margin, targeted: bool = False, generator: torch.Generator | None = None,
           trace: list | None = None) -> Tensor:
    """Square Attack (Andriushchenko et al., arXiv 1912.00049): random search over squares, a place and signs of their own for every image.

    p_init, the share of pixels that the first squares cover, is 0.8 for l_inf and 0.1 for l2; the paper's schedule of halvings is stretched
    to the number of queries. At most `queries` an image in each restart, the one that judges the clean image included. Images that still stand
    come back at their greatest loss. trace: receives a pair (queries so far, images still standing) after every query, for query curves."""
    core.check_images(x, y)
    core.check_steps(queries=queries, restarts=restarts)
    core.check_choice("norm", norm, core.NORMS)
    p_init = {"linf": 0.8, "l2": 0.1}[norm] if p_init is None else p_init
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init is the share of pixels in the first squares and must lie in (0, 1], got {p_init}")
    eps, generator, sign = core.check_budget(eps, x), core.default_generator(x, generator), -1.0 if targeted else 1.0
    start, propose = (_stripes, _recolour) if norm == "linf" else (_tiles, _move_mass)
    x = x.detach()
    out, top, used = x.clone(), torch.full(x.shape[:1], -torch.inf, dtype=x.dtype, device=x.device), 1
    with core.attacking(model), torch.no_grad():
        alive = _standing(model, x, y, eps, targeted)
        if trace is not None:
            trace.append((used, len(alive)))
        for attempt in range(restarts):
            ys, best, score = y[alive], x[alive], top.new_full(alive.shape, -torch.inf)
            ball = core.ball(best, eps[alive], norm)
            for k in range(queries - (attempt == 0)):
                if not len(alive):
                    return core.finish(out)
                p = p_init / 2 ** bisect_left(HALVINGS, (k - 1) * 10_000 // queries)
                new = propose(*ball, best, p, generator) if k else start(*ball, generator)
                logits = model(new)
                done = core.fooled(logits, ys, targeted)
                value = torch.where(done, torch.inf, sign * loss(logits, ys))
                rose = value > score
                best, score = torch.where(rows(rose), new, best), torch.where(rose, value, score)
                used += 1
                if done.any():
                    out[alive[done]] = new[done]
                    alive, ys, best, score, *ball = core.select(~done, alive, ys, best, score, *ball)
                if trace is not None:
                    trace.append((used, len(alive)))
            better = score > top[alive]
            out[alive[better]], top[alive[better]] = best[better], score[better]
    return core.finish(out)


def _stripes(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Vertical stripes one pixel wide, each channel of each at the lower or the upper bound."""
    return torch.where(_coins(low, (*low.shape[:2], 1, low.shape[3]), generator), high, low)


def _recolour(low: Tensor, high: Tensor, best: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """One square of side sqrt(p H W) moved to its lower or upper bound, a sign for each channel; signs that change nothing are turned round."""
    channels, height, width = low.shape[1:]
    side = min(max(round(math.sqrt(p * height * width)), 1), height, width)
    r, c = (_integers(n - side + 1, low, generator) + torch.arange(side, device=low.device) for n in (height, width))
    up = _coins(low, (*low.shape[:2], 1, 1), generator)
    first = torch.arange(0, channels * height, height, device=low.device)[:, None, None]
    at = ((first + r[:, None, :, None]) * width + c[:, None, None, :]).flatten(1)  # the square's pixels in a flat image
    lows, highs, now = (v.flatten(1).gather(1, at).view(-1, channels, side, side) for v in (low, high, best))
    idle = ~(torch.where(up, highs, lows) != now).flatten(1).any(1)
    return best.flatten(1).scatter(1, at, torch.where(up ^ rows(idle), highs, lows).flatten(1)).view_as(best)


def _bump(side: int, x: Tensor) -> Tensor:
    """The paper's pattern (side, side) of unit norm: two pyramids that fall off as sums of inverse squares, the second one negative."""
    def pyramid(height: int) -> Tensor:
        r, c = ((torch.arange(n, device=x.device) - n // 2).abs() for n in (height, side))
        fall = 1 / torch.arange(1, side // 2 + 2, device=x.device, dtype=x.dtype) ** 2
        half = fall.flip(0).cumsum(0).flip(0)[torch.maximum(r[:, None], c)]
        return half / half.norm()
    both = torch.cat([pyramid(side // 2), -pyramid(side - side // 2)])
    return both / both.norm()


def _turned(x: Tensor, side: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Patterns (*shape, side, side), lying or standing by a fair coin for each."""
    bump = _bump(side, x)
    return torch.where(_coins(x, (*shape, 1, 1), generator), bump, bump.mT)


def _tiles(x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
    """Patterns side by side, five to the shorter edge, with a sign for each and each channel."""
    batch, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    m, n = height // side, width // side
    tiles = _turned(x, side, (batch, 1, m, n), generator) * _signs(x, (batch, channels, m, n, 1, 1), generator)
    down, right = height - m * side, width - n * side
    delta = F.pad(tiles.transpose(3, 4).flatten(4).flatten(2, 3), (right // 2, right - right // 2, down // 2, down - down // 2))
    return (x + eps * delta / core.l2(delta)).clamp_(0, 1)


def _move_mass(x: Tensor, eps: Tensor, best: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Algorithm 3: clear one window and spend its norm, and what the ball still allows, on a pattern added to another window."""
    batch, channels, height, width = x.shape
    side = min(max(round(math.sqrt(p * height * width)), 3) // 2 * 2 + 1, height, width)
    delta, offsets = (best - x).flatten(2), torch.arange(side, device=x.device)

    def window() -> Tensor:  # like the authors', never on the last row or column: on Fashion-MNIST 1 to 2 points more fall so
        r, c = (_integers(max(n - side, 1), x, generator) + offsets for n in (height, width))
        return (r[:, :, None] * width + c[:, None, :]).view(batch, 1, -1)

    here, there = window(), window()
    mask = delta.new_zeros(batch, 1, height * width).scatter_(2, here, 1).scatter_(2, there, 1)
    spare = (eps.flatten(1) ** 2 - delta.flatten(1).square().sum(1, keepdim=True)).clamp_min(0)[:, :, None]
    budget = (delta * mask).square().sum(2, keepdim=True) + spare / channels
    old = delta.gather(2, here := here.expand(-1, channels, -1))
    new = _turned(x, side, (batch, 1), generator).flatten(2) * _signs(x, (batch, channels, 1), generator)
    new = new + old / old.norm(dim=2, keepdim=True).clamp_min(1e-12)
    new = new / new.norm(dim=2, keepdim=True).clamp_min(1e-12) * budget.sqrt()
    delta = delta.scatter(2, there.expand(-1, channels, -1), 0).scatter_(2, here, new).view_as(x)
    return (x + eps * delta / core.l2(delta).clamp_min(1e-12)).clamp_(0, 1)


# --- gradients estimated from scores ------------------------------------------------------------------------------------------------------


def spsa(model: Model, x: Tensor, y: Tensor, *, eps, steps: int = 100, samples: int = 128, delta: float = 0.01, lr: float = 0.01,
         loss: Loss = margin, targeted: bool = False, chunk: int = 1024, generator: torch.Generator | None = None) -> Tensor:
    """SPSA (Uesato et al., arXiv 1802.05666) in l_inf: Adam with rate lr on a gradient averaged over `samples` random sign directions.

    Each direction costs two queries, delta to either side and clipped to [0, 1]; at most 1 + steps (2 samples + 1) an image. No forward
    pass holds more than max(chunk, 2 B) images. Images that still stand come back at the last iterate."""
    core.check_images(x, y)
    core.check_steps(steps=steps, samples=samples, chunk=chunk)
    if not (delta > 0 and lr > 0):
        raise ValueError(f"delta and lr must be positive, got {delta} and {lr}")
    eps, generator, sign = core.check_budget(eps, x), core.default_generator(x, generator), -1.0 if targeted else 1.0
    x = x.detach()
    out = x.clone()
    with core.attacking(model), torch.no_grad():
        alive = _standing(model, x, y, eps, targeted)
        xs, ys, es, x_t = x[alive], y[alive], eps[alive], x[alive]
        mean, square_mean = torch.zeros_like(xs), torch.zeros_like(xs)
        for t in range(1, steps + 1):
            if not len(alive):
                break
            grad, left = torch.zeros_like(xs), samples
            while left:
                n = min(left, max(1, chunk // (2 * len(xs))))
                v = _signs(xs, (n, *xs.shape), generator)
                probes = torch.stack([x_t + delta * v, x_t - delta * v]).clamp_(0, 1)
                value = loss(model(probes.flatten(0, 2)), ys.repeat(2 * n)).view(2, n, -1, 1, 1, 1)
                grad, left = grad + ((value[0] - value[1]) * v).sum(0), left - n
            grad = grad * (sign / (2 * delta * samples))
            mean, square_mean = 0.9 * mean + 0.1 * grad, 0.999 * square_mean + 0.001 * grad**2
            x_t = x_t + lr * (mean / (1 - 0.9**t)) / ((square_mean / (1 - 0.999**t)).sqrt() + 1e-8)
            x_t = core.project(x_t, xs, es, "linf")
            out[alive] = x_t
            on = ~core.fooled(model(x_t), ys, targeted)
            if not on.all():
                alive, xs, ys, es, x_t, mean, square_mean = core.select(on, alive, xs, ys, es, x_t, mean, square_mean)
    return core.finish(out)


# --- a population of noises ---------------------------------------------------------------------------------------------------------------


def genattack(model: Model, x: Tensor, y: Tensor, *, eps, steps: int = 100, population: int = 10, temperature: float = 0.3,
              targeted: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """GenAttack (Alzantot et al., arXiv 1805.11090) in l_inf: generations of noises, the fittest kept, the rest crossed and mutated.

    Fitness is the log odds of the class y to be reached or, untargeted, of leaving it; parents are drawn by softmax(fitness / temperature). At
    most 1 + population + steps (population - 1) queries an image. Images that still stand come back with their fittest noise."""
    core.check_images(x, y)
    core.check_steps(steps=steps, population=population)
    if population < 2 or not temperature > 0:
        raise ValueError(f"population must be at least 2 and temperature positive, got {population} and {temperature}")
    eps, generator, sign = core.check_budget(eps, x), core.default_generator(x, generator), -1.0 if targeted else 1.0
    x = x.detach()
    out = x.clone()

    def fitness(noise: Tensor) -> Tensor:  # (B, k, C, H, W) -> (B, k), infinite for noises that succeed; one pass a member bounds the memory
        answers = [model((xs + member).clamp_(0, 1)) for member in noise.unbind(1)]
        return torch.stack([torch.where(core.fooled(z, ys, targeted), torch.inf, sign * core.log_odds(z, ys)) for z in answers], 1)

    with core.attacking(model), torch.no_grad():
        alive = _standing(model, x, y, eps, targeted)
        if not len(alive):
            return out
        xs, ys, es = x[alive], y[alive], eps[alive, None]
        noise = es * core.uniform(xs[:, None].expand(-1, population, -1, -1, -1), generator)
        fit, stale, plateaus = fitness(noise), torch.zeros_like(alive), torch.zeros_like(alive)
        for step in range(steps + 1):
            peak, best = fit.max(1, keepdim=True)
            elite = noise.take_along_dim(best[..., None, None, None], 1)
            out[alive], on = (xs + elite[:, 0]).clamp_(0, 1), peak[:, 0] < torch.inf
            if not on.all():
                alive, xs, ys, es, fit, noise, peak, elite, stale, plateaus = core.select(
                    on, alive, xs, ys, es, fit, noise, peak, elite, stale, plateaus)
            if step == steps or not len(alive):
                break
            chance = (fit / temperature).softmax(1)
            drawn = torch.multinomial(chance.to(generator.device), 2 * population - 2, True, generator=generator).to(x.device)
            mothers, fathers = noise[torch.arange(len(xs), device=x.device)[:, None], drawn].chunk(2, 1)
            ours, theirs = chance.gather(1, drawn)[..., None, None, None].chunk(2, 1)
            children = torch.where(_share(mothers, generator) * (ours + theirs) < ours, mothers, fathers)
            rate, reach = (torch.clamp(first * 0.9**plateaus, min=last).to(x.dtype).view(-1, 1, 1, 1, 1) for first, last in ((0.5, 0.1), (0.4, 0.15)))
            children = children + (_share(children, generator) < rate) * reach * es * core.uniform(children, generator)
            noise = torch.cat([elite, children.clamp(-es, es)], 1)
            fit = torch.cat([peak, fitness(noise[:, 1:])], 1)
            stale = torch.where(fit.argmax(1) > 0, 0, stale + 1)
            plateaus, stale = plateaus + stale // 100, stale % 100
    return core.finish(out)


# --- decisions alone ----------------------------------------------------------------------------------------------------------------------


def hopskipjump(model: Model, x: Tensor, y: Tensor, *, steps: int = 32, norm: str = "l2", samples: int = 100, tries: int = 100,
                start: Tensor | None = None, targeted: bool = False, chunk: int = 1024, generator: torch.Generator | None = None) -> Tensor:
    """HopSkipJump (Chen et al., arXiv 1904.02144): the smallest change found by walking along the boundary between decisions, l2 or linf.

    Each step estimates the boundary's normal from samples sqrt(t) decisions, jumps along it, and halves the way back to x. It begins at `start`
    (B, C, H, W), images that fool the model, or else at the first of `tries` uniform noises that does; targeted attacks usually need a start. An
    image without one comes back unchanged, any other as the nearest image that was seen to fool the model. With h = ceil(log2(d^1.5)), 18 for
    3x32x32, at most 2 + tries + h + sum_t (samples sqrt(t) + 2 h) queries an image, in passes of at most max(chunk, B) images."""
    core.check_images(x, y)
    core.check_steps(steps=steps, samples=samples, tries=tries, chunk=chunk)
    core.check_choice("norm", norm, core.NORMS)
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must hold one image for each of x, shape {tuple(x.shape)}, got {tuple(start.shape)}")
    generator, x, d = core.default_generator(x, generator), x.detach(), x[0].numel()
    theta = max(d**-1.5, 1e-6)  # the share of the way that the search for the boundary leaves open; float32 cannot resolve less
    halvings = math.ceil(-math.log2(theta))

    def falls(z: Tensor, labels: Tensor) -> Tensor:
        return core.fooled(model(z), labels, targeted)

    def size(v: Tensor) -> Tensor:
        return core.l2(v) if norm == "l2" else rows(v.abs().amax((1, 2, 3)))

    def back(far: Tensor) -> Tensor:
        """The image nearest to x on the way from `far`, which fools the model, that does so too."""
        near, reach = far, size(far - xs)
        low, high = torch.zeros_like(reach), torch.ones_like(reach)
        for _ in range(halvings):
            mid = (low + high) / 2
            z = torch.lerp(xs, far, mid) if norm == "l2" else core.project(far, xs, mid * reach, norm)
            hit = rows(falls(z, ys))
            near, low, high = torch.where(hit, z, near), torch.where(hit, low, mid), torch.where(hit, mid, high)
        return near

    def normal(t: int) -> Tensor:
        """The direction into the fooling side at x_t: probes weighted with their decisions, less the mean decision where they differ."""
        radius = torch.full_like(size(x_t), 0.1) if t == 1 else (math.sqrt(d) * theta * core.l2(x_t - xs)).clamp_min(1e-12)
        weighted, plain, votes, left = torch.zeros_like(x_t), torch.zeros_like(x_t), torch.zeros_like(radius), int(samples * math.sqrt(t))
        total = left
        while left:
            n = min(left, max(1, chunk // len(x_t)))
            u = (core.gaussian if norm == "l2" else core.uniform)(x_t.repeat(n, 1, 1, 1), generator)
            z = (x_t + radius * (u / core.l2(u)).view(n, *x_t.shape)).clamp_(0, 1)
            vote = falls(z.flatten(0, 1), ys.repeat(n)).to(x.dtype).view(n, -1, 1, 1, 1) * 2 - 1
            u = (z - x_t) / radius
            weighted, plain, votes, left = weighted + (vote * u).sum(0), plain + u.sum(0), votes + vote.sum(0), left - n
        mean = votes / total
        return core.steepest(weighted - torch.where(mean.abs() < 1, mean, 0) * plain, norm)

    with core.attacking(model), torch.no_grad():
        todo = _standing(model, x, y, x.new_ones(len(x)), targeted)
        out, found = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        for attempt in range(-1 if start is not None else 0, tries):
            if not len(todo):
                break
            z = start[todo].clamp(0, 1) if attempt < 0 else _share(x[todo], generator)
            hit = falls(z, y[todo])
            out[todo[hit]], found[todo[hit]], todo = z[hit], True, todo[~hit]
        if not found.any():
            return out
        xs, ys = x[found], y[found]
        x_t = best = back(out[found])
        for t in range(1, steps + 1):
            jump, step, far, todo = normal(t), size(x_t - xs) / math.sqrt(t), x_t.clone(), torch.arange(len(xs), device=x.device)
            for _ in range(halvings):
                z = (x_t[todo] + step[todo] * jump[todo]).clamp_(0, 1)
                hit = falls(z, ys[todo])
                far[todo[hit]], todo, step = z[hit], todo[~hit], step / 2
                if not len(todo):
                    break
            x_t = back(far)
            best = torch.where(size(x_t - xs) < size(best - xs), x_t, best)
        out[found] = best
    return core.finish(out)


# --- transfer -----------------------------------------------------------------------------------------------------------------------------


class ensemble(nn.Module):
    """The mean of several models' logits, as MI-FGSM fuses an ensemble (Dong et al., arXiv 1710.06081, section 3.3)."""

    def __init__(self, models: Sequence[Model]):
        super().__init__()
        self.models = nn.ModuleList(_hold(model) for model in models)
        if not self.models:
            raise ValueError("an ensemble needs at least one model, got none")

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.models]).mean(0)


class diverse(nn.Module):
    """Input diversity (Xie et al., arXiv 1803.06978): with `probability`, a coin for each image, the model sees it shrunk to between `low` and 1
    times its size and padded with zeros at random, one size and place for each call. (The paper enlarges 299 px to 330; shrinking suits models
    of one fixed size.) Draws come from the generator, by default one with seed 0."""

    def __init__(self, model: Model, probability: float = 0.5, generator: torch.Generator | None = None, low: float = 0.9):
        super().__init__()
        if not (0 <= probability <= 1 and 0 < low <= 1):
            raise ValueError(f"probability must lie in [0, 1] and low in (0, 1], got {probability} and {low}")
        self.model, self.probability, self.low = _hold(model), probability, low
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        scale, top, left, *coins = torch.rand(3 + len(x), generator=self.generator, device=self.generator.device).tolist()
        h, w = (max(1, round((self.low + (1 - self.low) * scale) * n)) for n in (height, width))
        top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
        small = F.interpolate(x, (h, w), mode="bilinear", align_corners=False)
        chosen = rows(torch.tensor(coins, device=x.device) < self.probability)
        return self.model(torch.where(chosen, F.pad(small, (left, width - w - left, top, height - h - top)), x))


def transfer(model: Model, x: Tensor, y: Tensor, *, eps, surrogates: Model | Sequence[Model], steps: int = 10, step_size=None,
             decay: float = 1.0, diversity: float = 0.5, norm: str = "linf", loss: Loss = cross_entropy, targeted: bool = False,
             generator: torch.Generator | None = None) -> Tensor:
    """Images crafted on other models by momentum steps with input diversity, for a victim that is never asked: no query at all.

    surrogates: a model, or a list of models whose logits are averaged. diversity is the probability of `diverse`; with 0 this is `mim` on the
    surrogates, and any of `mim`'s errors may be raised. `model`, the victim, stands there for the common signature and is not called."""
    source = ensemble(list(surrogates) if isinstance(surrogates, list | tuple | nn.ModuleList) else [surrogates])
    if diversity:
        source = diverse(source, diversity, core.default_generator(x, generator))
    return mim(source, x, y, eps=eps, steps=steps, step_size=step_size, decay=decay, norm=norm, loss=loss, targeted=targeted)
