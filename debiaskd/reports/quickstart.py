"""The quickstart's results: rows of results.json, its table, its claims, and the page.

A row is a dictionary with at least the keys of `REQUIRED`; accuracies and energies are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from debiaskd.reports import page
from debiaskd.reports.differences import differences
from debiaskd.reports.measured import Measured
from debiaskd.reports.summary import Summary

REQUIRED = (
    "method",
    "seed",
    "average_accuracy",
    "worst_group_accuracy",
    "energy_in_box",
    "seconds",
    "parameters",
)
#: (key, heading, digits behind the point) of the table's columns.
COLUMNS = (
    ("worst_group_accuracy", "worst group %", 1),
    ("average_accuracy", "average %", 1),
    ("unbiased_accuracy", "unbiased %", 1),
    ("adjusted_accuracy", "adjusted %", 1),
    ("energy_in_box", "energy in box %", 1),
    ("parameters", "parameters", 0),
    ("seconds", "seconds", 0),
)
#: What methods promise: which column of which is better than that of what, by at least how many points.
CLAIMS = (
    ("worst_group_accuracy", "dett", "kd", 15.0),
    ("worst_group_accuracy", "dett", "teacher", -2.0),
    ("worst_group_accuracy", "dett", "simkd", 0.0),
    ("worst_group_accuracy", "cid", "kd", 0.0),
    ("worst_group_accuracy", "dett+guided+cid", "dett", -2.0),
    ("energy_in_box", "dett+guided+cid", "dett", 0.0),
    ("energy_in_box", "guided", "erm", 15.0),
    ("average_accuracy", "guided", "erm", -1.0),
)


@dataclass(frozen=True)
class Finding:
    """A comparison of two methods, in words, and whether it came out as promised."""

    text: str
    held: bool


def row(method: str, run: Measured, seconds: float | None) -> dict[str, Any]:
    """A row of results.json from a measured run; accuracies and energies in percent."""
    found = {key: _percent(run.figures.get(key)) for key in run.figures}
    groups = {name: found.get(f"group_{g}_accuracy") for g, name in enumerate(run.groups)}
    return {
        "method": method,
        "seed": run.seed,
        "average_accuracy": found["accuracy"],
        "worst_group_accuracy": found["worst_group_accuracy"],
        "energy_in_box": found["epg"],
        "seconds": math.nan if seconds is None else seconds,
        "parameters": run.parameters,
        "unbiased_accuracy": found["unbiased_accuracy"],
        "adjusted_accuracy": found["adjusted_accuracy"],
        "group_accuracies": groups,
        "maps_without_energy": round((1 - (run.figures["defined"] or 0)) * run.data[2]),
        "validation_worst_group_accuracy": _percent(run.facts["figures"]["worst_group_accuracy"]),
        "selected_epoch": run.epoch,
    }


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """One summary a method, in the order of first appearance.

    Raises:
        ValueError: no row, or one without a required key.
    """
    if not rows:
        raise ValueError("rows must be at least one, got none")
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for one in rows:
        missing = [key for key in REQUIRED if key not in one]
        if missing:
            raise ValueError(f"rows must have the keys {', '.join(REQUIRED)}, got one without {', '.join(missing)}")
        by_method.setdefault(one["method"], []).append(one)
    shown = [key for key, _, _ in COLUMNS]
    return [
        Summary.of(
            method,
            [{key: one.get(key) for key in shown} for one in members],
            [one.get("group_accuracies", {}) for one in members],
        )
        for method, members in by_method.items()
    ]


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """What came of `CLAIMS`, for those whose methods were run."""
    headings = {key: heading for key, heading, _ in COLUMNS}
    found = []
    for key, better, other, margin in CLAIMS:
        figures = {summary.method: summary.figures[key].mean for summary in summaries if key in summary.figures}
        if better not in figures or other not in figures:
            continue
        gap = figures[better] - figures[other]
        wanted = f"at least {margin:g} points above" if margin > 0 else f"no more than {-margin:g} points below"
        text = (
            f"{headings[key]}: {better} {figures[better]:.1f} against {other} {figures[other]:.1f} "
            f"({gap:+.1f} points); expected {wanted if margin else 'above'}"
        )
        found.append(Finding(text, gap >= margin if margin else gap > 0))
    return found


def headline(summaries: Sequence[Summary]) -> str:
    """One sentence with what was measured, whether or not it is what one hoped for."""
    worst = {summary.method: summary.figures["worst_group_accuracy"].mean for summary in summaries}
    found = findings(summaries)
    if {"teacher", "kd", "dett"} <= set(worst):
        sentence = (
            f"On the group it does worst on, the debiased teacher gets {_rounded(worst['teacher'])} right, a small "
            f"student distilled from it the usual way {_rounded(worst['kd'])}, and one distilled by DeTT "
            f"{_rounded(worst['dett'])}."
        )
        missed = sum(not finding.held for finding in found)
        return f"{sentence} Not all is as expected: {missed} of {len(found)} checks failed." if missed else sentence
    best = max(worst, key=lambda method: worst[method])
    return f"The best worst-group accuracy is that of {best}: {_rounded(worst[best])}."


def _rounded(value: float) -> str:
    return f"{value:.0f}\N{NO-BREAK SPACE}%"


def render(document: Mapping[str, Any], runs: Mapping[str, Measured]) -> str:
    """The report as one HTML page that loads nothing from elsewhere.

    Args:
        document: the content of results.json: rows, environment, settings.
        runs: the runs of one seed by method, whose examples are shown.

    Raises:
        ModuleNotFoundError: jinja2 or pillow is not installed.
        ValueError: as `summarize`.
    """
    summaries, settings = summarize(document["rows"]), document["settings"]
    columns = [column for column in COLUMNS if all(column[0] in summary.figures for summary in summaries)]
    recipes = settings["recipes"]
    return page.render(
        "quickstart.html.j2",
        headline=headline(summaries),
        findings=findings(summaries),
        summaries=summaries,
        columns=columns,
        best=_best(summaries, [key for key, _, _ in columns]),
        rows=document["rows"],
        runs=runs,
        examples=next(iter(runs.values())).examples,
        descriptions=settings["methods"],
        selection=settings["selection"],
        pictures=settings["pictures"],
        recipes=list(recipes),
        differences=differences(list(recipes.values())),
        environment=_flat(document["environment"]),
    )


def _best(summaries: Sequence[Summary], keys: Sequence[str]) -> dict[str, str]:
    """For each column where more is better, the student that has most."""
    students = [summary for summary in summaries if summary.method != "teacher"]
    scored = [key for key in keys if key not in ("parameters", "seconds")]
    if not students:
        return {}
    return {key: max(students, key=lambda summary: summary.figures[key].mean).method for key in scored}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, dict):
            flat.update(_flat(value, f"{name}: "))
        elif isinstance(value, (list, tuple)):
            flat[name] = ", ".join(map(str, value)) or "none"
        else:
            flat[name] = str(value)
    return flat
