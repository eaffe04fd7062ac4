"""Input gradients, on which all five defences are built: what the loss says about each pixel."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advlab.attacks import core
from advlab.attacks.core import Loss, Model, cross_entropy
from advlab.models import features, layer_names


def input_gradient(model: Model, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy) -> Tensor:
    """The gradient of each image's own loss over its pixels, (B, C, H, W), for images x in [0, 1] and labels y (B,).

    The losses are summed, so that an image's gradient does not depend on the size of its batch. Bad input raises ValueError as in an attack."""
    core.check_images(x, y)
    with core.attacking(model):
        return core.gradient(model, x, y, loss, check=y)[2]


def magnitude(gradient: Tensor) -> Tensor:
    """Euclidean norm over channels at each pixel: (B, C, H, W) to (B, H, W)."""
    return gradient.norm(dim=1)


def own_scale(maps: Tensor) -> Tensor:
    """Maps (B, H, W) each divided by its own maximum, for display; an all-zero map stays zero."""
    return maps / maps.flatten(1).amax(1).clamp_min(1e-30)[:, None, None]


# --- error amplification (HGD, section 5.1) -----------------------------------------------------------------------------------------------


def error_amplification(classifier: nn.Module, x: Tensor, x_p: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """E_l = |f_l(x_p) - f_l(x)|_1 / |f_l(x)|_1 for each image, (B,), at the image itself ("pixels") and at every layer of models.layer_names (or at
    the submodules named), after its activation, for clean images x (B, C, H, W) and perturbed ones x_p (HGD, equation 6 and Fig. 5)."""
    names = layer_names(classifier) if names is None else names
    with torch.no_grad():
        clean, changed = ({"pixels": v} | features(classifier, v, names) for v in (x, x_p))
    return {name: (changed[name] - z).flatten(1).abs().sum(1) / z.flatten(1).abs().sum(1).clamp_min(1e-12) for name, z in clean.items()}


# --- similarity of gradient maps (S2S, arXiv 1803.07994, section 4.2) ----------------------------------------------------------------------

SCALINGS = "max", "clip", "rank"


def reconstruction_gradient(restorer: Model, x: Tensor, *, detach_target: bool = False) -> Tensor:
    """The gradient of each image's ||x - A(x)||^2 over its pixels, (B, C, H, W), for images x in [0, 1] and a restorer A of the same shape.

    x is differentiated on both sides, unless detach_target takes the left one as a constant. ValueError for bad images, or another shape."""
    core.check_images(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))
    with core.attacking(restorer):
        x = x.detach().requires_grad_()
        out = restorer(x)
        if out.shape != x.shape:
            raise ValueError(f"the restorer gives {tuple(out.shape)} for images {tuple(x.shape)}; a reconstruction has the image's shape")
        (grad,) = torch.autograd.grad(((x.detach() if detach_target else x) - out).square().sum(), x)
    return grad


def scaled(maps: Tensor, how: str = "max") -> Tensor:
    """Maps (B, H, W) of values from 0 up, brought to [0, 1] each by itself: divided by its maximum ("max"), the same after cutting what exceeds
    its 99th percentile ("clip"), or the share of its other pixels that are smaller ("rank"). An all-zero map stays zero."""
    core.check_choice("scaling", how, SCALINGS)
    flat = maps.flatten(1)
    if how == "rank":
        return (torch.searchsorted(flat.sort(1).values, flat.contiguous()) / (flat.shape[1] - 1)).to(maps.dtype).view_as(maps)
    return own_scale(torch.minimum(maps, flat.quantile(0.99, 1)[:, None, None]) if how == "clip" else maps)


def ssim(a: Tensor, b: Tensor, *, window: int = 7, sigma: float | None = None) -> Tensor:
    """Structural similarity of maps (B, H, W) in [0, 1], the mean over all windows that lie inside the map: (B,).

    The definition of scikit-image's structural_similarity with data_range=1: a square window with sample covariance or, with sigma, a Gaussian cut
    off at 3.5 sigma (11 taps for 1.5, Wang et al. 2004) with population covariance. Computed in float64, since variances are differences.
    ValueError for maps of unequal shape, maps smaller than the window, or an even window."""
    reach = (window - 1) // 2 if sigma is None else int(3.5 * sigma + 0.5)
    side = 2 * reach + 1
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < side or (sigma is None and window != side):
        raise ValueError(f"ssim compares maps of one shape (B, H, W), at least as large as its odd window; got {tuple(a.shape)}, {tuple(b.shape)}, "
                         f"window {window if sigma is None else side}")
    exact = torch.float32 if a.device.type == "mps" else torch.float64
    a, b, at = a.to(exact), b.to(exact), torch.arange(-reach, reach + 1, dtype=exact, device=a.device)
    taps = torch.ones_like(at) if sigma is None else torch.exp(-((at / sigma) ** 2) / 2)
    taps = taps / taps.sum()
    bands = [F.pad(taps, (0, n + 1 - side)).repeat(n + 1 - side)[: (n + 1 - side) * n].view(-1, n) for n in a.shape[1:]]  # row i: taps from i on
    mean_a, mean_b, aa, bb, ab = (bands[0] @ m @ bands[1].T for m in (a, b, a * a, b * b, a * b))
    unbiased = side**2 / (side**2 - 1) if sigma is None else 1.0
    var_a, var_b, cov = ((s - m) * unbiased for s, m in ((aa, mean_a**2), (bb, mean_b**2), (ab, mean_a * mean_b)))
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.mean((1, 2)).to(torch.float32)


