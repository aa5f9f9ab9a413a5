"""Where things lie in charts: scales, ticks, lines. How they look is in drawings.html.j2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

#: Values that span more than this are drawn by their logarithm.
DECADES = 50.0


class Scale:
    """From values to places.

    Args:
        values: that have to fit; with none, or a single value, there is room around it.
        start, end: places of the lowest and the highest; `end` may be the smaller.
        bounds: that are not exceeded, such as 0 and 100 for percent.
        log: may be logarithmic, and is where the values are positive and span much.
        whole: of whole numbers, which alone get a tick; the first and the last lie at the ends.

    Example:
        >>> from debiaskd.reports.charts import Scale
        >>> scale = Scale([0.0, 10.0], 0, 100)
        >>> scale(5.0), scale.ticks
        (50.0, [(0.0, '0'), (50.0, '5'), (100.0, '10')])
        >>> Scale([0.001, 1.0], 0, 90, log=True).ticks
        [(0.0, '0.001'), (30.0, '0.01'), (60.0, '0.1'), (90.0, '1')]
    """

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        log: bool = False,
        whole: bool = False,
    ) -> None:
        self.start, self.end = start, end
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        self.log = log and low > 0 and high > DECADES * low
        if self.log:
            self.low, self.high = float(math.floor(math.log10(low))), float(math.ceil(math.log10(high)))
            each = math.ceil((self.high - self.low) / 6)
            self._steps = [10.0**power for power in range(int(self.low), int(self.high) + 1, each)]
            return
        if high == low:
            room = 0.5 if whole else abs(low) / 10 or 0.5
            low, high = low - room, high + room
        step = _step((high - low) / (6 if whole else 4), whole)
        if not whole:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        self.low, self.high = max(low, bounds[0]), min(high, bounds[1])
        first = math.ceil(self.low / step - 1e-9)
        self._steps = [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return round(self.start + (self.end - self.start) * (at - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of each."""
        return [(self(value), f"{value:.6g}") for value in self._steps]


def _step(least: float, whole: bool) -> float:
    """The next of 1, 2, 5, 10, …"""
    power: float = 10.0 ** math.floor(math.log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))
    return max(step, 1.0) if whole else step


class Places:
    """Equally spaced places of values that have names, from 0.

    Args:
        names: of the values.
        start, end: places of the first and the last; a single one lies in the middle.

    Example:
        >>> from debiaskd.reports.charts import Places
        >>> Places(["1", "5", "20"], 0, 100).ticks
        [(0.0, '1'), (50.0, '5'), (100.0, '20')]
    """

    def __init__(self, names: Sequence[str], start: float, end: float) -> None:
        self.names, self.start, self.end = list(names), start, end

    def __call__(self, value: float) -> float:
        if len(self.names) == 1:
            return (self.start + self.end) / 2
        return round(self.start + (self.end - self.start) * value / (len(self.names) - 1), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        return [(self(i), name) for i, name in enumerate(self.names)]


@dataclass(frozen=True)
class Point:
    """A value pair, in words for whoever points at it; `strong` is drawn larger, what is `beaten` is left empty, and a
    whisker reaches `spread` above and below."""

    x: float
    y: float
    title: str
    strong: bool = False
    beaten: bool = False
    spread: float = 0.0


@dataclass(frozen=True)
class Series:
    """Points of one name, in one colour: a number from 0."""

    name: str
    color: int
    points: tuple[Point, ...]


class Chart:
    """Series in one frame; `joined` by lines or each point for itself.

    Args:
        title, across, up: of the chart, of its horizontal and of its vertical axis.
        series: what is drawn; those without points are not.
        joined: whether points are joined by lines.
        log: whether the vertical axis may be logarithmic.
        bounds: of both axes, or of the vertical one where points are joined.
        size: width and height.
        names: of the horizontal axis' values 0, 1, …, which are then equally spaced; none: they are numbers.
    """

    def __init__(
        self,
        title: str,
        across: str,
        up: str,
        series: Sequence[Series],
        *,
        joined: bool,
        log: bool = False,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        size: tuple[int, int] = (480, 260),
        names: Sequence[str] = (),
    ) -> None:
        self.title, self.across, self.up, self.joined = title, across, up, joined
        self.width, self.height = size
        self.series = [one for one in series if one.points]
        points = [point for one in self.series for point in one.points]
        self.left, self.top = 52, 30 if title else 12
        self.right, self.bottom = self.width - 14, self.height - 40
        sideways = (-math.inf, math.inf) if joined else bounds
        room = 24 if names else 0  # for the first and the last name
        self.x: Scale | Places = (
            Places(names, self.left + room, self.right - room)
            if names
            else Scale([p.x for p in points], self.left, self.right, bounds=sideways, whole=joined)
        )
        heights = [p.y + side * p.spread for p in points for side in ((-1, 1) if p.spread else (0,))]
        heights = [min(max(height, bounds[0]), bounds[1]) for height in heights]
        self.y = Scale(heights, self.bottom, self.top, bounds=bounds, log=log)

    def whisker(self, point: Point) -> tuple[float, float]:
        """Places of the upper and the lower end of a point's whisker, within the frame."""
        ends = (self.y(point.y + point.spread), self.y(point.y - point.spread))
        return max(ends[0], self.top), min(ends[1], self.bottom)

    def path(self, series: Series) -> str:
        """The points of a line, as SVG writes them; of each pixel's width the first, the extremes and the last.

        More than these a line through them does not show (Jugel et al. 2014, M4), and long runs have many more.
        """
        places = [(self.x(point.x), self.y(point.y)) for point in series.points]
        kept: list[tuple[float, float]] = []
        for _, column in groupby(places, lambda place: math.floor(place[0])):
            points = list(column)
            heights = [y for _, y in points]
            told = {0, heights.index(min(heights)), heights.index(max(heights)), len(points) - 1}
            kept += [points[i] for i in sorted(told)]
        return " ".join(f"{x:g},{y:g}" for x, y in kept)
