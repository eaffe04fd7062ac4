"""Figures in one style: colours of Okabe and Ito (2008), and a marker, a line style and a hatch for each, so that a figure reads in
greyscale and by colour-blind people. Every function returns a free-standing matplotlib Figure (no pyplot state), which a notebook shows
as a cell's last value; `save_figure` writes it, byte for byte the same for the same figure and versions."""

import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from advlab import report

# colour, marker, line style, hatch; dark and light alternate, for greyscale
LOOKS = (
    ("#0072B2", "o", "-", ""),
    ("#E69F00", "s", "--", "///"),
    ("#009E73", "^", "-.", "..."),
    ("#D55E00", "D", ":", "xxx"),
    ("#56B4E9", "v", (0, (5, 1)), "\\\\\\"),
    ("#000000", "P", (0, (1, 1)), "ooo"),
    ("#CC79A7", "X", (0, (3, 1, 1, 1, 1, 1)), "++"),
    ("#8C8C8C", "*", (0, (8, 2)), "--"),
)
DPI = 120


def style():
    """The style as a context manager over matplotlib's settings; nothing is changed outside it."""
    import matplotlib
    from cycler import cycler

    return matplotlib.rc_context({
        "axes.prop_cycle": cycler(color=[look[0] for look in LOOKS], linestyle=[look[2] for look in LOOKS]),
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9,
        "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False, "legend.handlelength": 3.2,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#DDDDDD",
        "grid.linewidth": 0.6, "lines.linewidth": 1.8, "lines.markersize": 5.5, "hatch.linewidth": 0.7,
        "image.interpolation": "nearest", "figure.dpi": DPI, "savefig.facecolor": "white",
    })  # fmt: skip


def figure(rows: int = 1, cols: int = 1, *, width: float | None = None, height: float | None = None, **subplots):
    """An empty Figure in the style and its axes, as `Figure.subplots` returns them; sizes in inches."""
    from matplotlib.figure import Figure

    with style():
        fig = Figure(figsize=(width or 1.4 + 3.6 * cols, height or 0.4 + 2.8 * rows), layout="constrained")
        fig._repr_png_ = partial(_png, fig)  # a Figure made without pyplot has no picture of its own in a notebook
        return fig, fig.subplots(rows, cols, **subplots)


def save_figure(fig, notebook: str, name: str, *, profile: str, dataset: str, where: Path | None = None) -> Path:
    """Write figures/<profile>/<dataset>/<notebook>-<name>.png (under runs/ for the profile "smoke"; `where` overrides the folder), whole
    or not at all, and return its path."""
    return report.write_atomic(report.target("figures", profile, dataset, f"{notebook}-{name}.png", where), _png(fig))


def perturbation(delta: Tensor, scale: float | None = None) -> Tensor:
    """`delta` (any shape) as pictures in [0,1]: 0 becomes mid-grey, +-scale white and black. One scale for the whole tensor, its largest
    absolute value unless given, so that perturbations shown together can be compared."""
    scale = float(delta.abs().max()) if scale is None else scale
    return (0.5 + 0.5 * delta.detach() / max(scale, 1e-12)).clamp(0, 1)


def image_grid(
    rows: Sequence[Tensor | Sequence[Tensor | None]], row_labels: Sequence[str] | None = None, col_labels: Sequence[str] | None = None,
    *, captions: Sequence[Sequence[str]] | None = None, size: float = 1.0,
):  # fmt: skip
    """A grid of pictures: each row is a tensor (N,C,H,W) or a sequence of (C,H,W), C = 1 or 3, in [0,1]; `captions` go under the
    pictures, `size` is a picture's side in inches; None leaves a place empty. Raises ValueError for pixels outside [0,1] or NaN, and for labels that
    do not fit the grid."""
    count = max((len(r) for r in rows), default=0)
    for what, names, number in (("row", row_labels, len(rows)), ("column", col_labels, count), ("caption", captions, len(rows))):
        if names is not None and len(names) != number:
            raise ValueError(f"{len(names)} {what} labels for a grid of {len(rows)} rows and {count} columns")
    left = 0.075 * max(map(len, row_labels)) if row_labels else 0
    height = len(rows) * (size + 0.2 * bool(captions)) + 0.2 * bool(col_labels)
    fig, axes = figure(len(rows), count, width=left + count * size, height=height, squeeze=False)
    with style():
        for i, line in enumerate(rows):
            for j, ax in enumerate(axes[i]):
                ax.set(xticks=[], yticks=[])
                there = j < len(line) and line[j] is not None
                ax.spines[:].set(visible=there, color="#BBBBBB", linewidth=0.5)  # a white picture on white paper needs an edge
                if there:
                    ax.imshow(_pixels(line[j], f"picture {j} of row {i}"), cmap="gray", vmin=0, vmax=1)
                    if captions:
                        ax.set_xlabel(captions[i][j], fontsize=7.5, labelpad=2)
                if col_labels and i == 0:
                    ax.set_title(col_labels[j], fontsize=8.5, pad=3)
            if row_labels:
                axes[i, 0].set_ylabel(row_labels[i], rotation=0, ha="right", va="center", fontsize=8.5)
    fig.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.01, hspace=0.01)
    return fig


