"""Training: the steps against values worked out by hand, resuming bit for bit, and a cache that believes no file it has not checked."""

import json
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advlab import paths, training
from advlab.checkpoints import describe, digest, from_bytes, to_bytes, write
from advlab.data import random_flip
from advlab.models import Normalize, seeded
from advlab.training import fast_fgsm, fit, load_or_fit, pgd_accuracy, pgd_at, standard, trades

EPS = 8 / 255


def make_data(n: int = 40, seed: int = 0):
    """Noise (n, 1, 8, 8), brighter in the upper half for class 1."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=g)
    x = torch.randint(0, 120, (n, 1, 8, 8), generator=g)
    x[:, :, :4] += 100 * y.view(-1, 1, 1, 1)
    return x.to(torch.uint8), y


def build(width: int = 4) -> nn.Sequential:
    body = [nn.Conv2d(1, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(Normalize(), *body, nn.Linear(9 * width, 2))


def network(seed: int = 0) -> nn.Sequential:
    with seeded(seed):
        return build()


def batch(n: int = 8):
    x, y = make_data(n)
    return x / 255, y


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def timeless(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in history]


QUICK = {"epochs": 2, "batch_size": 16, "progress": False, "device": "cpu"}
EVENTS = {"countdown": -1, "saves": -1, "error": RuntimeError("stopped"), "forget": False}


def interrupted_step(model, x, y, generator):
    """fast_fgsm, which a test can stop at a chosen step, or make forget what it learned."""
    EVENTS["countdown"] -= 1
    if EVENTS["countdown"] == 0:
        raise EVENTS["error"]
    loss, metrics = fast_fgsm(model, x, y, generator, eps=EPS)
    return (-30 * loss if EVENTS["forget"] else loss), metrics


def nan_step(model, x, y, generator):
    EVENTS["countdown"] -= 1
    loss, metrics = standard(model, x, y, generator)
    return loss * (math.nan if EVENTS["countdown"] == 0 else 1), metrics


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads only cost time on networks this small
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def events(monkeypatch):
    for key, value in EVENTS.items():
        monkeypatch.setitem(EVENTS, key, value)


# --- steps --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [standard, partial(pgd_at, eps=0.0), partial(fast_fgsm, eps=0.0), partial(trades, eps=0.0),
                                  partial(trades, eps=EPS, beta=0)])
def test_without_a_budget_every_step_is_cross_entropy(step):
    model, (x, y) = network().train(), batch()
    model[4].p = 0.0  # TRADES passes the batch twice, which dropout would make two things
    loss, metrics = step(model, x, y, torch.Generator().manual_seed(0))
    expected = F.cross_entropy(model(x), y)
    torch.testing.assert_close(loss, expected)
    assert all(0 <= value <= 1 for value in metrics.values())


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_trades_by_hand(beta):
    """One pixel x = 0.5, logits (0, 4x): KL is greatest at an end of the interval, so that the loss is one of two numbers."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    model[1].weight.data = torch.tensor([[0.0], [4.0]])
    loss, _ = trades(model, torch.full((1, 1, 1, 1), 0.5), torch.tensor([1]), torch.Generator().manual_seed(0), eps=0.1, beta=beta, steps=20)
    p = [1 / (1 + math.exp(4 * x)) for x in (0.4, 0.5, 0.6)]
    kl = [p[1] * math.log(p[1] / q) + (1 - p[1]) * math.log((1 - p[1]) / (1 - q)) for q in (p[0], p[2])]
    assert any(math.isclose(loss.item(), -math.log(1 - p[1]) + beta * k, rel_tol=1e-5) for k in kl)


@pytest.mark.parametrize(("step", "frozen", "live"), [(partial(pgd_at, eps=EPS, steps=3), 3, 1), (partial(fast_fgsm, eps=EPS), 1, 1),
                                                     (partial(trades, eps=EPS, steps=3), 3, 2)])
