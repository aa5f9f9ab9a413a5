"""The charts of a section: what was kept, and how training went."""

from __future__ import annotations

from itertools import combinations

from debiaskd.reports.charts import Chart, Point, Series
from debiaskd.reports.measured import Measured
from debiaskd.reports.sections import DETAILS, Section
from debiaskd.training.pareto import ParetoFront
from debiaskd.training.validation import HEADINGS

PERCENT = (0.0, 100.0)
#: The figures of the fronts: the first of these that runs have.
FRONTS = (("f1", "epg", "iou"), ("accuracy", "epg", "iou"))

_HEADING = dict(HEADINGS)


def pareto(section: Section) -> list[Chart]:
    """What each run kept, by each pair of its validation figures: F1 or accuracy, EPG, IoU."""
    names = next((names for names in FRONTS if any(_kept(run, names) for run in section.runs)), None)
    if names is None:
        return []
    joint = _joint(section, names)
    charts = []
    for x, y in combinations(range(len(names)), 2):
        series = [
            Series(run.name, entry.color, tuple(_front_point(run, row, names, x, y, joint) for row in rows))
            for entry in section.entries
            for run in entry.runs
            if (rows := _kept(run, names))
        ]
        across, up = f"{_HEADING[names[x]]} %", f"{_HEADING[names[y]]} %"
        size = (340, 300)
        charts.append(Chart("", across, up, series, joined=False, bounds=PERCENT, size=size))
    return charts


def _joint(section: Section, names: tuple[str, ...]) -> set[tuple[str, int]]:
    """(run, epoch) on the front of all runs together, as far as they were validated and looked at alike."""
    fronts: dict[tuple[str, str], ParetoFront] = {}
    for run in section.runs:
        front = fronts.setdefault((run.validated, run.looked_at), ParetoFront(names))
        for row in _kept(run, names):
            front.add([_number(row[name]) for name in names], int(_number(row["epoch"])), run.name)
    return {(candidate.payload, candidate.epoch) for front in fronts.values() for candidate in front}


def losses(section: Section) -> list[Chart]:
    """The sum of the terms and each of them, by step; a line for every run, a point for every row of its log."""
    keys = {key: None for run in section.runs for row in run.steps[:1] for key in row}
    charts = []
    for key in keys:
        if key not in ("step", "epoch", "learning_rate"):
            lines = [
                Series(run.name, entry.color, _points(run, run.steps, "step", key, 0, 1))
                for entry in section.entries
                for run in entry.runs
            ]
            title = "loss" if key == "loss" else f"loss: {key}"
            charts.append(Chart(title, "step", "", lines, joined=True, log=True))
    return charts


def validation(section: Section) -> list[Chart]:
    """Each figure by epoch; the epoch that was kept stands out."""
    charts = []
    for key, heading in HEADINGS:
        lines = [
            Series(run.name, entry.color, _points(run, run.epochs, "epoch", key, 1, 100))
            for entry in section.entries
            for run in entry.runs
        ]
        if key not in DETAILS and any(line.points for line in lines):
            charts.append(Chart(f"{heading} %", "epoch", "", lines, joined=True, bounds=PERCENT))
    return charts


def _points(
    run: Measured, rows: list[dict[str, float | None]], across: str, key: str, first: int, unit: int
) -> tuple[Point, ...]:
    """Of the rows that have a value; `first` is the number of the first row for people."""
    points = []
    for row in rows:
        value = row.get(key)
        if value is not None and _known(value):
            x, y = _number(row.get(across)) + first, unit * value
            strong = across == "epoch" and x == run.epoch
            points.append(Point(x, y, f"{run.name}, {across} {x:g}: {y:.4g}", strong=strong))
    return tuple(points)


def _kept(run: Measured, names: tuple[str, ...]) -> list[dict[str, float | None]]:
    """The validation figures of the epochs that a run kept; not those of which one is undefined."""
    kept = set(run.facts.get("front", []))
    return [row for row in run.epochs if row.get("epoch") in kept and all(_known(row.get(name)) for name in names)]


def _front_point(
    run: Measured, row: dict[str, float | None], names: tuple[str, ...], x: int, y: int, joint: set[tuple[str, int]]
) -> Point:
    epoch = int(_number(row["epoch"]))
    values = ", ".join(f"{_HEADING[name]} {100 * _number(row[name]):.1f} %" for name in names)
    title = f"{run.name}, epoch {epoch + 1}: {values}"
    place = (100 * _number(row[names[x]]), 100 * _number(row[names[y]]))
    return Point(*place, title, strong=epoch + 1 == run.epoch, beaten=(run.name, epoch) not in joint)


def _known(value: float | None) -> bool:
    return value is not None and value == value


def _number(value: float | None) -> float:
    return 0.0 if value is None else value