def accuracy_curves(
    rows: Iterable[dict], *, x: str = "eps", by: str = "system", order: str | None = None, chance: float | None = None, title: str = "",
    legend: bool = True, ax=None,
):  # fmt: skip
    """Lines of `value` against the field `x`, one for each `by`, joined in the order of x or of the field `order` (where x was measured), with the
    band from low to high where rows give one, hollow markers at the paper's numbers, and a dotted line at `chance` (in per cent). The first line is
    the thickest, so that it shows under one that hides it. eps is drawn in 255ths, accuracies in per cent. Returns the Figure. Raises ValueError if
    two rows claim one place."""
    from matplotlib.ticker import MaxNLocator

    fig, ax = (ax.figure, ax) if ax is not None else figure(width=6.0, height=3.2)
    rows, scale = [report.percent(r) for r in rows if r[x] is not None], 255 if x == "eps" else 1
    with style():
        for k, (look, (name, line)) in enumerate(zip(LOOKS, _groups(rows, by, x).items())):
            line = sorted(line, key=lambda r: r[order or x])
            at, value = [scale * r[x] for r in line], [r["value"] for r in line]
            ax.plot(at, value, color=look[0], marker=look[1], linestyle=look[2], label=name, zorder=3, clip_on=False,
                    linewidth=2.6 - 0.2 * k, markersize=7.5 - 0.5 * k)
            if all(r["low"] is not None and r["high"] is not None for r in line):
                low, high = [r["low"] for r in line], [r["high"] for r in line]
                if len(line) == 1:
                    ax.vlines(at, low, high, color=look[0], linewidth=1.3)
                else:
                    ax.fill_between(at, low, high, color=look[0], alpha=0.18, linewidth=0)
            if paper := [(scale * r[x], r["paper"]) for r in line if r["paper"] is not None]:
                ax.plot(*zip(*paper), look[1], color=look[0], markerfacecolor="white", markersize=8, zorder=4, clip_on=False)
        if chance is not None:
            ax.axhline(chance, color="#555555", linestyle=(0, (1, 3)), linewidth=1.2, label="chance")
        if any(r["paper"] is not None for r in rows):
            ax.plot([], [], "o", color="#555555", markerfacecolor="white", markersize=8, label="in the paper")
        if rows and all(abs(scale * r[x] - round(scale * r[x])) < 1e-6 for r in rows):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="eps (of 255)" if x == "eps" else x, title=title)
        _value_axis(ax, rows)
        if legend:
            aside(ax)
    return fig


