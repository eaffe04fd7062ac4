"""environment.yml, pyproject.toml and requirements.lock agree, and every module imports without heavy side effects."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
CONDA_NAMES = {"pytorch": "torch", "snakemake-minimal": "snakemake"}


def bare(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower()


def declared() -> set[str]:
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    return {bare(r) for r in [*PROJECT["dependencies"], *extras]}


def locked() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\]+)", LOCK, re.M):
        found.setdefault(name.lower(), set()).add(version)
    return found


def test_conda_environment_names_packages_that_pyproject_declares():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    names = {CONDA_NAMES.get(bare(d), bare(d)) for d in environment["dependencies"] if isinstance(d, str)} - {"python", "pip"}
    assert names <= declared()
    assert {"torch", "torchvision", "jupyterlab", "ipywidgets", "matplotlib", "seaborn", "scikit-image", "papermill", "snakemake", "nbval"} <= names
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python"))
    assert python.removeprefix("python") == PROJECT["requires-python"]
    assert {"pip": ["-e .[test]"]} in environment["dependencies"]


def test_lock_pins_every_declared_package_with_hashes_and_no_address():
    assert declared() <= set(locked())
    assert "://" not in LOCK
    pins = re.findall(r"^[a-z0-9].*==.*$", LOCK, re.M)
    assert len(pins) == len(re.findall(r"==[^\n]*\\\n(?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+", LOCK))


def test_lock_holds_versions_that_pyproject_admits():
    from packaging.requirements import Requirement

    for text in [*PROJECT["dependencies"], *(r for g in PROJECT["optional-dependencies"].values() for r in g)]:
        requirement = Requirement(text)
        for version in locked()[requirement.name.lower()]:
            assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


def test_citation_names_the_five_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert len(citation["references"]) == 5
    assert citation["version"] == PROJECT["version"]


MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in (ROOT / "advlab").rglob("*.py"))


def test_importing_everything_draws_no_random_numbers_and_loads_no_plotting():
    code = ("import sys, torch, importlib; state = torch.get_rng_state(); "
            f"[importlib.import_module(m) for m in {[m for m in MODULES if not m.endswith('__main__')]!r}]; "
            "assert torch.equal(state, torch.get_rng_state()); "
            "print([m for m in ('matplotlib', 'seaborn', 'pandas', 'skimage', 'torchvision', 'papermill', 'foolbox') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

