"""Black-box attacks on linear models, whose exact distances are known, and the contracts that every attack keeps."""

import math
from functools import partial

import pytest
import torch
from helpers import in_precision
from torch import nn

from advlab.attacks import core
from advlab.attacks.adaptive import eot
from advlab.attacks.blackbox import _bump, diverse, ensemble, genattack, hopskipjump, spsa, square, transfer
from advlab.attacks.gradient import mim, pgd

SHAPE = (1, 12, 12)
BOUNDED = {
    "square-linf": (partial(square, queries=300), "linf"),
    "square-l2": (partial(square, norm="l2", queries=300), "l2"),
    "spsa": (partial(spsa, steps=30, samples=32, chunk=256), "linf"),
    "genattack": (partial(genattack, steps=120), "linf"),
}
QUERYING = {**{name: attack for name, (attack, _) in BOUNDED.items()}, "hopskipjump-l2": partial(hopskipjump, steps=4),
            "hopskipjump-linf": partial(hopskipjump, steps=4, norm="linf")}


class Counting(nn.Module):
    """A model that notes how many images each forward pass held."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, []

    def forward(self, x):
        assert x.min() >= 0 and x.max() <= 1, "a query outside [0, 1]"
        self.passes.append(len(x))
        return self.model(x)


def linear(classes=2, seed=0):
    """A linear classifier; images of 0.3 to 0.7 with its predictions, so that no pixel meets 0 or 1 on the way to the boundary."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), classes)).eval()
    x = torch.rand(12, *SHAPE) * 0.4 + 0.3
    return model, x, model(x).argmax(1)


def distance(model, x, y, norm):
    """The exact distance to the nearest boundary: gap of logits over the dual norm of the difference of weights."""
    weight, logits = model[1].weight.detach(), model(x).detach()
    gap = logits.gather(1, y[:, None]) - logits
    slope = (weight[y][:, None] - weight).norm(p=1 if norm == "linf" else 2, dim=2)
    return (gap / slope).scatter(1, y[:, None], torch.inf).amin(1)


def size(delta, norm):
    return delta.flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)


def wrong(model, x, y):
    return model(x).argmax(1) != y


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("classes", [2, 4])
def test_falls_beyond_the_exact_distance_and_never_below_it(name, classes):
    attack, norm = BOUNDED[name]
    model, x, y = linear(classes)
    exact = distance(model, x, y, norm)
    for factor, expected in ((0.95, False), (3.0, True)):
        x_adv = attack(model, x, y, eps=factor * exact)
        assert (wrong(model, x_adv, y) == expected).all(), f"{factor} of the exact distance"
        assert (size(x_adv - x, norm) <= factor * exact * (1 + 1e-5) + 1e-6).all()
        assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_square_comes_close_to_the_exact_distance():
    model, x, y = linear()
    assert wrong(model, square(model, x, y, eps=1.1 * distance(model, x, y, "linf"), queries=1000), y).all()


