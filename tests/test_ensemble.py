"""The per-image worst case and AutoAttack: stages run only on what still stands, and never do worse than their parts."""

from functools import partial

import pytest
import torch
from torch import nn

from advlab.attacks import apgd, core, dlr, fgsm, pgd
from advlab.attacks.ensemble import apgd_targets, autoattack, fmn_targets, predict, strongest


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 48), nn.ReLU(), nn.Linear(48, 6)).eval()


@pytest.fixture(scope="module")
def batch(net):
    x = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    y[:2] = (y[:2] + 1) % 6  # two images are wrong from the start
    return x, y


def stands(net, x, y):
    return net(x).argmax(1) == y


def test_each_attack_sees_only_what_the_ones_before_left(net, batch):
    x, y = batch
    seen, trace = [], []

    def spy(name, attack):
        def call(model, x, y):
            seen.append((name, len(x)))
            return attack(model, x, y)
        return call

    attacks = {"weak": spy("weak", partial(fgsm, eps=0.02)), "strong": spy("strong", partial(pgd, eps=0.05)), "idle": spy("idle", lambda m, x, y: x)}
    x_adv = strongest(net, x, y, attacks=attacks, trace=trace)
    weak = int((~stands(net, fgsm(net, x, y, eps=0.02), y))[2:].sum())
    assert seen[:2] == [("weak", 22), ("strong", 22 - weak)] and trace[0] == ("weak", 22, weak)
    assert trace[-1][2] == 0 and int(stands(net, x_adv, y).sum()) == 22 - sum(fell for _, _, fell in trace)
    assert torch.equal(x_adv[:2], x[:2])  # wrong already: unchanged


def test_images_that_stand_come_back_unchanged_and_no_attack_is_an_error(net, batch):
    x, y = batch
    assert torch.equal(strongest(net, x, y, attacks={"none": partial(pgd, eps=0.0)}), x)
    with pytest.raises(ValueError, match="no attack was given"):
        strongest(net, x, y, attacks={})


@pytest.mark.parametrize("norm", core.NORMS)
def test_autoattack_is_at_least_as_strong_as_each_of_its_stages(net, batch, norm):
    x, y = batch
    eps, trace = (0.03 if norm == "linf" else 0.15), []
    x_adv = autoattack(net, x, y, eps=eps, norm=norm, steps=20, queries=50, trace=trace)
    delta = (x_adv - x).flatten(1)
    assert (delta.abs().amax() if norm == "linf" else delta.norm(dim=1).max()) <= eps + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    left = int(stands(net, x_adv, y).sum())
    for stage in (partial(apgd, steps=20), partial(apgd, steps=20, loss=dlr), partial(apgd_targets, steps=20), partial(pgd, steps=20)):
        assert left <= int(stands(net, stage(net, x, y, eps=eps, norm=norm), y).sum())
    assert [name for name, *_ in trace] == ["apgd-ce", "apgd-t", "fmn", "square"][: len(trace)]
    assert 0 < left < 22  # neither hopeless nor trivial at this budget


def test_autoattack_leaves_nothing_behind_and_repeats_itself(net, batch):
    x, y = batch
    state = torch.get_rng_state()
    run = partial(autoattack, net, x, y, eps=0.03, steps=10, queries=20)
    assert torch.equal(run(), run())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_targeted_stage_tries_one_class_after_another():
    """Class 1 is the likeliest wrong one and cannot be reached, class 2 just can, where all four pixels rise by nearly 0.1."""
    layer = nn.Linear(4, 5)
    layer.weight.data.zero_()
    layer.weight.data[2] = 3.0
    layer.bias.data = torch.tensor([0.0, -0.1, -1.0 - 3 * 4 * 0.5, -20.0, -20.0])
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    flat = nn.Sequential(nn.Flatten(), layer).eval()
    for eps in (0.1, torch.tensor([0.1, 0.1, 0.1])):
        assert [int(stands(flat, apgd_targets(flat, x, y, eps=eps, steps=20, targets=k), y).sum()) for k in (1, 2)] == [3, 0]
    assert stands(flat, apgd_targets(flat, x, y, eps=torch.tensor([0.1, 0.05, 0.1]), steps=20), y).tolist() == [False, True, False]


def test_results_have_no_graph_and_a_model_in_training_mode_is_refused_before_its_buffers_move(net, batch):
    x, y = batch[0].clone().requires_grad_(), batch[1]
    whole = [partial(attack, eps=0.03) for attack in (partial(autoattack, steps=2, queries=2), apgd_targets, fmn_targets)]
    for attack in (*whole, partial(strongest, attacks={"fgsm": partial(fgsm, eps=0.03)})):
        assert not attack(net, x, y).requires_grad
        live = nn.Sequential(nn.BatchNorm2d(3), net)
        with pytest.raises(ValueError, match="training mode"):
            attack(live, x, y)
        assert live[0].num_batches_tracked == 0


def test_two_classes_have_no_third_logit():
    x, flat = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)), nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    flat[1].weight.data, flat[1].bias.data = torch.tensor([[1.0] * 4, [-1.0] * 4]), torch.tensor([-2.0, 2.0])
    y = flat(x).argmax(1)
    assert not stands(flat, autoattack(flat, x, y, eps=1.0, version="rand", steps=10, samples=2), y).any()


def test_the_random_version_breaks_a_noisy_model(net, batch):
    x, y = batch
    generator = torch.Generator().manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, v):
            return self.net(v + 0.05 * core.gaussian(v, generator))

    x_adv = autoattack(Noisy(), x, y, eps=0.2, version="rand", steps=10, samples=5)
    assert stands(net, x_adv, y).float().mean() < 0.2


@pytest.mark.parametrize(("options", "words"), [({"version": "fast"}, "unknown version"), ({"targeted": True}, "untargeted"),
                                                ({"eps": torch.full((24,), 0.1)}, "one eps"), ({"norm": "l1"}, "unknown norm")])
def test_bad_options_are_refused(net, batch, options, words):
    with pytest.raises(ValueError, match=words):
        autoattack(net, *batch, **{"eps": 0.1, "steps": 2, "queries": 2, **options})


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_attacked_by_the_margin(classes, batch):
    torch.manual_seed(1)
    small = nn.Sequential(nn.Flatten(), nn.Linear(48, classes)).eval()
    x = batch[0]
    y = small(x).argmax(1)
    assert not stands(small, autoattack(small, x, y, eps=0.5, steps=10, queries=20), y).any()


def test_predicting_in_parts_is_predicting_at_once(net, batch):
    torch.testing.assert_close(predict(net, batch[0], 7), net(batch[0]).detach())
