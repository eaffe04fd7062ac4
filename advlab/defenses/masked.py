"""Defences that are broken on purpose: each hides or fakes something, looks strong to a careless evaluation, and fails a check of
`advlab.sanity`. Notebook 02 breaks them with their cures; the tests hold the checks to them. None of them should ever protect anything."""

import torch
from torch import Tensor, nn

from advlab.attacks import core
from advlab.attacks.adaptive import straight_through


class Quantise(nn.Module):
    """A restorer that rounds pixels to `levels` values, whose gradient is zero everywhere: shattered. Its cure is bpda with the identity."""

    def __init__(self, levels: int = 8):
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return straight_through((x * (self.levels - 1)).round() / (self.levels - 1), 0 * x)


class RandomView(nn.Module):
    """A restorer that shows square images rolled by any offset, turned and mirrored, with uniform noise of +-`noise`, all drawn anew for each
    image from its own generator: stochastic. Its cure is eot."""

    def __init__(self, noise: float = 0.0, seed: int = 0):
        super().__init__()
        self.noise, self.generator = noise, torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), g = x.shape, self.generator
        turn, down, across = torch.randint(2, (3, b), generator=g).to(x.device)
        shift = torch.randint(h, (2, b, 1), generator=g).to(x.device)
        at = torch.arange(h, device=x.device)
        rows = (shift[0] + at * (1 - 2 * down[:, None])) % h
        columns = (shift[1] + at * (1 - 2 * across[:, None])) % w
        image, channel = torch.arange(b, device=x.device).view(b, 1, 1, 1), torch.arange(c, device=x.device).view(1, c, 1, 1)
        x = torch.where(core.rows(turn) == 1, x.transpose(2, 3), x)[image, channel, rows.view(b, 1, h, 1), columns.view(b, 1, 1, w)]
        return (x + self.noise * core.uniform(x, g)).clamp(0, 1)


class Sharpen(nn.Module):
    """A classifier with its logits multiplied by `scale`: the loss saturates, and its gradient underflows to zero. Its cure is a loss
    that does not saturate, the margin or the difference of logits ratio."""

    def __init__(self, classifier: nn.Module, scale: float = 1e4):
        super().__init__()
        self.classifier, self.scale = classifier, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.classifier(x)


class Probabilities(nn.Module):
    """A classifier that returns its softmax, so that losses are flat wherever it is sure."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x).softmax(1)


class Memory(nn.Module):
    """A cheat that knows the images it will be tested on: it answers with the stored label where an image lies further than `far` from the
    nearest stored one (so that larger budgets fare worse), or once it has been asked more than `patience` times (so that more steps and
    restarts do), and classifies honestly elsewhere."""

    def __init__(self, classifier: nn.Module, x: Tensor, y: Tensor, *, far: float = torch.inf, patience: float = torch.inf):
        super().__init__()
        self.classifier, self.x, self.y, self.far, self.patience, self.asked = classifier, x, y, far, patience, 0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(x)
        self.asked += 1
        nearest = torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(1)
        linf = (x - self.x[nearest]).abs().amax((1, 2, 3))
        answer = 100 * nn.functional.one_hot(self.y[nearest], logits.shape[1]) + 0 * logits
        known = (linf > self.far) | (self.asked > self.patience)
        return torch.where(known[:, None], answer, logits)


class Brittle(nn.Module):
    """A cheat like Memory that enlarges whatever has changed since the nearest stored image by `gain`: noise hurts it like an attack."""

    def __init__(self, classifier: nn.Module, x: Tensor, gain: float = 20.0):
        super().__init__()
        self.classifier, self.x, self.gain = classifier, x, gain

    def forward(self, x: Tensor) -> Tensor:
        stored = self.x[torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(1)]
        return self.classifier((stored + self.gain * (x - stored)).clamp(0, 1))


class Introspective(nn.Module):
    """A classifier that moves its input one step down its own loss for its own prediction before it answers: gradients inside forward."""

    def __init__(self, classifier: nn.Module, step: float = 4 / 255):
        super().__init__()
        self.classifier, self.step = classifier, step

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            label = self.classifier(x).argmax(1)
            grad = core.gradient(self.classifier, x, label, core.cross_entropy)[2]
        return self.classifier((x - self.step * grad.sign()).clamp(0, 1))
