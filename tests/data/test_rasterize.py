"""Masks of COCO's segmentations are those of pycocotools, pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_segmentation import compressed, runs_of

from debiaskd.data.sources.segmentation import rasterize

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
pycocotools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")


def theirs(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        encoded = pycocotools.merge(pycocotools.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = pycocotools.frPyObjects(segmentation, height, width)
    else:
        encoded = {**segmentation, "counts": segmentation["counts"].encode()}
    return pycocotools.decode(encoded).astype(bool)


def coordinates(most: int) -> st.SearchStrategy[float]:
    return st.integers(-300, (most + 3) * 100).map(lambda n: n / 100) | st.integers(-2, most + 2).map(float)


@st.composite
def outlines(draw: st.DrawFn) -> tuple[list[list[float]], int, int]:
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    points = st.tuples(coordinates(width), coordinates(height))
    polygons = draw(st.lists(st.lists(points, min_size=3, max_size=8), min_size=1, max_size=3))
    return [[value for point in polygon for value in point] for polygon in polygons], height, width


@settings(max_examples=300)
@given(outlines())
@example(([[2.0, 2.0, 2.0, 2.0, 7.5, 2.0, 7.5, 9.1]], 12, 12))
@example(([[-1.0, -1.0, 30.0, -1.0, 30.0, 30.0, -1.0, 30.0]], 5, 7))
def test_polygons(outline: tuple[list[list[float]], int, int]) -> None:
    polygons, height, width = outline
    mine = rasterize(polygons, height, width)
    if mine is None:  # without an area
        assert not theirs(polygons, height, width).any()
    else:
        assert np.array_equal(mine, theirs(polygons, height, width))


@settings(max_examples=100)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_run_length_encodings(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    mask[0, 0] = seed % 2
    runs = runs_of(mask)
    for counts in (runs, compressed(runs)):
        found = rasterize({"size": [height, width], "counts": counts}, height, width)
        expected = theirs({"size": [height, width], "counts": counts}, height, width)
        assert np.array_equal(expected, mask)
        assert (found is None and not mask.any()) or np.array_equal(found, mask)


def test_what_is_no_outline_or_of_another_size_has_no_pixels() -> None:
    assert rasterize({"size": [3, 4], "counts": [2, 3, 7]}, 4, 3) is None
    assert rasterize([[1.0, 2.0, "x"]], 4, 3) is None
    assert rasterize([], 4, 3) is None