def test_attacks_see_frozen_parameters_and_running_statistics(step, frozen, live):
    """Forward passes are counted by the modes and the parameters that they see; batch norm is updated by the training passes alone."""
    model, (x, y), seen = network().train(), batch(), []
    model[0].eval()
    model.register_forward_hook(lambda m, _, out: seen.append((m.training, m[1].weight.requires_grad, out.requires_grad)))
    loss, _ = step(model, x, y, torch.Generator().manual_seed(0))
    assert all(p.grad is None for p in model.parameters())
    assert (seen.count((False, False, True)), seen.count((True, True, True))) == (frozen, live)
    assert model[2].num_batches_tracked == live
    assert model.training and not model[0].training
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_adversarial_steps_descend_the_loss_of_their_own_images():
    """A linear model, whose worst image in the ball is known: x moved by eps against the sign of the weights' difference."""
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), batch()
    x = x.clamp(0.1, 0.9)
    with seeded(1):
        nn.init.normal_(model[1].weight)
    towards = (model[1].weight[1] - model[1].weight[0]).detach().sign().view(1, 1, 8, 8)
    worst = x + EPS * towards * (1 - 2 * y).view(-1, 1, 1, 1)
    loss, _ = pgd_at(model, x, y, torch.Generator().manual_seed(0), eps=EPS, steps=10)
    torch.testing.assert_close(loss, F.cross_entropy(model(worst), y))


# --- fit ----------------------------------------------------------------------------------------------------------------------------------


def test_fit_learns_and_leaves_a_clean_model(capsys):
    model, (x, y) = network(), make_data(200)
    held = partial(pgd_accuracy, x=x[:40], y=y[:40], eps=EPS)
    rows = fit(model, standard, (x, y), epochs=8, batch_size=32, evaluate=held, augment=random_flip, device="cpu", progress=False)
    assert capsys.readouterr() == ("", "")
    assert [row["epoch"] for row in rows] == list(range(1, 9)) and rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[-1]["accuracy"] > 0.9 and rows[-1]["pgd_accuracy"] > 0.8 and rows[0]["lr"] > rows[-1]["lr"] > 0 and rows[0]["images_per_second"] > 0
    assert not any(m.training for m in model.modules()) and all(p.grad is None and p.requires_grad for p in model.parameters())
    fit(model, standard, (x, y), **QUICK | {"progress": True})
    assert "loss" in capsys.readouterr().err


def test_fit_averages_over_images_not_batches():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x, y = make_data(20)  # batches of 16 and 4
    rows = fit(model, standard, (x, y), epochs=1, batch_size=16, lr=1e-12, optimizer="adam", device="cpu", progress=False)
    assert rows[0]["loss"] == pytest.approx(F.cross_entropy(model(x / 255), y).item(), rel=1e-5)


def loader(generator):
    x, y = make_data(32)
    order = torch.randperm(32, generator=generator)
    return [(x[i] / 255, y[i]) for i in order.split(16)]


def test_data_may_be_a_function_of_a_generator_or_a_dataset():
    a, b = network(), network()
    assert timeless(fit(a, standard, loader, **QUICK)) == timeless(fit(b, standard, make_data(32), **QUICK))
    assert same(a.state_dict(), b.state_dict())


def test_global_generator_is_neither_used_nor_touched(tmp_path):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before, model = torch.get_rng_state(), network()
        fit(model, interrupted_step, make_data(), augment=random_flip, **QUICK)
        cached, _ = load_or_fit("tiny", build, interrupted_step, make_data(), folder=tmp_path / str(seed), **QUICK)
        assert torch.equal(before, torch.get_rng_state())
        states += [(model.state_dict(), cached.state_dict())]
    assert all(same(a, b) for a, b in zip(*states))


@pytest.mark.parametrize("by_name", [True, False])
def test_frozen_parts_stay_in_eval_mode_and_bit_identical(by_name):
    """A restorer before a classifier, which is frozen by its parameters, or because only the restorer is named."""
    restorer, classifier, seen = nn.Conv2d(1, 1, 3, padding=1), network(), []
    classifier.requires_grad_(by_name)
    model = nn.Sequential(restorer, classifier).train()
    classifier.register_forward_hook(lambda m, *_: seen.append(any(k.training for k in m.modules()) or any(p.requires_grad for p in m.parameters())))
    before, old = {k: v.clone() for k, v in classifier.state_dict().items()}, restorer.weight.clone()
    fit(model, standard, make_data(), train_modules=["0"] if by_name else None, **QUICK)
    assert len(seen) == 6 and not any(seen) and same(before, classifier.state_dict()) and not torch.equal(old, restorer.weight)
    assert all(p.requires_grad == by_name and p.grad is None for p in classifier.parameters())


