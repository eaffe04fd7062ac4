"""For the tests of attacks: linear models whose nearest adversarial point is known, a counter of passes, a check of purity."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def linear_model(shape: tuple[int, int, int], classes: int = 2, seed: int = 0, bias: float = 0.0) -> nn.Sequential:
    """Logits W (v - 1/2) for the flattened image v: all boundaries meet in the middle of the box. bias is added to the logit of class 0."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=generator))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
        model[1].bias[0] += bias
    return model


def closest(model: nn.Sequential, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Distance (B,) from x to the nearest image in [0, 1] of another class than y, for a linear_model; infinite where there is none.

    The shortest d with w.d >= b inside the box is clip(t w), in l2, or clip(t sign(w)), in linf, at the least t that reaches b."""
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    v = x.flatten(1).double()[:, None]
    w = weight[None] - weight[y][:, None]  # (B, classes, pixels)
    b = -(v * w).sum(2, keepdim=True) - (bias[None] - bias[y][:, None])[:, :, None]
    way = w if norm == "l2" else w.sign()

    def clip(t: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(t * way, -v), 1 - v)

    low, high = torch.zeros_like(b), 1 / way.abs().amin(2, keepdim=True).clamp_min(1e-9)
    within = (w * clip(high)).sum(2) >= b[:, :, 0]
    for _ in range(60):
        middle = (low + high) / 2
        enough = (w * clip(middle)).sum(2, keepdim=True) >= b
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    rival = torch.arange(len(weight), device=y.device) != y[:, None]
    return torch.where(rival & within, size(clip(high).flatten(0, 1), norm).view(b.shape[:2]), torch.inf).amin(1).to(x.dtype)


def size(delta: Tensor, norm: str) -> Tensor:
    return delta.flatten(1).norm(2 if norm == "l2" else torch.inf, dim=1)


class PassCounter:
    """Counts the images and batches that go forward through a model, and backward from its output; no parameter may ask for a gradient."""

    def __init__(self, model: nn.Module):
        self.forward = self.forward_batches = self.backward = self.backward_batches = 0
        self.model = model

    def __enter__(self) -> "PassCounter":
        self.handle = self.model.register_forward_hook(self._count)
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()

    def _count(self, model: nn.Module, inputs: tuple, out: Tensor) -> None:
        assert not any(p.requires_grad for p in model.parameters()), "a gradient of a parameter would be computed"
        self.forward, self.forward_batches = self.forward + len(out), self.forward_batches + 1
        if out.requires_grad:
            out.register_hook(self._count_back)

    def _count_back(self, grad: Tensor) -> None:
        self.backward, self.backward_batches = self.backward + len(grad), self.backward_batches + 1


def assert_pure(model: nn.Module, x: Tensor, y: Tensor, attack: Callable) -> Tensor:
    """Run attack(model, x, y) twice: same answer, in [0, 1]; model, inputs and global generator as they were. Returns the answer."""
    state = {name: v.clone() for name, v in model.state_dict().items()}
    kept, rng, modes = (x.clone(), y.clone()), torch.get_rng_state(), [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    x_adv = attack(model, x, y)
    assert torch.equal(x_adv, attack(model, x, y)), "not deterministic"
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad and not x.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and x_adv.data_ptr() != x.data_ptr()
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1]) and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, state[name]) for name, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    return x_adv


def notebook(folder, name, *code, parameters='profile = "quick"\ndataset = "skimage10"\nn = 4\nrate = 0.5\nflag = True\nnames = ["a"]'):
    """Write a notebook with a parameters cell and cells of code into a folder."""
    from nbformat import v4, write

    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    cells = [v4.new_markdown_cell("# made"), v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(v4.new_code_cell, code)]
    write(v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


def in_precision(net, batch, dtype):
    """The network, copied, and images of that dtype, with their labels."""
    return copy.deepcopy(net).to(dtype), batch[0].to(dtype), batch[1]
