"""Two processes that torchrun starts on the CPU against one: the same gradients, one set of files, and no survivor of a process that dies."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from advlab import data, parallel, zoo
from advlab.__main__ import main
from advlab.attacks import bim
from advlab.data import random_flip
from advlab.models import seeded
from advlab.training import evaluating, fast_fgsm, fit, load_or_fit, pgd_accuracy, standard

EPS = 8 / 255


def make_data(n: int):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (n,), generator=g)
    return (torch.rand(n, 1, 8, 8, generator=g) * 0.6 + 0.3 * y.view(-1, 1, 1, 1)), y


def build(norm: bool = False) -> nn.Sequential:
    middle = [nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2)] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), *middle, nn.Conv2d(6, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))


def both_passes(model, x, y, generator):
    """As TRADES, but without a random start: an attack with frozen parameters, then two forward passes that share their gradient."""
    with evaluating(model):
        x_adv = bim(model, x, y, eps=EPS, steps=3)
    clean, robust = model(x), model(x_adv)
    loss = F.cross_entropy(clean, y) + F.kl_div(robust.log_softmax(1), clean.softmax(1), reduction="batchmean")
    return loss, {"accuracy": (robust.argmax(1) == y).float().mean()}


def mortal(model, x, y, generator):
    """fast_fgsm, in whose seventh step the last process is killed where the test says so."""
    mortal.calls += 1
    if mortal.calls == 7 and os.environ.get("RANK") == os.environ.get("KILL", "none"):
        os.kill(os.getpid(), signal.SIGKILL)
    return fast_fgsm(model, x, y, generator, eps=EPS)


mortal.calls = 0
# (step, images, settings): batches of 8 with a rest of 5, of 1, of which one process gets none, and batch norm on one batch
CASES = {"linear": (standard, 37, {"augment": random_flip}), "attacked": (both_passes, 41, {}), "norm": (standard, 8, {"epochs": 1})}
SETTINGS = {"epochs": 2, "batch_size": 8, "lr": 0.05, "schedule": "constant", "device": "cpu", "progress": False}


def recorded(case: str) -> dict:
    """Every step's gradient as the optimiser sees it, and weights and history at the end."""
    (step, n, settings), steps = CASES[case], []
    with seeded(parallel.processes()[0]):  # each process starts from other weights, and must be given the first one's
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)) if case == "linear" else build(case == "norm")
    parameters = list(model.parameters())
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(torch.cat([p.grad.flatten() for p in parameters])))
    history = fit(model, step, make_data(n), **SETTINGS | settings)
    hook.remove()
    rows = [{key: row[key] for key in ("epoch", "loss", "accuracy", "lr")} for row in history]
    return {"gradients": torch.stack(steps), "weights": model.state_dict(), "history": rows}


def kept(folder: Path) -> tuple[nn.Module, dict]:
    """A training with all that a training can have, through the cache."""
    x, y = make_data(45)
    watch = partial(pgd_accuracy, x=x[:8], y=y[:8], eps=EPS)
    return load_or_fit("kept", partial(build, norm=True), mortal, (x, y), folder=folder, save_every=0.0, optimizer="adam", evaluate=watch,
                       guard="pgd_accuracy", augment=random_flip, **SETTINGS | {"lr": 1e-3})


def worker(folder: Path) -> None:
    rank, out = parallel.processes()[0], {} if "KILL" in os.environ else {case: recorded(case) for case in CASES}
    model, info = kept(folder)
    again, found = kept(folder)
    infos = json.loads(json.dumps({"info": info, "found": found}))
    torch.save(out | infos | {"kept": model.state_dict(), "again": again.state_dict()}, folder / f"rank{rank}")


