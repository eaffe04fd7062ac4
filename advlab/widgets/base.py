"""What the explorers share: controls, one thread that draws, a picture with its text for screen readers, a status line, progress and Cancel.

A change of a control returns at once; the drawing happens in one worker thread for all explorers, so that no two of them use a network at the same
time. A drawing that was overtaken by a newer change, or cancelled, stops at its next step and is never shown. Drawings use their own generators
and free-standing figures in matplotlib's present style: no global state is read or written. Do not train a network while its explorer draws."""

import base64
import html
import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import ipywidgets
import torch
from ipywidgets import HTML, Box, Button, Dropdown, FloatProgress, IntSlider, Layout, VBox
from torch import Tensor, nn

from advlab.attacks.core import Model
from advlab.plots import LOOKS

WIDTH, DPI = 9.2, 100  # of a picture, in inches and dots an inch: it fits beside JupyterLab's side bar on a screen of 1280 dots
_worker = ThreadPoolExecutor(1, "explorer")


class Cancelled(Exception):
    """Raised by Job.tick to leave a drawing that nobody waits for any more."""


class Job:
    """One drawing on its way. `total` is how many steps it expects; `tick` counts one, and raises Cancelled where the drawing is out of date."""

    def __init__(self, stopped: Callable[[], bool], show: Callable[[float], None]):
        self.total, self.done, self._stopped, self._show = 1, 0, stopped, show
        self._start = self._shown = time.monotonic()

    def tick(self) -> None:
        if self._stopped():
            raise Cancelled
        self.done, now = self.done + 1, time.monotonic()
        if now - self._start > 0.3 and now - self._shown > 0.1:  # no flicker for what is quick
            self._shown = now
            self._show(min(self.done / self.total, 1.0))

    def watch(self, model: Model) -> nn.Module:
        """The model, each of whose forward passes is a tick: what makes any attack on it show its progress and stop when asked."""
        return _Watched(model, self)


class _Watched(nn.Module):
    def __init__(self, model: Model, job: Job):
        super().__init__()
        self.model, self.job = model, job

    def forward(self, x: Tensor) -> Tensor:
        self.job.tick()
        return self.model(x)


