"""Training: `fit` runs any step function, `load_or_fit` keeps what came out and finds it again.

What makes a method is its step, `step(model, x, y, generator) -> (loss, metrics)`: a scalar tensor to descend, and numbers to average over the
epoch. Options are set by `functools.partial(pgd_at, eps=8/255)`. Steps craft their attacks in eval mode, with the running statistics of batch norm
that the finished model will use (Wong et al.'s code does it in train mode), and differentiate the loss in the modes that `fit` has set.

Everything random is drawn from generators, the global ones included, that are seeded anew from (seed, epoch, step). So no generator state is
saved, a run that was killed resumes to the same weights bit for bit (on the CPU, at one thread count), and the caller's global state is untouched.

Under torchrun the processes share every batch (advlab.parallel says how); the first alone evaluates, writes files and shows the bar. Their number is
noted as that of threads is, and no part of a configuration: one process finds the checkpoint of several, and a killed run may resume with fewer."""

import copy
import inspect
import json
import math
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab import parallel, paths
from advlab.attacks import core
from advlab.attacks.gradient import ffgsm, pgd
from advlab.checkpoints import describe, digest, fingerprint, load_weights, seal, to_bytes, trusted, unseal, write
from advlab.data import batches
from advlab.models import seeded

CODE = 1  # raise it when training gives other weights than before: cached checkpoints are then trained anew
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("onecycle", "cosine", "milestones", "constant")
torch.backends.cudnn.allow_tf32 = False  # by default CUDA's convolutions keep 10 bits of a mantissa, too few for the small gradients that decide here
torch.backends.cudnn.deterministic = True  # and may sum in another order each time, which turns signs of gradients near 0
RUNTIME = ("model", "device", "checkpoint", "save_every", "progress")  # arguments of fit that are no part of its configuration

Step = Callable[[nn.Module, Tensor, Tensor, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


def device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, or the best that this machine has: CUDA, then MPS, then the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def fast_bfloat16(where: torch.device) -> bool:
    """Whether bfloat16 autocast pays there: on CUDA (a step of ResNet-18 on 128 images took an H100 8.6 for 21.3 ms at width 64, and as long at
    width 16), and on processors with bfloat16 instructions (there it trained 2.3 times as fast)."""
    chips = ("avx512_bf16", "amx_tile") if where.type == "cpu" else ()
    return where.type == "cuda" or any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in chips)


# --- steps --------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def standard(model, x, y, generator, *, label_smoothing: float = 0.0):
    """Cross-entropy on clean images."""
    logits = model(x).float()
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing), {"accuracy": _accuracy(logits, y)}


def pgd_at(model, x, y, generator, *, eps: float, steps: int = 10, step_size: float | None = None, norm: str = "linf"):
    """PGD adversarial training (Madry et al., arXiv 1706.06083): cross-entropy on PGD's images only."""
    with evaluating(model):
        x_adv = pgd(model, x, y, eps=eps, steps=steps, step_size=step_size, norm=norm, loss=_cross_entropy, generator=generator)
    return on_adversarial(model, x_adv, y)


def fast_fgsm(model, x, y, generator, *, eps: float, step_size: float | None = None):
    """Fast adversarial training (Wong et al., arXiv 2001.03994): cross-entropy on images of `ffgsm`, whose step is 1.25 eps by default.

    It can collapse within an epoch to a model that only resists FGSM (catastrophic overfitting). Hence give fit
    evaluate=partial(pgd_accuracy, x=..., y=..., eps=eps) on a batch held out of the training data, and guard="pgd_accuracy"."""
    with evaluating(model):
        x_adv = ffgsm(model, x, y, eps=eps, step_size=step_size, loss=_cross_entropy, generator=generator)
    return on_adversarial(model, x_adv, y)


def trades(model, x, y, generator, *, eps: float, beta: float = 6.0, steps: int = 10, step_size: float | None = None, norm: str = "linf"):
    """TRADES (Zhang et al., arXiv 1901.08573): cross-entropy(f(x), y) + beta KL(f(x) || f(x_adv)), both means over the batch.

    x_adv ascends the KL term by PGD from a uniform random start; the authors' code starts from Gaussian noise of standard deviation 0.001."""
    with evaluating(model):
        with torch.no_grad():
            target = model(x).float()
        x_adv = pgd(model, x, y, eps=eps, steps=steps, step_size=step_size, norm=norm, generator=generator,
                    loss=lambda logits, _: _kl(target, logits.float()))
    clean, robust = model(x).float(), model(x_adv).float()
    loss = F.cross_entropy(clean, y) + beta * _kl(clean, robust).mean()
    return loss, {"accuracy": _accuracy(clean, y), "robust_accuracy": _accuracy(robust, y)}


