"""What a page shows of runs that were measured on the same images: entries, columns, differences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from debiaskd.reports.differences import ABSENT, Difference, differences
from debiaskd.reports.measured import Measured
from debiaskd.reports.paired import comparisons
from debiaskd.reports.summary import Summary
from debiaskd.training.run import digest
from debiaskd.training.validation import COUNTS, HEADINGS

#: Figures for readers in a hurry, the most telling first.
LEADING = ("worst_group_accuracy", "f1", "accuracy")
#: Figures of the table of every run alone.
DETAILS = (
    "epg_defined",
    "epg_small",
    "epg_middle",
    "epg_large",
    "worst_group_low",
    "worst_group_high",
    "worst_group_ece",
    "deletion",
    "deletion_random",
)
#: Figures of which less is better.
LOWER = ("ece",)


@dataclass(frozen=True)
class Entry:
    """Runs that differ in nothing but their seed: a row of the table, a colour of the charts."""

    summary: Summary
    runs: tuple[Measured, ...]
    color: int

    @property
    def name(self) -> str:
        return self.summary.method


def entries(runs: Sequence[Measured]) -> list[Entry]:
    """In the order of first appearance."""
    by_settings: dict[str, list[Measured]] = {}
    for run in runs:
        by_settings.setdefault(digest(run.settings), []).append(run)
    found: list[Entry] = []
    for members in by_settings.values():
        name = _common([run.name for run in members])
        if not name or name in {entry.name for entry in found}:
            name = members[0].name + (f" + {len(members) - 1}" if len(members) > 1 else "")
        found.append(Entry(_summary(name, members), tuple(members), len(found)))
    return found


def _common(names: Sequence[str]) -> str:
    """What is left of the names without their seeds."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names))
    prefix = "".join(letters[0] for letters in alike).rstrip("0123456789")
    return re.sub(r"[-_./= ]*(seed)?[-_./= ]*$", "", prefix)


def _summary(name: str, runs: Sequence[Measured]) -> Summary:
    counts = dict(COUNTS)
    rows: list[dict[str, float | None]] = []
    for run in runs:
        shares = {key: value for key, value in run.figures.items() if key not in counts}
        percent = {key: None if value is None else 100 * value for key, value in shares.items()}
        rows.append({**percent, "parameters": run.parameters})
    groups = [{group: row.get(_of_group(g)) for g, group in enumerate(runs[0].groups)} for row in rows]
    return Summary.of(name, rows, groups)


def _of_group(g: int) -> str:
    return f"group_{g}_accuracy"


class Section:
    """Runs that were measured on the same images, and all that the page shows of them.

    Attributes:
        data, split, count: names of the data set and of the split, number of images.
        title: all of these.
        columns, details: (key, heading, digits) of the table, and of the one of every run.
        differences: what the recipes of the entries differ in.
        examples: images that each run has looked at.
        looks: attributions in words, and the entries that they are of.
        best: for each column where more is better and entries compare, those that have most.
        counts: (heading, number) of what figures are of, such as the classes in the mAP.
        comparisons: of entries on the same images, by their worst groups.
        energy, spread: whether there are attributions in boxes; entries of several seeds.
        compare: whether all runs were validated on the same images.
    """

    def __init__(self, runs: Sequence[Measured]) -> None:
        self.runs, self.entries = tuple(runs), entries(runs)
        self.data, self.split, self.count = runs[0].data
        self.title = f"{self.data}, {self.split}: {self.count} image{'s' if self.count != 1 else ''}"
        self.examples = runs[0].examples
        self.columns = self._columns([pair for pair in HEADINGS if pair[0] not in DETAILS])
        self.columns.append(("parameters", "parameters", 0))
        groups = [(_of_group(g), group) for g, group in enumerate(runs[0].groups)]
        self.details = self._columns([*HEADINGS, *groups])
        self.groups = [group for key, group in groups if key in {column[0] for column in self.details}]
        self.differences: list[Difference] = differences([entry.runs[0].settings for entry in self.entries])
        self.compare = len({run.validated for run in runs}) == 1
        counts = [(heading, runs[0].figures.get(key)) for key, heading in COUNTS]
        self.counts = [(heading, int(number)) for heading, number in counts if number is not None]
        self.energy = any(column[0] == "epg" for column in self.columns)
        self.looks: dict[str, list[str]] = {}
        for entry in self.entries:
            self.looks.setdefault(entry.runs[0].looked_at, []).append(entry.name)
        self.best = self._best()
        self.comparisons = comparisons([(one.name, [run.judged for run in one.runs]) for one in self.entries])
        self.spread = any(len(entry.runs) > 1 for entry in self.entries)

    def _columns(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str, int]]:
        there = {key for run in self.runs for key, value in run.figures.items() if value is not None}
        return [(key, f"{heading} %", 1) for key, heading in pairs if key in there]

    def _best(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        differing = ("epg", "iou") if len(self.looks) > 1 else ()
        for key, _, _ in self.columns[:-1] if len(self.entries) > 1 else ():
            means = {one.name: one.summary.figures[key].mean for one in self.entries if key in one.summary.figures}
            if means and key not in differing:
                best = (min if key in LOWER else max)(means.values())
                found[key] = [name for name, mean in means.items() if mean == best]
        return found

    @property
    def headline(self) -> str:
        """The most telling figure, and who has most of it."""
        key, heading, _ = next((c for lead in LEADING for c in self.columns if c[0] == lead), self.columns[-1])
        if key == "parameters":
            return f"{self.title}, and nothing that accuracy can be measured by"
        have = [entry for entry in self.entries if key in entry.summary.figures]
        top = max(have, key=lambda entry: entry.summary.figures[key].mean)
        first = f"{heading.removesuffix(' %')} on {self.split}: {top.name}, {top.summary.figures[key].text(1)} %"
        return first[0].upper() + first[1:] + (f", the highest of {len(self.entries)}" if len(self.entries) > 1 else "")

    @property
    def interval(self) -> str:
        """The 95 % intervals of the worst groups, in words; "" where they are not known."""
        told = []
        for entry in self.entries:
            ends = [entry.summary.figures.get(f"worst_group_{end}") for end in ("low", "high")]
            if None not in ends:
                low, high = (end.mean for end in ends if end is not None)
                told.append(f"{entry.name} {low:.1f} to {high:.1f}")
        return "; ".join(told)

    def told(self, entry: Entry) -> list[str]:
        """What an entry's recipe has that others do not."""
        values = [(one.key.removeprefix("terms."), one.values[entry.color]) for one in self.differences]
        return [f"{key}: {value}" for key, value in values if value != ABSENT]


def sectioned(runs: Sequence[Measured]) -> list[Section]:
    """By the images that they were measured on, in the order of first appearance."""
    by_pictures: dict[str, list[Measured]] = {}
    for run in runs:
        by_pictures.setdefault(run.pictures, []).append(run)
    return [Section(members) for members in by_pictures.values()]
