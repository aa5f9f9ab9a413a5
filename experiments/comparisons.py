"""Make the tables of docs/results.md and docs/transplant.md from the JSON files that evidence.py and token_teacher.py
wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from debiaskd.evaluation.trust import from_hex
from debiaskd.metrics import Interval, paired_difference
from debiaskd.reports.summary import Figure

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
WORST, AVERAGE, ENERGY = "worst_group_accuracy", "accuracy", "epg"
HEADINGS = {
    WORST: "worst group %",
    AVERAGE: "average accuracy %",
    ENERGY: "energy in box %",
    "mnist_accuracy": "digits, probed: accuracy %",
    "voc_map": "VOC, probed: mAP %",
}
Row = dict[str, Any]
#: A method and its teacher.
Who = tuple[str, str | None]

#: Claims of the papers: metric, the better method, the other method, description. Teachers are debiased by group DRO.
DRO = "group_dro"
CLAIMS: tuple[tuple[str, Who, Who, str], ...] = (
    (WORST, ("teacher", DRO), ("kd", DRO), "KD from a debiased teacher still yields a biased student"),
    (WORST, ("dett", DRO), ("kd", DRO), "transplanting and reweighting reduce the bias"),
    (WORST, ("dett", DRO), ("teacher", DRO), "the student is then no worse than its teacher"),
    (WORST, ("dett", DRO), ("simkd", DRO), "transplanting alone does less than with reweighting"),
    (WORST, ("kd, λ = 5", DRO), ("kd", DRO), "reweighting also helps KD"),
    (WORST, ("dett, λ = 5", DRO), ("kd, λ = 5", DRO), "transplanting helps more, at the same λ"),
    (WORST, ("cid", DRO), ("kd", DRO), "CID's student is less biased than KD's"),
    (
        WORST,
        ("dett", DRO),
        ("dett", "dfr"),
        "DeTT gets more from a teacher whose features are debiased than from one debiased in its head alone",
    ),
    (WORST, ("kd", DRO), ("kd", "dfr"), "so does KD"),
    (ENERGY, ("guided", None), ("erm", None), "a tenth of the boxes moves attributions onto the object"),
    (AVERAGE, ("guided", None), ("erm", None), "without costing accuracy"),
    (WORST, ("dett+guided+cid", DRO), ("dett", DRO), "all three together do better than DeTT alone"),
    (WORST, ("dett+guided+cid, reweighted", DRO), ("dett", DRO), "they do if CID's terms are also reweighted"),
)
CIFAR_CLAIMS: tuple[tuple[str, Who, Who, str], ...] = (
    (AVERAGE, ("kd", None), ("plain", None), "KD helps"),
    (AVERAGE, ("cid", None), ("kd", None), "CID does better than KD"),
    ("mnist_accuracy", ("cid", None), ("kd", None), "CID's features transfer better than KD's, to digits"),
    ("voc_map", ("cid", None), ("kd", None), "and to VOC images"),
)
BIRDS_CLAIMS: tuple[tuple[str, Who, Who, str], ...] = (
    (WORST, ("teacher", DRO), ("kd", DRO), "KD from a debiased teacher still yields a biased student"),
    (WORST, ("dett", DRO), ("kd", DRO), "transplanting and reweighting reduce the bias"),
    (WORST, ("dett", DRO), ("simkd", DRO), "transplanting alone does less than with reweighting"),
    (WORST, ("dett", DRO), ("plain", None), "DeTT's student is less biased than one trained on the labels"),
    (WORST, ("cid", DRO), ("kd", DRO), "CID's student is less biased than KD's"),
    (WORST, ("dett+guided+cid", DRO), ("dett", DRO), "all three together do better than DeTT alone"),
    (WORST, ("dett, nothing known", "afr"), ("kd", DRO), "DeTT that knows no group beats KD from a teacher that does"),
    (WORST, ("energy, 100% of the boxes", None), ("plain", None), "guidance by the boxes reduces the bias"),
    (ENERGY, ("energy, 100% of the boxes", None), ("plain", None), "guidance moves attributions onto the bird"),
)
BIRDS = ("waterbirds95", "waterbirds100")
#: Tables of docs/results.md: for each row, method and teacher, and its label.
TABLES: dict[str, tuple[tuple[Who, str], ...]] = {
    "teachers": tuple(
        ((method, teacher), f"{method}, teacher {teacher}" if method != "teacher" else f"teacher itself, {teacher}")
        for teacher in ("erm", "dfr", DRO)
        for method in ("teacher", "kd", "dett")
    ),
    "methods": (
        (("teacher", DRO), "teacher (group_dro)"),
        (("erm", None), "erm, without a teacher"),
        (("kd", DRO), "kd"),
        (("simkd", DRO), "simkd"),
        (("dett", DRO), "dett"),
        (("cid", DRO), "cid"),
        (("guided", None), "guided, without a teacher, 10 % of the boxes"),
        (("dett+guided+cid", DRO), "dett+guided+cid, 10 % of the boxes"),
    ),
    "students": (
        (("teacher", DRO), "teacher itself"),
        (("kd", DRO), "kd"),
        (("kd, smaller student", DRO), "kd, smaller student"),
        (("dett", DRO), "dett"),
        (("dett, smaller student", DRO), "dett, smaller student"),
    ),
    "lambda": (
        (("simkd", DRO), "transplanted, 1 (simkd)"),
        *(((f"dett, λ = {up}", DRO), f"transplanted, {up}") for up in (5, 20)),
        (("dett", DRO), "transplanted, 50 (dett)"),
        (("dett, λ = 200", DRO), "transplanted, 200"),
        (("kd", DRO), "kd, 1"),
        *(((f"kd, λ = {up}", DRO), f"kd, {up}") for up in (5, 20, 50)),
    ),
    "parts": (
        (("kd", DRO), "kd"),
        (("kd + sample", DRO), "kd + sample"),
        (("kd + sample + relation", DRO), "kd + sample + relation"),
        (("cid", DRO), "kd + sample + relation + backdoor (cid)"),
    ),
    "reweighted": (
        (("kd", DRO), "kd"),
        (("simkd", DRO), "transplanting (simkd)"),
        (("dett", DRO), "transplanting, reweighted (dett)"),
        (("cid", DRO), "cid"),
        (("cid, its backdoor term reweighted", DRO), "cid, its backdoor term reweighted"),
        (("cid, reweighted", DRO), "cid, all but its class loss reweighted"),
        (("dett+guided+cid", DRO), "dett+guided+cid"),
        (("dett+guided+cid, reweighted", DRO), "dett+guided+cid, all but guidance and class loss reweighted"),
    ),
    "boxes": (
        (("erm", None), "none (erm)"),
        (("guided, 1% of the boxes", None), "1 %"),
        (("guided", None), "10 %"),
        (("guided, 100% of the boxes", None), "all"),
    ),
}


def blocks() -> dict[str, Any]:
    return {
        **{f"comparison-{name}": lambda name=name: shortcut_table(name) for name in TABLES},
        "comparison-claims": lambda: verdicts(_rows("shortcut"), CLAIMS, _document("shortcut").get("test_groups")),
        "comparison-cifar": cifar,
        "token-teacher": token_teacher,
        **{name: lambda name=name: waterbirds(name) for name in BIRDS},
        **{f"{name}-claims": lambda name=name: verdicts(_rows(name), *_birds_claims(name)) for name in BIRDS},
        "comparison-cifar-claims": lambda: verdicts(
            _rows("cifar"), CIFAR_CLAIMS, _document("cifar").get("test_groups")
        ),
    }


def _document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _rows(name: str) -> list[Row]:
    return list(_document(name)["rows"])


def _of(rows: Iterable[Row], who: Who, key: str) -> dict[int, float]:
    """Percent by seed."""
    return {row["seed"]: 100 * row[key] for row in rows if (row["method"], row.get("teacher")) == who}


def shortcut_table(name: str) -> str:
    document = _document("shortcut")
    first = {"lambda": "λ", "parts": "terms", "boxes": "boxes"}.get(name, "method")
    return _table(document, TABLES[name], (WORST, AVERAGE, ENERGY), first)


def cifar() -> str:
    document = _document("cifar")
    named = tuple(((name, None), name) for name in document["settings"]["methods"])
    return _table(document, named, (AVERAGE, "mnist_accuracy", "voc_map"), "method")


def token_teacher() -> str:
    document = _document("token_teacher")
    named = tuple(((name, None), name) for name in ("teacher", *document["settings"]["methods"]))
    return _table(document, named, (WORST, AVERAGE), "method")


def waterbirds(name: str) -> str:
    """Of every run that is there, the teachers first."""
    document = _document(name)
    # Waterbirds-100 has no training images of two groups, which an average weighted as in training would leave out.
    average = "adjusted_accuracy" if name == "waterbirds95" else AVERAGE
    rows = sorted(document["rows"], key=lambda row: row["method"] != "teacher")
    taught = any(row.get("teacher") for row in rows)
    first = "| model | teacher |" if taught else "| model |"
    lines = [f"{first} worst group % | its 95 % interval | average accuracy % | energy in box % |"]
    lines.append(f"| --- |{' --- |' * taught} ---: | ---: | ---: | ---: |")
    for method, teacher in dict.fromkeys((row["method"], row.get("teacher")) for row in rows):
        found = [row for row in rows if (row["method"], row.get("teacher")) == (method, teacher)]
        cells = [Figure.of([100 * row[key] for row in found]).text(1) for key in (WORST, average, ENERGY)]
        interval = "" if len(found) > 1 else "{worst_group_low:.1%} to {worst_group_high:.1%}".format(**found[0])
        cells = [*([teacher or ""] if taught else []), cells[0], interval.replace("%", ""), *cells[1:]]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    where, seeds = document["environment"], len({row["seed"] for row in rows})
    weighs = "; the average weighs groups as training has them" if average != AVERAGE else ""
    said = f"Test split, {seeds} seed{'s' * (seeds > 1)}{weighs}. CPU, torch {where['torch']}."
    return "\n".join([*lines, "", said])


def _birds_claims(name: str) -> tuple[list[tuple[str, Who, Who, str]], list[int]]:
    """Those of which both sides are there, and the test images' groups."""
    document = _document(name)
    there = {(row["method"], row.get("teacher")) for row in document["rows"]}
    return [claim for claim in BIRDS_CLAIMS if set(claim[1:3]) <= there], document["test_groups"]


