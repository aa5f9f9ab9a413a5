"""What a sweep found, as a page, as a document and as lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from debiaskd.pipeline.tuning import Criterion, Outcome, by_setting
from debiaskd.recipe.sweep import Setting, text
from debiaskd.reports.charts import Chart, Point, Series
from debiaskd.reports.page import render
from debiaskd.reports.sections import DETAILS
from debiaskd.reports.summary import Figure
from debiaskd.training.validation import HEADINGS
from debiaskd.utils import files
from debiaskd.version import __version__

#: Lines of a chart; with more settings of the other keys, one line shows the best of them.
MOST = 6
_HEADING = dict(HEADINGS)


class Row:
    """The trials of a setting.

    Attributes:
        setting: the values.
        outcomes: of its trials.
        score: what it is compared by, in percent, over the seeds that can be compared; None: there are none.
        metrics: in percent, by name; those that every finished trial has.
        failed: (trial, why) of those that failed.
    """

    def __init__(self, setting: Setting, outcomes: Sequence[Outcome], criterion: Criterion) -> None:
        self.setting, self.outcomes = setting, list(outcomes)
        scores = [100 * value for value in map(criterion, outcomes) if value is not None]
        self.score = Figure.of(scores) if scores else None
        there = [outcome.metrics for outcome in outcomes if outcome.facts is not None]
        self.metrics: dict[str, Figure] = {}
        for key in _HEADING:
            values = [100 * value for one in there if (value := one.get(key)) is not None]
            if there and len(values) == len(there):
                self.metrics[key] = Figure.of(values)
        self.failed = [(str(one.trial), one.error) for one in outcomes if one.error is not None]

    @property
    def values(self) -> dict[str, str]:
        return {key: text(value) for key, value in self.setting.values.items()}

    @property
    def count(self) -> str:
        """Trials that were finished."""
        done = sum(one.facts is not None for one in self.outcomes)
        return str(done) if done == len(self.outcomes) else f"{done} of {len(self.outcomes)}"


def rows(outcomes: Sequence[Outcome], criterion: Criterion) -> list[Row]:
    """A row for each setting, in the order of the trials."""
    return [Row(setting, members, criterion) for setting, members in by_setting(outcomes)]


def document(
    recipe: str,
    over: Mapping[str, Sequence[Any]],
    outcomes: Sequence[Outcome],
    criterion: Criterion,
    best: Setting | None,
) -> dict[str, Any]:
    """`results.json`: every trial, every setting, and what was chosen; metrics as fractions, on validation."""
    found = rows(outcomes, criterion)
    return {
        "made_by": f"debiaskd {__version__}",
        "recipe": recipe,
        "over": {key: list(values) for key, values in over.items()},
        "split": "validation",
        "rule": criterion.rule,
        "compared": list(criterion.names),
        "best": None if best is None else dict(best.values),
        "settings": [
            {
                "setting": dict(row.setting.values),
                "mean": None if row.score is None else row.score.mean / 100,
                "std": None if row.score is None or row.score.spread is None else row.score.spread / 100,
                "finished": sum(one.facts is not None for one in row.outcomes),
                "failed": len(row.failed),
            }
            for row in found
        ],
        "rows": [_trial(outcome) for row in found for outcome in row.outcomes],
    }


def _trial(outcome: Outcome) -> dict[str, Any]:
    trial, facts = outcome.trial, outcome.facts or {}
    return {
        "setting": dict(trial.setting.values),
        "seed": trial.seed,
        "run": str(trial.folder),
        "error": outcome.error,
        "epoch": facts.get("epoch"),
        "stopped": facts.get("stopped"),
        "seconds": outcome.seconds,
        "figures": outcome.metrics,
    }


def lines(found: Sequence[Row], criterion: Criterion, best: Setting | None) -> list[str]:
    """The table for a terminal: each setting with what it is compared by, the chosen one marked."""
    shown = [f"{criterion} on validation, %"]
    width = max(len(str(row.setting)) for row in found)
    for row in found:
        value = "–" if row.score is None else row.score.text(1)
        mark = " *" if best is not None and row.setting.slug == best.slug else ""
        shown.append(f"{row.setting!s:>{width}}  {value}{mark}")
    return [*shown, *(f"failed: {name}: {why}" for row in found for name, why in row.failed)]


def write_page(
    path: Path,
    recipe: str,
    over: Mapping[str, Sequence[Any]],
    found: Sequence[Row],
    criterion: Criterion,
    best: Setting | None,
    yaml: str,
) -> None:
    """Write the page.

    Args:
        path: of the page; whole, or as it was before.
        recipe: its name.
        over: values by key.
        found: see `rows`.
        criterion, best: what the settings are compared by, and which was chosen.
        yaml: the recipe that was chosen.

    Raises:
        OSError: it cannot be written.
    """
    columns = [
        (key, heading) for key, heading in HEADINGS if key not in DETAILS and any(key in r.metrics for r in found)
    ]
    score = score_name(criterion)
    page = render(
        "tuning.html.j2",
        recipe=recipe,
        keys=list(over),
        rows=found,
        best=None if best is None else best.slug,
        chosen=next((row for row in found if best is not None and row.setting.slug == best.slug), None),
        score=score,
        rule=criterion.rule,
        own_column=len(criterion.names) > 1,
        compared=list(criterion.names),
        columns=columns,
        charts=[chart(key, values, found, score, most(criterion)) for key, values in over.items()],
        seeds=max(len(row.outcomes) for row in found),
        yaml=yaml,
        version=__version__,
    )
    files.write_text(path, page)


def score_name(criterion: Criterion) -> str:
    """What settings are compared by, for people."""
    return " + ".join(_HEADING[name] for name in criterion.names)


def most(criterion: Criterion) -> float:
    """The highest value there can be, in percent."""
    return 100.0 * len(criterion.names)


def chart(key: str, values: Sequence[Any], found: Sequence[Row], score: str, top: float) -> Chart:
    """The score by the values of a key: a line for each setting of the other keys, or for the best of them."""
    order = _ordered(values)
    groups: dict[str, list[Row]] = {}
    for row in found:
        others = ", ".join(f"{name}={value}" for name, value in row.values.items() if name != key)
        groups.setdefault(others, []).append(row)
    series = []
    if len(groups) <= MOST:
        for number, (name, members) in enumerate(groups.items()):
            series.append(Series(name or score, number, _points(key, order, members)))
    else:
        best = [
            max((row for row in found if row.values[key] == value and row.score), key=_mean, default=None)
            for value in order
        ]
        series.append(Series("the best of the other keys' values", 0, _points(key, order, [r for r in best if r])))
    return Chart(key, key, f"{score} %", series, joined=True, bounds=(0.0, top), size=(480, 280), names=order)


def _mean(row: Row) -> float:
    return -math.inf if row.score is None else row.score.mean


def _points(key: str, order: Sequence[str], members: Sequence[Row]) -> tuple[Point, ...]:
    found = []
    for row in sorted(members, key=lambda row: order.index(row.values[key])):
        if row.score is not None:
            place, spread = order.index(row.values[key]), row.score.spread or 0.0
            title = f"{row.setting}: {row.score.text(1)} %"
            found.append(Point(place, row.score.mean, title, strong=True, spread=spread))
    return tuple(found)


def _ordered(values: Sequence[Any]) -> list[str]:
    """Numbers by size, anything else as it was given."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return [text(value) for value in (sorted(values) if numbers else values)]
