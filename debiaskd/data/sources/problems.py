"""Problems of a data set: what was skipped and why, what was corrected, and whether enough is left."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

#: `prepare` refuses a split when a larger share of its images or boxes, or of a list's rows, was passed over.
LIMIT = 0.9


class DataError(ValueError):
    """A data set, or a prepared folder, cannot be used. The message is one line."""


@dataclass
class Tally:
    """Entries of one kind in one place, such as the boxes of "train": how many there were, how many were passed over.

    Attributes:
        where: a split, or the name of a file (`of_file`) whose rows belong to no split yet.
        what: plural noun, "images", "boxes" or "rows".
        total: entries, those passed over included.
        reasons: number of entries passed over and the first of them, by reason.
    """

    where: str
    what: str
    of_file: bool = False
    total: int = 0
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        return sum(count for count, _ in self.reasons.values())

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        known, first = self.reasons.get(reason, (0, example))
        self.reasons[reason] = known + count, first

    def explained(self) -> str:
        """ "12 × unknown category, such as a.xml: 'x'; 3 × …", the most frequent reasons first."""
        order = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        return "; ".join(f"{count} × {reason}, such as {first}" for reason, (count, first) in order[:3])


@dataclass
class Problems:
    """What is wrong with a data set.

    Args:
        strict: raise `DataError` at the first thing that is wrong, instead of passing it over.
        lenient: never refuse because too little is left.

    Attributes:
        found: what was passed over: for each kind what it was found in, in order.
        notes: what was read with a correction, or may surprise: the same, nothing being lost.
        tallies: counts by place and kind of entry; `check` judges them.
    """

    strict: bool = False
    lenient: bool = False
    found: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)

    def add(self, kind: str, what: str, tally: Tally | None = None) -> None:
        """Records that `what` was passed over because of `kind`, also in `tally`."""
        what = _printable(what)
        if self.strict:
            raise DataError(f"{kind}: {what}")
        self.found.setdefault(kind, []).append(what)
        if tally is not None:
            tally.skip(kind, what)

    def note(self, kind: str, what: str) -> None:
        self.notes.setdefault(kind, []).append(_printable(what))

    def refuse(self, message: str) -> None:
        """Raises `DataError`; with `lenient` the message becomes a note."""
        if not self.lenient:
            raise DataError(f"{_printable(message)}; --lenient (lenient=True) goes on")
        self.note("not refused, being lenient", message)

    def merge(self, found: dict[str, list[str]]) -> None:
        for kind, names in found.items():
            for name in names:
                self.add(kind, name)

    def tally(self, where: str, what: str, *, of_file: bool = False) -> Tally:
        return self.tallies.setdefault((where, what), Tally(where, what, of_file))

    def check(self, splits: Collection[str]) -> None:
        """Refuses where nothing or almost nothing is left: more than `LIMIT` of a tally of `splits`, or of a file, was
        passed over.

        Raises:
            DataError: so it is, and `lenient` is False.
        """
        for tally in self.tallies.values():
            if (tally.of_file or tally.where in splits) and tally.skipped > LIMIT * tally.total:
                count = f"{tally.skipped} of {tally.total} {tally.what}"
                self.refuse(f"{tally.where}: {count} were passed over: {tally.explained()}")

    def why(self) -> str:
        """ ": 5 × bad row: a, and 4 more; …" to end a message with, or "" where nothing was passed over."""
        return f": {'; '.join(self.lines(1))}" if self.found else ""

    def lines(self, shown: int = 3) -> list[str]:
        """One line for each kind of what was passed over, with the first few names."""
        return _lines(self.found, shown)

    def note_lines(self, shown: int = 3) -> list[str]:
        """One line for each kind of note, with the first few names."""
        return _lines(self.notes, shown)


def _lines(found: dict[str, list[str]], shown: int) -> list[str]:
    made = []
    for kind, names in sorted(found.items()):
        more = f", and {len(names) - shown} more" if len(names) > shown else ""
        made.append(f"{len(names)} × {kind}: {', '.join(names[:shown])}{more}")
    return made


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # names come from anywhere
