"""Bounds of polygons and run-length encoded masks, against the masks themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from debiaskd.data.sources.segmentation import bounds


def runs_of(mask: NDArray[np.bool_]) -> list[int]:
    """Column by column, beginning with those outside."""
    pixels = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], pixels, [not pixels[-1]]]).astype(np.int8)))
    return np.diff(np.concatenate([[0], edges])).tolist()  # type: ignore[no-any-return]


def compressed(runs: list[int]) -> str:
    """As COCO's own code writes them."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != -1 if bits & 16 else value != 0
            text += chr((bits | 32 * more) + 48)
    return text


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_bounds_of_masks(height: int, width: int, data: st.DataObject) -> None:
    pixels = data.draw(
        st.lists(st.sampled_from([False, False, True]), min_size=height * width, max_size=height * width)
    )
    mask = np.array(pixels).reshape(height, width)
    ys, xs = mask.nonzero()
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else None
    runs = runs_of(mask)
    assert sum(runs) == height * width
    for counts in (runs, compressed(runs)):
        assert bounds({"size": [height, width], "counts": counts}) == expected


def test_a_mask_of_coco() -> None:
    # 5×4: two pixels at the top of the second column, as pycocotools.mask.encode gives it
    mask = np.zeros((5, 4), bool)
    mask[:2, 1] = True
    assert compressed(runs_of(mask)) == "52=" and runs_of(mask) == [5, 2, 13]
    assert bounds({"size": [5, 4], "counts": "52="}) == (1, 0, 2, 2)
    assert bounds({"size": [5, 4], "counts": "52\x7f"}) is None


@settings(max_examples=25)
@given(st.lists(st.lists(st.tuples(*[st.integers(0, 99)] * 2), min_size=3, max_size=6), min_size=1, max_size=3))
def test_bounds_of_polygons(polygons: list[list[tuple[int, int]]]) -> None:
    points = np.array([point for polygon in polygons for point in polygon])
    low, high = points.min(0).tolist(), points.max(0).tolist()
    expected = (*low, *high) if low[0] < high[0] and low[1] < high[1] else None
    flat = [[value for point in polygon for value in point] for polygon in polygons]
    assert bounds(flat) == expected
    if len(flat) == 1:
        assert bounds(flat[0]) == expected


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        "x",
        [[1, 2]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, "3", 4]],
        [[1, 2, float("nan"), 4]],
        [[1, 1, 3, 3], 5],
        [[1, 2, 5, 2]],
        {"size": [4, 4]},
        {"size": [4], "counts": [1, 2]},
        {"size": [4, 4], "counts": [1, -2]},
        {"size": [4, 4], "counts": [1, 20]},
        {"size": [4, 4], "counts": [16]},
        {"size": [4, 4], "counts": "\u20ac"},
        {"size": [4, 4], "counts": "P"},
    ],
)
def test_what_has_no_bounds(segmentation: Any) -> None:
    assert bounds(segmentation) is None
