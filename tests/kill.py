"""Kill the pipeline at random moments, resume it, and compare the results files with those of a run that nobody disturbed.

    python tests/kill.py --kills 10 --notebooks 00 10 11 --jobs 2

Every kill sends SIGKILL to Snakemake, its steps and their kernels at once. After each, no results file may be damaged; in the end no network that was
finished before a kill may have been trained again, and all rows must be the same, measured times apart. All is written in a temporary folder."""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

VOLATILE = ("commit", "seconds")  # of a run; what a row measures with a clock:
CLOCKED = ("seconds", "milliseconds")
TIMES = ("s", "ms", "ms an image", "images/s", "seconds", "times the classifier's")  # units
CLOCKS = ("time", "training step", "inference")  # words of a metric that is a share or ratio of times


def start(home: Path, arguments: list[str], *more: str) -> subprocess.Popen:
    environment = os.environ | {"ADVLAB_HOME": str(home)}
    with open(home / "log", "ab") as log:
        return subprocess.Popen([sys.executable, "-m", "advlab", "run", "--profile", "smoke", *arguments, *more], env=environment, stdout=log,
                                stderr=log, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all its descendants: kernels lead sessions of their own, which a signal to the group would miss."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family)


def rows(file: Path) -> dict:
    """What must be the same in a results file: run and rows without times and commit."""
    document = json.loads(file.read_text())
    kept = []
    for row in document["rows"]:
        clock = row["unit"] in TIMES or any(word in str(row.get("metric")) for word in CLOCKS)
        kept.append({k: v for k, v in row.items() if k not in CLOCKED and not (clock and k in ("value", "low", "high"))})
    return {"run": {k: v for k, v in document["run"].items() if k not in VOLATILE}, "rows": kept}


def results(home: Path) -> dict[str, dict]:
    return {str(f.relative_to(home)): rows(f) for f in sorted((home / "runs/smoke").glob("*/[0-9][0-9]_*.json"))}


def networks(home: Path) -> dict[str, int]:
    """Each finished network's file and when it was written."""
    return {f.name: f.stat().st_mtime_ns for f in (home / "data/checkpoints").glob("*.pt") if f.with_suffix(".json").exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--notebooks", nargs="+", default=["00", "10", "11"])
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    arguments, moments = [*options.notebooks, "--jobs", options.jobs], random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm = Path(folder, "calm")
        calm.mkdir()
        begun = time.monotonic()
        if start(calm, arguments).wait():
            sys.exit(f"the undisturbed run failed:\n{(calm / 'log').read_text()}")
        whole = time.monotonic() - begun
        expected, kills, cycles = results(calm), 0, 0
        print(f"undisturbed: {whole:.0f} s, {len(expected)} results files, {sum(len(d['rows']) for d in expected.values())} rows", flush=True)
        while kills < options.kills:
            cycles += 1
            home = Path(folder, f"disturbed{cycles}")
            home.mkdir()
            finished, resumed = {}, []
            while True:
                process = start(home, arguments, *resumed)
                resumed = ["--resume"]
                begun = time.monotonic()
                try:
                    code = process.wait(moments.uniform(0.1, 0.5) * whole if kills < options.kills else None)  # of what a whole run takes
                except subprocess.TimeoutExpired:
                    kill(process)
                    kills += 1
                    whole_files, finished = len(results(home)), networks(home) | finished
                    done = " ".join(sorted(f.stem[:2] for f in (home / "runs/smoke").glob("*/*.done")))
                    print(f"kill {kills} after {time.monotonic() - begun:.0f} s: notebooks done: {done or 'none'}; results files, all whole: "
                          f"{whole_files}; networks: {len(finished)}", flush=True)
                    continue
                if code:
                    sys.exit(f"the resumed run failed:\n{(home / 'log').read_text()}")
                break
            found, now = results(home), networks(home)
            again = [name for name, written in finished.items() if now.get(name) != written]
            unequal = [name for name in {*expected, *found} if expected.get(name) != found.get(name)]
            for name in unequal:
                pairs = list(zip(expected.get(name, {}).get("rows", []), found.get(name, {}).get("rows", [])))
                rows_of = [f"{a}\n  {b}" for a, b in pairs if a != b] or ["its run or its number of rows"]
                print(f"{name} differs in {len(rows_of)} places, first:\n  {rows_of[0]}", file=sys.stderr)
            if again or unequal:
                sys.exit(f"trained again: {again}; results that differ: {unequal}")
            print(f"resumed to the end: {len(found)} results files equal, {len(finished)} networks not trained again", flush=True)
    print(f"{kills} kills in {cycles} series: results equal to the undisturbed run's")


if __name__ == "__main__":
    main()
