"""Two entries of a report on the same images: the difference of their worst groups, with a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from debiaskd.metrics import Interval, paired_difference
from debiaskd.training.validation import Judged

#: Entries up to which each is compared with each; of more, each with the one whose worst group is best.
ALL_PAIRS = 4


@dataclass(frozen=True)
class Comparison:
    """`first` less `second`, in worst-group accuracy.

    Attributes:
        first, second: names.
        difference: as fractions, with its 95 % interval.
    """

    first: str
    second: str
    difference: Interval

    @property
    def verdict(self) -> str:
        """In words."""
        if self.difference.low > 0:
            return f"{self.first} is better"
        if self.difference.high < 0:
            return f"{self.second} is better"
        return "not told apart"


def comparisons(judged: Sequence[tuple[str, Sequence[Judged | None]]]) -> list[Comparison]:
    """Paired comparisons of entries.

    Args:
        judged: (name, what each of its runs made of the same images) of each entry.

    Returns:
        One for each pair that is compared; none where the images' groups, or what a run made of them, are not known.
    """
    known = [(name, _correct(runs)) for name, runs in judged]
    groups = next((run.groups for _, runs in judged for run in runs if run is not None), None)
    if groups is None or len(known) < 2 or any(rows is None for _, rows in known):
        return []
    rows = [(name, correct) for name, correct in known if correct is not None]
    if any(correct.shape[1] != len(groups) for _, correct in rows):
        return []
    pairs = list(combinations(rows, 2))
    if len(rows) > ALL_PAIRS:
        best = max(rows, key=lambda row: _worst(row[1], groups))
        pairs = [(best, other) for other in rows if other is not best]
    found = []
    for first, second in pairs:
        if _worst(first[1], groups) < _worst(second[1], groups):
            first, second = second, first
        found.append(Comparison(first[0], second[0], paired_difference(first[1], second[1], groups)))
    return found


def _correct(runs: Sequence[Judged | None]) -> Tensor | None:
    """bool [S,N] of the runs of an entry."""
    rows = [run.correct for run in runs if run is not None]
    if len(rows) < len(runs) or not rows or len({len(row) for row in rows}) > 1:
        return None
    return torch.stack(rows)


def _worst(correct: Tensor, groups: Tensor) -> float:
    """Mean over models of the worst group's accuracy."""
    accuracies = torch.stack([correct[:, groups == group].double().mean(1) for group in groups.unique()])
    return float(accuracies.min(0).values.mean())
