"""What the five papers print, as data: `exhibits.csv` lists the 45 exhibits, each table or figure with printed numbers has one CSV
(`hgd_t2.csv` is HGD-T2), and `text.csv` holds what running text says about a printed table.

One row a number: exhibit, dataset, system, threat, attack, eps in eps_unit (1/255, or 1 for the [0,1] scale), metric, value, unit (%,
fraction, points, s, h, or 1), note; a few tables add a column (trained_on, steps, blocks, removed, against, f_b). Numbers stand as
printed, also those that cannot be right, which their note says. Names are the project's: datasets as in `advlab.data`; "no defence";
PixGD for HGD's pixel guided denoiser (printed PGD, DUNET); AT for adversarial training; -U and -T for untargeted and targeted; `threat`
is none, oblivious (the attacker differentiates the bare classifier: HGD's white set, GRED's grey box, TRN's tables but the third), paper
(the paper's own white box), transfer (from another classifier) or query."""

import csv
from pathlib import Path

HERE = Path(__file__).resolve().parent
NUMERIC = ("eps", "value", "steps", "blocks", "removed")


def read(name: str) -> list[dict]:
    """A file of this folder, one dict a row, numbers as floats and empty cells None."""
    with open(HERE / name, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in row:
            if row[key] == "":
                row[key] = None
            elif key in NUMERIC:
                row[key] = float(row[key])
    return rows


def exhibits() -> list[dict]:
    """The 45 exhibits in the papers' order: id, paper, exhibit (as the paper calls it), what, notebook (the one that holds it), figure
    (the slug of its figure there, None where it is a table only)."""
    return read("exhibits.csv")


def table(exhibit: str) -> list[dict]:
    """Every number printed in `exhibit` (an id such as "HGD-T2", or "text" for remarks about the tables), one dict a number, empty cells
    None; an empty list where the exhibit prints none. Raises ValueError for an unknown id."""
    known = [e["id"] for e in exhibits()] + ["text"]
    if exhibit not in known:
        raise ValueError(f"unknown exhibit {exhibit!r}; known are {', '.join(known)}")
    name = exhibit.lower().replace("-", "_") + ".csv"
    return read(name) if (HERE / name).exists() else []


def paper_value(exhibit: str, /, *, as_fraction: bool = False, **where) -> float | None:
    """The printed number of the one row of `table(exhibit)` whose fields equal `where` (text without regard to case; eps as printed), or
    None where the paper prints no such number. In the unit of its row; with `as_fraction` per cents and points are divided by 100, to
    stand beside an accuracy of `advlab.evaluation`. Raises ValueError if a field is unknown to the table, or more than one row
    matches."""
    rows = table(exhibit)
    unknown = set(where) - set(rows[0]) if rows else set()
    if unknown:
        raise ValueError(f"{exhibit} has no field {sorted(unknown)[0]!r}; its fields are {', '.join(rows[0])}")
    found = [r for r in rows if all(_fold(r[key]) == _fold(v) for key, v in where.items())]
    if len(found) > 1:
        differ = [key for key in rows[0] if len({r[key] for r in found}) > 1 and key not in ("value", "note")]
        raise ValueError(f"{len(found)} numbers of {exhibit} match {where}; name one more of {', '.join(differ)}")
    if not found:
        return None
    return found[0]["value"] / (100 if as_fraction and found[0]["unit"] in ("%", "points") else 1)


def _fold(value):
    return value.lower() if isinstance(value, str) else value