def pgd_accuracy(model: nn.Module, *, x: Tensor, y: Tensor, eps: float, steps: int = 10) -> dict[str, float]:
    """Share of the images x (B, C, H, W), uint8 or in [0, 1], with labels y (B,) that are classified correctly under PGD from a fixed start."""
    where = next(model.parameters()).device
    x, y = (x / 255 if x.dtype == torch.uint8 else x).to(where), y.to(where)
    with evaluating(model), torch.no_grad():
        return {"pgd_accuracy": _accuracy(model(pgd(model, x, y, eps=eps, steps=steps)), y).item()}


def on_adversarial(model, x_adv, y):
    """What steps of adversarial training return: cross-entropy on images already attacked."""
    logits = model(x_adv).float()
    return F.cross_entropy(logits, y), {"robust_accuracy": _accuracy(logits, y)}


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == y).float().mean()


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return core.cross_entropy(logits.float(), y)  # autocast gives bfloat16 logits


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p || softmax q), (B,)."""
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1)


# --- fit ----------------------------------------------------------------------------------------------------------------------------------


def fit(model: nn.Module, step: Step, data, *, epochs: int, batch_size: int = 128, lr: float | None = None, optimizer: str = "sgd",
        schedule: str = "onecycle", milestones: Sequence[float] = (0.5, 0.75), weight_decay: float = 5e-4, augment: Callable | None = None,
        seed: int = 0, evaluate: Callable[[nn.Module], dict] | None = None, guard: str | None = None, train_modules: Sequence[str] | None = None,
        amp: bool | None = None, channels_last: bool | None = None, device: str | torch.device | None = None,
        checkpoint: str | Path | None = None, save_every: float = 60.0, progress: bool = True) -> list[dict]:
    """Train `model` in place, leave it on the device in eval mode, and return one row an epoch: epoch (from 1), loss and the step's metrics as
    means over images, what `evaluate(model)` returned, lr, seconds and images_per_second of the training alone.

    data: a Dataset, a pair (x, y) of tensors (images uint8, or floats in [0, 1]), or a function of a generator that returns such a pair (then made
    only when something is to be trained) or, called anew for every epoch, a sized iterable of batches (x, y). augment: see `advlab.data.batches`.
    lr: the greatest, by default 0.1 for "sgd" (Nesterov momentum 0.9) and 1e-3 for "adam". schedule: stepped every batch; "milestones" multiplies lr
    by 0.1 at these shares of the run. train_modules: names of the submodules to train, all else being frozen meanwhile; by default every parameter
    that requires a gradient. A module whose parameters are all frozen stays in eval mode. guard: a metric of the row; when it falls below half its
    best, the epoch is undone, training stops with a warning, and the row says collapsed. amp: whether bfloat16 autocast may be used, as it then is
    where it is fast (`fast_bfloat16`); by default not, as steps that attack or map gradients would differentiate in bfloat16 too.
    channels_last: by default on, except on MPS.

    checkpoint: a file saved after every epoch and every save_every seconds; the same call finds it and resumes. ValueError for a bad setting or empty
    data, FloatingPointError for a loss that is not finite, OSError when saving fails; in each case, as after Ctrl-C, the last checkpoint stays."""
    settings = {k: v for k, v in locals().items() if k not in RUNTIME}
    core.check_steps(epochs=epochs, batch_size=batch_size)
    rank, number = parallel.processes()
    where, layout = _place(model, device, channels_last)
    parallel.alike(model)
    begin, n_steps = _source(data, batch_size, augment, where)
    amp = bool(amp) and fast_bfloat16(where)
    checkpoint, key = checkpoint and Path(checkpoint), None
    if checkpoint:
        shapes = [[name, *p.shape, p.requires_grad] for name, p in model.named_parameters()]
        key = fingerprint({"code": CODE, "model": shapes, **describe(settings)})
    run = {"epoch": 0, "step": 0, "seconds": 0.0, "totals": {}, "history": [], "good": None, "stopped": False}
    from tqdm.auto import tqdm

    with _own_rng(where), _training(model, train_modules) as parameters:
        opt, scheduler = _optimizer(parameters, optimizer, lr, weight_decay, schedule, milestones, epochs * n_steps)
        parts = {"model": model, "optimizer": opt, "scheduler": scheduler}
        if saved := parallel.first(trusted(partial(unseal, checkpoint, key), checkpoint) if checkpoint and not rank else None):
            run = saved["run"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        saved_at = time.monotonic()

        def save(every: float = 0.0) -> None:
            nonlocal saved_at
            if checkpoint and not rank and time.monotonic() - saved_at >= every:
                _check_finite(run, model)
                write(checkpoint, seal({"key": key, "run": run} | {name: part.state_dict() for name, part in parts.items()}))
                saved_at = time.monotonic()

        bar = tqdm(total=epochs * n_steps, initial=run["epoch"] * n_steps + run["step"], unit="step", disable=rank > 0 or not progress)
        try:
            while run["epoch"] < epochs and not run["stopped"]:
                start = time.perf_counter() - run["seconds"]
                for i, (x, y) in enumerate(begin(_reseed(torch.device("cpu"), seed, run["epoch"], "data"))):
                    if i < run["step"]:
                        continue  # a resumed epoch: drawn and dropped, so that the rest is drawn as before
                    n, (own, share) = len(y), parallel.part(len(y))
                    x, y = x[own].to(where, memory_format=layout if x.ndim == 4 else torch.preserve_format), y[own].to(where)
                    generator = _reseed(where, seed, run["epoch"], i, *[rank] * (rank > 0))
                    # no cache: in some releases weights cast under no_grad serve the training pass too, and get no gradient (pytorch issue 112583)
                    with torch.autocast(where.type, torch.bfloat16, enabled=amp, cache_enabled=False):
                        loss, metrics = step(model, x, y, generator)
                    opt.zero_grad()
                    loss.backward()
                    values = {"loss": loss, **metrics}
                    if number > 1:
                        values = parallel.average(model, parameters, values, share)
                    opt.step()
                    run["lr"] = scheduler.get_last_lr()[0]
                    scheduler.step()
                    _add(run["totals"], n, {"images": 1, **values}, where)
                    run["step"], run["seconds"] = i + 1, time.perf_counter() - start
                    if where.type == "cpu" or i % 20 == 19:  # reading a number waits for the GPU
                        bar.set_postfix(epoch=run["epoch"] + 1, loss=f"{_check_finite(run):.4f}", refresh=False)
                    bar.update()
                    save(every=save_every)
                _check_finite(run, model)
                run["seconds"] = time.perf_counter() - start
                _reseed(where, seed, run["epoch"], "evaluate")
                with evaluating(model), torch.no_grad():
                    measured = parallel.first({k: float(v) for k, v in evaluate(model).items()} if evaluate and not rank else {})
                _close_epoch(run, model, measured, guard)
                save()
        except KeyboardInterrupt:
            kept = f"the same call resumes from {checkpoint}" if checkpoint and checkpoint.exists() else "no checkpoint was kept"
            raise KeyboardInterrupt(f"training stopped in epoch {run['epoch'] + 1} of {epochs}: {kept}") from None
        finally:
            bar.close()
    return run["history"]


def _place(model, name, channels_last) -> tuple[torch.device, torch.memory_format]:
    where = device(name)
    on = where.type != "mps" if channels_last is None else channels_last
    layout = torch.channels_last if on else torch.contiguous_format
    model.to(where, memory_format=layout)
    return where, layout


def _source(data, batch_size, augment, where) -> tuple[Callable[[torch.Generator], Iterable], int]:
    """A function from a generator to one epoch's batches, and their number."""
    made = data(torch.Generator().manual_seed(0)) if callable(data) else data
    if callable(data) and not isinstance(made, tuple):
        if augment is not None:
            raise ValueError("augment works on tensors; where data is a function of a generator, augment inside it")
        begin, n = data, len(made)
    else:
        x, y = (made.x, made.y) if hasattr(made, "x") else made
        if len(x) != len(y):
            raise ValueError(f"data has {len(x)} images and {len(y)} labels; give one label for each image")
        n = math.ceil(len(x) / batch_size)

        def begin(generator: torch.Generator) -> Iterable:
            return batches(x, y, batch_size, shuffle=True, generator=generator, augment=augment, device=where)
    if not n:
        raise ValueError("the training data is empty; pass at least one image")
    return begin, n


