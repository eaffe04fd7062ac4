"""The notebook series: which notebooks there are, what their parameters are, and what a run would change in them (`advlab.pipeline` runs them).

A notebook's cell tagged `parameters` holds the quick values as literals. `notebooks/params/<profile>.yaml` overrides them, in a section `common:`
for every notebook and in one named after each notebook, and then in one for a notebook on one data set, `NN_slug@dataset:`; -p name=value comes
last. A name that a notebook does not know, or a value of another
type, is an error before anything runs (papermill itself only warns)."""

import ast
import difflib
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advlab import paths

PROFILES = ("smoke", "quick", "standard", "paper")


class SeriesError(paths.UserError):
    """An unknown notebook, profile or parameter, or a notebook that failed; the message says which, and what to do."""


def cores() -> int:
    """How many cores this process may use, where the system tells; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def names() -> list[str]:
    """Every notebook of the series by its name NN_slug, in order."""
    return sorted(p.stem for p in paths.notebooks().glob("[0-9][0-9]_*.ipynb"))


def pick(wanted: Sequence[str] = ()) -> list[str]:
    """Notebooks by number (01), by name or by file; all of them when none is named."""
    known = names()
    if not wanted:
        return known
    chosen = set()
    for word in wanted:
        stem = Path(word).stem
        found = [name for name in known if stem in (name, name[:2])]
        if not found:
            raise SeriesError(f"unknown notebook {word!r}; the series has {', '.join(known)}")
        chosen.update(found)
    return sorted(chosen)


def code_cells(name: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Each code cell of a notebook as its source and its tags."""
    file = paths.notebooks() / f"{name}.ipynb"
    return _code_cells(file, file.stat().st_mtime_ns)


@functools.lru_cache
def _code_cells(file: Path, _changed: int):
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        return tuple(("".join(c["source"]), tuple(c["metadata"].get("tags", ()))) for c in cells if c["cell_type"] == "code")
    except (ValueError, KeyError, TypeError) as error:
        raise SeriesError(f"{file} is no notebook of format 4: {error!r}") from None


def parameters(name: str) -> dict[str, Any]:
    """The parameters of a notebook and their quick values, read from the literals of its tagged cell."""
    tagged = [source for source, tags in code_cells(name) if "parameters" in tags]
    if len(tagged) != 1:
        raise SeriesError(f"notebook {name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one")
    values = {}
    for statement in ast.parse(tagged[0]).body:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1 or not isinstance(statement.targets[0], ast.Name):
            raise SeriesError(f"the parameters cell of {name} may only assign literals to names, found: {ast.unparse(statement)}")
        try:
            values[statement.targets[0].id] = ast.literal_eval(statement.value)
        except ValueError:
            raise SeriesError(f"in the parameters cell of {name}, {ast.unparse(statement)} is no literal") from None
    return values


def overrides(name: str, profile: str, dataset: str | None = None) -> dict[str, Any]:
    """What a profile changes in a notebook: its sections `common`, NN_slug and, for a data set asked for, NN_slug@dataset, checked against the
    parameters cell."""
    import yaml

    file = paths.notebooks() / "params" / f"{profile}.yaml"
    if not file.exists():
        known = sorted(p.stem for p in file.parent.glob("*.yaml"))
        raise SeriesError(f"unknown profile {profile!r}; choose one of {', '.join(known)}")
    sections = yaml.safe_load(file.read_text()) or {}
    stray = {section.split("@")[0] for section in sections} - {"common", *names()}
    if stray:
        raise SeriesError(f"{file.name} has a section {sorted(stray)[0]!r} that is neither 'common' nor a notebook")
    values = {**(sections.get("common") or {}), **(sections.get(name) or {}), **(sections.get(f"{name}@{dataset}") or {})}
    return checked(name, {"profile": profile, **values}, file.name)


def checked(name: str, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values, if the notebook knows every name and each has the type of the notebook's own value."""
    known = parameters(name)
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
            raise SeriesError(f"notebook {name} has no parameter {key!r} (from {source}){hint}")
        default = known[key]
        number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if default is not None and value is not None and not number and type(value) is not type(default):
            raise SeriesError(f"parameter {key!r} of {name} takes a {type(default).__name__}, got {value!r} (from {source})")
    return dict(values)


def from_environment(name: str) -> dict[str, Any]:
    """What `$ADVLAB_PROFILE` changes in a notebook, {} when it is not set: nbval runs the committed notebooks with it at `smoke`."""
    profile = os.environ.get("ADVLAB_PROFILE")
    return overrides(name, profile) if profile else {}


def plan(wanted: Sequence[str], profile: str, dataset: str | None, given: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each chosen notebook with the values that differ from its own, all checked. `given` must be known to one of the notebooks at least."""
    chosen, steps = pick(wanted), []
    asked = {**({"dataset": dataset} if dataset else {}), **given}
    for key in asked:
        if not any(key in parameters(name) for name in chosen):
            checked(chosen[0], {key: asked[key]}, "the command line")
    for name in chosen:
        known = parameters(name)
        own = checked(name, {k: v for k, v in asked.items() if k in known}, "the command line")
        values = overrides(name, profile, asked.get("dataset")) | own
        steps.append((name, {k: v for k, v in values.items() if known[k] != v}))
    for kind in {values.get("dataset", parameters(name).get("dataset")) for name, values in steps} - {None, "skimage10"}:
        if not re.fullmatch(r"\w[\w.-]*", kind):
            raise SeriesError(f"a run takes a data set by its name, which its results get, not {kind!r}; $ADVLAB_DATA names the folder of NAME.npz")
        from advlab import data  # imports torch, which takes seconds: not for the embedded set

        data.find(kind)
    return steps
