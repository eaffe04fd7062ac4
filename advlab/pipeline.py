"""Running the series: what each notebook depends on, the one-notebook step, and the call of Snakemake, whose rules stand in the Snakefile.

A notebook is done when its stamp, runs/<profile>/<dataset>/NN_slug.done, was written after its results were. It is stale when its code cells, its
values or a module of the package that it uses (through any number of imports) have changed, when a notebook before it ran later, or when a results
file that it wrote is gone. Outputs, text cells, comments and docstrings of modules do not count."""

import ast
import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from advlab import paths, series
from advlab.series import SeriesError


def before(name: str, names: Sequence[str]) -> list[str]:
    """The notebooks among `names` whose results or networks a notebook uses: 00 for all; within a paper the one before it; 00 and all the papers'
    for those of the nineties, which compare, judge, audit and explore."""
    earlier = [n for n in sorted(names) if n < name]
    if name[0] == "9":
        return [n for n in earlier if n[0] != "9" and n[:2] not in ("01", "02")]
    if name[0] == "0":
        return [n for n in earlier if n[:2] == "00"]
    return [n for n in earlier if n[0] == name[0]][-1:] or [n for n in earlier if n[:2] == "00"]


def behind(name: str, names: Sequence[str]) -> int:
    """How many notebooks among `names` wait for one, directly or not: the longer the chain behind it, the sooner it should start."""
    chain = {name}
    for other in sorted(names):
        if chain.intersection(before(other, names)):
            chain.add(other)
    return len(chain) - 1


def sources(name: str, running: str = "") -> list[str]:
    """What the results of a notebook depend on, as "what digest": its code cells (comments apart), every module of the package that it uses, and for
    those that fill the README's tables, the rows published under other profiles than the `running` one, whose notebooks run before them anyway."""
    lines = "\n".join(source for source, _ in series.code_cells(name)).splitlines()
    magic = [line for line in lines if line.lstrip().startswith(("%", "!"))]  # of IPython, not Python
    try:
        tree = ast.parse("\n".join(line for line in lines if line not in magic))
        found, todo = {}, _imported(tree, "")
    except SyntaxError as error:
        raise SeriesError(f"notebook {name} is not Python: {error}") from None
    while todo:
        module = todo.pop()
        if module not in found:
            found[module], further = _module(module)
            todo |= further - set(found)
    if "advlab.readme" in found:
        files = sorted(f for profile in {*paths.COMMITTED} - {running} for f in paths.stored("results", profile).glob("*/[0-8]*.json"))
        found["published results"] = _digest(*(f"{f.name} {json.loads(f.read_text(encoding='utf-8')).get('rows')}" for f in files))
    return [f"code {_digest(ast.dump(tree), *magic)}", *(f"{module} {digest}" for module, digest in sorted(found.items()))]


