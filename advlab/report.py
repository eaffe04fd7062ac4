"""Results are data: a notebook's rows go to one JSON file (and a CSV beside it), are checked on the way in and out, and every table is
made from them. Figures are in `advlab.plots`, the papers' numbers in `advlab.reference`.

A document is `{"run": {...}, "rows": [...]}`. `run` says where the numbers come from and may differ between two runs; `rows` must not
(timings in a field `seconds` apart), so two runs are compared by their rows. A row is flat: the core fields below, plus any further
scalars (metric, dataset, trained_on, queries, ...)."""

import csv
import difflib
import io
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from advlab import paths, reference

# field: (type, may be null); eps on the [0,1] scale, `paper` in the row's own unit, low and high a 95 % interval (Wilson for accuracies)
FIELDS = {
    "exhibit": (str, False), "system": (str, False), "threat": (str, True), "attack": (str, True), "norm": (str, True),
    "eps": (float, True), "steps": (int, True), "n": (int, True), "correct": (int, True), "value": (float, False),
    "unit": (str, False), "low": (float, True), "high": (float, True), "seed": (int, True), "paper": (float, True),
}  # fmt: skip
RUN = ("parameters", "seed", "device", "threads", "versions", "commit", "seconds")
BESIDES = ("ladder", "comparison", "benchmark", "study")  # rows that belong to no exhibit of a paper


class SchemaError(ValueError):
    """A results document that does not keep the schema; the message names the row and the field."""


def row(**fields) -> dict:
    """One result row: the core fields in order, absent ones null, then the extras. Scalars of torch and NumPy become plain numbers.
    Raises SchemaError for a value of the wrong kind, and for an extra whose name looks like a misspelt core field."""
    for name in set(fields) - set(FIELDS):
        if near := difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8):
            raise SchemaError(f"unknown field {name!r}: did you mean {near[0]!r}?")
    full = {name: _plain(v) for name, v in {**dict.fromkeys(FIELDS), **fields}.items()}
    _check_row(full, "row", _known_exhibits())
    return full


def run_info(parameters: dict, seed: int, started: float, *, device=None) -> dict:
    """Where numbers come from: the notebook's parameters, seed, device (unless given, the one that `training.device` picks), torch
    threads, versions, git commit (None outside a checkout) and the seconds since `started`, a reading of `time.time()`."""
    import platform
    from importlib import metadata

    import torch

    from advlab import training

    device = training.device(device)
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "advlab"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "parameters": {k: _plain(v) for k, v in parameters.items()}, "seed": seed, "device": name, "threads": torch.get_num_threads(),
        "versions": versions, "commit": _commit(), "seconds": round(time.time() - started, 1),
    }  # fmt: skip