@pytest.mark.parametrize("name", QUERYING)
def test_leaves_nothing_behind_and_repeats_itself(name):
    model, x, y = linear(3)
    model[1].bias.requires_grad_(False)
    attack = QUERYING[name] if name.startswith("hop") else partial(QUERYING[name], eps=0.5 * distance(model, x, y, "linf"))
    before, state = x.clone(), torch.get_rng_state()
    first, second = attack(model, x, y), attack(model, x, y)
    assert torch.equal(first, second)
    draws = [attack(model, x, y, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == [True, False] and all(p.grad is None for p in model.parameters())
    assert not model.training and not first.requires_grad and first.dtype == x.dtype


@pytest.mark.parametrize("name", QUERYING)
def test_an_image_that_is_fooled_already_costs_one_query(name):
    model, x, y = linear(3)
    counting, labels = Counting(model), (y + 1) % 3
    x_adv = QUERYING[name](counting, x, labels, **({} if name.startswith("hop") else {"eps": 0.1}))
    assert torch.equal(x_adv, x) and counting.passes == [len(x)]


@pytest.mark.parametrize("name", BOUNDED)
def test_a_budget_of_zero_changes_nothing(name):
    model, x, y = linear()
    assert torch.equal(BOUNDED[name][0](model, x, y, eps=0.0), x)
    eps = 3 * distance(model, x, y, BOUNDED[name][1])
    eps[::2] = 0
    moved = (BOUNDED[name][0](model, x, y, eps=eps) != x).flatten(1).any(1)
    assert moved.tolist() == [False, True] * (len(x) // 2)


@pytest.mark.parametrize(("attack", "queries"), [
    (partial(square, queries=37), 37),
    (partial(square, queries=37, restarts=3), 111),
    (partial(square, norm="l2", queries=1), 1),
    (partial(spsa, steps=3, samples=10, chunk=1), 1 + 3 * 21),
    (partial(spsa, steps=3, samples=10, chunk=50), 1 + 3 * 21),
    (partial(genattack, steps=4, population=6), 1 + 6 + 4 * 5),
])
def test_an_image_that_stands_costs_exactly_its_queries(attack, queries):
    model, x, y = linear()
    counting = Counting(model)
    attack(counting, x, y, eps=1e-4)
    assert sum(counting.passes) == queries * len(x)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hopskipjump_keeps_to_its_queries(norm):
    model, x, y = linear()
    counting, h = Counting(model), math.ceil(1.5 * math.log2(x[0].numel()))
    hopskipjump(counting, x, y, steps=3, samples=20, tries=30, chunk=64, norm=norm)
    assert sum(counting.passes) <= len(x) * (2 + 30 + h + sum(20 * math.sqrt(t) + 2 * h for t in (1, 2, 3)))
    assert max(counting.passes) <= 64


@pytest.mark.parametrize("chunk", [1, 30, 500])
def test_spsa_bounds_its_passes(chunk):
    model, x, y = linear()
    counting = Counting(model)
    spsa(counting, x, y, eps=1e-4, steps=1, samples=40, chunk=chunk)
    assert max(counting.passes) <= max(chunk, 2 * len(x))


@pytest.mark.parametrize("name", BOUNDED)
def test_images_that_fall_leave_the_batch(name):
    attack, norm = BOUNDED[name]
    model, x, y = linear()
    eps = 3 * distance(model, x, y, norm)
    eps[0] = 1e-4
    counting, alone = Counting(model), Counting(model)
    x_adv = attack(counting, x, y, eps=eps)
    attack(alone, x[:1], y[:1], eps=eps[:1])
    assert wrong(model, x_adv, y).sum() == len(x) - 1
    assert sum(counting.passes) < len(x) / 2 * sum(alone.passes)
    assert min(counting.passes[-10:]) == min(alone.passes[-10:])


def test_square_traces_its_query_curve():
    model, x, y = linear()
    counting, trace = Counting(model), []
    x_adv = square(counting, x, y, eps=1.3 * distance(model, x, y, "linf").median(), queries=50, trace=trace)
    queries, standing = zip(*trace)
    assert queries == tuple(range(1, len(trace) + 1)) and trace[0] == (1, len(x))
    assert standing[-1] == (~wrong(model, x_adv, y)).sum() and 0 < standing[-1] < len(x)
    assert list(standing) == sorted(standing, reverse=True)
    assert counting.passes == [len(x), *standing[:-1]]


def test_square_restarts_only_help():
    model, x, y = linear(4)
    eps = 2.5 * distance(model, x, y, "linf")
    once, often = (square(model, x, y, eps=eps, queries=40, restarts=n) for n in (1, 4))
    assert (core.margin(model(often), y) >= core.margin(model(once), y)).logical_or(wrong(model, often, y)).all()
    assert wrong(model, often, y).sum() > wrong(model, once, y).sum()


def test_squares_pattern_by_hand():
    top, bottom = torch.tensor([[1.0, 5, 1]]), torch.tensor([[1.0, 1, 1], [1, 5, 1]])  # quarters: 1 + 1/4 at the centre, 1/4 round it
    expected = torch.cat([top / top.norm(), -bottom / bottom.norm()]) / math.sqrt(2)
    torch.testing.assert_close(_bump(3, top), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (1, 9, 4)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_takes_any_image_size(shape, norm):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)), torch.rand(3, *shape)
    y = model(x).argmax(1)
    x_adv = square(model, x, y, eps=0.05, norm=norm, queries=30)
    assert (size(x_adv - x, norm) <= 0.05 + 1e-6).all() and x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize("name", QUERYING)
def test_targeted(name):
    model, x, y = linear(4)
    target = model(x).argsort(1)[:, -2]
    weight = model[1].weight.detach()
    start = (weight[target] > weight.mean(0)).to(x.dtype).view_as(x)  # black and white: the corner of [0, 1]^d that suits the target
    options = {"start": start} if name.startswith("hop") else {"eps": 0.3 if BOUNDED[name][1] == "linf" else 2.5}
    x_adv = QUERYING[name](model, x, target, targeted=True, **options)
    reached = model(x_adv).argmax(1) == target
    assert reached.all()
    same = QUERYING[name](model, x, y, targeted=True, **options)
    assert torch.equal(same, x)


@pytest.mark.parametrize("name", QUERYING)
def test_needs_no_gradient(name):
    linear_model, x, _ = linear()

    def decisions(z):  # staircase in, labels out: no gradient anywhere, and only labels where the attack needs no more
        logits = linear_model((z * 50).round() / 50)
        return nn.functional.one_hot(logits.argmax(1), 2) * 5.0 if name.startswith("hop") else logits.detach()

    y = decisions(x).argmax(1)
    with pytest.raises(ValueError, match="gradient"):
        pgd(decisions, x, y, eps=0.1)
    options = {} if name.startswith("hop") else {"eps": 4 * distance(linear_model, x, y, BOUNDED[name][1]) + 0.02}
    assert (decisions(QUERYING[name](decisions, x, y, **options)).argmax(1) != y).all()


# --- hopskipjump --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "bound"), [("l2", 1.08), ("linf", 1.2)])
def test_hopskipjump_nears_the_exact_distance_in_a_batch_as_alone(norm, bound):
    model, x, y = linear()
    exact = distance(model, x, y, norm)
    for part in (slice(None), slice(0, 1)):
        x_adv = hopskipjump(model, x[part], y[part], steps=12, norm=norm)
        assert wrong(model, x_adv, y[part]).all() and x_adv.min() >= 0 and x_adv.max() <= 1
        ratio = size(x_adv - x[part], norm) / exact[part]
        assert (ratio > 1 - 1e-4).all() and ratio.mean() < bound


def test_hopskipjump_returns_images_without_a_start_unchanged():
    x, y = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0)) / 2, torch.zeros(6, dtype=torch.int64)

    def stubborn(z):  # only gives way to images that noise never is: brighter than 0.9
        return torch.stack([torch.zeros(len(z)), z.mean((1, 2, 3)) - 0.9], 1)

    assert torch.equal(hopskipjump(stubborn, x, y, steps=2, tries=5), x)
    start = x.clone()
    start[::2] = 1.0
    x_adv = hopskipjump(stubborn, x, y, steps=2, tries=5, start=start)
    assert wrong(stubborn, x_adv, y).tolist() == [True, False] * 3
    assert torch.equal(x_adv[1::2], x[1::2])


