"""Mean and spread of metrics over runs that differ in nothing but their seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """Mean and spread over seeds.

    Attributes:
        mean: of the values.
        spread: sample standard deviation; None for a single value.
        values: one a seed.

    Example:
        >>> Figure.of([90.0, 92.0]).text(1)
        '91.0 ± 1.4'
    """

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
    """The runs of one method.

    Attributes:
        method: its name.
        figures: by metric; those that every run has.
        groups: accuracy by group, likewise.
    """

    method: str
    figures: dict[str, Figure]
    groups: dict[str, Figure]

    @classmethod
    def of(
        cls,
        method: str,
        runs: Sequence[Mapping[str, float | None]],
        groups: Sequence[Mapping[str, float | None]],
    ) -> Summary:
        """The summary of runs, at least one: `runs` are their metrics, `groups` their accuracies by group."""
        return cls(method, _figures(runs), _figures(groups))


def _figures(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Figure]:
    found = {}
    for key in rows[0]:
        known = [value for value in (row.get(key) for row in rows) if value is not None]
        if len(known) == len(rows):
            found[key] = Figure.of(known)
    return found
