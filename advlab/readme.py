"""The README's tables, made from committed results files: `python -m advlab readme` rewrites what stands between `<!-- begin: NAME -->` and
`<!-- end: NAME -->`. A test fails when the README and the files disagree."""

import re
from collections.abc import Callable

from advlab import ledger, paths, report
from advlab.report import markdown, share


def classifiers() -> str:
    """Clean accuracy, and accuracy under PGD, of the shared classifiers on Fashion-MNIST (notebooks 00 and 01, standard)."""
    where = {"profile": "standard", "dataset": "fashion_mnist"}
    first, second = (report.load_results(name, **where)["rows"] for name in ("00_data_and_classifiers", "01_gradient_attacks"))
    roles = {"target": "ResNet-18 of width 16", "adversarial": "the same, adversarially trained at 8/255"}
    lines = []
    for role, what in roles.items():
        clean = next(r for r in first if r["system"] == role and r["attack"] == "clean")
        pgd = {round(255 * r["eps"], 3): r for r in second if r["system"] == role and r["attack"] == "pgd"}
        attacked = [pgd[eps] for eps in (2, 4, 8)]
        lines.append([what, f"{share(clean)}, n = {clean['n']:,}", *(share(r) for r in attacked)])
    n, steps = attacked[0]["n"], attacked[0]["steps"]
    table = markdown(["classifier", "clean", *(f"PGD-{steps} at {e}/255" for e in (2, 4, 8))], lines)
    return f"{table}\n\nFashion-MNIST, profile `standard`; attacks on the first {n} test images; 95 % Wilson intervals."


def _benchmark(name: str) -> tuple[list[dict], str]:
    """A benchmark's rows, and a line that says where they come from."""
    document = report.load_results(name, profile="standard", dataset="benchmark")
    run = document["run"]
    return document["rows"], f"{run['parameters']['libraries']}; torch {run['versions']['torch']}, {run['device']}, {run['threads']} threads."


def speed() -> str:
    """Seconds of our attacks over those of their bare passes, and over the fastest peer's (benchmarks/attacks.py)."""
    rows, source = _benchmark("attacks_speed")
    ours = {(r["network"], r["attack"]): r for r in rows if r["system"] == "advlab"}
    own = {(r["network"], r["attack"]): r for r in _rows("attacks_overhead", "benchmark")}
    race = {(r["network"], r["attack"]): r for r in rows if r["unit"] == "ratio"}
    lines = []
    for key, r in ours.items():
        against = race.get(key)
        lines.append([key[1], key[0], f"{r['forward_passes']:.1f} + {r['backward_passes']:.1f}", f"{r['ratio_bare']:.2f}",
                      f"{own[key]['value']:.2f} [{own[key]['low']:.2f}, {own[key]['high']:.2f}]" if key in own else "-",
                      f"{against['value']:.2f} [{against['low']:.2f}, {against['high']:.2f}] {against['peer']}" if against else "-",
                      f"{r['peak_ratio']:.2f}"])
    header = ["attack", "network", "passes an image", "time / bare passes", "time / its own passes", "time / fastest peer",
              "memory / bare pass"]
    return f"{markdown(header, lines)}\n\nBatches of {rows[-1]['n']}, medians [quartiles]; interleaved rounds, but for the own passes. {source}"


def defences() -> str:
    """What gradient maps for ten labels and the transformation cost beside the passes they need (benchmarks/gradient_maps.py, transform.py)."""
    documents = [report.load_results(name, profile="standard", dataset="benchmark") for name in ("gradient_maps", "transform")]
    ratios = [r for document in documents for r in document["rows"] if r["unit"] in ("ratio", "s")]
    lines = [[r["network"], r["system"].replace(" / ", " over "), f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" + " s" * (r["unit"] == "s"),
              f"{r.get('goal', '-')}" + (", missed" if r.get("passed") is False else "")] for r in ratios]
    table = markdown(("networks", "time of", "ratio", "goal: at most"), lines)
    maps, g = (document["run"]["threads"] for document in documents)
    return f"{table}\n\nBatches of 64 on a CPU (threads: maps and SSIM {maps}, g {g}), medians [quartiles] of interleaved rounds."


def strength() -> str:
    """What our attacks leave standing, or the norms they find, beside the strongest peer's (benchmarks/strength.py)."""
    rows, source = _benchmark("attacks_strength")
    ours = {(r["network"], r["attack"], r["system"]): r for r in rows if r["system"].startswith("advlab") and "passed" not in r}
    lines = []
    for r in (r for r in rows if r["unit"] in ("points", "ratio")):
        name = r["system"].split(" / ")[0].split(" - ")[0]
        mine = ours[r["network"], r["attack"], name]
        if r["unit"] == "points":
            cells = [f"{100 * mine['value']:.1f} %", f"{100 * r['strongest_peer_leaves']:.1f} % ({r['peer']})", f"{r['value']:+.1f} points"]
        else:
            cells = [f"{mine['value']:.4g}", r["peer"], f"{r['value']:.3f} times"]
        attack, budget = r["attack"] + name.removeprefix("advlab"), f"{255 * r['eps']:.2f}/255" if r["eps"] else f"least {r['norm']}"
        lines.append([attack, r["network"], budget, str(r["n"]), *cells])
    header = ["attack", "network", "budget", "n", "advlab", "strongest peer", "difference"]
    return f"{markdown(header, lines)}\n\nRobust accuracy, or mean norm; lower is stronger. Equal steps, starts and queries. {source}"


