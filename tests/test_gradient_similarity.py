"""Similarity of gradient maps, against scikit-image and numbers worked out by hand."""

import numpy as np
import pytest
import torch
from helpers import PassCounter
from skimage.filters import sobel as skimage_sobel
from skimage.metrics import structural_similarity
from torch import nn

from advlab.gradients import cosine, input_gradient, magnitude, pairwise_ssim, reconstruction_gradient, scaled, sobel, ssim


def maps(n=6, side=32, seed=0, width=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, side, width or side, generator=generator) ** 3


@pytest.mark.parametrize(("side", "width"), [(32, 32), (28, 28), (17, 40), (64, 64)])
@pytest.mark.parametrize(("ours", "theirs"), [
    ({"window": 7}, {"win_size": 7}), ({"window": 11}, {"win_size": 11}),
    ({"sigma": 1.5}, {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
    ({"sigma": 0.8}, {"gaussian_weights": True, "sigma": 0.8, "use_sample_covariance": False})])
def test_ssim_is_scikit_images(ours, theirs, side, width):
    a = scaled(maps(side=side, width=width))
    b = scaled(0.7 * a + 0.3 * maps(side=side, width=width, seed=1))
    b[0], b[1] = a[0], 0  # the same map, and a flat one
    want = [structural_similarity(p.numpy().astype(np.float64), q.numpy().astype(np.float64), data_range=1.0, **theirs) for p, q in zip(a, b)]
    torch.testing.assert_close(ssim(a, b, **ours).double(), torch.tensor(want, dtype=torch.float64), atol=1e-5, rtol=0)


def test_ssim_of_a_map_with_itself_is_one_and_it_is_symmetric():
    a, b = maps(), maps(seed=1)
    torch.testing.assert_close(ssim(a, a), torch.ones(6))
    assert torch.equal(ssim(a, b), ssim(b, a)) and (ssim(a, b) < 0.9).all()


def test_ssim_of_flat_maps_by_hand():
    """Without variance only the means speak: (2 m n + C1) / (m^2 + n^2 + C1)."""
    a, b = torch.full((1, 9, 9), 0.5), torch.full((1, 9, 9), 0.25)
    assert ssim(a, b).item() == pytest.approx((2 * 0.125 + 1e-4) / (0.3125 + 1e-4), rel=1e-6)


def test_pairwise_ssim_holds_each_pair_and_ones_on_its_diagonal():
    stacks = [maps(seed=i) for i in range(3)]
    table = pairwise_ssim(stacks, window=7)
    assert table.shape == (3, 3, 6) and torch.equal(table, table.transpose(0, 1))
    assert torch.equal(table.diagonal(), torch.ones(6, 3)) and torch.equal(table[0, 2], ssim(stacks[0], stacks[2]))


@pytest.mark.parametrize("options", [{"window": 6}, {"window": 9}, {"sigma": 1.5}])
def test_ssim_refuses_an_even_window_and_one_larger_than_the_map(options):
    with pytest.raises(ValueError, match="odd window"):
        ssim(maps(side=8), maps(side=8), **options)
    with pytest.raises(ValueError, match="one shape"):
        ssim(maps(side=32), maps(side=31))


def test_scaling_by_hand():
    ramp = torch.arange(101.0).view(1, 1, 101)
    assert torch.equal(scaled(ramp), ramp / 100)
    torch.testing.assert_close(scaled(ramp, "clip"), (ramp / 99).clamp(max=1))
    assert torch.equal(scaled(ramp**5, "rank"), ramp / 100)  # a rank ignores any increasing change
    tied = torch.tensor([[[3.0, 1.0], [1.0, 2.0]]])
    torch.testing.assert_close(scaled(tied, "rank"), torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]) / 3)
    with pytest.raises(ValueError, match="unknown scaling 'log'"):
        scaled(ramp, "log")


@pytest.mark.parametrize("how", ["max", "clip", "rank"])
def test_an_all_zero_map_stays_zero_and_its_ssim_is_a_number(how):
    flat = scaled(torch.zeros(2, 8, 8), how)
    assert torch.equal(flat, torch.zeros(2, 8, 8)) and torch.isfinite(ssim(flat, scaled(maps(2, 8), how))).all()


def test_sobel_is_scikit_images():
    x = torch.rand(4, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    want = np.stack([skimage_sobel(image.mean(0).numpy()) for image in x])
    torch.testing.assert_close(sobel(x), torch.from_numpy(want), atol=1e-6, rtol=0)
    assert sobel(torch.full((1, 3, 8, 8), 0.3)).abs().max() < 1e-6


def test_cosine_by_hand():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1e-20, 0.0]]).view(4, 1, 1, 2)
    b = torch.tensor([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0], [1e-20, 0.0]]).view(4, 1, 1, 2)
    torch.testing.assert_close(cosine(a, b), torch.tensor([0.96, -1.0, 0.0, 1.0]))


def linear_restorer(side=4):
    """A(x) = W x + c on the flattened image, so that the gradient of ||x - A(x)||^2 is known."""
    torch.manual_seed(0)
    layer = nn.Linear(side * side, side * side)
    return nn.Sequential(nn.Flatten(), layer, nn.Unflatten(1, (1, side, side))), layer


@pytest.mark.parametrize("detach_target", [False, True])
def test_reconstruction_gradient_of_a_linear_restorer(detach_target):
    restorer, layer = linear_restorer()
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    v = x.flatten(1)
    residual = v - layer(v)
    through = -layer.weight if detach_target else torch.eye(16) - layer.weight  # the derivative of the residual
    want = 2 * residual @ through
    with PassCounter(restorer) as counter:
        grad = reconstruction_gradient(restorer, x, detach_target=detach_target)
    torch.testing.assert_close(grad.flatten(1), want.detach())
    assert counter.forward == counter.backward == 5 and not grad.requires_grad and not x.requires_grad
    assert all(p.grad is None and p.requires_grad for p in restorer.parameters())


def test_an_images_gradient_maps_do_not_depend_on_its_batch(net, batch):
    x, y = batch
    whole, alone = input_gradient(net, x, y), input_gradient(net, x[3:4], y[3:4])
    torch.testing.assert_close(magnitude(whole)[3:4], magnitude(alone), atol=1e-6, rtol=1e-4)
    restorer, _ = linear_restorer()
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(reconstruction_gradient(restorer, x)[2:3], reconstruction_gradient(restorer, x[2:3]))


def test_reconstruction_gradient_refuses_what_is_no_reconstruction():
    with pytest.raises(ValueError, match="a reconstruction has the image's shape"):
        reconstruction_gradient(nn.Conv2d(1, 1, 3), torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="must lie in \\[0, 1\\]"):
        reconstruction_gradient(nn.Identity(), 2 + torch.rand(2, 1, 4, 4))
