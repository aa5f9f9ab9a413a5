"""Pareto-front checkpoint selection by several validation metrics.

An epoch is on the Pareto front if no other is at least as good in every metric and better in one. Figures are rounded
to bins before they are compared, so that noise in the third digit does not keep every epoch; of epochs in the same
bins the earliest stays.

Source: Rao et al. 2023, "Studying How to Efficiently and Effectively Guide Models with Explanations",
arXiv 2303.11932: F1, EPG and IoU on validation, in bins of 0.005.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from debiaskd.utils import checks


@dataclass(frozen=True)
class Candidate:
    """An epoch: its metrics in the order of the front's names, and whatever belongs to it, such as a file's name."""

    values: tuple[float, ...]
    epoch: int
    payload: Any = None


@dataclass(frozen=True)
class Change:
    """What `ParetoFront.add` did: whether the new epoch is on the front, and which are on it no more."""

    entered: bool
    left: tuple[Candidate, ...]


class ParetoFront:
    """The Pareto front of the epochs so far.

    Args:
        names: of the metrics, each a fraction in [0,1], larger is better.
        bin: metrics are rounded to multiples of it before they are compared, > 0.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> from debiaskd.training.pareto import ParetoFront
        >>> front = ParetoFront()
        >>> front.add({"F1": 0.70, "EPG": 0.30, "IoU": 0.20}, epoch=0).entered
        True
        >>> front.add({"F1": 0.69, "EPG": 0.50, "IoU": 0.30}, epoch=1).entered
        True
        >>> change = front.add({"F1": 0.71, "EPG": 0.35, "IoU": 0.20}, epoch=2)
        >>> change.entered, [gone.epoch for gone in change.left], [kept.epoch for kept in front]
        (True, [0], [1, 2])
    """

    def __init__(self, names: Sequence[str] = ("F1", "EPG", "IoU"), bin: float = 0.005) -> None:
        self.names = tuple(checks.sequence("names", names))
        if not self.names or not all(isinstance(n, str) for n in self.names) or len(set(self.names)) < len(self.names):
            raise ValueError(f"names must be different strings, at least one, got {list(self.names)}")
        self.bin = checks.number("bin", bin, minimum=0, exclusive=True)
        self.front: tuple[Candidate, ...] = ()
        self.seen: list[Candidate] = []  # all of them, without their payloads, to be plotted

    def __len__(self) -> int:
        return len(self.front)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.front)

    def __contains__(self, epoch: object) -> bool:
        return any(candidate.epoch == epoch for candidate in self.front)

    def add(self, values: Mapping[str, float] | Sequence[float], epoch: int, payload: Any = None) -> Change:
        """Add an epoch.

        Args:
            values: fractions in [0,1] by name (further names are ignored), or in the order of `names`; numbers or
                tensors of one element.
            epoch: which it is.
            payload: kept while the epoch is on the front; what it must be for `state_dict` to be saved is up to the
                format that it is saved in.

        Returns:
            Whether it entered, and which epochs left. One that did not enter makes none leave.

        Raises:
            TypeError, ValueError: a name is missing, or a value is not a fraction.
        """
        new = Candidate(self._values(values), checks.integer("epoch", epoch), payload)
        self.seen.append(Candidate(new.values, new.epoch))
        place = self._bins(new)
        if any(all(a >= b for a, b in zip(self._bins(old), place)) for old in self.front):
            return Change(False, ())
        left = tuple(old for old in self.front if all(a <= b for a, b in zip(self._bins(old), place)))
        self.front = (*(old for old in self.front if old not in left), new)
        return Change(True, left)

    def _bins(self, candidate: Candidate) -> tuple[int, ...]:
        return tuple(round(value / self.bin) for value in candidate.values)

    def _values(self, values: Mapping[str, float] | Sequence[float]) -> tuple[float, ...]:
        if isinstance(values, Mapping):
            missing = [name for name in self.names if name not in values]
            if missing:
                raise ValueError(f"values must have {', '.join(self.names)}, got {', '.join(map(str, values))}")
            values = [values[name] for name in self.names]
        elif len(checks.sequence("values", values)) != len(self.names):
            raise ValueError(f"values must be {len(self.names)} ({', '.join(self.names)}), got {len(values)}")
        found = []
        for name, value in zip(self.names, values):
            number = checks.number(f"values[{name!r}]", value.item() if hasattr(value, "item") else value)
            if not 0 <= number <= 1:
                raise ValueError(f"values[{name!r}] must be a fraction in [0,1], not percent, got {number!r}")
            found.append(number)
        return tuple(found)

    # -- across resumes ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, and the payloads."""
        return {
            "names": list(self.names),
            "bin": self.bin,
            "front": [asdict(candidate) for candidate in self.front],
            "seen": [{"values": candidate.values, "epoch": candidate.epoch} for candidate in self.seen],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict()`, also after JSON or `torch.save`.

        Raises:
            ValueError: it is of a front of other names or another bin, or not of one at all.
        """
        try:
            names, width = tuple(state["names"]), state["bin"]
            front = tuple(Candidate(tuple(c["values"]), c["epoch"], c["payload"]) for c in state["front"])
            seen = [Candidate(tuple(c["values"]), c["epoch"]) for c in state["seen"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"state must come from ParetoFront.state_dict(), got one without {error}") from None
        if (names, width) != (self.names, self.bin):
            raise ValueError(f"state must be of names {self.names} and bin {self.bin}, got {names} and {width}")
        self.front, self.seen = front, seen

    # -- an image --------------------------------------------------------------------------------------------------

    def plot(self, path: str | Path) -> None:
        """Each pair of metrics: epochs on the front with their numbers, all others in grey.

        Args:
            path: where to; its ending says the format, such as .png or .svg.

        Raises:
            ImportError: matplotlib is not installed (it comes with the `train` extra).
            ValueError: fewer than two names, or a format that matplotlib does not know.
        """
        if len(self.names) < 2:
            raise ValueError(f"plot needs at least two names, got {list(self.names)}")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the image needs matplotlib: pip install 'debiaskd[train]'") from error
        pairs = list(combinations(range(len(self.names)), 2))
        figure = Figure(figsize=(4.2 * len(pairs), 4.2))
        for axes, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs):
            kept = {candidate.epoch for candidate in self.front}
            beaten = [candidate.values for candidate in self.seen if candidate.epoch not in kept]
            axes.scatter(*_columns(beaten, x, y), s=14, color="0.75", label="beaten")
            axes.scatter(*_columns([c.values for c in self.front], x, y), s=30, color="tab:blue", label="on the front")
            for candidate in self.front:
                place = (candidate.values[x], candidate.values[y])
                axes.annotate(str(candidate.epoch), place, (4, 4), textcoords="offset points", fontsize=8)
            axes.set_xlabel(self.names[x])
            axes.set_ylabel(self.names[y])
            axes.margins(0.1)
            axes.grid(alpha=0.3)
        figure.axes[0].legend(fontsize=8)
        figure.suptitle(
            f"{len(self.front)} of {len(self.seen)} epochs on the front, each with its number (bins of {self.bin:g})",
            fontsize=12 if len(pairs) > 1 else 8,
        )
        figure.subplots_adjust(left=0.17 / len(pairs), right=0.99, bottom=0.12, top=0.91, wspace=0.25)
        figure.savefig(path, dpi=110)


def _columns(values: Sequence[tuple[float, ...]], x: int, y: int) -> tuple[list[float], list[float]]:
    return [value[x] for value in values], [value[y] for value in values]