def test_autocast_gives_every_parameter_a_gradient(monkeypatch):
    """A pass under no_grad must not leave cast weights behind that the training pass would use: TRADES makes one."""
    monkeypatch.setattr(training, "fast_bfloat16", lambda where: True)
    model = network()
    before = {k: v.clone() for k, v in model.named_parameters()}
    rows = fit(model, partial(trades, eps=EPS, steps=2), make_data(), amp=True, weight_decay=0.0, **QUICK)
    assert all(not torch.equal(before[k], p) and p.dtype == torch.float32 for k, p in model.named_parameters()) and math.isfinite(rows[-1]["loss"])


@pytest.mark.parametrize(("change", "message"), [
    ({"optimizer": "lion"}, "unknown optimizer 'lion'"), ({"schedule": "linear"}, "unknown schedule 'linear'"), ({"epochs": 0}, "epochs .* got 0"),
    ({"epochs": 1.5}, "epochs .* got 1.5"), ({"batch_size": 0}, "batch_size .* got 0"), ({"lr": -1.0}, "lr .* got -1.0"),
    ({"lr": math.nan}, "lr .* got nan"), ({"weight_decay": -0.1}, "weight_decay .* -0.1"), ({"milestones": (2,)}, "milestones .*2"),
    ({"train_modules": ["decoder"]}, "decoder"), ({"train_modules": []}, "no parameter to train"), ({"data": make_data(0)}, "empty"),
    ({"data": (make_data(4)[0], make_data(3)[1])}, "4 images and 3 labels"), ({"data": loader, "augment": random_flip}, "augment"),
    ({"guard": "pgd_accuracy"}, "guard 'pgd_accuracy'")])
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fit(network(), standard, **{"data": make_data(), **QUICK, **change})


def test_collapse_restores_the_epoch_before(tmp_path):
    """The step is made to ascend a multiple of its loss from epoch 4 on; the guard puts back the weights that three epochs alone give."""
    x, y = make_data(120)

    def measure(model):
        EVENTS["forget"] = measure.calls >= 3
        measure.calls += 1
        return pgd_accuracy(model, x=x[:40], y=y[:40], eps=EPS)

    kept = []
    settings = {"batch_size": 20, "schedule": "constant", "progress": False, "device": "cpu"}
    for epochs in (3, 9):
        measure.calls, EVENTS["forget"] = 1, False
        model = network()
        if epochs == 3:
            rows = fit(model, interrupted_step, (x[40:], y[40:]), epochs=3, evaluate=measure, guard="pgd_accuracy", **settings)
            assert not any(row["collapsed"] for row in rows) and rows[-1]["pgd_accuracy"] > 0.7
        else:
            with pytest.warns(UserWarning, match="epoch 3 were put back"):
                rows = fit(model, interrupted_step, (x[40:], y[40:]), epochs=9, evaluate=measure, guard="pgd_accuracy", **settings)
            assert [row["collapsed"] for row in rows] == [False] * 3 + [True]
        kept.append(model.state_dict())
    assert same(*kept)


# --- stopping and resuming ----------------------------------------------------------------------------------------------------------------

RESUMES = [{}, {"optimizer": "adam", "schedule": "cosine", "save_every": 0.0}, {"schedule": "milestones", "save_every": 0.0}]


@pytest.mark.parametrize("settings", RESUMES, ids=lambda s: s.get("schedule", "onecycle"))
@pytest.mark.parametrize("where", ["step", "before writing", "after writing"])
def test_stopped_anywhere_resumes_bit_for_bit(settings, where, tmp_path, monkeypatch):
    """2 epochs of 3 steps, stopped at every step, or around every save; the rerun ends where the undisturbed run ended."""
    settings = QUICK | settings | {"augment": random_flip}
    whole = network()
    history = fit(whole, interrupted_step, make_data(), **settings)
    write, stops = training.write, 0

    def stopping_write(path, raw):
        EVENTS["saves"] -= 1
        if EVENTS["saves"] == 0 and where == "before writing":
            raise EVENTS["error"]
        write(path, raw)
        if EVENTS["saves"] == 0:
            raise EVENTS["error"]

    monkeypatch.setattr(training, "write", stopping_write)
    for k in range(1, 9):
        checkpoint, model = tmp_path / f"{k}.partial", network()
        EVENTS["countdown" if where == "step" else "saves"] = k
        try:
            fit(model, interrupted_step, make_data(), checkpoint=checkpoint, **settings)
        except RuntimeError:
            stops += 1
        EVENTS["countdown"] = EVENTS["saves"] = -1
        model = network()
        rows = fit(model, interrupted_step, make_data(), checkpoint=checkpoint, **settings)
        assert same(whole.state_dict(), model.state_dict()) and timeless(rows) == timeless(history)
    assert stops == (6 if where == "step" else 8 if settings.get("save_every") == 0 else 2)