class Explorer(VBox):
    """The base. A subclass builds its controls, a dict of widgets by name, and has draw(job, **values) -> (figure, alt text, status line), which runs
    in the worker under no_grad with the controls' values and calls job.tick() between its steps.

    png: the picture's bytes, None where there is none. alt: what it shows, in words. status: the line above it. error: the exception that the last
    drawing met, or None. Set `explorer.controls[name].value`, then `wait()`."""

    draw: Callable[..., tuple]

    def __init__(self, controls: Mapping[str, ipywidgets.Widget]):
        self.controls, self.png, self.alt, self.status, self.error = dict(controls), None, "", "", None
        self._idle = threading.Condition()  # guards what follows
        self._version, self._cancelled, self._busy = 0, -1, False
        self._view, self._line = HTML(), HTML()
        self._bar = FloatProgress(max=1.0, description="Working", layout=Layout(visibility="hidden", width="200px", flex="none"))
        self._stop = Button(description="Cancel", tooltip="Stop the drawing under way", disabled=True, layout=Layout(width="84px", flex="none"))
        self._stop.on_click(lambda _: self.cancel())
        for name, control in self.controls.items():
            control.style.description_width = "76px"
            control.tooltip = control.tooltip or f"{control.description} ({name})"
            control.observe(self.refresh, "value")
        shelf = Box([*self.controls.values(), self._stop, self._bar], layout=Layout(flex_flow="row wrap"))
        super().__init__([shelf, self._line, self._view], layout=Layout(max_width=f"{int(WIDTH * DPI) + 60}px"))
        self.add_class("advlab-explorer")
        self.add_class(type(self).__name__)
        self.refresh()

    def refresh(self, _=None) -> None:
        """Draw anew with the controls' present values; a drawing under way is given up."""
        with self._idle:
            self._version += 1
            if self._busy:
                return  # the worker sees the new version at its next step
            self._busy = True
        _worker.submit(self._work)

    def cancel(self) -> None:
        """Stop the drawing under way; the picture is taken away, because it would not fit the controls. Any change draws again."""
        with self._idle:
            self._cancelled = self._version

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is being drawn; False where `timeout` seconds were not enough."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._busy, timeout)

    def _work(self) -> None:
        while True:
            with self._idle:
                version = self._version
            job = Job(lambda v=version: v == self._cancelled or v != self._version, self._progress)
            png, alt, status, error = None, "no picture", "", None
            try:
                job.tick()
                with torch.no_grad():
                    figure, alt, status = self.draw(job, **{name: control.value for name, control in self.controls.items()})
                png = to_png(figure)
            except Cancelled:
                status = "Cancelled. Any change draws again."
            except Exception as problem:
                error, alt, status = problem, "no picture", f"Not drawn: {problem}" if isinstance(problem, ValueError) else f"Not drawn: {problem!r}"
            with self._idle:
                if version == self._version:  # else it was overtaken: once more
                    self.png, self.alt, self.status, self.error = png, alt, status, error
                    self._publish()
                    self._busy = False
                    self._idle.notify_all()
                    return

    def _publish(self) -> None:
        source = "" if self.png is None else f'src="data:image/png;base64,{base64.b64encode(self.png).decode()}" style="max-width:100%;height:auto"'
        self._view.value = f'<img alt="{html.escape(self.alt)}" {source}>' if self.png else ""
        self._line.value = f'<span role="status" style="line-height:1.4;display:block">{html.escape(self.status)}</span>'
        self._bar.layout.visibility, self._stop.disabled = "hidden", True

    def _progress(self, share: float) -> None:
        self._bar.value, self._bar.layout.visibility, self._stop.disabled = share, "visible", False

    def _repr_mimebundle_(self, **kwargs):
        """The live widgets and, for where nobody can move a slider (nbval, papermill, a page on the web), the first picture."""
        self.wait(120)
        bundle = super()._repr_mimebundle_(**kwargs) | {"text/plain": f"{type(self).__name__}: {self.alt}"}
        return bundle if self.png is None else bundle | {"image/png": base64.b64encode(self.png).decode()}


class ImageExplorer(Explorer):
    """An Explorer of images x (N, C, H, W) in [0, 1] with labels y (N,), and of one model(x) -> logits or several by name, in eval mode. classes are
    the labels' names."""

    def __init__(self, models: Model | Mapping[str, Model], x: Tensor, y: Tensor, classes: Sequence[str] | None, controls: Mapping):
        image = slider(IntSlider, "Image", "Number of the image", 0, 0, 0, 1)
        every = {"model": choice("Model", [""], "The network that is looked into"), "image": image, **controls}
        self._adopt(models, x, y, classes, every)
        super().__init__(every)

    def replace(self, models=None, x: Tensor | None = None, y: Tensor | None = None, classes: Sequence[str] | None = None) -> None:
        """Other models, images, labels or class names, those not given staying as they are; every control keeps its value where it still exists."""
        def one(new, old):
            return old if new is None else new

        self._adopt(one(models, self.models), one(x, self.x), one(y, self.y), one(classes, self.classes), self.controls)
        self.refresh()

    def _adopt(self, models, x, y, classes, controls) -> None:
        models = dict(models) if isinstance(models, Mapping) else {"model": models}
        if x.ndim != 4 or len(x) != len(y) or not len(x) or not models:
            raise ValueError(f"an explorer needs a model, and images (N, C, H, W) with a label each; got {tuple(x.shape)} and {len(y)} labels")
        self.models, self.x, self.y = models, x, y
        if classes is None:
            with torch.no_grad():
                classes = [str(k) for k in range(next(iter(models.values()))(x[:1]).shape[1])]
        self.classes, self.kept = list(classes), {}
        options(controls["model"], list(models))
        controls["image"].value, controls["image"].max = min(controls["image"].value, len(x) - 1), len(x) - 1

    def remember(self, key, make: Callable):
        """make(), once for each key until images or models change; what was begun before such a change is not kept after it."""
        kept = self.kept
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def said(self, logits: Tensor) -> str:
        """The prediction of logits (1, L) with its probability, as "coffee 93 %"."""
        p, k = logits.softmax(1).max(1)
        return f"{self.classes[int(k)]} {p.item():.0%}"


