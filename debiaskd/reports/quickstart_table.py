"""From rows of results to `results.json` and a self-contained `report.html`.

A row is a dictionary with at least the keys of `REQUIRED`; accuracies and energies are in percent. Methods are not
known by name here, except to say in words what came of the comparisons in `FINDINGS`.
"""

from __future__ import annotations

import errno
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debiaskd.reports import page
from debiaskd.reports.gallery import Gallery

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
FINDINGS = (
    ("worst_group_accuracy", "dett", "kd", 15.0),
    ("worst_group_accuracy", "dett", "teacher", -2.0),
    ("worst_group_accuracy", "dett", "simkd", 0.0),
    ("worst_group_accuracy", "cid", "kd", 0.0),
    ("worst_group_accuracy", "dett+guided+cid", "dett", -2.0),
    ("energy_in_box", "dett+guided+cid", "dett", 0.0),
    ("energy_in_box", "guided", "erm", 15.0),
    ("average_accuracy", "guided", "erm", -1.0),
)
PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Figure:
    """Mean and spread over seeds; the spread is the sample standard deviation, None for a single seed."""

    mean: float
    spread: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, tuple(values))

    def text(self, digits: int) -> str:
        mean = f"{self.mean:,.{digits}f}"
        return mean if self.spread is None or digits == 0 else f"{mean} ± {self.spread:.{digits}f}"


@dataclass(frozen=True)
class Summary:
    """One method over all its seeds: figures by key of `COLUMNS`, and by group."""

    method: str
    figures: dict[str, Figure]
    groups: dict[str, Figure]


@dataclass(frozen=True)
class Finding:
    """A comparison of worst-group accuracies, in words, and whether it came out as promised."""

    text: str
    held: bool


def summarize(rows: Sequence[dict[str, Any]]) -> list[Summary]:
    """One summary a method, in the order of first appearance.

    Raises:
        ValueError: no row, or one without a required key.
    """
    if not rows:
        raise ValueError("rows must be at least one, got none")
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        missing = [key for key in REQUIRED if key not in row]
        if missing:
            raise ValueError(f"rows must have the keys {', '.join(REQUIRED)}, got one without {', '.join(missing)}")
        by_method.setdefault(row["method"], []).append(row)
    return [_summary(method, members) for method, members in by_method.items()]


def _summary(method: str, rows: list[dict[str, Any]]) -> Summary:
    figures = {key: Figure.of([row[key] for row in rows]) for key, _, _ in COLUMNS if all(key in row for row in rows)}
    parts = [row.get("group_accuracies", {}) for row in rows]
    groups = {
        name: Figure.of([part[name] for part in parts])
        for name in parts[0]
        if all(part.get(name) is not None for part in parts)
    }
    return Summary(method, figures, groups)


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """What came of `FINDINGS`, for those whose methods were run."""
    headings = {key: heading for key, heading, _ in COLUMNS}
    found = []
    for key, better, other, margin in FINDINGS:
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
        said = (
            f"On the group it does worst on, the debiased teacher gets {_percent(worst['teacher'])} right, a small "
            f"student distilled from it the usual way {_percent(worst['kd'])}, and one distilled by DeTT "
            f"{_percent(worst['dett'])}."
        )
        missed = sum(not finding.held for finding in found)
        return f"{said} Not all is as expected: {missed} of {len(found)} checks failed." if missed else said
    best = max(worst, key=lambda method: worst[method])
    return f"The best worst-group accuracy is that of {best}: {_percent(worst[best])}."


def _percent(value: float) -> str:
    return f"{value:.0f}\N{NO-BREAK SPACE}%"


def render(document: dict[str, Any], gallery: Gallery) -> str:
    """The report as one HTML page that loads nothing from elsewhere.

    Args:
        document: the content of results.json: rows, environment, settings.
        gallery: the example pictures.

    Raises:
        ModuleNotFoundError: jinja2 or pillow is not installed.
        ValueError: as `summarize`.
    """
    summaries = summarize(document["rows"])
    settings = dict(document["settings"])
    columns = [column for column in COLUMNS if all(column[0] in summary.figures for summary in summaries)]
    return page.render(
        "quickstart.html.j2",
        headline=headline(summaries),
        findings=findings(summaries),
        summaries=summaries,
        columns=columns,
        best=_best(summaries, [key for key, _, _ in columns]),
        rows=document["rows"],
        gallery=gallery,
        descriptions=settings.pop("methods", {}),
        selection=settings.pop("selection", ""),
        settings=_flat(settings),
        environment=_flat(document["environment"]),
        seconds=document["environment"].get("seconds"),
    )


def _best(summaries: Sequence[Summary], keys: Sequence[str]) -> dict[str, str]:
    """For each column where more is better, the student that has most."""
    students = [summary for summary in summaries if summary.method != "teacher"]
    scored = [key for key in keys if key not in ("parameters", "seconds")]
    if not students:
        return {}
    return {key: max(students, key=lambda summary: summary.figures[key].mean).method for key in scored}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
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


def require() -> None:
    """Import what a report needs, so that a missing package is known before hours of training and not after."""
    import jinja2
    import PIL
    import sklearn

    _ = jinja2, PIL, sklearn


class Target:
    """The directory that gets the two files, both complete or neither.

    Raises:
        OSError: at construction, if it is a file, cannot be made or written, or its disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        directory.mkdir(parents=True, exist_ok=True)
        self._temporary(b"\0" * PROBE_BYTES).unlink()

    def write(self, html: str, document: dict[str, Any]) -> None:
        """Both files lie complete on the disk under other names before either gets its own; results.json is last."""
        texts = {
            "report.html": html,
            "results.json": json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        }
        written: dict[str, Path] = {}
        try:
            for name, text in texts.items():
                written[name] = self._temporary(text.encode())
            for name in texts:
                os.replace(written[name], self.directory / name)
        finally:
            for path in written.values():
                path.unlink(missing_ok=True)

    def _temporary(self, content: bytes) -> Path:
        path = None
        try:
            descriptor, name = tempfile.mkstemp(prefix=".debiaskd-", dir=self.directory)
            path = Path(name)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # Private by mkstemp's choice; results are for whom the directory is for.
            path.chmod(0o666 & ~_umask())
        except BaseException as error:
            if path is not None:
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                # A temporary file's name would mean nothing to a user, and a full disk comes with no name at all.
                raise OSError(error.errno, error.strerror, str(self.directory)) from error
            raise
        return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