def launch(*arguments, number: int = 2, **environment) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes saw, and the folder that they wrote."""
    folder = tmp_path_factory.mktemp("pair")
    done = launch("test_parallel", folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}", weights_only=True) for rank in range(2)], folder


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear", "attacked"])
def test_two_processes_descend_the_gradients_of_one(pair, case):
    (first, second), one = (saved[case] for saved in pair[0]), recorded(case)
    assert len(one["gradients"]) == 2 * -(-CASES[case][1] // 8) and torch.equal(first["gradients"], second["gradients"])
    assert same(first["weights"], second["weights"]) and first["history"] == second["history"]
    torch.testing.assert_close(first["gradients"], one["gradients"], atol=1e-5, rtol=0)
    torch.testing.assert_close(first["weights"], one["weights"], atol=1e-5, rtol=0)
    for got, expected in zip(first["history"], one["history"], strict=True):
        assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_running_statistics_are_means_over_the_processes(pair):
    """The mean of half batches' means is that of the batch; variances are those within the halves."""
    (first, second), one = (saved["norm"]["weights"] for saved in pair[0]), recorded("norm")["weights"]
    assert same(first, second) and first["1.num_batches_tracked"] == 1
    torch.testing.assert_close(first["1.running_mean"], one["1.running_mean"], atol=1e-6, rtol=0)
    assert (first["1.running_var"] != one["1.running_var"]).any()


@pytest.mark.slow
def test_the_cache_holds_one_file_that_every_process_finds(pair, tmp_path):
    (first, second), folder = pair
    assert same(first["kept"], second["kept"]) and same(first["kept"], first["again"]) and same(second["again"], first["again"])
    assert first["info"] == second["info"] and not first["info"]["cached"] and first["found"]["cached"] and second["found"]["cached"]
    assert first["info"]["processes"] == 2
    model, info = kept(folder)
    assert info["cached"] and same(model.state_dict(), first["kept"])
    assert sorted(p.suffix for p in folder.glob("kept-*")) == [".json", ".pt"]
    assert Path(kept(tmp_path)[1]["path"]).name == Path(info["path"]).name  # one process calls it the same


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_one_killed_process_ends_all_and_the_same_command_resumes(pair, tmp_path):
    done = launch("test_parallel", tmp_path, KILL="1")
    assert done.returncode and "SIGKILL" in done.stderr and "rank      : 1" in done.stderr
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    done = launch("test_parallel", tmp_path, KILL="nobody")
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "rank1", weights_only=True)
    assert not saved["info"]["cached"] and same(saved["kept"], pair[0][0]["kept"]) and not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_the_command_under_torchrun_fills_the_cache_of_the_notebooks(tmp_path, monkeypatch):
    done = launch("advlab", "train", "target", "--profile", "smoke", "-p", "limit=130", ADVLAB_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    _, record = zoo.shared("target", data.load("skimage10", limit=130), "smoke")
    assert record["cached"] and record["processes"] == 2 and done.stdout.split() == ["target", record["path"]]


def test_the_command_in_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    arguments = ["train", "target", "partner", "--profile", "smoke", "-p", "limit=130", "-p", "seed=3"]
    assert main(arguments) == 0 and len(list(tmp_path.rglob("*.pt"))) == 2
    assert zoo.shared("target", data.load("skimage10", limit=130), "smoke", seed=3)[1]["path"] in capsys.readouterr().out
    assert main(["train", "villain"]) == 1 and "unknown role 'villain'; choose from target, adversarial" in capsys.readouterr().err
    assert main(["train", "--profile", "fast"]) == 1 and "unknown profile 'fast'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_parts_make_up_the_batch(number, n, monkeypatch):
    parts = []
    for rank in range(number):
        monkeypatch.setattr(parallel, "processes", lambda rank=rank: (rank, number))
        parts.append(parallel.part(n))
    assert all(len(range(n)[own]) for own, _ in parts) and sum(share for _, share in parts) == pytest.approx(1)
    assert sorted(i for own, share in parts if share for i in range(n)[own]) == list(range(n))


if __name__ == "__main__":
    import test_parallel  # whose functions have the same names in the cache as under pytest

    test_parallel.worker(Path(sys.argv[1]))