KILLING = """
import os, random, signal, sys, time, traceback
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)  # and no thread is started before the forks
torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # loads modules that each process would load by itself
from advlab.training import load_or_fit
from test_training import build, interrupted_step, make_data, QUICK

def train(folder, slow):
    torch.nn.modules.module.register_module_forward_hook(lambda *_: time.sleep(slow))
    try:
        load_or_fit("tiny", build, interrupted_step, make_data(), folder=folder, save_every=0.0, **QUICK | {{"epochs": 4}})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def child(folder, slow=0.0):
    pid = os.fork()
    if not pid:
        train(folder, slow)
    return pid

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def saved(folder):
    return folder.exists() and folder.stat().st_mtime_ns  # changes with every file that comes, goes or is renamed

whole, killed, shared = (Path({folder!r}) / name for name in ("whole", "killed", "shared"))
assert code(child(whole)) == 0
kills, draw = 0, random.Random(0)
while not list(killed.glob("*.pt")):
    before, pid = saved(killed), child(killed, slow=0.004)
    while saved(killed) == before:  # so that each gets further than the one before
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.15))
    os.kill(pid, signal.SIGKILL)
    kills += code(pid) == -signal.SIGKILL
both = [child(shared), child(shared)]
assert [code(pid) for pid in both] == [0, 0]
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kill_9_at_random_moments_and_two_at_once(tmp_path):
    """Processes killed and started again until one ends leave the same file as one left alone, and so do two that train the same at once."""
    script = KILLING.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2
    files = {folder: list((tmp_path / folder).glob("*.pt")) for folder in ("whole", "killed", "shared")}
    assert len({file.read_bytes() for (file,) in files.values()}) == 1
    assert not list(tmp_path.glob("*/*.bad"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_interruption_keeps_the_state_and_says_where(error, tmp_path):
    checkpoint = tmp_path / "run.partial"
    EVENTS.update(countdown=5, error=error())  # the second step of epoch 2
    with pytest.raises(error) as caught:
        fit(network(), interrupted_step, make_data(), checkpoint=checkpoint, **QUICK)
    assert error is not KeyboardInterrupt or (str(checkpoint) in str(caught.value) and "epoch 2 of 2" in str(caught.value))
    assert from_bytes(checkpoint.read_bytes()[:-32])["run"]["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["run.partial"]
    EVENTS.update(countdown=5)
    with pytest.raises(error) as caught:
        fit(network(), interrupted_step, make_data(), **QUICK)
    assert error is not KeyboardInterrupt or "no checkpoint" in str(caught.value)


def test_a_loss_that_is_not_finite_is_named_and_not_saved(tmp_path):
    checkpoint = tmp_path / "run.partial"
    EVENTS["countdown"] = 5
    with pytest.raises(FloatingPointError, match="nan in epoch 2, by step 2"):
        fit(network(), nan_step, make_data(), checkpoint=checkpoint, save_every=0.0, **QUICK)
    saved = from_bytes(checkpoint.read_bytes()[:-32])
    assert (saved["run"]["epoch"], saved["run"]["step"]) == (1, 1) and all(v.isfinite().all() for v in saved["model"].values())


def nan_gradient(model, x, y, generator):
    """A finite loss whose gradient is not, at a chosen step: the square root of 0."""
    EVENTS["countdown"] -= 1
    loss, metrics = standard(model, x, y, generator)
    return loss + ((model[-1].weight * 0).sum().abs().sqrt() if EVENTS["countdown"] == 0 else 0), metrics


def test_weights_that_are_not_finite_are_named_and_not_saved(tmp_path):
    EVENTS["countdown"] = 5
    with pytest.raises(FloatingPointError, match="6\\.weight is no longer finite in epoch 2, by step 2"):
        fit(network(), nan_gradient, make_data(), checkpoint=tmp_path / "run.partial", save_every=0.0, **QUICK)
    assert all(v.isfinite().all() for v in from_bytes((tmp_path / "run.partial").read_bytes()[:-32])["model"].values())
    EVENTS["countdown"] = 6  # the very last step
    with pytest.raises(FloatingPointError):
        load_or_fit("bad", build, nan_gradient, make_data(), folder=tmp_path, **QUICK)
    assert not list(tmp_path.glob("bad*.pt"))


def test_a_file_that_cannot_be_read_now_is_left_where_it_is(tmp_path, monkeypatch):
    load_or_fit("tiny", build, standard, make_data(), folder=tmp_path, **QUICK)
    before = sorted(tmp_path.iterdir())

    def busy(path):
        raise OSError(24, "Too many open files", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many"):
        patch.setattr(Path, "read_bytes", busy)
        load_or_fit("tiny", build, standard, make_data(), folder=tmp_path, **QUICK)
    assert sorted(tmp_path.iterdir()) == before and load_or_fit("tiny", build, standard, make_data(), folder=tmp_path, **QUICK)[1]["cached"]


def test_a_full_disk_is_reported_and_leaves_the_checkpoint(tmp_path, monkeypatch):
    """A limit on the size of files makes the second save fail half way, as a full disk would."""
    resource = pytest.importorskip("resource")
    checkpoint, limits, write = tmp_path / "run.partial", resource.getrlimit(resource.RLIMIT_FSIZE), training.write

    def filling_write(path, raw):
        EVENTS["saves"] -= 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if EVENTS["saves"] else 1000, limits[1]))
        try:
            write(path, raw)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(training, "write", filling_write)
    EVENTS["saves"] = 2
    with pytest.raises(OSError, match=r"could not save .* is intact.*run\.partial"):
        fit(network(), standard, make_data(), checkpoint=checkpoint, **QUICK)
    assert from_bytes(checkpoint.read_bytes()[:-32])["run"]["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["run.partial"]


def test_a_file_is_replaced_never_written_over(tmp_path):
    """Who has the old file open still reads all of it."""
    path = tmp_path / "new" / "file"
    write(path, b"old")
    with open(path, "rb") as file:
        write(path, b"newer")
        assert file.read() == b"old" and path.read_bytes() == b"newer" and list(path.parent.iterdir()) == [path]


def test_writing_beside_another_process(tmp_path, monkeypatch):
    """The other's temporary file, seen in the folder, is renamed or removed before it is looked at; one of a process killed long ago goes."""
    path, glob = tmp_path / "file", Path.glob
    old, young = tmp_path / "file.1.tmp", tmp_path / "file.2.tmp"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / "file.0.tmp", *glob(folder, pattern)])
    write(path, b"kept")
    assert path.read_bytes() == b"kept" and sorted(tmp_path.iterdir()) == [path, young]