def validate(document: dict) -> dict:
    """Return `document` if it keeps the schema: `run` with its seven entries, `rows` flat dicts with every core field, numbers finite,
    low <= value <= high, correct <= n, the exhibit an id of `reference.exhibits()` or one of ladder, comparison, benchmark, study. Raises
    SchemaError naming the row and the field."""
    if not isinstance(document, dict) or not isinstance(document.get("run"), dict) or not isinstance(document.get("rows"), list):
        raise SchemaError('results must be {"run": {...}, "rows": [...]}')
    if missing := [name for name in RUN if name not in document["run"]]:
        raise SchemaError(f"run lacks {missing[0]!r}; make it with report.run_info")
    try:
        json.dumps(document["run"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SchemaError(f"run cannot be written as JSON: {error}") from None
    known = _known_exhibits()
    for i, r in enumerate(document["rows"]):
        _check_row(r, f"row {i}", known)
    return document


def save_results(notebook: str, rows: Iterable[dict], *, run: dict, profile: str, dataset: str, where: Path | None = None) -> Path:
    """Write `rows` and `run` to data/results/<profile>/<dataset>/<notebook>.json and a CSV beside it, and return the JSON's path. The
    profile "smoke" writes under runs/ instead; `where` overrides the folder. Nothing is written unless the document is valid
    (SchemaError), and a reader sees the old file or the new one, never a part."""
    document = {"run": {**run, "notebook": notebook, "profile": profile, "dataset": dataset}, "rows": [dict(r) for r in rows]}
    validate(document)
    path = target("results", profile, dataset, f"{notebook}.json", where)
    fields = list(dict.fromkeys([*FIELDS, *(name for r in document["rows"] for name in r)]))
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(document["rows"])
    lines = ",\n  ".join(json.dumps(r, allow_nan=False) for r in document["rows"])  # a row a line: diffs stay readable
    text = f'{{\n "run": {json.dumps(document["run"], indent=2, allow_nan=False)},\n "rows": [\n  {lines}\n ]\n}}\n'
    write_atomic(path.with_suffix(".csv"), sheet.getvalue().encode())
    return write_atomic(path, text.encode())


def load_results(notebook: str, *, profile: str, dataset: str, where: Path | None = None) -> dict:
    """Read and validate what `save_results` wrote. Raises FileNotFoundError saying how to make it, SchemaError for a damaged file."""
    path = target("results", profile, dataset, f"{notebook}.json", where)
    path = path if where else paths.stored("results", profile) / dataset / path.name
    if not path.exists():
        raise FileNotFoundError(f"no results at {path}; run notebook {notebook} with profile {profile} and data set {dataset} first")
    try:
        return validate(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # of JSON, of Unicode, or of the schema
        raise SchemaError(f"{path} is not a results file: {error}; delete it and run the notebook again") from None


Names = str | Sequence[str]


def table(rows: Iterable[dict], *, index: Names = "system", columns: Names = "attack", digits: int = 1, interval: bool = False):
    """A pandas DataFrame of text cells "here (paper)", or "here" where the paper prints no number, with rows and columns in order of
    first appearance; accuracies in per cent; `interval` adds "[low, high]". Raises ValueError if two rows fall into one cell."""
    import pandas as pd

    def cell(r):
        parts = [f"{r['value']:.{digits}f}"]
        if interval and r.get("low") is not None and r.get("high") is not None:
            parts.append(f"[{r['low']:.{digits}f}, {r['high']:.{digits}f}]")
        if r.get("paper") is not None:
            parts.append(f"({r['paper']:.{digits}f})")
        return " ".join(parts)

    index, columns = [[names] if isinstance(names, str) else list(names) for names in (index, columns)]
    cells: dict = {}
    for r in map(percent, rows):
        i, c = [tuple(label(name, r.get(name)) for name in names) for names in (index, columns)]
        if c in cells.setdefault(i, {}):
            raise ValueError(f"two rows for {' / '.join(i + c)}; give a field that tells them apart in index or columns")
        cells[i][c] = cell(r)
    across = list(dict.fromkeys(c for line in cells.values() for c in line))
    if not cells:
        raise ValueError("no rows to tabulate")
    frame = pd.DataFrame([[line.get(c, "") for c in across] for line in cells.values()])
    frame.index, frame.columns = pd.MultiIndex.from_tuples(cells, names=index), pd.MultiIndex.from_tuples(across, names=columns)
    if len(index) == 1:
        frame.index = frame.index.get_level_values(0)
    if len(columns) == 1:
        frame.columns = frame.columns.get_level_values(0)
    return frame


def mean_row(values, **fields) -> dict:
    """A row whose value is the mean of values (N,), with n and the normal 95 % interval of the mean (empty for a single value)."""
    n, mean = len(values), values.double().mean().item()
    half = 1.959964 * values.double().std().item() / math.sqrt(n) if n > 1 else None
    return row(value=mean, n=n, low=None if half is None else mean - half, high=None if half is None else mean + half, **fields)


def verdict(exhibit: str, *, claim: str, rows: Iterable[dict] = (), claims: dict[str, bool] | None = None, survives: bool | None = None,
            tolerance: float = 0.05, **fields) -> dict:
    """The row (system "verdict") with both verdicts on an exhibit. Every row with a paper's number is a mark, met when it lies within
    `tolerance` of it (absolute for accuracies and fractions, else relative), and so is every entry of `claims`: a statement of the paper, and
    whether it came true here. reproduced: yes (all met), partly (half or more), no. survives: True is held, False refuted, None not tested.
    value is the share of marks met. Raises ValueError without a mark."""
    rows, claims = list(rows), claims or {}
    marks = [_near(r, tolerance) for r in rows if r.get("paper") is not None] + list(claims.values())
    if not marks:
        raise ValueError(f"nothing to judge {exhibit} by: give rows with a paper's number, or claims")
    met, sizes = sum(marks), [r["n"] for r in rows if r.get("n")]
    return row(exhibit=exhibit, system="verdict", value=met / len(marks), unit="fraction", marks=len(marks), met=met, claim=claim,
               reproduced="yes" if met == len(marks) else "partly" if 2 * met >= len(marks) else "no", tolerance=tolerance,
               survives={True: "held", False: "refuted", None: "not tested"}[survives],
               statements="; ".join(f"{text}: {'held' if ok else 'not held'}" for text, ok in claims.items()) or None,
               **{"n": min(sizes, default=None)} | fields)


def _near(r: dict, tolerance: float) -> bool:
    scale = 1.0 if r["unit"] in ("accuracy", "fraction") else abs(r["paper"])
    return abs(r["value"] - r["paper"]) <= tolerance * scale + 1e-9


def verdicts(rows: Iterable[dict]):
    """The verdict rows among `rows` as a pandas DataFrame that a notebook shows uncut: exhibit, claim, both verdicts, what they rest on. ValueError
    if there is none."""
    import pandas as pd

    class Uncut(pd.DataFrame):
        def _repr_html_(self):
            with pd.option_context("display.max_colwidth", None):
                return super()._repr_html_()

    lines = [{"exhibit": r["exhibit"], "claim": r["claim"],
              "number reproduced": counted(r),
              "survives an adaptive attack": r["survives"], "statements": r["statements"] or "", "n": "" if r["n"] is None else f"{r['n']:,}"}
             for r in rows if r["system"] == "verdict"]
    if not lines:
        raise ValueError("no verdict among the rows; make them with report.verdict")
    return Uncut(pd.DataFrame(lines).set_index("exhibit"))


def counted(r: dict) -> str:
    """The first verdict of a verdict row in words: of its marks, how many numbers lie near the paper's and how many statements came true."""
    said = (r["statements"] or "").split("; ") if r["statements"] else []
    true = sum(": held" in text for text in said)
    numbers = [f"{r['met'] - true} of {r['marks'] - len(said)} numbers within {r['tolerance']:g}"] if r["marks"] > len(said) else []
    return f"{r['reproduced']} ({', '.join(numbers + ([f'{true} of {len(said)} statements'] if said else []))})"


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    rows = [list(header), *map(list, lines)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def share(row: dict) -> str:
    """An accuracy with its interval, in per cent."""
    return f"{100 * row['value']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def percent(r: dict) -> dict:
    """The row with an accuracy or fraction, its interval and the paper's number turned into per cent, for display; other rows as they
    are."""
    if r["unit"] not in ("accuracy", "fraction"):
        return r
    scaled = {name: None if r.get(name) is None else 100 * r[name] for name in ("value", "low", "high", "paper")}
    return {**r, **scaled, "unit": "%"}


def label(name: str, value) -> str:
    """A field's value as a reader wants it: eps as "8/255" where it is a multiple of a half 255th, null as a dash."""
    if value is None:
        return "-"
    if name == "eps" and value and math.isclose(value * 510, round(value * 510), abs_tol=1e-4):
        return f"{round(value * 510) / 2:g}/255"
    return f"{value:g}" if isinstance(value, float) else str(value)


def target(kind: str, profile: str, dataset: str, name: str, where: Path | None = None) -> Path:
    """Where a file of `kind` "results" or "figures" goes: `where`, else the published folder, or runs/ for the profile "smoke", which
    must leave the others alone. Raises ValueError for a name that is no plain file name."""
    for part in (profile, dataset, name):
        if not re.fullmatch(r"\w[\w.-]*", part):
            raise ValueError(f"{part!r} cannot be part of a path; use letters, digits, '.', '_' and '-'")
    folder = {"results": paths.results, "figures": paths.figures}[kind]
    return Path(where or (paths.runs if profile == "smoke" else folder)(profile, dataset)) / name


def write_atomic(path: Path, data: bytes) -> Path:
    """Write `data` to a temporary name beside `path`, flush it to disk and rename it, so that `path` is never half written; returns
    `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a result from others
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _known_exhibits() -> set[str]:
    return {e["id"] for e in reference.exhibits()} | set(BESIDES)


def _plain(value):
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _check_row(r: dict, where: str, known: set[str]) -> None:
    def fail(name, what):
        raise SchemaError(f"{where}: field {name!r} {what}")

    if not isinstance(r, dict):
        raise SchemaError(f"{where} is not a dict but {r!r}")
    if names := [r[key] for key in ("exhibit", "system", "attack") if isinstance(r.get(key), str)]:
        where += f" ({', '.join(names)})"
    for name, (kind, nullable) in FIELDS.items():
        if name not in r:
            fail(name, "is missing; make rows with report.row")
        value = r[name]
        if value is None:
            if not nullable:
                fail(name, "must not be null")
        elif kind is str:
            if not isinstance(value, str) or not value:
                fail(name, f"must be a non-empty text, not {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or not math.isfinite(value):
            fail(name, f"must be {'an integer' if kind is int else 'a finite number'}, not {value!r}")
    for name in set(r) - set(FIELDS):
        value = r[name]
        if not (value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))):
            fail(name, f"must be a text, a finite number, true, false or null, not {value!r}")
    for name in ("eps", "steps", "n", "correct"):
        if r[name] is not None and r[name] < 0:
            fail(name, f"must not be negative, but is {r[name]}")
    if r["exhibit"] not in known:
        fail("exhibit", f"must be an id from exhibits.csv or one of {', '.join(BESIDES)}, not {r['exhibit']!r}")
    for low, high in (("low", "value"), ("value", "high"), ("low", "high"), ("correct", "n")):
        if r[low] is not None and r[high] is not None and r[low] > r[high] + 1e-9:
            fail(low, f"is {r[low]}, above {high} = {r[high]}")


def _commit() -> str | None:
    import subprocess

    if not (paths.SOURCE / ".git").exists():  # installed elsewhere: a commit found above would be another project's
        return None
    try:
        command = ["git", "-C", str(paths.SOURCE), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