def _optimizer(parameters, optimizer, lr, weight_decay, schedule, milestones, total):
    core.check_choice("optimizer", optimizer, OPTIMIZERS)
    core.check_choice("schedule", schedule, SCHEDULES)
    lr = {"sgd": 0.1, "adam": 1e-3}[optimizer] if lr is None else lr
    if not (0 < lr < math.inf and 0 <= weight_decay < math.inf):
        raise ValueError(f"lr must be above 0 and weight_decay not negative, both finite; got {lr!r} and {weight_decay!r}")
    if not all(0 < m < 1 for m in milestones):
        raise ValueError(f"milestones are shares of the run, between 0 and 1; got {tuple(milestones)}")
    options = {"lr": lr, "weight_decay": weight_decay, "fused": True}  # one kernel for all tensors: HGD's quick training step takes 0.82 of the time
    opt = torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **options) if optimizer == "sgd" else torch.optim.Adam(parameters, **options)
    schedules = torch.optim.lr_scheduler
    if schedule == "onecycle":
        return opt, schedules.OneCycleLR(opt, lr, total_steps=total, cycle_momentum=False)
    if schedule == "cosine":
        return opt, schedules.CosineAnnealingLR(opt, total)
    return opt, schedules.MultiStepLR(opt, [round(m * total) for m in milestones] if schedule == "milestones" else [])