def _rows(name: str, dataset: str) -> list[dict]:
    """A notebook's standard rows, none where it has not run yet."""
    try:
        return report.load_results(name, profile="standard", dataset=dataset)["rows"]
    except FileNotFoundError:
        return []


def hgd() -> str:
    """HGD's denoisers, blind and knowing attackers side by side (notebooks 10 and 13, standard), on both data sets."""
    tables, none = [], {}
    for dataset, title in (("fashion_mnist", "Fashion-MNIST"), ("cifar10", "CIFAR-10")):
        tenth, last = (_rows(name, dataset) for name in ("10_hgd_denoisers", "13_hgd_adaptive"))
        pooled = [r for r in tenth if r["attack"] in ("clean", "FGSM+IFGSM4") and r["unit"] == "accuracy"]
        blind = {(r["system"], r["threat"], round(255 * r["eps"])): r for r in pooled}
        through = [r for r in last if r["exhibit"] == "study" and (r["threat"], r["attack"]) == ("end to end", "pgd") and "l2" in r]
        sweep = min((r["steps"] for r in through), default=0)  # every system; more steps were spent on LGD alone
        end = {(r["system"], round(255 * r["eps"])): r for r in through if r["steps"] == sweep}
        worst = {r["system"]: r for r in last if r["threat"] == "worst case"}

        def cell(row: dict) -> str:
            return share(row) if row else "-"

        lines = [[name, *(cell(blind.get((name, threat, eps), none)) for threat, eps in (("none", 0), ("oblivious", 16), ("transfer", 16))),
                  *(cell(end.get((name, eps), none)) for eps in (2, 4, 8)), cell(worst.get(name, none))]
                 for name in dict.fromkeys(name for name, *_ in [*blind, *end])]
        header = ["defence", "clean", "white, 16/255", "black, 16/255", *(f"PGD-{sweep} end to end, {eps}/255" for eps in (2, 4, 8)), "ladder, 8/255"]
        sizes = [f"{blind['LGD', 'none', 0]['n']:,} test images", *(f"{end['LGD', 4]['n']} end to end" for _ in end.keys() & {("LGD", 4)})]
        tables.append(f"{title}, {', '.join(sizes)}:\n\n{markdown(header, lines)}")
    return "\n\n".join(tables)


def _spent() -> str:
    """The seconds of the runs behind standard's results, summed by kind of device; a run that wrote two files counts once."""
    runs = {(name, document["run"]["seconds"]): document["run"]["device"] for (name, _), document in ledger.documents("standard").items()}
    gpu = sum(seconds for (_, seconds), device in runs.items() if device.startswith("cuda"))
    cpu = sum(seconds for _, seconds in runs) - gpu
    return (f"Its {len(runs)} runs took {cpu / 3600:.1f} hours on CPUs and {gpu / 60:.0f} minutes on a GPU in all; networks that came from a cache "
            "cost nothing in them.")


def claims() -> str:
    """The ledger's summary (advlab.ledger), standard."""
    lines = ledger.entries("standard")
    left = ledger.exclusions("standard")
    reasons = "; ".join(f"{reason} ({sum(r == reason for r in left.values())})" for reason in dict.fromkeys(left.values()))
    note = f"Profile `standard`; an exhibit counts once for each data set. {_spent()} "
    note += f"Excluded by name: {reasons}." if left else "Nothing is excluded."
    return f"{markdown(ledger.SUMMARY, ledger.summary(lines))}\n\n{note}"


def compared() -> str:
    """Every system of the common ground that has run at standard: clean, first rung, worst case, cost (advlab.ledger)."""
    rows, missing = ledger.comparison("standard")
    rows, lines = ledger.settled(rows), []
    for system in dict.fromkeys(r["system"] for r in rows):
        rungs = [r for r in rows if r["system"] == system and "rung" in r]
        cost = {r["attack"]: r["value"] for r in rows if r["system"] == system and r["threat"] == "cost"}
        price = [f"{cost[k]:{form}}" if k in cost else "-" for k, form in (("training", ",.0f"), ("inference", ".1f"), ("parameters", ",.0f"))]
        ends = [f"{share(r)}" + (f" ({r['threat']})" if k == 1 else "") for k, r in enumerate((*rungs[:2], rungs[-1]))] if rungs else ["-"] * 3
        paper = next((paper for paper, (_, own) in ledger.LAST.items() if own == system != paper), None)
        lines.append([f"{paper}: {system}" if paper else system, *ends, *price])
    header = ["system", "clean", "first rung", "worst case", "training, s", "answer, times the bare classifier's", "parameters beside it"]
    sizes = sorted({r["n"] for r in rows if "rung" in r})
    note = f"Fashion-MNIST, profile `standard`, eps 8/255, the first {' or '.join(map(str, sizes))} test images; 95 % intervals."
    return f"{markdown(header, lines)}\n\n{note}" + (f" Not there yet: {', '.join(f'`{name}`' for name in missing)}." if missing else "")


BLOCKS: dict[str, Callable[[], str]] = {f.__name__: f for f in (classifiers, claims, compared, defences, hgd, speed, strength)}


def filled(text: str) -> str:
    """The README with every block made anew. ValueError for a block that nobody makes."""
    def fill(match: re.Match) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"README.md has a block {name!r}; known ones are {', '.join(BLOCKS)}")
        return f"<!-- begin: {name} -->\n{BLOCKS[name]()}\n<!-- end: {name} -->"

    return re.sub(r"<!-- begin: (?P<name>\w+) -->.*?<!-- end: (?P=name) -->", fill, text, flags=re.S)


def refresh() -> None:
    file = paths.SOURCE / "README.md"
    report.write_atomic(file, filled(file.read_text()).encode())