# --- controls and pictures ------------------------------------------------------------------------------------------------------------------


def choice(description: str, values: Sequence, tooltip: str) -> Dropdown:
    return Dropdown(options=list(values), description=description, tooltip=tooltip, layout=Layout(width="250px"))


def options(control, values: Sequence) -> None:
    """Give a choice these options; it keeps its value where that is among them, and is hidden where there is nothing to choose."""
    before = control.value
    control.options = list(values)
    if before in control.options:
        control.value = before
    control.layout.display = None if len(control.options) > 1 else "none"


def only_where(control, chooser, fits: Callable) -> None:
    """Disable a control while the chooser's value does not fit, because it would change nothing."""
    def follow(_=None) -> None:
        control.disabled = not fits(chooser.value)

    chooser.observe(follow, "value")
    follow()


def slider(kind, description: str, tooltip: str, value, low, high, step):
    """An IntSlider or FloatSlider that reports when it is let go."""
    form = {"readout_format": ".2g"} if kind is not IntSlider and step < 0.1 else {}
    form |= {"continuous_update": False, "layout": Layout(width="290px")}
    return kind(value, min=low, max=high, step=step, description=description, tooltip=tooltip, **form)


def figure(height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")


def place(fig, left: float, bottom: float, width: float, height: float, title: str = ""):
    """Axes at a place given in inches; fixed places are drawn in half the time that a layout engine takes."""
    w, h = fig.get_size_inches()
    ax = fig.add_axes((left / w, bottom / h, width / w, height / h))
    ax.set_title(title, fontsize=10, pad=4)
    ax.tick_params(labelsize=8.5)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def picture(fig, image: Tensor, left: float, bottom: float, side: float, title: str = "", *, below: str = "", size: float = 10, scale=(0.0, 1.0),
            cmap: str = "gray") -> None:
    """An image (C, H, W), cut to [0, 1], or a map (H, W) drawn from scale[0] to scale[1], in a square of `side` inches with words above and below.
    Without axes, which would take most of a drawing's time."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    v = image.detach().float().cpu()
    v = v[0] if v.ndim == 3 and len(v) == 1 else v
    if v.ndim == 2:
        v = torch.from_numpy(colormaps[cmap](((v - scale[0]) / max(scale[1] - scale[0], 1e-12)).clamp(0, 1).numpy())[..., :3]).permute(2, 0, 1)
    wide, high = (round(side * DPI * n / max(v.shape[1:])) for n in (v.shape[2], v.shape[1]))
    v = nn.functional.interpolate(v[None].float().clamp(0, 1), (high, wide), mode="nearest-exact" if high >= v.shape[1] else "area")[0]
    x, y, (w, h) = round(left * DPI), round(bottom * DPI), fig.get_size_inches() * DPI
    fig.figimage(v.permute(1, 2, 0).numpy(), x, y, origin="upper")
    fig.add_artist(Rectangle((x / w, y / h), wide / w, high / h, transform=fig.transFigure, fill=False, edgecolor="#BBBBBB", linewidth=0.5))
    for text, at, anchor in ((title, y + high + 5, "bottom"), (below, y - 4, "top")):
        if text:
            fig.text((x + wide / 2) / w, at / h, text, fontsize=size, ha="center", va=anchor)


def line(ax, k: int, x, y, label: str, **more) -> None:
    colour, marker, dash, _ = LOOKS[k % len(LOOKS)]
    ax.plot(x, y, color=colour, marker=marker, linestyle=dash, linewidth=1.6, markersize=4.5, label=label, **more)


def to_png(fig) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(fig).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
