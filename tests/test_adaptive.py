"""Adaptive wrappers against gradients that can be worked out by hand."""

from functools import partial

import pytest
import torch
from torch import nn

from advlab.attacks import core
from advlab.attacks.adaptive import SoftMaxPool, SoftReLU, aware, bpda, eot, rejecting, smooth, soft_sign, undetected, unflagged
from advlab.attacks.core import cross_entropy, margin
from advlab.attacks.gradient import pgd
from advlab.models import segnet


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 4, 16), nn.ReLU(), nn.Linear(16, 5)).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 2, 4, 4, generator=generator), torch.randint(0, 5, (6,), generator=generator)


def quantise(x):
    return (x * 4).round() / 4


def test_bpda_has_the_forward_of_the_defence_and_the_gradient_of_its_stand_in(net, batch):
    x, y = batch
    at_quantised = core.gradient(net, quantise(x), y, cross_entropy)[2]
    logits, _, grad = core.gradient(bpda(quantise, net), x, y, cross_entropy)
    assert torch.equal(logits, net(quantise(x)).detach())
    assert torch.equal(grad, at_quantised)
    halved = core.gradient(bpda(quantise, net, backward=lambda v: v / 2), x, y, cross_entropy)[2]
    torch.testing.assert_close(halved, at_quantised / 2)


def test_bpda_breaks_a_quantiser_that_pgd_cannot_see(net, batch):
    x = batch[0]
    y = net(quantise(x)).argmax(1)
    defence = nn.Sequential(_Module(quantise), net)
    blind = defence(pgd(defence, x, y, eps=0.3, steps=20, random_init=False)).argmax(1)
    seen = defence(pgd(bpda(quantise, net), x, y, eps=0.3, steps=20)).argmax(1)
    assert torch.equal(blind, y)  # rounding has a zero gradient
    assert not torch.any(seen == y)


class _Module(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def test_bpda_refuses_a_stand_in_of_another_shape(net, batch):
    with pytest.raises(ValueError, match=r"\(6, 2, 4, 4\).*\(6, 2, 2, 2\)"):
        bpda(quantise, net, backward=lambda v: v[..., ::2, ::2])(batch[0])


class Draws(nn.Module):
    """A random defence with known draws: adds 0, 1, 2, ... to logit 0, image after image."""

    def forward(self, x):
        z = torch.zeros(len(x), 3)
        z[:, 0] = torch.arange(len(x), dtype=torch.float)
        return z + 0 * x.sum()


@pytest.mark.parametrize(("chunk", "draws"), [(None, [[0, 1, 2, 3], [4, 5, 6, 7]]), (5, [[0, 1, 2, 3], [4, 0, 1, 2]])])
def test_eot_means_over_exactly_its_draws_of_each_image(chunk, draws):
    x, drawn = torch.rand(2, 1, 2, 2), torch.tensor(draws, dtype=torch.float)  # in chunks, the third pass starts at 0 again
    assert torch.equal(eot(Draws(), 4, chunk=chunk)(x)[:, 0], drawn.mean(1))
    probabilities = eot(Draws(), 4, over="probabilities", chunk=chunk)(x).exp()
    torch.testing.assert_close(probabilities[:, 0], (drawn.exp() / (drawn.exp() + 2)).mean(1))


def test_eot_of_a_deterministic_model_is_that_model(net, batch):
    x, y = batch
    torch.testing.assert_close(eot(net, 3)(x), net(x))
    torch.testing.assert_close(eot(net, 3, over="probabilities")(x), net(x).log_softmax(1))
    one, three = (core.gradient(m, x, y, cross_entropy)[2] for m in (net, eot(net, 3, chunk=7)))
    torch.testing.assert_close(one, three)


def test_k_samples_cost_k_images_and_no_more(net, batch):
    seen = []
    net.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    eot(net, 7)(batch[0])
    assert sum(seen) == 7 * 6


def test_soft_sign_and_relu_keep_their_value_and_have_the_derivative_they_claim():
    v = torch.tensor([-0.3, 0.0, 0.2, 5.0], dtype=torch.float64, requires_grad=True)
    for soft, hard, slope in ((partial(soft_sign, temperature=0.5), torch.sign, (1 - (v / 0.5).tanh() ** 2) / 0.5),
                              (SoftReLU(0.5), torch.relu, (v / 0.5).sigmoid())):
        out = soft(v)
        assert torch.equal(out, hard(v))
        torch.testing.assert_close(torch.autograd.grad(out.sum(), v)[0], slope.detach())


def test_a_model_that_draws_once_a_pass_is_averaged_over_passes():
    class Once(nn.Module):
        def forward(self, v):
            drawn.append(torch.randn(()))
            return v.flatten(1)[:, :2] + drawn[-1]

    drawn, x = [], torch.rand(3, 1, 2, 2)
    apart = eot(Once(), 5, apart=True)(x)
    assert len(drawn) == 5
    torch.testing.assert_close(apart, x.flatten(1)[:, :2] + torch.stack(drawn).mean())
    drawn.clear()
    eot(Once(), 5, apart=True, chunk=2)(x)
    assert len(drawn) == 10  # two chunks for each of five


def test_smooth_replaces_a_relu_that_is_used_twice():
    relu = nn.ReLU()
    assert [type(m).__name__ for m in smooth(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu))] == ["Linear", "SoftReLU"] * 2