# --- the cache ----------------------------------------------------------------------------------------------------------------------------


def cached(folder, *, name="tiny", model=build, step=standard, data=None, **settings):
    return load_or_fit(name, model, step, make_data() if data is None else data, folder=folder, **QUICK | settings)


def test_the_second_call_loads_the_same_network(tmp_path):
    first, info = cached(tmp_path)
    with warnings.catch_warnings(action="error"):
        second, again = cached(tmp_path)
    assert (info.pop("cached"), again.pop("cached")) == (False, True) and info == again
    assert same(first.state_dict(), second.state_dict()) and not any(m.training for net in (first, second) for m in net.modules())
    assert len(info["history"]) == 2 and info["seconds"] > 0 and info["versions"]["torch"] == torch.__version__
    stem = Path(info["path"]).stem
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{stem}.json", f"{stem}.pt"] and stem.startswith("tiny-") and len(stem) == 17


def test_a_network_is_copied_and_its_weights_are_part_of_the_configuration(tmp_path):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained, _ = cached(tmp_path, model=model)
    assert same(before, model.state_dict()) and model.training and not same(before, trained.state_dict())
    assert cached(tmp_path, model=network())[1]["cached"] and not cached(tmp_path, model=network(1))[1]["cached"]
    assert same(trained.state_dict(), cached(tmp_path)[0].state_dict())  # built from the same seed


def test_published_weights_come_first_and_are_checked_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "published", lambda: tmp_path / "published")
    first, info = cached(tmp_path / "published")
    loaded, again = cached(tmp_path / "own")
    assert again["cached"] and again["path"] == info["path"] and same(first.state_dict(), loaded.state_dict()) and not (tmp_path / "own").exists()
    flip_a_bit(Path(info["path"]), None)
    with pytest.warns(UserWarning, match="damaged"):
        anew = cached(tmp_path / "own")[1]
    assert not anew["cached"] and Path(anew["path"]).parent == tmp_path / "own" and anew["sha256"] == info["sha256"]