@contextmanager
def _training(model: nn.Module, names: Sequence[str] | None) -> Iterator[list[nn.Parameter]]:
    """The parameters to train; every other one is frozen inside, and modules whose parameters are all frozen are in eval mode."""
    try:
        parts = [model.get_submodule(name) for name in ([""] if names is None else names)]
    except AttributeError as error:
        raise ValueError(f"train_modules {list(names)} do not name submodules of the model: {error}") from None
    inside = {id(p) for part in parts for p in part.parameters()}
    wanted = [p for p in model.parameters() if p.requires_grad]
    trained, others = [p for p in wanted if id(p) in inside], [p for p in wanted if id(p) not in inside]
    if not trained:
        raise ValueError("the model has no parameter to train: call requires_grad_(True) on some, or name other train_modules")
    try:
        for p in others:
            p.requires_grad_(False)
        model.eval()
        for part in parts:
            part.train()
            for module in part.modules():
                if (own := list(module.parameters())) and not any(p.requires_grad for p in own):
                    module.eval()
        yield trained
    finally:
        for p in others:
            p.requires_grad_(True)
        for p in trained:
            p.grad = None
        model.eval()


@contextmanager
def _own_rng(where: torch.device) -> Iterator[None]:
    """The global generators may be seeded inside; afterwards they are as before."""
    gpu = where.type != "cpu"
    current = torch.cuda.device(where) if where.type == "cuda" else nullcontext()
    with current, torch.random.fork_rng([where] if gpu else [], device_type=where.type if gpu else "cuda"):
        yield


def _reseed(where: torch.device, *parts: int | str) -> torch.Generator:
    """Seed the global generators, of which dropout draws, by `parts`, and return one more on the device."""
    seed = int(digest(repr(parts).encode())[:15], 16)
    torch.default_generator.manual_seed(seed)
    if where.type != "cpu":
        torch.get_device_module(where).manual_seed(seed)
    return torch.Generator(where).manual_seed(seed + 1)


def _add(totals: dict, n: int, values: dict, where: torch.device) -> None:
    """Sums over images, kept on the device; in double precision where it has that."""
    dtype = torch.float32 if where.type == "mps" else torch.float64
    for name, value in values.items():
        value = value.detach() if isinstance(value, Tensor) else torch.full((), value, device=where)  # a copy would wait for the GPU
        totals[name] = totals.get(name, 0) + n * value.to(where, dtype)


def _check_finite(run: dict, model: nn.Module | None = None) -> float:
    loss = (run["totals"]["loss"] / run["totals"]["images"]).item() if run["totals"] else 0.0
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss} in epoch {run['epoch'] + 1}, by step {run['step']}; lower lr, or check the data for NaN")
    if model is not None and not torch.stack([p.isfinite().all() for p in model.parameters()]).all():  # one wait for the GPU
        bad = next(name for name, p in model.named_parameters() if not p.isfinite().all())
        raise FloatingPointError(f"{bad} is no longer finite in epoch {run['epoch'] + 1}, by step {run['step']}, under a finite loss: its "
                                 "gradient was not; look for a square root, logarithm or division of zero in the step")
    return loss


