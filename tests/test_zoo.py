"""The shared classifiers, and what advlab.gradients says of them."""

import pytest
import torch
from torch import nn

from advlab import data, gradients, zoo
from advlab.__main__ import main
from advlab.attacks import margin

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains one network at a time")


@pytest.fixture(scope="module")
def train():
    return data.load("skimage10", limit=256)


def test_a_shared_classifier_is_trained_once_and_read_back(train, monkeypatch, tmp_path):
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    for role in ("target", "adversarial"):
        first, record = zoo.shared(role, train, "smoke", progress=False)
        again, kept = zoo.shared(role, train, "smoke", progress=False)
        assert not record["cached"] and kept["cached"] and not again.training
        assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert len(list(tmp_path.rglob("*.pt"))) == 2
    _, record = zoo.shared("target", train.take(128), "smoke", progress=False)
    assert not record["cached"]  # other data, another classifier


@ON_CPU
def test_classifiers_trained_side_by_side_are_the_same_bits(train, monkeypatch, tmp_path):
    monkeypatch.setattr("advlab.series.cores", lambda: 2)
    found = {}
    for how in ("together", "alone"):
        monkeypatch.setenv("ADVLAB_HOME", str(tmp_path / how))
        if how == "together":
            zoo.side_by_side(["target", "partner"], train, "smoke", eps=0.02, seed=3)
        found[how] = [zoo.shared(role, train, "smoke", eps=0.02, seed=3, progress=False) for role in ("target", "partner")]
    for (a, kept), (b, record) in zip(found["together"], found["alone"], strict=True):
        assert kept["cached"] and not record["cached"] and kept["threads"] == record["threads"]
        assert all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@ON_CPU
def test_without_room_for_two_nothing_is_trained_side_by_side(train, monkeypatch, tmp_path):
    monkeypatch.setattr("advlab.series.cores", lambda: 1)
    monkeypatch.setenv("ADVLAB_HOME", str(tmp_path))
    zoo.side_by_side(["target", "partner"], train, "smoke", progress=True)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(("role", "profile"), [("villain", "quick"), ("target", "fast")])
def test_unknown_roles_and_profiles_are_refused(train, role, profile):
    with pytest.raises(ValueError, match=r"roles: target, adversarial"):
        zoo.shared(role, train, profile)


def test_digits_are_shifted_but_never_mirrored(train):
    one = torch.zeros(64, 1, 28, 28)
    one[..., 10:18, 10] = 1.0
    one[..., 10, 10:14] = 1.0  # points to the right
    grey = data.Dataset("mnist", "train", one, torch.zeros(64, dtype=torch.int64), ("a",), "")
    shifted = zoo.augmentation(grey)(one, generator=torch.Generator().manual_seed(0))
    columns = shifted.sum(2)[:, 0]
    assert (columns.argmax(1) < 13.5).all() and len(set(columns.argmax(1).tolist())) > 3  # the bar moves by up to 3 and stays left of the hook
    assert torch.equal(shifted.sum((1, 2, 3)), one.sum((1, 2, 3)))


def test_input_gradient_of_a_linear_model_is_its_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)).eval()
    x, y = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 0, 1, 1])
    w = model[1].weight.detach()
    expected = torch.stack([(w[1 - c] - w[c]).view(3, 2, 2) for c in y])
    torch.testing.assert_close(gradients.input_gradient(model, x, y, loss=margin), expected)
    one = gradients.input_gradient(model, x[:1], y[:1])  # no mean over the batch
    torch.testing.assert_close(gradients.input_gradient(model, x, y)[:1], one)


def test_magnitude_and_own_scale_by_hand():
    g = torch.tensor([[[[3.0, 0.0]], [[4.0, 1.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    maps = gradients.magnitude(g)
    assert torch.equal(maps, torch.tensor([[[5.0, 1.0]], [[0.0, 0.0]]]))
    torch.testing.assert_close(gradients.own_scale(maps), torch.tensor([[[1.0, 0.2]], [[0.0, 0.0]]]))


def test_training_on_a_damaged_archive_is_refused_in_words(tmp_path, monkeypatch, capsys):
    (tmp_path / "mnist.npz").write_text("no archive")
    monkeypatch.setenv("ADVLAB_DATA", str(tmp_path))
    assert main(["train", "--dataset", "mnist", "--profile", "smoke"]) == 1
    assert "mnist.npz is damaged or no .npz archive" in capsys.readouterr().err