@functools.cache
def _module(name: str) -> tuple[str, set[str]]:
    """Digest of a module's code (comments and docstrings apart) and of its tables, and the modules that it imports. A module's table has its name;
    a package has those that are no module's."""
    file = _file(name)
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    imported = _imported(tree, name if file.name == "__init__.py" else name.rpartition(".")[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    around = sorted(file.parent.glob("*.csv"))
    tables = [t for t in around if (not t.with_suffix(".py").exists() if file.name == "__init__.py" else t.stem == file.stem)]
    return _digest(ast.dump(tree), *(table.read_text(encoding="utf-8") for table in tables)), imported


def _imported(tree: ast.AST, package: str) -> set[str]:
    """The modules of advlab that a syntax tree imports anywhere, their packages among them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    whole = {".".join(name.split(".")[: i + 1]) for name in names if name.split(".")[0] == "advlab" for i in range(name.count(".") + 1)}
    return {name for name in whole if _file(name)}


def _file(module: str) -> Path | None:
    base = paths.SOURCE.joinpath(*module.split("."))
    return next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def copy_of(name: str, profile: str, values: Mapping[str, Any]) -> Path:
    """Where the executed copy of a notebook goes; its stamp and the message of a failure lie beside it, as .done and .failed."""
    return paths.runs(profile, str(values.get("dataset", series.parameters(name).get("dataset", "none")))) / f"{name}.ipynb"


def step(name: str, profile: str, values: Mapping[str, Any], stamp: Path | None = None) -> None:
    """Execute one notebook with papermill, then write its stamp, also to `stamp` where Snakemake keeps its files elsewhere. The copy is saved after
    every cell, so that a failure leaves it; SeriesError then names notebook, cell and file, and says how to go on."""
    sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's test of addresses, of which notebooks have none: it takes 2.5 s to import
    import papermill
    from nbclient.exceptions import DeadKernelError

    from advlab import report

    out = copy_of(name, profile, values)
    os.environ.pop("ADVLAB_PROFILE", None)  # the values are in the parameters; the variable would overrule them
    begun = time.time()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in (out.with_suffix(".done"), out.with_suffix(".failed")):
            old.unlink(missing_ok=True)
        papermill.execute_notebook(paths.notebooks() / f"{name}.ipynb", out, parameters=dict(values), cwd=paths.notebooks(), kernel_name="python3",
                                   progress_bar=False, request_save_on_cell_execute=True)
        written = sorted(report.target("results", profile, "any", "any").parent.parent.glob(f"*/{name}.json"))
        done = {"notebook": name, "values": dict(values), "finished": time.time(), "seconds": round(time.time() - begun, 1),
                "results": [os.path.relpath(file, paths.home()) for file in written if file.stat().st_mtime >= begun - 1]}
        for place in {out.with_suffix(".done"), (stamp or out.with_suffix(".done")).absolute()}:
            report.write_atomic(place, json.dumps(done, indent=1).encode())
    except papermill.exceptions.PapermillExecutionError as error:
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        message = (f"notebook {name} failed in cell {error.cell_index} ({first.strip()}): {error.ename}: {error.evalue}; "
                   f"the copy up to there is {out}")
    except DeadKernelError:
        message = f"the kernel of notebook {name} died (killed, or out of memory?); the copy up to there is {out}"
    except OSError as error:
        message = f"notebook {name} could not be saved: {error.strerror} ({error.filename or out})"
    else:
        print(f"{name}: {time.time() - begun:.0f} s -> {out}", flush=True)
        return
    message += ". What was finished stays; mend the cause, then go on with `make resume`"
    with contextlib.suppress(OSError):  # the disk is full, say: it is on the terminal
        out.with_suffix(".failed").write_text(message)
    raise SeriesError(message)


def run(wanted: Sequence[str] = (), *, profile: str = "quick", dataset: str | None = None, given: Mapping[str, Any] | None = None, jobs: int = 0,
        threads: int = 1, on: str = "local", force: bool = False, resume: bool = False, dry: bool = False, refresh: bool = False,
        further: Sequence[str] = ()) -> None:
    """Run the notebooks that are stale, and print what ran; dry=True prints which are stale, and why. Only the notebooks `wanted` run, whatever
    they depend on.

    jobs notebooks at a time (0: as many as fit the cores) with `threads` threads each, on which results depend in the last digits, as they do not
    on `jobs`. `on`: a folder with Snakemake's options, one of profiles/ by name. resume=True takes the lock of a killed run away.
    refresh=True puts the outputs into the notebooks themselves. `further` goes to Snakemake. SeriesError names what failed."""
    steps = series.plan(wanted, profile, dataset, given or {})
    options = next((p for p in (paths.SOURCE / "profiles" / on, Path(on).resolve()) if (p / "config.yaml").is_file()), None)
    if options is None:
        raise SeriesError(f"no config.yaml in {Path(on).resolve()}: --on takes local, slurm, cloud or a folder with Snakemake's options")
    if jobs < 0 or threads < 1:
        raise SeriesError(f"at least one job and one thread, got {jobs} and {threads}")
    copies = {name: copy_of(name, profile, values) for name, values in steps}
    folder = paths.home() / "runs" / profile
    request = {"wanted": list(wanted), "profile": profile, "dataset": dataset, "given": dict(given or {}), "threads": threads}
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(paths.SOURCE / "Snakefile"), "--directory", str(folder), "--workflow-profile",
               str(options), "--config", f"request={quote(json.dumps(request))}"]  # quoted, or Snakemake would read the values in its own way
    if resume and not dry and (folder / ".snakemake").exists():
        subprocess.run([*command, "--unlock", "--quiet", "all"], check=True)
    if on == "local":
        cores = series.cores()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        command += ["--cores", str((jobs or max(cores // threads, 1)) * threads), "--resources", f"mem_mb={memory}", "gpu=1"]
    elif jobs:
        command += ["--jobs", str(jobs)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SeriesError(f"runs cannot be written: {error}; set ADVLAB_HOME to a folder that can") from None
    lost = [name for name, copy in copies.items() if _lost(copy)]
    again = [str(copies[name].with_suffix(".done").relative_to(folder)) for name in (copies if force else lost)]
    command += [*(["--forcerun", *again] if again else []), *further]
    if dry:
        return _explain(command, lost, len(steps))
    for copy in copies.values():
        copy.with_suffix(".failed").unlink(missing_ok=True)
    process = subprocess.Popen(command)
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # Snakemake gets it too, and tidies up
            process.wait()
    failed = [copy.with_suffix(".failed").read_text() for copy in copies.values() if copy.with_suffix(".failed").exists()]
    for name, copy in copies.items() if refresh else ():
        if copy.with_suffix(".done").exists():
            try:
                _refresh(copy, paths.notebooks() / f"{name}.ipynb")
            except SeriesError as error:
                failed.append(str(error))
    if process.returncode or failed:
        done = sum(copy.with_suffix(".done").exists() for copy in copies.values())
        raise SeriesError("\n".join([*failed, f"{done} of {len(steps)} notebooks are done; Snakemake's messages above say what stopped the "
                                      "rest (a lock left by a killed run: `make resume`)"]))


def _lost(copy: Path) -> bool:
    """Whether a results file is gone that the notebook wrote when it ran last."""
    try:
        return not all((paths.home() / file).exists() for file in json.loads(copy.with_suffix(".done").read_text())["results"])
    except (OSError, ValueError, KeyError):
        return copy.with_suffix(".done").exists()


def _explain(command: list[str], lost: Sequence[str], count: int) -> None:
    """Print each stale notebook and why, from Snakemake's dry run."""
    done = subprocess.run([*command, "--dry-run", "--quiet", "host"], capture_output=True, text=True)
    if done.returncode:
        raise SeriesError(f"Snakemake's dry run failed:\n{done.stdout}{done.stderr}")
    stale = dict(re.findall(r"^rule (\d\d_\w+):\n(?:    .*\n)*?    reason: (.*)$", done.stdout, re.M))
    for name, reason in sorted(stale.items()):
        reason = reason.replace("Union of exclusive params before and now across all output: ", "").strip()
        print(f"{name}: {reason.replace('Forced execution', 'Its results are gone') if name in lost else reason}")
    print(f"{len(stale)} of {count} notebooks would run" if stale else f"nothing to do: {count} notebooks are up to date")


def _refresh(executed: Path, notebook: Path) -> None:
    """Put the outputs of an executed copy into the notebook, whose code cells are the same; where a widget left a picture, only the picture."""
    import nbformat

    document = nbformat.read(notebook, as_version=4)
    cells, ran = ([c for c in cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
                  for cells in (document.cells, nbformat.read(executed, as_version=4).cells))
    if [c.source for c in cells] != [c.source for c in ran]:
        raise SeriesError(f"{executed} was made from another version of {notebook}; run it again")
    for count, (cell, other) in enumerate(zip(cells, ran, strict=True), 1):
        cell.outputs, cell.execution_count = other.outputs, count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "image/png" in output.get("data", ()):  # its widget has gone with the kernel
                output.data.pop("application/vnd.jupyter.widget-view+json", None)
    fresh = notebook.with_suffix(".tmp")
    nbformat.write(document, fresh)
    os.replace(fresh, notebook)