@pytest.mark.parametrize("name", QUERYING)
def test_runs_against_a_random_defence(name):
    model, x, y = linear()
    exact = distance(model, x, y, "l2" if name.endswith("l2") else "linf")
    x, y, exact = x[exact > exact.median()], y[exact > exact.median()], exact[exact > exact.median()]
    generator = torch.Generator().manual_seed(1)

    def defence(z):
        return model((z + 0.02 * torch.randn(z.shape, generator=generator)).clamp(0, 1))

    options = {} if name.startswith("hop") else {"eps": 3 * exact}
    x_adv = QUERYING[name](eot(defence, 8), x, y, **options)
    assert torch.isfinite(x_adv).all() and ((x_adv != x).flatten(1).any(1)).all()
    if not name.startswith("hop"):
        assert (size(x_adv - x, BOUNDED[name][1]) <= 3 * exact + 1e-5).all()


# --- transfer -----------------------------------------------------------------------------------------------------------------------------


def test_transfer_on_a_copy_is_mim_and_never_asks_the_victim():
    model, x, y = linear(4)
    victim, copy = Counting(model), linear(4)[0]
    for norm in ("linf", "l2"):
        x_adv = transfer(victim, x, y, eps=0.05, surrogates=copy, diversity=0, norm=norm, steps=5)
        assert torch.equal(x_adv, mim(model, x, y, eps=0.05, norm=norm, steps=5))
    assert victim.passes == [] and all(p.grad is None and p.requires_grad for p in copy.parameters())


