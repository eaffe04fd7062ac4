"""Where things lie: every path is worked out from the package, so that a notebook finds them from any folder (nbval starts a kernel in the
notebook's folder, papermill in the caller's). `$ADVLAB_HOME` moves everything that is written; `$ADVLAB_DATA` adds a folder of data archives."""

import os
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent  # the checkout: notebooks/ and committed results live here


def home() -> Path:
    """The folder under which data/, figures/ and runs/ are written: `$ADVLAB_HOME`, else the checkout."""
    return Path(os.environ.get("ADVLAB_HOME") or SOURCE).expanduser().resolve()


def notebooks() -> Path:
    return SOURCE / "notebooks"


def archives() -> list[Path]:
    """Folders searched for data sets, in order: `$ADVLAB_DATA`, then data/raw."""
    extra = os.environ.get("ADVLAB_DATA")
    return ([Path(extra).expanduser().resolve()] if extra else []) + [home() / "data" / "raw"]


def checkpoints() -> Path:
    return home() / "data" / "checkpoints"


def published() -> Path:
    """Trained networks that are part of the checkout, in the same form as checkpoints."""
    return SOURCE / "data" / "weights"


def results(profile: str, dataset: str) -> Path:
    return home() / "data" / "results" / profile / dataset


def figures(profile: str, dataset: str) -> Path:
    return home() / "figures" / profile / dataset


def runs(profile: str, dataset: str) -> Path:
    return home() / "runs" / profile / dataset