def _table(document: dict[str, Any], named: Sequence[tuple[Who, str]], keys: Sequence[str], first: str) -> str:
    lines = [f"| {first} | " + " | ".join(HEADINGS[key] for key in keys) + " |", "| --- |" + " ---: |" * len(keys)]
    for who, words in named:
        figures = [Figure.of(list(_of(document["rows"], who, key).values())).text(1) for key in keys]
        lines.append(f"| {words} | " + " | ".join(figures) + " |")
    where, seeds = document["environment"], len(document["seeds"])
    lines += ["", f"Test split, means ± standard deviation over {seeds} seeds. CPU, torch {where['torch']}."]
    for teacher, later in document.get("renewed", {}).items():
        if any(who[1] == teacher for who, _ in named):
            lines[-1] += f" Rows of {teacher} were trained later, with torch {later['torch']}."
    return "\n".join(lines)


def verdicts(rows: list[Row], claims: Sequence[tuple[str, Who, Who, str]], groups: Sequence[int] | None = None) -> str:
    """One row for each claim: the difference by seed, and whether it confirms the claim.

    Where the rows hold which test images were predicted rightly, a paired bootstrap over the images decides; else the
    signs of the seeds' differences do.

    Args:
        rows, claims: of an experiment.
        groups: of each test image; None: not known.
    """
    intervals = [_interval(rows, *claim[:3], groups) for claim in claims]
    known = any(interval is not None for interval in intervals)
    between = ("| 95 % interval ", "| --- ") if known else ("", "")
    lines = [f"| claim | difference | by seed, points {between[0]}| confirmed |"]
    lines.append(f"| --- | --- | --- {between[1]}| --- |")
    for (key, better, other, words), interval in zip(claims, intervals):
        one, two = _of(rows, better, key), _of(rows, other, key)
        gaps = [one[seed] - two[seed] for seed in sorted(one)]
        figure = f"{HEADINGS[key]}: {_name(better)} − {_name(other)}"
        cells = [words, figure, ", ".join(f"{gap:+.1f}" for gap in gaps)]
        if known:
            cells.append("" if interval is None else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}")
        lines.append(f"| {' | '.join([*cells, _said(gaps, interval)])} |")
    return "\n".join(lines)


def _said(gaps: Sequence[float], interval: Interval | None) -> str:
    if interval is not None:
        if interval.low > 0:
            return "yes" if all(gap > 0 for gap in gaps) else "yes, not in every seed"
        return "no, the other way round" if interval.high < 0 else "not told apart"
    if all(gap > 0 for gap in gaps):
        return "yes, in every seed"
    return "on average, not in every seed" if sum(gaps) > 0 else "no"


def _interval(rows: list[Row], key: str, better: Who, other: Who, groups: Sequence[int] | None) -> Interval | None:
    """Of a difference in accuracy, from which test images each seed's model predicts rightly; None if not known."""
    if key not in (WORST, AVERAGE) or groups is None:
        return None
    of_group = torch.tensor(groups) if key == WORST else torch.zeros(len(groups), dtype=torch.int64)
    models = []
    for who in (better, other):
        texts = [row.get("correct") for row in rows if (row["method"], row.get("teacher")) == who]
        if not texts or None in texts:
            return None
        models.append(torch.stack([from_hex(text, len(groups)) for text in texts]))
    return paired_difference(*models, of_group)


def _name(who: Who) -> str:
    method, teacher = who
    return method if teacher is None else f"{method} ({teacher})"