def pairwise_ssim(maps: Sequence[Tensor], **options) -> Tensor:
    """SSIM between each two of M stacks of maps (B, H, W): (M, M, B), symmetric, with 1 on the diagonal. Options as in `ssim`."""
    out = torch.ones(len(maps), len(maps), len(maps[0]), device=maps[0].device)
    for i, j in combinations(range(len(maps)), 2):
        out[i, j] = out[j, i] = ssim(maps[i], maps[j], **options)
    return out


def sobel(x: Tensor) -> Tensor:
    """Edge strength of images (B, C, H, W): the Sobel magnitude of the mean over channels, (B, H, W), scikit-image's filters.sobel."""
    smooth, slope = torch.tensor([[1.0, 2.0, 1.0], [4.0, 0.0, -4.0]], dtype=x.dtype, device=x.device) / 4
    kernels = torch.stack([slope[:, None] * smooth, smooth[:, None] * slope])[:, None]
    return F.conv2d(F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), kernels).square().mean(1).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between each image's two gradients (B, C, H, W): (B,); 0 where one of them is zero."""
    a, b = (g.flatten(1) / g.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-30) for g in (a, b))
    return (a * b).sum(1)


# --- input sensitivity (GRED) ---------------------------------------------------------------------------------------------------------------


def log_odds_gradient(model: Model, x: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """For each image: logits (B, L); r (B,), the log-odds of any other class against the predicted one; and dr/dx (B, C, H, W).

    The cross-entropy for the predicted label is softplus(r), so its gradient is sigmoid(r) dr/dx. The first factor holds all of the confidence
    and may be as small as e^-100; the second is of ordinary size, so neither is lost to float32. create_graph: stay differentiable in x."""
    grow = create_graph and x.requires_grad
    with core.attacking(model):
        x = x if grow else x.detach().requires_grad_()
        logits = model(x)
        r = core.log_odds(logits, logits.argmax(1))
        (grad,) = torch.autograd.grad(r.sum(), x, create_graph=grow)
    return (logits, r, grad) if grow else (logits.detach(), r.detach(), grad)


def input_sensitivity(model: Model, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """InSen, |d CE(f(x), argmax f(x)) / dx|, (B, C, H, W), in losses a unit of [0, 1] (GRED, arXiv 2002.12527, eq. 1)."""
    _, r, grad = log_odds_gradient(model, x, create_graph=create_graph)
    return core.rows(r.sigmoid()) * grad.abs()


def log_sensitivity(model: Model, x: Tensor, *, norm: bool = False, create_graph: bool = False) -> Tensor:
    """The decimal logarithm of InSen, (B, C, H, W), or of its l2 norm, (B,), exact also where InSen itself underflows; at most 38 orders below
    its confidence factor where a derivative is zero."""
    _, r, grad = log_odds_gradient(model, x, create_graph=create_graph)
    size = grad.flatten(1).norm(dim=1) if norm else grad.abs()
    return (F.logsigmoid(r) if norm else core.rows(F.logsigmoid(r))) / math.log(10) + size.clamp_min(1e-38).log10()


# --- gradient maps for every label (TRN) ----------------------------------------------------------------------------------------------------


def gradient_maps(model: Model, x: Tensor, *, top: int | None = None, differentiable: bool = False, chunk: int | None = None) -> Tensor:
    """The gradient over its pixels of each image's cross-entropy for every label, (B, n, C, H, W) in losses a unit of [0, 1], for images x
    (B, C, H, W): GMEM of TRN (arXiv 2202.01117, eq. 5). Autograd is on inside, whatever the caller has set.

    G_i = J^T (p - e_i) for logits z with Jacobian J and p = softmax(z), so that sum_i p_i G_i = 0: one forward pass and n - 1 vector-Jacobian
    products are enough. Those taken are D_i = J^T (e_k - e_i), k the predicted class, from which G_i = D_i - sum_j p_j D_j; none of them holds
    a difference of two numbers near 1, so the map of a confidently predicted label keeps its relative precision. One product after another:
    on processors that was faster than batching them (5.1 bare passes for n = 10, against 6.2 by vmap and 9.3 on repeated images).

    top: only the maps of that many likeliest labels, likeliest first, where there are too many classes. differentiable: keep the graph, for
    attacks that differentiate through the maps. chunk: images at a time, which bounds the memory (of the maps that are not differentiable).
    ValueError for x that is no float batch, top outside 2..n, a chunk below 1, or batch norm or dropout in training mode."""
    if x.ndim != 4 or not x.is_floating_point() or not len(x):
        raise ValueError(f"gradient maps need a float batch (B, C, H, W) with an image at least, got {x.dtype} of shape {tuple(x.shape)}")
    if chunk is not None:
        core.check_steps(chunk=chunk)
    return torch.cat([_gradient_maps(model, part, top, differentiable) for part in x.split(chunk or len(x))])


def _gradient_maps(model: Model, x: Tensor, top: int | None, differentiable: bool) -> Tensor:
    with torch.inference_mode(False), core.attacking(model), torch.autocast(x.device.type, enabled=False):  # bfloat16 would round p_i away
        x = x if differentiable and x.requires_grad else (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        logits = model(x)
        n = logits.shape[1]
        if top is not None and not 2 <= top <= n:
            raise ValueError(f"top must lie between 2 and the {n} classes of the model, got {top}")
        order = logits.detach().argsort(1, descending=True)

        def product(vector: Tensor, last: bool = False) -> Tensor:
            # a constant vector goes into a sum: as grad_outputs it would make torch import sympy, which takes seconds
            of, weights = (logits, vector) if vector.requires_grad else ((logits * vector).sum(), None)
            return torch.autograd.grad(of, x, weights, retain_graph=differentiable or not last, create_graph=differentiable)[0]

        unit = torch.eye(n, dtype=x.dtype, device=x.device)[order]  # (B, n, n), one-hot rows, likeliest label first
        p = logits.softmax(1).gather(1, order)
        ranks = range(1, n if top is None else top)
        away = [product(unit[:, 0] - unit[:, i], top is None and i == n - 1) for i in ranks]
        if top is None:
            mean = sum(core.rows(p[:, i]) * d for i, d in zip(ranks, away))
        else:  # sum_j p_j D_j over all classes is one product more
            mean = product((p[:, 1:, None] * (unit[:, :1] - unit[:, 1:])).sum(1), last=True)
        maps = torch.stack([torch.zeros_like(x), *away], 1) - mean[:, None]
        if top is None:
            maps = maps[torch.arange(len(x), device=x.device)[:, None], order.argsort(1)]
    return maps if differentiable else maps.detach()


def map_statistics(maps: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """Fig. 3's claim in numbers, for maps (B, n, C, H, W) and predicted labels (B,), each (B,): mean Pearson correlation of the magnitudes |G_i|
    between two other labels (`other`) and between another and the predicted one (`predicted`), and |G_predicted| over the median other norm."""
    (b, n), own = maps.shape[:2], F.one_hot(predicted, maps.shape[1]).bool()
    flat = magnitude(maps.flatten(0, 1)).view(b, n, -1)
    unit = F.normalize(flat - flat.mean(2, keepdim=True), dim=2, eps=1e-30)
    r, norms = unit @ unit.transpose(1, 2), maps.flatten(2).norm(dim=2)
    two = ~own[:, :, None] & ~own[:, None] & ~torch.eye(n, dtype=torch.bool, device=maps.device)
    return {"other": r[two].view(b, -1).mean(1), "predicted": r[own[:, :, None] & ~own[:, None]].view(b, -1).mean(1),
            "ratio": norms[own] / norms[~own].view(b, n - 1).median(1).values}


# --- finite differences (adversarial transformation) --------------------------------------------------------------------------------------


def finite_differences(f: Model, x: Tensor, i: Tensor, j: Tensor, h: float) -> Tensor:
    """[f_i(x + h e_j) - f_i(x - h e_j)] / 2h for pairs of flat positions i and j, (P,) int64, of one image x (1, C, H, W): (P,) (arXiv 1911.11219,
    equation 4). f maps images to images. Give x in float64: in float32 a small h leaves nothing but rounding."""
    unique, at = j.unique(return_inverse=True)
    away = h * F.one_hot(unique, x.numel()).to(x).view(-1, *x.shape[1:])
    with torch.no_grad():
        rise = (f(x + away) - f(x - away)).flatten(1)
    return rise[at, i] / (2 * h)
