"""The ledger: every exhibit of the five papers with what was measured, from the results files of a profile; and the comparison of the five defences
on their common ground, from the rows that each paper's last notebook wrote.

A profile is complete when each exhibit has a measured value on enough images and a verdict, and the networks of its paper are trained; what is not
stands in reference/exclusions.csv with its reason. `gaps` says what is missing, `unexplained` whether that list is right."""

import os
from collections.abc import Iterable
from pathlib import Path

from advlab import paths, reference, report
from advlab.reference import exclusions as excluded

# paper: its last notebook, the system that stands for it in the comparison
LAST = {"HGD": ("13_hgd_adaptive", "LGD"), "S2S": ("22_s2s_counterfactuals", "S2S"), "GRED": ("33_gred_white_box", "GRED"),
        "TRN": ("43_trn_bypass", "TRN"), "Transform": ("52_transform_comparison", "Transform")}  # fmt: skip
YARDSTICKS = ("no defence", "AT")
ROLES = {"target": "no defence", "adversarial": "AT"}  # the yardsticks' names in notebook 00
COSTS = {"training": "s", "inference": "times the classifier's", "parameters": "parameters"}
COMMON = {"smoke": "skimage10", "quick": "skimage10", "standard": "fashion_mnist", "paper": "cifar10"}
ENOUGH = {"quick": 64, "standard": 200, "paper": 1000}  # images behind at least one measured value of each exhibit
FEWER = {("standard", "Transform"): 100}  # a pass of Transform costs fourteen of the bare classifier's
CLEAN = {"no defence": 0.8, "AT": 0.6, "defence": 0.5}  # clean accuracy below which a network counts as not trained; chance is 0.1


def documents(profile: str) -> dict[tuple[str, str], dict]:
    """The valid results files of a profile by (notebook, data set); those of the notebooks 90 to 99, which are made from others, left out."""
    found = sorted(f for f in paths.stored("results", profile).glob("*/[0-8][0-9]_*.json"))
    return {(f.stem, f.parent.name): report.load_results(f.stem, profile=profile, dataset=f.parent.name) for f in found}


# --- the ledger ------------------------------------------------------------


def entries(profile: str) -> list[dict]:
    """One dict for each exhibit and data set that it was measured on, in the papers' order; an exhibit that has not run has one whose dataset is
    None. n and least are the largest and smallest number of images behind a value of the paper's kind; measure is one of the values, the paper's in
    brackets."""
    found, out = documents(profile), []
    for e in reference.exhibits():
        ran = {dataset: [r for r in document["rows"] if r["exhibit"] == e["id"]] for (notebook, dataset), document in found.items()
               if notebook == e["notebook"]}
        chosen = {dataset: rows for dataset, rows in ran.items() if rows} or ran or {None: []}  # 22's ladder may be on a data set of its own
        out += [_entry(e, profile, dataset, rows) for dataset, rows in chosen.items()]
    return out


def _entry(e: dict, profile: str, dataset: str | None, rows: list[dict]) -> dict:
    verdict = next((r for r in rows if r["system"] == "verdict"), {})
    measured = [r for r in rows if r["system"] != "verdict" and r.get("source") != "printed in the paper"]
    sizes = [r["n"] for r in measured if r["n"] and r["threat"] != "adaptive"]  # our attack on more images does not complete the paper's exhibit
    where, figure = (paths.stored(kind, profile) / (dataset or "none") / f"{e['notebook']}{end}"
                     for kind, end in (("results", ".json"), ("figures", f"-{e['figure']}.png")))
    return {
        "exhibit": e["id"], "paper": e["paper"], "title": e["exhibit"], "what": e["what"], "profile": profile, "dataset": dataset,
        "claim": verdict.get("claim"), "measure": _measure(e["paper"], measured), "rows": len(measured), "n": max(sizes, default=None),
        "least": min(sizes, default=None), "met": verdict.get("met"), "marks": verdict.get("marks"), "tolerance": verdict.get("tolerance"),
        "reproduced": verdict.get("reproduced"), "survives": verdict.get("survives"), "statements": verdict.get("statements"),
        "notebook": paths.notebooks() / f"{e['notebook']}.ipynb", "figure": figure if e["figure"] and figure.exists() else None,
        "results": where if rows else None,
    }  # fmt: skip