def test_soft_max_pool_keeps_its_value_and_spreads_its_gradient():
    v = torch.rand(2, 3, 4, 4, requires_grad=True)
    out = SoftMaxPool(nn.MaxPool2d(2), 0.5)(v)
    torch.testing.assert_close(out, nn.functional.max_pool2d(v, 2))
    grad = torch.autograd.grad(out.sum(), v)[0]
    assert (grad != 0).all()  # every pixel of a window takes part
    torch.testing.assert_close(grad.sum(), torch.tensor(float(out.numel())))  # the weights' own derivatives cancel in the sum


def test_smooth_reaches_a_pooling_that_hands_on_places():
    v = torch.rand(2, 3, 4, 4, requires_grad=True)
    twin = smooth(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, return_indices=True)))
    (out, places), (hard, there) = twin(v), nn.functional.max_pool2d(v, 2, return_indices=True)
    torch.testing.assert_close(out, hard)
    assert torch.equal(places, there) and (torch.autograd.grad(out.sum(), v)[0] != 0).all()
    assert sum(isinstance(m, SoftMaxPool) for m in smooth(segnet(3, 2, 4)).modules()) == 1  # which serves both stages


def test_smooth_shares_parameters_gives_the_same_output_and_revives_dead_units(batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5)).eval()
    with torch.no_grad():
        net[0].bias -= 100  # every unit is dead, the gradient exactly zero
    twin, (x, y) = smooth(net, temperature=50.0), batch
    assert all(a is b for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    torch.testing.assert_close(twin(x), net(x))
    assert core.gradient(net, x, y, cross_entropy)[2].abs().max() == 0
    assert core.gradient(twin, x, y, cross_entropy)[2].abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize(("build", "words"), [(lambda: smooth(nn.Linear(2, 2)), "no nn.ReLU"), (lambda: smooth(nn.ReLU(), 0.0), "positive"),
                                              (lambda: eot(nn.ReLU(), 0), "n must be"), (lambda: eot(nn.ReLU(), 2, over="x"), "unknown over")])
def test_bad_wrappers_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_detector_aware_attack_fools_without_a_flag_where_the_blind_one_is_flagged(net, batch):
    x = batch[0]
    y = net(x).argmax(1)

    def score(v):  # flags any image whose mean has moved
        return (v.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs()

    system = aware(net, score, threshold=0.02)
    assert system(x).shape == (6, 6) and (system(x)[:, -1] < 0).all()
    blind = pgd(net, x, y, eps=0.4, steps=40)
    assert not unflagged(system(blind), y).all()
    seen = pgd(system, x, y, eps=0.4, steps=100, loss=undetected(margin, weight=20.0, slack=0.005), success=unflagged, keep="best")
    assert unflagged(system(seen), y).all()


def test_rejecting_gives_the_extra_class_exactly_to_flagged_images(net, batch):
    x = batch[0]
    flags = torch.tensor([1.0, -1.0, 0.5, -0.2, 2.0, -3.0])
    decided = rejecting(aware(net, lambda v: flags))(x).argmax(1)
    assert torch.equal(decided, torch.where(flags > 0, 5, net(x).argmax(1)))