CHANGES = [{"seed": 1}, {"lr": 0.05}, {"epochs": 1}, {"model": partial(build, width=5)}, {"data": make_data(41)}, {"augment": random_flip},
           {"step": partial(standard, label_smoothing=0.1)}, *({"step": partial(pgd_at, eps=EPS, steps=steps)} for steps in (1, 2)),
           {"evaluate": partial(pgd_accuracy, x=make_data()[0], y=make_data()[1], eps=EPS, steps=1)}, {"name": "other"}]


def test_every_change_has_its_own_file(tmp_path):
    paths = {cached(tmp_path, **change)[1]["path"] for change in [{}, *CHANGES]}
    assert len(paths) == len(CHANGES) + 1 == len(list(tmp_path.glob("*.pt")))


def truncate(weights, notes):
    weights.write_bytes(weights.read_bytes()[:-100])


def flip_a_bit(weights, notes):
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)


def replace_by_text(weights, notes):
    weights.write_text("no network")


def replace_by_foreign(weights, notes):
    _, info = cached(weights.parent / "elsewhere", seed=7)
    foreign = Path(info["path"])
    foreign.replace(weights)
    foreign.with_suffix(".json").replace(notes)


def reshape(weights, notes):
    """Notes and weights that agree with each other, but not with the model."""
    raw = to_bytes({k: v[:1] if v.ndim else v for k, v in from_bytes(weights.read_bytes()).items()})
    weights.write_bytes(raw)
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"sha256": digest(raw)}))


DAMAGES = [(truncate, "digest"), (flip_a_bit, "digest"), (replace_by_text, "digest"), (replace_by_foreign, "other settings"), (reshape, "do not fit"),
           (lambda weights, notes: notes.unlink(), "json is missing"), (lambda weights, notes: notes.write_text("[1]"), "is not used"),
           (lambda weights, notes: notes.write_text('{"config": '), "is not used")]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[d.__name__ if d.__name__ != "<lambda>" else f"notes {r}" for d, r in DAMAGES])
def test_a_file_that_is_not_right_is_reported_kept_and_trained_anew(damage, reason, tmp_path):
    good, info = cached(tmp_path)
    weights, sound = Path(info["path"]), Path(info["path"]).read_bytes()
    for suffix in (".bad", ".1.bad"):
        damage(weights, weights.with_suffix(".json"))
        bad = weights.read_bytes()
        with pytest.warns(UserWarning, match=reason) as caught:
            again, info = cached(tmp_path)
        assert str(weights) in str(caught[0].message) and not info["cached"] and same(good.state_dict(), again.state_dict())
        assert Path(f"{weights}{suffix}").read_bytes() == bad and weights.read_bytes() == sound
    assert cached(tmp_path)[1]["cached"]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, replace_by_text, None])
def test_a_damaged_or_foreign_resume_file_is_not_used(damage, tmp_path):
    checkpoint, whole, model = tmp_path / "run.partial", network(), network()
    history = fit(whole, interrupted_step, make_data(), **QUICK)
    fit(network(), standard if damage is None else interrupted_step, make_data(), checkpoint=checkpoint, **QUICK)
    if damage:
        damage(checkpoint, None)
    with pytest.warns(UserWarning, match="other settings" if damage is None else "digest"):
        rows = fit(model, interrupted_step, make_data(), checkpoint=checkpoint, **QUICK)
    assert timeless(rows) == timeless(history) and same(whole.state_dict(), model.state_dict()) and (tmp_path / "run.partial.bad").exists()


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_names_are_plain(name, tmp_path):
    with pytest.raises(ValueError, match="name must be"):
        cached(tmp_path, name=name)


def test_describe_tells_apart_what_trains_apart():
    eps = 0.1
    for value in (lambda model: eps, object(), torch.Generator().manual_seed, EVENTS.get):
        with pytest.raises(ValueError, match="cannot be described"):
            describe(value)
    frozen, wide = network(), network()
    frozen[1].weight.requires_grad_(False)
    wide[4].p = 0.2
    values = [network(), frozen, wide, network(1), standard, partial(standard, label_smoothing=0.2), partial(standard, label_smoothing=0.3),
              torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2), random_flip, interrupted_step, build]
    texts = [json.dumps(describe(value)) for value in values]
    assert len(set(texts)) == len(values) and texts[0] == json.dumps(describe(network().eval()))
    assert describe(standard) == {"function": "advlab.training.standard", "label_smoothing": 0.0}


def test_device_is_found_or_named():
    assert training.device("cpu") == torch.device("cpu") and training.device().type in ("cpu", "cuda", "mps")