def _close_epoch(run: dict, model: nn.Module, measured: dict, guard: str | None) -> None:
    totals = {name: float(total) for name, total in run["totals"].items()}
    n, seconds = totals.pop("images"), run["seconds"]
    row = {"epoch": run["epoch"] + 1} | {k: v / n for k, v in totals.items()} | measured
    row |= {"lr": run["lr"], "seconds": seconds, "images_per_second": n / seconds}
    run["history"].append(row)
    run |= {"epoch": run["epoch"] + 1, "step": 0, "seconds": 0.0, "totals": {}}
    if guard is None:
        return
    if guard not in row:
        raise ValueError(f"guard {guard!r} is no metric of this training; choose one of {', '.join(row)}, or let evaluate return it")
    best = max(r[guard] for r in run["history"])
    row["collapsed"] = row[guard] < best / 2
    if row["collapsed"]:
        model.load_state_dict(run["good"])
        run["stopped"] = True
        warnings.warn(f"{guard} fell to {row[guard]:.3f} in epoch {row['epoch']} after {best:.3f} (collapse): the weights of epoch "
                      f"{row['epoch'] - 1} were put back and training stopped", stacklevel=3)
    else:
        run["good"] = {k: v.detach().clone() for k, v in model.state_dict().items()}


# --- the cache ----------------------------------------------------------------------------------------------------------------------------


def load_or_fit(name: str, model: nn.Module | Callable[[], nn.Module], step: Step, data, *, folder: str | Path | None = None,
                **settings) -> tuple[nn.Module, dict]:
    """The model trained by `fit(model, step, data, **settings)`, in eval mode, from data/checkpoints (or `folder`) where that was done before.

    model: a function that builds it, as partial(small_cnn, width=16), called with the weights drawn from `seed`; or a network, which is copied and
    whose present weights are then part of the configuration. The configuration is worked out from the arguments, defaults included, by
    `checkpoints.describe`. Its hash names <name>-<hash>.pt, a state dict, and beside it a .json with the digest, configuration and history; during
    training, a .partial from which a killed run resumes. Published weights, in data/weights, come before one's own. A file that is damaged or not of
    this configuration is reported by a warning, moved aside to *.bad and trained anew. Returns the model and a dict: name, path, config, sha256,
    history, seconds, device, threads, processes, versions, cached."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name must be made of letters, digits, '_', '.' and '-', as it becomes a file's; got {name!r}")
    bound = inspect.signature(fit).bind(model, step, data, **settings)
    bound.apply_defaults()
    given = bound.arguments
    config = {"code": CODE, "model": describe(model), **describe({k: v for k, v in given.items() if k not in RUNTIME})}
    stem, home = f"{name}-{fingerprint(config)[:12]}", Path(folder or paths.checkpoints())
    unfinished = home / f"{stem}.partial"
    if isinstance(model, nn.Module):
        model = copy.deepcopy(model)
    else:
        with seeded(given["seed"]):
            model = model()
    rank, number = parallel.processes()
    where, _ = _place(model, given["device"], given["channels_last"])
    for place in (paths.published(), home):  # the last of them is where new weights go
        weights, notes = place / f"{stem}.pt", place / f"{stem}.json"
        if info := parallel.first(None if rank else trusted(partial(load_weights, model, weights, notes, config), weights, notes)):
            parallel.alike(model)
            if not rank:
                unfinished.unlink(missing_ok=True)
            return model.eval(), info | {"path": str(weights), "cached": True}
    history = fit(model, step, data, checkpoint=unfinished, **settings)
    raw = to_bytes({k: v.cpu() for k, v in model.state_dict().items()})
    info = {"name": name, "config": config, "sha256": digest(raw), "history": history, "seconds": sum(row["seconds"] for row in history),
            "device": str(where), "threads": torch.get_num_threads(), "processes": number,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    if not rank:
        write(notes, json.dumps(info, indent=1).encode())
        write(weights, raw)  # last: without it the notes count for nothing
        unfinished.unlink(missing_ok=True)
    return model, parallel.first(info) | {"path": str(weights), "cached": False}