def _measure(paper: str, rows: list[dict]) -> str | None:
    """One value in words: of the rows with a paper's number, or of all where none has one, the last of the paper's own system (f o A of S2S)."""
    rows = [r for r in rows if r["system"] != r.get("against")]  # nothing is learnt from a thing's likeness to itself
    rows = [r for r in rows if r["paper"] is not None] or rows
    own = [r for r in rows if LAST[paper][1] in r["system"] or " o A" in r["system"]] or rows
    if not own:
        return None
    r = report.percent(own[-1])
    printed = "" if r["paper"] is None else f" (paper: {r['paper']:.3g})"
    at = [r["system"], r["attack"], *([report.label("eps", r["eps"])] if r["eps"] else []), r.get("metric") or r.get("measure")]
    return f"{', '.join(str(a) for a in at if a)}: {r['value']:.3g}{'' if r['unit'] == '1' else ' ' + r['unit']}{printed}"


SUMMARY = ("paper", "exhibits run", "number reproduced: yes / partly / no", "claim survives an adaptive attack: held / refuted / not tested")
LINES = ("exhibit", "claim", "data, n", "one of the values", "number reproduced", "survives an adaptive attack", "where")


def summary(lines: Iterable[dict]) -> list[list[str]]:
    """SUMMARY's columns for each paper: how many of its exhibits have run, and its verdicts counted; an exhibit counts once for each data set."""
    def count(paper: str, field: str, words: tuple[str, ...]) -> str:
        return " / ".join(str(sum(e["paper"] == paper and e[field] == word for e in lines)) for word in words)

    lines, out = list(lines), []
    for paper in LAST:
        own = {e["exhibit"]: False for e in lines if e["paper"] == paper} | {e["exhibit"]: True for e in lines if e["paper"] == paper and e["rows"]}
        sets = dict.fromkeys(e["dataset"] for e in lines if e["paper"] == paper and e["rows"])
        out.append([paper, f"{sum(own.values())} of {len(own)}" + (f" on {', '.join(sets)}" if sets else ""),
                    count(paper, "reproduced", ("yes", "partly", "no")), count(paper, "survives", ("held", "refuted", "not tested"))])
    return out


def listed(lines: Iterable[dict], start: Path) -> list[list[str]]:
    """LINES' columns for each entry, with links from the folder `start` to notebook, figure and results file."""
    out = []
    for e in lines:
        links = [f"[{word}]({relative(e[word], start)})" for word in ("notebook", "figure", "results") if e[word]]
        sizes = "" if e["n"] is None else f", n = {e['n']:,}" if e["n"] == e["least"] else f", n = {e['least']:,} to {e['n']:,}"
        number = "-" if e["rows"] else "not run"
        if e["reproduced"]:
            number = report.counted(e)
        out.append([f"{e['exhibit']}: {e['what']}", e["claim"] or "-", f"{e['dataset']}{sizes}" if e["dataset"] else "-", e["measure"] or "-", number,
                    e["survives"] or "-", " · ".join(links)])
    return [[cell.replace("|", "\\|") for cell in line] for line in out]


def gaps(profile: str, of: Iterable[dict] | None = None) -> dict[str, str]:
    """What each exhibit that is not complete lacks on its best data set, by its id; {} when the profile is complete."""
    weak, best = untrained(profile), {}
    for e in entries(profile) if of is None else of:
        enough = FEWER.get((profile, e["paper"]), ENOUGH[profile])
        lack = ("not run" if not e["rows"] else f"at most {e['n']} images behind a value, {enough} wanted" if (e["n"] or 0) < enough
                else "no verdict" if e["reproduced"] is None else weak.get(e["paper"], ""))
        if best.get(e["exhibit"]) != "":
            best[e["exhibit"]] = lack
    return {exhibit: lack for exhibit, lack in best.items() if lack}


def untrained(profile: str) -> dict[str, str]:
    """The papers whose networks are below the clean floor of CLEAN, or have no clean accuracy in the rows of their last notebook, and why. The
    yardsticks' clean accuracy is that of notebook 00, which trains them, on the same data set."""
    found, out = documents(profile), {}
    start = {(r["system"], dataset): r["value"] for (name, dataset), document in found.items() if name[:2] == "00" for r in document["rows"]
             if r["attack"] == "clean" and r["system"] in ROLES}
    for paper, (notebook, system) in LAST.items():
        rows = [r for (name, _), document in found.items() if name == notebook for r in document["rows"]
                if r["exhibit"] == "comparison" and r["attack"] == "clean" and r["system"] in (system, *YARDSTICKS)]
        sets = {dataset for name, dataset in found if name == notebook}
        rows += [{"system": ROLES[role], "value": value} for (role, dataset), value in start.items() if dataset in sets]
        low = [f"{r['system']} has {r['value']:.1%} clean" for r in rows if r["value"] < CLEAN.get(r["system"], CLEAN["defence"])]
        if low or system not in {r["system"] for r in rows}:
            out[paper] = "; ".join(low) or f"no clean accuracy of {system}"
    return out


