"""Where things lie: every path is worked out from the package, so that a notebook finds them from any folder (nbval starts a kernel in the
notebook's folder, papermill in the caller's). `$ADVLAB_HOME` moves everything that is written; `$ADVLAB_DATA` adds a folder of data archives."""

import os
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent  # the checkout: notebooks/ and committed results live here
COMMITTED = ("standard", "paper")  # profiles whose results and figures are part of the checkout


class UserError(ValueError):
    """What somebody can put right: the command line prints the message, without a traceback."""


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


def stored(kind: str, profile: str) -> Path:
    """Where to read a profile's "results" or "figures": the folder that runs write to or, where none of a COMMITTED profile has run there, the
    checkout's. Below it lie folders of data sets."""
    if profile == "smoke":
        return home() / "runs" / profile
    ours = profile not in COMMITTED or results(profile, "any").parent.is_dir()
    return (home() if ours else SOURCE) / {"results": "data/results", "figures": "figures"}[kind] / profile


def runs(profile: str, dataset: str) -> Path:
    return home() / "runs" / profile / dataset