def aside(ax, **options) -> None:
    """The legend of `ax` in the style, to its right unless `options` of `Axes.legend` say otherwise."""
    with style():
        ax.legend(**{"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} | options)


def bars(
    rows: Iterable[dict], *, x: str = "attack", by: str = "system", level: tuple[float, str] | None = None, title: str = "", legend: bool = True,
    ax=None,
):  # fmt: skip
    """Bars of `value`, a group for each `x` and a bar for each `by`, whiskers from low to high, a diamond at the paper's number, a dotted line at
    `level` (height in per cent, name). Returns the Figure. Raises ValueError if two rows claim one place."""
    rows = [report.percent(r) for r in rows]
    places, groups = list(dict.fromkeys(report.label(x, r[x]) for r in rows)), _groups(rows, by, x)
    room = max(3.2, 0.26 * len(places) * (len(groups) + 1), 0.085 * sum(len(place) + 2 for place in places))  # for the bars, and for their names
    fig, ax = (ax.figure, ax) if ax is not None else figure(width=1.8 + room, height=3.2)
    width, handles = 0.84 / max(len(groups), 1), []
    with style():
        for k, (look, (name, line)) in enumerate(zip(LOOKS, groups.items())):
            at = [places.index(report.label(x, r[x])) + (k - (len(groups) - 1) / 2) * width for r in line]
            # the face is a lighter shade, so that black hatches show in greyscale too
            heights, face = [r["value"] for r in line], _tint(look[0])
            handles.append(ax.bar(at, heights, width * 0.94, color=face, edgecolor="black", linewidth=0.6, hatch=look[3], label=name))
            for a, r in zip(at, line):
                if r["low"] is not None and r["high"] is not None:
                    for colour, thick in (("white", 3.0), ("black", 1.3)):  # a white edge, to be seen on dark hatches
                        ax.vlines(a, r["low"], r["high"], color=colour, linewidth=thick, zorder=4)
                if r["paper"] is not None:
                    ax.plot(a, r["paper"], "D", color="black", markerfacecolor="white", markersize=5, zorder=5, clip_on=False)
        if any(r["paper"] is not None for r in rows):
            handles += ax.plot([], [], "D", color="black", markerfacecolor="white", markersize=5, label="in the paper")
        if level is not None:
            handles.append(ax.axhline(level[0], color="#555555", linestyle=(0, (1, 3)), linewidth=1.2, label=level[1]))
        ax.set_xticks(range(len(places)), places)
        ax.grid(axis="x", visible=False)
        ax.set(title=title)
        _value_axis(ax, rows)
        if legend:
            aside(ax, handles=handles, handleheight=1.4)
    return fig


def joint(clouds: dict[str, tuple[Tensor, Tensor]], *, xlabel: str, ylabel: str):
    """2-D histograms on one scale, log counts in bins of 1, a panel for each name in `clouds`: x against y (any shape), with the line of least
    squares through the origin, its slope k in the title. Points with x = 0 are in the fit and not in the picture; y reaches as far as 99.9 % of the
    points, x as far as all. Returns the Figure; ValueError where every x is 0."""
    from matplotlib.colors import LogNorm

    clouds = {name: (x.double().flatten().cpu(), y.double().flatten().cpu()) for name, (x, y) in clouds.items()}
    if empty := [name for name, (x, _) in clouds.items() if not x.any()]:
        raise ValueError(f"every x of {empty[0]!r} is 0; there is no line to fit")
    shown = {name: (x[x.round() != 0], y[x.round() != 0]) for name, (x, y) in clouds.items()}
    wide = 1 + round(max(float(x.abs().max()) for x, _ in clouds.values()))
    tall = max(wide, *(round(y.abs().sort().values[int(0.999 * (len(y) - 1))].item()) for _, y in shown.values() if len(y)))
    edges = [(torch.arange(-size, size + 2) - 0.5).numpy() for size in (wide, tall)]
    fig, axes = figure(1, len(clouds), width=1.0 + 3.0 * len(clouds), height=3.1, squeeze=False, sharey=True)
    spans = [end for e in edges for end in (e[0], e[-1])]
    top = max(float(torch.histogramdd(torch.stack(pair, 1), bins=[len(e) - 1 for e in edges], range=spans).hist.max()) for pair in shown.values())
    with style():
        for ax, (name, (x, y)) in zip(axes[0], clouds.items()):
            k = (x @ y / (x @ x)).item()
            x, y = (v.numpy() for v in shown[name])
            *_, mesh = ax.hist2d(x, y, bins=edges, norm=LogNorm(1, max(top, 2)), cmin=1, rasterized=True)
            ax.plot([-wide, wide], [-k * wide, k * wide], color="#D55E00", linestyle="--")
            ax.set(title=f"{name}, k = {k:.2f}", xlabel=f"{xlabel}, 0 left out", xlim=(-wide, wide), ylim=(-tall, tall))
        axes[0, 0].set_ylabel(ylabel)
        fig.colorbar(mesh, ax=axes[0, -1], label="count")
    return fig


def histograms(
    groups: dict[str, Sequence[float]], *, label: str = "", title: str = "", bins: int = 30, span: tuple[float, float] | None = None,
    legend: bool = True, ax=None,
):  # fmt: skip
    """Histograms of several groups of numbers on common bins over `span` (from the least to the largest number), as steps filled lightly, each as a
    share of its own group. Returns the Figure. Raises ValueError for a group that is empty or not finite."""
    import seaborn

    for name, values in groups.items():
        if not len(values) or not torch.as_tensor(values, dtype=torch.float64).isfinite().all():
            raise ValueError(f"group {name!r} has {len(values)} values, which must be at least one and all finite")
    every = torch.cat([torch.as_tensor(v, dtype=torch.float64) for v in groups.values()])
    fig, ax = (ax.figure, ax) if ax is not None else figure(width=6.0, height=3.0)
    with style():
        for look, (name, values) in zip(LOOKS, groups.items()):
            seaborn.histplot(x=list(values), bins=bins, binrange=span or (every.min().item(), every.max().item()), stat="probability", element="step",
                             color=look[0], linestyle=look[2], alpha=0.18, linewidth=1.8, label=name, ax=ax)
        ax.set(xlabel=label, ylabel="share", title=title)
        if legend:
            aside(ax)
    return fig


def matrix(
    values, row_labels: Sequence[str], col_labels: Sequence[str], *, digits: int = 2, label: str = "",
    vmin: float | None = None, vmax: float | None = None, ax=None, title: str = "",
):  # fmt: skip
    """A heat map of `values` (rows x columns; a dash on white for NaN) with its numbers written in, on a scale whose lightness rises with the
    value. Returns the Figure."""
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if values.shape != (len(row_labels), len(col_labels)):
        raise ValueError(f"values have shape {tuple(values.shape)}, labels say {(len(row_labels), len(col_labels))}")
    size = 1.6 + 0.07 * max(map(len, row_labels)) + 0.62 * len(col_labels)
    fig, ax = (ax.figure, ax) if ax is not None else figure(width=size, height=1.1 + 0.45 * len(row_labels))
    with style():
        image = ax.imshow(values.numpy(), cmap="cividis", vmin=vmin, vmax=vmax, aspect="auto")
        ax.set_xticks(range(len(col_labels)), col_labels, rotation=30 if max(map(len, col_labels)) > 8 else 0)
        ax.set_yticks(range(len(row_labels)), row_labels)
        ax.set(title=title)
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for i, line in enumerate(values.tolist()):
            for j, v in enumerate(line):
                absent = v != v
                ink = "black" if absent or image.norm(v) > 0.5 else "white"
                ax.text(j, i, "-" if absent else f"{round(v, digits) + 0.0:.{digits}f}", ha="center", va="center", color=ink, fontsize=8.5)
        fig.colorbar(image, ax=ax, label=label, shrink=0.9).outline.set_visible(False)
    return fig


def _pixels(x: Tensor, what: str):
    x = x.detach().float().cpu()
    if not ((x >= -1e-6) & (x <= 1 + 1e-6)).all():  # also false for NaN
        raise ValueError(f"{what} has pixels in [{x.min():.3g}, {x.max():.3g}], not in [0,1]; clamp or rescale it first")
    x = x.clamp(0, 1).numpy()
    return x[0] if x.shape[0] == 1 else x.transpose(1, 2, 0)


def _png(fig) -> bytes:
    buffer = io.BytesIO()
    with style():
        fig.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})  # by default it names matplotlib's version
    return buffer.getvalue()


def _groups(rows: Iterable[dict], by: str, x: str) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for r in rows:
        line = groups.setdefault(report.label(by, r[by]), [])
        if any(r[x] == other[x] for other in line):
            raise ValueError(f"two rows at {by} = {r[by]!r}, {x} = {r[x]!r}; choose the rows so that {by} and {x} tell them apart")
        line.append(r)
    if len(groups) > len(LOOKS):
        raise ValueError(f"{len(groups)} different {by} in one figure, at most {len(LOOKS)} can be told apart; draw two figures")
    return groups


def _tint(colour: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.35 + 0.65 * c for c in to_rgb(colour))


def _value_axis(ax, rows: Sequence[dict]) -> None:
    units = {r["unit"] for r in rows}
    if len(units) > 1:
        raise ValueError(f"rows of different units in one figure: {', '.join(sorted(units))}")
    unit = units.pop() if units else ""
    ax.set_ylabel("accuracy (%)" if unit == "%" else unit)
    if unit == "%":
        ax.set_ylim(0, 102)