def exclusions(profile: str) -> dict[str, str]:
    """The exhibits that a profile may lack, with the reason, from reference/exclusions.csv."""
    return {r["exhibit"]: r["reason"] for r in excluded.listed() if r["profile"] == profile}


def unexplained(profile: str) -> list[str]:
    """What is wrong with the list of exclusions: a gap without an entry, an entry without a gap, an unknown exhibit. [] when it is right."""
    missing, listed = gaps(profile), exclusions(profile)
    known = {e["id"] for e in reference.exhibits()}
    return [f"{e}: {why}; run its notebook at {profile}, or give the reason in exclusions.csv" for e, why in missing.items() if e not in listed] + [
        f"{e}: {'complete, so that its entry must go from exclusions.csv' if e in known else 'no such exhibit'}" for e in listed if e not in missing]


# --- the comparison ------------------------------------------------------------


def comparison(profile: str, dataset: str | None = None) -> tuple[list[dict], list[str]]:
    """The rows of the exhibit "comparison" in the papers' last notebooks, on the profile's common ground unless a data set is given, with
    `source`, the notebook; and the results files that are not there yet. Costs come as threat "cost" and attack training (s), inference (times
    the bare classifier) or parameters."""
    rows, missing, dataset = [], [], dataset or COMMON[profile]
    for notebook, _ in LAST.values():
        try:
            document = report.load_results(notebook, profile=profile, dataset=dataset)
        except FileNotFoundError:
            missing.append(f"{profile}/{dataset}/{notebook}.json")
            continue
        rows += [_named(r) | {"source": notebook} for r in document["rows"] if r["exhibit"] == "comparison"]
    return rows, missing


def _named(r: dict) -> dict:
    """A cost row with its kind as the attack: notebooks say it there or as `metric`, in words of their own. The yardsticks' parameters are 0: they
    stand in the classifier's place, not beside it."""
    kind = (r["attack"] if r["threat"] == "cost" else r.get("metric") or "").split(" ")[0].replace("size", "parameters")
    if kind not in COSTS or "rung" in r:
        return r
    r = r | {"threat": "cost", "attack": kind, "unit": COSTS[kind]}
    return r | {"value": 0.0} if r["system"] in YARDSTICKS and kind == "parameters" else r


def settled(rows: list[dict]) -> list[dict]:
    """The comparison's rows with each system's ladder once, and each of its costs once: its first source counts."""
    first: dict[tuple, str] = {}
    return [r for r in rows if first.setdefault((r["system"], r["attack"] if r["threat"] == "cost" else "ladder"), r["source"]) == r["source"]]


def inconsistent(rows: list[dict], profile: str) -> list[str]:
    """What speaks against the comparison, in words: a worst case above a rung, ladders on different numbers of images (but for those that FEWER
    allows) or at different eps, or, which would mean other images or networks, a yardstick whose clean accuracy differs between notebooks that use
    as many images. Steps, draws and queries may differ."""
    wrong, ladders, clean = [], {}, {}
    light = {LAST[paper][0] for of, paper in FEWER if of == profile}
    for r in rows:
        if "rung" in r:
            ladders.setdefault((r["system"], r["source"]), []).append(r)
        if r["attack"] == "clean":
            clean.setdefault((r["system"], r["n"]), set()).add(r["correct"])
    for (system, source), rungs in ladders.items():
        worst = next((r["worst"] for r in rungs if r["threat"] == "worst case"), None)
        if worst is None:
            wrong.append(f"{system} in {source} has no worst case")
        elif (least := min(r["value"] for r in rungs if r["threat"] != "worst case")) < worst - 1e-9:
            wrong.append(f"{system} in {source}: worst case {worst:.1%} above its strongest rung, {least:.1%}")
    for field in ("n", "eps"):
        heavy = [r for (_, source), rungs in ladders.items() if field != "n" or source not in light for r in rungs]
        if len(values := {r[field] for r in heavy if r[field]}) > 1:
            wrong.append(f"{field} differs between systems: {', '.join(f'{v:g}' for v in sorted(values))}")
    return wrong + [f"clean counts of {s} differ between notebooks: {sorted(v)}" for (s, _), v in clean.items() if s in YARDSTICKS and len(v) > 1]


def by_threat(rows: list[dict]) -> dict[str, dict[str, float]]:
    """For each system the accuracy left after the rungs of each threat, in the ladder's order; "none" is clean, "worst case" comes last."""
    left: dict[str, dict[str, float]] = {}
    for r in rows:
        if "rung" in r:
            line = left.setdefault(r["system"], {})
            line[r["threat"]] = min(r["value"], line.get(r["threat"], 1.0))
    return left


def relative(path: Path | None, start: Path) -> str | None:
    """A path as a link from the folder `start`."""
    return None if path is None else Path(os.path.relpath(path, start)).as_posix()
