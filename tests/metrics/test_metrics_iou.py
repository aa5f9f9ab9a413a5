"""The IoU of maps with boxes, against numbers by hand, loops over pixels and reference vectors."""

import math

import pytest
import torch
from cases import reference
from torch import nn

from debiaskd import Boxes, backend
from debiaskd.metrics import energy_in_box, iou_with_boxes


def iou_by_loop(attribution, boxes, threshold, size):
    positive = attribution.float()
    if positive.shape != size:
        positive = nn.functional.interpolate(positive[None, None], size=size, mode="bilinear")[0, 0]
    positive = positive.clamp(min=0)
    low, high = positive.min(), positive.max()
    if high > low:
        positive = (positive - low) / (high - low)
    elif high > 0:
        positive = torch.ones_like(positive)
    above = {tuple(place) for place in (positive > threshold).nonzero().tolist()}
    covered = {
        (y, x)
        for x0, y0, x1, y1 in boxes
        for y in range(max(y0, 0), min(y1, size[0]))
        for x in range(max(x0, 0), min(x1, size[1]))
    }
    return len(above & covered) / len(above | covered) if above | covered else 0.0


def test_iou_reproduces_the_reference():
    given = reference("metrics.npz")
    got = iou_with_boxes(given["attributions"], Boxes(given["boxes"], given["offsets"]))
    torch.testing.assert_close(got.double(), given["iou_each"], rtol=1e-6, atol=0)
    torch.testing.assert_close(got.double().mean(), given["iou"], rtol=1e-6, atol=0)


ROWS = [[[3, 5, 20, 21]], [], [[0, 0, 24, 24]], [[0, 0, 9, 9], [5, 5, 30, 14]], [[1, 1, 2, 2]], [[-5, -5, 3, 3]]]
THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.95)


@pytest.mark.parametrize("side", (24, 6))
@pytest.mark.parametrize("name", (None, "eager"))
def test_iou_at_several_thresholds_against_a_loop(side, name):
    maps = torch.randn(6, side, side, generator=torch.Generator().manual_seed(3))
    maps[0] = maps[0].abs() + 0.2  # positive everywhere: its minimum is taken away
    with backend(name):
        got = iou_with_boxes(maps, Boxes.from_lists(ROWS), THRESHOLDS, size=(24, 24))
    expected = [[iou_by_loop(a, b, t, (24, 24)) for t in THRESHOLDS] for a, b in zip(maps, ROWS)]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(iou_with_boxes(maps, Boxes.from_lists(ROWS), 0.3, size=(24, 24)), got[:, 2])


@pytest.mark.parametrize("scale", (1.0, 0.1, 1 / 3, 1e-20, 1e-44, 3e38 / 40))
def test_iou_of_pixels_at_the_threshold_is_that_of_normalised_maps(scale):
    generator = torch.Generator().manual_seed(4)
    maps = torch.randint(-5, 41, (40, 12, 12), generator=generator).float()
    maps[20:] = maps[20:].clamp(min=3)
    maps = maps * scale
    thresholds = [i / 40 for i in range(40)]
    boxes = [[[i % 7, 2, 6 + i % 6, 9]] for i in range(40)]
    got = iou_with_boxes(maps, Boxes.from_lists(boxes), thresholds)
    positive = maps.clamp(min=0)
    low, high = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    above = ((positive - low) / (high - low))[:, None] > torch.tensor(thresholds)[:, None, None]
    mask = Boxes.from_lists(boxes).mask((12, 12))[:, None]
    expected = (above & mask).sum((2, 3)) / (above | mask).sum((2, 3))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_iou_of_odd_maps():
    maps = torch.zeros(7, 4, 4)
    maps[1] = 2.5  # constant: all of it
    maps[2] = -1
    maps[3, 0, 0] = math.nan
    maps[4, 0, 0] = math.inf
    maps[5, 0, 0] = -math.inf
    boxes = Boxes.from_lists([[], [[0, 0, 2, 4]], [[0, 0, 2, 2]], [[0, 0, 2, 2]], [[0, 0, 2, 2]], [[0, 0, 2, 2]], None])
    got = iou_with_boxes(maps, boxes)
    expected = torch.tensor([0, 0.5, 0, math.nan, math.nan, 0, math.nan])
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert iou_with_boxes(maps[:0], boxes[:0], (0.1, 0.2), (9, 9)).shape == (0, 2)


def test_counts_of_large_maps_are_exact(monkeypatch):
    monkeypatch.setattr("debiaskd.metrics.localization.EXACT_PIXELS", 64)
    maps = torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(5))
    boxes = Boxes.from_lists([[[0, 0, 5, 9]], [[2, 2, 4, 4]]])
    got = iou_with_boxes(maps, boxes)
    share = energy_in_box(maps[:, :2, :2], boxes, (10, 10))
    monkeypatch.undo()
    assert got.dtype == share.dtype == torch.float32
    torch.testing.assert_close(got, iou_with_boxes(maps, boxes))
    torch.testing.assert_close(share, energy_in_box(maps[:, :2, :2], boxes, (10, 10)))


@pytest.mark.parametrize("side", (24, 6))
@pytest.mark.parametrize("name", (None, "eager"))
def test_ignored_areas_are_in_neither_set_and_out_of_the_range(side, name):
    maps = torch.randn(6, side, side, generator=torch.Generator().manual_seed(9)).abs() + 0.1
    areas = [[[0, 0, 12, 24]], None, [[0, 0, 24, 24]], [[4, 4, 30, 9], [20, 0, 24, 24]], [], [[-3, 9, 24, 24]]]
    with backend(name):
        got = iou_with_boxes(maps, Boxes.from_lists(ROWS), THRESHOLDS[1:], (24, 24), Boxes.from_lists(areas))
    for found, one, rows, ignored in zip(got, maps, ROWS, areas):
        large = nn.functional.interpolate(one[None, None], size=(24, 24), mode="bilinear")[0, 0]
        mask, ignore = (Boxes.from_lists([r]).mask((24, 24))[0] for r in (rows, ignored))
        judged = large[mask | ~ignore]
        share, mask = (judged - judged.min()) / (judged.max() - judged.min()), mask[mask | ~ignore]
        for value, threshold in zip(found.tolist(), THRESHOLDS[1:]):
            above = share > threshold
            assert value == pytest.approx(float((above & mask).sum() / (above | mask).sum()), rel=1e-6)
