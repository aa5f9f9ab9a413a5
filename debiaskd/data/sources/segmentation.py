"""Bounds and pixels of COCO's segmentations: polygons, and run-length encoded masks in both of their forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Points of the grid on which outlines are walked, for each pixel.
_FINE = 5


def bounds(segmentation: Any) -> tuple[float, float, float, float] | None:
    """The smallest box around a segmentation, (x0, y0, x1, y1), half-open.

    Args:
        segmentation: a list of polygons [x, y, x, y, …], one such polygon, or {"size": [height, width], "counts": …}
            with counts as a list of runs or as COCO's compressed text.

    Returns:
        None where it is nothing of these, or covers nothing.
    """
    if isinstance(segmentation, dict):
        return _of_mask(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        return None
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    xs: list[float] = []
    ys: list[float] = []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 4 or len(polygon) % 2 or not all(map(_is_number, polygon)):
            return None
        xs += polygon[0::2]
        ys += polygon[1::2]
    box = float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
    return box if box[2] > box[0] and box[3] > box[1] else None


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 1 << 53) or (type(value) is float and math.isfinite(value))


def _of_mask(mask: dict[str, Any]) -> tuple[float, float, float, float] | None:
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return None
    height, width = size
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return None
    if sum(runs) > height * width:
        return None
    return _of_runs(runs, height)


def _of_runs(runs: Sequence[int], height: int) -> tuple[float, float, float, float] | None:
    """Runs of pixels outside and inside in turn, column by column."""
    x0 = y0 = math.inf
    x1 = y1 = -math.inf
    start = 0
    for number, run in enumerate(runs):
        if number % 2 and run:
            (first, top), (last, bottom) = divmod(start, height), divmod(start + run - 1, height)
            if last > first:  # it leaves a column at its end and enters the next one at its beginning
                top, bottom = 0, height - 1
            x0, y0, x1, y1 = min(x0, first), min(y0, top), max(x1, last + 1), max(y1, bottom + 1)
        start += run
    return None if x1 < x0 else (float(x0), float(y0), float(x1), float(y1))


def _decompressed(text: str) -> list[int] | None:
    """COCO's text: groups of 5 bits, least first, 32 for "more follows"; from the third run on, differences to the run
    before the last one."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs


# -- masks -----------------------------------------------------------------------------------------------------------


def rasterize(segmentation: Any, height: int, width: int) -> NDArray[np.bool_] | None:
    """The pixels of a segmentation, bool [H,W], as pycocotools makes them.

    Args:
        segmentation: as for `bounds`; several polygons are joined.
        height, width: of the image.

    Returns:
        None where it is nothing of these, or a mask of another size.
    """
    if isinstance(segmentation, dict):
        if _of_mask(segmentation) is None or segmentation["size"] != [height, width]:
            return None
        counts = segmentation["counts"]
        runs = _decompressed(counts) if isinstance(counts, str) else counts
        ends = np.cumsum(np.array(runs, np.int64))
        return _between(ends[: len(ends) - len(ends) % 2 or None], height, width) if runs else None
    if bounds(segmentation) is None:
        return None
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    mask = np.zeros((height, width), np.bool_)
    for polygon in polygons:
        if len(polygon) >= 6:
            mask |= _between(_crossings(np.array(polygon, np.float64).reshape(-1, 2), height, width), height, width)
    return mask


def _between(positions: NDArray[np.int64], height: int, width: int) -> NDArray[np.bool_]:
    """Pixels, counted column by column, from the first position to the second, from the third to the fourth, …"""
    changes = np.bincount(positions, minlength=height * width + 1)[: height * width]
    inside: NDArray[np.bool_] = (np.cumsum(changes) % 2).astype(np.bool_).reshape(width, height).T
    return inside


def _crossings(points: NDArray[np.float64], height: int, width: int) -> NDArray[np.int64]:
    """Where a polygon's outline crosses the middle of a column of pixels, on a grid five times as fine.

    Edges are walked point by point along their longer axis. Between two points in different columns of the fine grid
    lies a crossing; those that fall on the middle of a column of pixels count, from the next row of pixels on.
    """
    fine = np.trunc(_FINE * points + 0.5).astype(np.int64)
    walked = [_walk(a, b) for a, b in zip(fine, np.roll(fine, -1, 0))]
    u, v = np.concatenate(walked).T
    moved = u[1:] != u[:-1]
    x = (np.where(u[1:] < u[:-1], u[1:], u[1:] - 1)[moved] + 0.5) / _FINE - 0.5
    y = (np.minimum(v[1:], v[:-1])[moved] + 0.5) / _FINE - 0.5
    middle = (np.floor(x) == x) & (x >= 0) & (x <= width - 1)
    rows = np.ceil(y[middle].clip(0, height)).astype(np.int64)
    positions: NDArray[np.int64] = x[middle].astype(np.int64) * height + rows
    return positions


def _walk(start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n,2], the points of an edge from its start to its end."""
    dx, dy = np.abs(end - start).tolist()
    along = 0 if dx >= dy else 1
    low, high = (start, end) if start[along] <= end[along] else (end, start)
    steps = np.arange(max(dx, dy) + 1)
    slope = (high[1 - along] - low[1 - along]) / max(dx, dy, 1)
    points = np.empty((len(steps), 2), np.int64)
    points[:, along] = low[along] + steps
    points[:, 1 - along] = np.trunc(low[1 - along] + slope * steps + 0.5).astype(np.int64)
    return points if low is start else points[::-1]