def test_transfer_fuses_logits():
    (first, x, y), second = linear(4), linear(4, seed=1)[0]
    both = ensemble([first, second, second])
    torch.testing.assert_close(both(x), (first(x) + 2 * second(x)) / 3)
    x_adv = transfer(first, x, y, eps=0.05, surrogates=[first, second], diversity=0)
    assert torch.equal(x_adv, mim(ensemble([first, second]), x, y, eps=0.05))
    with pytest.raises(ValueError, match="at least one model"):
        transfer(first, x, y, eps=0.05, surrogates=[])


def test_transfer_with_diversity_is_seeded_and_bounded():
    model, x, y = linear(4)
    state = torch.get_rng_state()
    draws = [transfer(model, x, y, eps=0.05, surrogates=model, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(transfer(model, x, y, eps=0.05, surrogates=model), draws[0])
    assert all((draw - x).abs().max() <= 0.05 + 1e-6 and draw.min() >= 0 and draw.max() <= 1 for draw in draws)
    assert torch.equal(torch.get_rng_state(), state)


def test_diversity_shrinks_and_pads_some_images():
    x = torch.full((400, 1, 20, 20), 0.8)
    once = diverse(nn.Identity(), 0.3, low=0.5)
    z, again = once(x), once(x)
    changed = (z != x).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.4 and not torch.equal(z, again)
    values = z[changed].unique()
    assert values[0] == 0 and (values[1:] - 0.8).abs().max() < 1e-6  # nothing but the image and the padding
    area = (z[changed] > 0).float().mean((1, 2, 3))
    assert (area >= 0.25).all() and (area < 1).all()
    assert torch.equal(diverse(nn.Identity(), 0.0)(x), x)
    torch.testing.assert_close(diverse(nn.Identity(), 1.0, low=1.0)(x), x)


def test_diversity_passes_gradients_and_modes_on():
    model, x, y = linear()
    source = diverse(model, 0.5)
    assert set(map(id, source.parameters())) == set(map(id, model.parameters()))
    assert core.gradient(source, x, y, core.cross_entropy)[2].abs().amax((1, 2, 3)).min() > 0


# --- bad input ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attack", "message"), [
    (partial(square, eps=-0.1), "eps must be finite and not negative"),
    (partial(square, eps=0.1, queries=0), "queries must be a whole number"),
    (partial(square, eps=0.1, norm="l1"), "unknown norm 'l1'"),
    (partial(square, eps=0.1, p_init=1.5), r"p_init .* must lie in \(0, 1\], got 1.5"),
    (partial(spsa, eps=0.1, delta=0.0), "delta and lr must be positive"),
    (partial(genattack, eps=0.1, population=1), "population must be at least 2"),
    (partial(hopskipjump, tries=0), "tries must be a whole number"),
    (partial(hopskipjump, start=torch.zeros(1, *SHAPE)), "start must hold one image for each"),
    (partial(transfer, eps=0.1, surrogates=nn.Flatten(), diversity=2), "probability must lie in"),
])
def test_bad_options(attack, message):
    model, x, y = linear()
    with pytest.raises(ValueError, match=message):
        attack(model, x, y)


@pytest.mark.parametrize("name", QUERYING)
def test_bad_input(name):
    model, x, y = linear()
    attack = partial(QUERYING[name], **({} if name.startswith("hop") else {"eps": 0.1}))
    with pytest.raises(ValueError, match="batch is empty"):
        attack(model, x[:0], y[:0])
    with pytest.raises(ValueError, match="probabilities"):
        attack(nn.Sequential(model, nn.Softmax(1)), x, y)
    with pytest.raises(ValueError, match="label 7 is out of range"):
        attack(model, x, torch.full_like(y, 7))
    with pytest.raises(ValueError, match="training mode"):
        attack(nn.Sequential(nn.BatchNorm2d(1), model).train(), x, y)


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_other_precisions(net, batch, name, dtype):
    assert QUERYING[name](*in_precision(net, batch, dtype), eps=0.1).dtype == dtype
