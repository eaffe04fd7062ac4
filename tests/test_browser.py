"""Notebook 95 in JupyterLab in a real browser: every explorer draws, every control changes its picture from the keyboard, no request
leaves the machine.

Chromium comes from the system (`apt-get install chromium`); without it, or without Playwright, the test is skipped. ADVLAB_BROWSER_PROFILE chooses
another profile than smoke, ADVLAB_SCREENSHOTS a folder for pictures of the explorers."""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pytest

from advlab import paths

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EXPLORERS = ("AttackExplorer", "GradientMapExplorer", "AmplificationExplorer", "SensitivityExplorer", "SimilarityExplorer", "TransformExplorer",
             "ComparisonBrowser")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
MINUTES = 60_000  # ms; how long to wait for what must come, never asserted

SLIDERS, CHOICES = ".noUi-target:not([disabled]) .noUi-handle:visible", "select:enabled:visible"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine; apt-get install chromium")]

STATE = """async () => {
  const cells = window.jupyterapp.shell.currentWidget.model.toJSON().cells.filter(c => c.cell_type === 'code');
  return cells.map(c => ({count: c.execution_count, outputs: c.outputs}));
}"""
RUN = """async () => {
  const app = window.jupyterapp; await app.restored;
  await app.shell.currentWidget.sessionContext.ready;
  window.finished = false;
  app.commands.execute('notebook:run-all-cells').then(() => { window.finished = true; });
}"""
WATCH = """(root) => {
  if (window.times) { window.times.length = 0; return; }
  window.times = []; let began = null;
  root.addEventListener('keydown', () => { began = performance.now(); }, true);
  new MutationObserver(() => { if (began !== null && root.querySelector('img')) { window.times.push(performance.now() - began); began = null; } })
    .observe(root.querySelector('img').closest('.widget-html-content'), {childList: true, subtree: true});
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that serves a copy of the notebook, with folders of its own."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copy(paths.notebooks() / "95_explore.ipynb", home)
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))  # every explorer is on the page
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(home / kind.lower()) for kind in ("WORKSPACES", "SETTINGS")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=",
               f"--ServerApp.root_dir={home}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", *(["--allow-root"] if ROOT else [])]
    environment = os.environ | folders | {"ADVLAB_PROFILE": os.environ.get("ADVLAB_BROWSER_PROFILE", "smoke"), "OMP_NUM_THREADS": "1"}
    with (home / "log").open("w") as log, subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT) as server:
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{address}/api", timeout=5).read()
                    break
                except (urllib.error.URLError, OSError):
                    assert server.poll() is None, (home / "log").read_text()
                    time.sleep(0.2)
            yield address
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(lab):
    """The notebook after all of its cells have run; page.hosts holds every address that it asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; pip install advlab[test]")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if ROOT else [])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(3 * MINUTES)
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(urlparse(request.url).hostname or urlparse(request.url).scheme))
        page.on("websocket", lambda socket: page.hosts.add(urlparse(socket.url).hostname))
        page.goto(f"{lab}/lab/tree/95_explore.ipynb")
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
        page.evaluate(RUN)
        page.wait_for_function("() => window.finished", timeout=20 * MINUTES)
        yield page
        browser.close()


def shown(root) -> tuple[str, str]:
    """The picture of an explorer and the words that go with it, once nothing is being drawn."""
    image = root.locator("img").first
    image.wait_for(state="visible")
    return image.get_attribute("src"), image.get_attribute("alt")


def move(page, root, act) -> tuple[str, str]:
    before = shown(root)
    act()
    page.wait_for_function("([root, src, alt]) => { const i = root.querySelector('img'); return i && i.src && (i.src !== src || i.alt !== alt); }",
                           arg=[root.element_handle(), *before])
    return shown(root)


def test_all_cells_run_without_an_error_and_every_explorer_shows_a_picture(page):
    cells = page.evaluate(STATE)
    assert all(cell["count"] for cell in cells)
    assert [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"] == []
    for name in EXPLORERS:
        src, alt = shown(page.locator(f".{name}"))
        assert src.startswith("data:image/png;base64,") and len(alt) > 40


def test_screenshots_on_demand(page):
    folder = os.environ.get("ADVLAB_SCREENSHOTS")
    if not folder:
        pytest.skip("ADVLAB_SCREENSHOTS is not set")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in EXPLORERS:
        page.locator(f".{name}").screenshot(path=f"{folder}/{name}.png")
    page.locator(".AttackExplorer").scroll_into_view_if_needed()
    page.screenshot(path=f"{folder}/page.png")


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_control_changes_the_picture_from_the_keyboard(page, name):
    root = page.locator(f".{name}")
    sliders, choices = (root.locator(kind).element_handles() for kind in (SLIDERS, CHOICES))
    assert len(sliders) + len(choices) >= 2
    for slider in sliders:
        slider.focus()
        at_end = slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")
        move(page, root, lambda at_end=at_end: page.keyboard.press("ArrowLeft" if at_end else "ArrowRight"))
    for select in filter(lambda select: select.is_enabled(), choices):  # one choice may disable another
        values, now = select.evaluate("e => [[...e.options].map(o => o.text), e.selectedIndex]")
        truth = shown(root)[1].split("True label ")[-1].split(";")[0]  # which is no target
        other = next(k for k, value in enumerate(values) if k != now and value != truth)
        select.focus()
        move(page, root, lambda select=select, other=other: select.select_option(index=other))
    assert [out for cell in page.evaluate(STATE) for out in cell["outputs"] if out["output_type"] == "error"] == []


@pytest.mark.parametrize("name", EXPLORERS)
def test_the_tab_key_reaches_every_control_and_each_has_its_label(page, name):
    root = page.locator(f".{name}")
    controls = root.locator(f"{SLIDERS}, {CHOICES}")
    controls.first.focus()
    wanted = controls.element_handles()
    reached = set()
    for _ in range(4 * len(wanted)):
        reached |= {k for k, handle in enumerate(wanted) if handle.evaluate("e => e === document.activeElement")}
        page.keyboard.press("Tab")
    assert reached == set(range(len(wanted)))
    labels = root.locator(".widget-label:visible").all_text_contents()
    assert len([text for text in labels if text.strip()]) >= len(wanted)


def test_how_long_a_change_of_eps_takes(page, record_property):
    root = page.locator(".AttackExplorer")
    attack, handle = root.locator("select").nth(1), root.locator(".noUi-handle").nth(1)
    for name in ("fgsm", "pgd"):
        if attack.input_value() != name:
            move(page, root, lambda name=name: attack.select_option(label=name))
        root.evaluate(WATCH)
        for k in range(11):
            handle.focus()
            move(page, root, lambda k=k: page.keyboard.press("ArrowLeft" if k % 2 else "ArrowRight"))
        times = sorted(page.evaluate("() => window.times"))
        assert len(times) >= 10
        middle = statistics.median(times)
        record_property("note", f"from key to new picture, {name}: median {middle:.0f} ms, slowest {times[-1]:.0f} ms of {len(times)}")


def test_no_request_leaves_the_machine(page, record_property):
    record_property("note", f"hosts that the page asked: {', '.join(sorted(map(str, page.hosts)))}")
    assert "127.0.0.1" in page.hosts and page.hosts <= {"127.0.0.1", "data", "blob"}
