"""The energy pointing game and the size of boxes, against numbers by hand, a loop over pixels and reference vectors."""

import math

import pytest
import torch
from cases import reference
from torch import nn

from debiaskd import Boxes, backend
from debiaskd.metrics import box_coverage, box_size_bins, energy_in_box, energy_pointing_game, iou_with_boxes


def test_energy_reproduces_the_reference():
    given = reference("metrics.npz")
    attributions, boxes = given["attributions"], Boxes(given["boxes"], given["offsets"])
    got = energy_in_box(attributions, boxes)
    torch.testing.assert_close(got.double(), given["epg_each"].double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.double().mean(), given["epg"].double(), rtol=1e-5, atol=1e-7)


def test_energy_of_upsampled_maps_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(5, 6, 6, generator=generator)
    maps[4] = -1.0
    rows = [[[3, 5, 20, 21]], [], [[0, 0, 48, 48]], [[0, 0, 9, 9], [5, 5, 30, 14]], [[1, 1, 2, 2]]]
    got = energy_in_box(maps, Boxes.from_lists(rows), size=(48, 48))
    for value, attribution, boxes in zip(got, maps.double(), rows):
        large = nn.functional.interpolate(attribution[None, None], size=(48, 48), mode="bilinear")[0, 0].clamp(min=0)
        inside = sum(
            float(large[y, x])
            for y in range(48)
            for x in range(48)
            if any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
        )
        expected = inside / float(large.sum()) if large.sum() > 0 else 0.0
        assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("attribution", "boxes", "error", "message"),
    [
        (torch.zeros(2, 4), Boxes.from_lists([[], []]), ValueError, r"attribution must have shape \[N,H,W\]"),
        (torch.zeros(2, 4, 4), Boxes.from_lists([[]]), ValueError, "boxes must be of N=2 images, got 1"),
        (torch.zeros(1, 4, 4), [[0, 0, 1, 1]], TypeError, "boxes must be debiaskd.Boxes, got list"),
        (torch.zeros(1, 4, 4).long(), Boxes.from_lists([[]]), TypeError, "attribution must be float32"),
    ],
)
def test_bad_energy_arguments(attribution, boxes, error, message):
    with pytest.raises(error, match=message):
        energy_in_box(attribution, boxes)


def test_energy_tells_undefined_maps_from_those_that_lie_outside():
    maps = torch.zeros(6, 4, 4)
    maps[0, 3, 3] = 1  # outside of its box
    maps[1] = -1
    maps[3, 0, 0], maps[3, 3, 3] = 3e-30, 1e-30  # far below what the op would divide by
    maps[4, 0, 0] = math.nan
    maps[5] = 1
    boxes = Boxes.from_lists([[[0, 0, 2, 2]]] * 5 + [None])
    share, defined = energy_pointing_game(maps, boxes)
    torch.testing.assert_close(share, torch.tensor([0, 0, 0, 0.75, math.nan, math.nan]), equal_nan=True)
    assert defined.tolist() == [True, False, False, True, True, False]


def test_energy_without_boxes_or_maps():
    share, defined = energy_pointing_game(torch.ones(2, 3, 3), Boxes.from_lists([[], [[3, 3, 9, 9]]]))
    assert share.tolist() == [0, 0] and defined.all()
    share, defined = energy_pointing_game(torch.ones(0, 3, 3), Boxes.from_lists([]), size=(6, 6))
    assert share.shape == defined.shape == (0,)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("function", (energy_in_box, iou_with_boxes))
def test_dtypes_give_what_float32_gives(dtype, function):
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(4, 8, 9, generator=generator).to(dtype)
    boxes = Boxes.from_lists([[[1, 2, 7, 6]], [], [[0, 0, 9, 8]], [[3, 3, 5, 5], [0, 0, 4, 4]]])
    got = function(maps, boxes)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, function(maps.float(), boxes), rtol=1e-6, atol=1e-7)
    strided = maps.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(function(strided, boxes), got, rtol=1e-6, atol=1e-7)


# ---- ignored areas ----


def energy_by_pixels(attribution, boxes, ignore, size):
    """The share in the boxes, from lists of judged pixels; and whether there is any energy among them."""
    large = nn.functional.interpolate(attribution.double()[None, None], size=size, mode="bilinear")[0, 0].clamp(min=0)

    def holds(rows, y, x):
        return any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in rows or [])

    places = [(y, x) for y in range(size[0]) for x in range(size[1])]
    inside = sum(float(large[place]) for place in places if holds(boxes, *place))
    outside = sum(float(large[p]) for p in places if not holds(boxes, *p) and not holds(ignore, *p))
    return inside / (inside + outside) if inside + outside > 0 else 0.0, inside + outside > 0


AREAS = [
    [[0, 0, 12, 24]],
    None,
    [[0, 0, 24, 24]],
    [[4, 4, 30, 9], [20, 0, 24, 24]],
    [],
    [[-3, 9, 24, 24], [0, 0, 24, 10]],
]


@pytest.mark.parametrize("side", (24, 6))
@pytest.mark.parametrize("name", (None, "eager"))
def test_ignored_areas_count_neither_as_inside_nor_as_outside(side, name):
    maps = torch.randn(6, side, side, generator=torch.Generator().manual_seed(3))
    rows = [[[3, 5, 20, 21]], [[2, 2, 9, 9]], [[5, 5, 12, 24]], [[0, 0, 9, 9], [5, 5, 30, 14]], [], [[1, 1, 2, 2]]]
    with backend(name):
        share, defined = energy_pointing_game(maps, Boxes.from_lists(rows), (24, 24), Boxes.from_lists(AREAS))
        assert torch.equal(energy_in_box(maps, Boxes.from_lists(rows), (24, 24), Boxes.from_lists(AREAS)), share)
    expected = [energy_by_pixels(*each, (24, 24)) for each in zip(maps, rows, AREAS)]
    torch.testing.assert_close(share.double(), torch.tensor([e[0] for e in expected]).double(), rtol=2e-6, atol=1e-7)
    assert defined.tolist() == [e[1] for e in expected]


def test_what_little_is_left_beside_ignored_areas_is_shared_as_exactly():
    maps = torch.zeros(5, 8, 8)
    maps[:, 0, :4] = torch.tensor([1e7, 3e6, 2e6, 5e6])  # in the ignored area
    maps[0, 4, :3], maps[1, 4, :2], maps[2, 4, 2:4] = torch.tensor([3.0, 0.25, 0.75]), 1e-25, 7.0
    maps[3] = maps[3].clamp(min=0)
    maps[4, 0, 1], maps[4, 4, :4] = math.nan, 0.5
    boxes, areas = Boxes.from_lists([[[0, 4, 2, 5]]] * 5), Boxes.from_lists([[[0, 0, 8, 1]]] * 5)
    share, defined = energy_pointing_game(maps, boxes, ignore=areas)
    torch.testing.assert_close(share, torch.tensor([3.25 / 4, 1, 0, 0, 0.5]), rtol=1e-6, atol=0)
    assert defined.tolist() == [True, True, True, False, True]


def test_ignored_areas_where_nothing_is_known_or_nothing_is_given():
    maps = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(8))
    boxes, areas = Boxes.from_lists([[[0, 0, 3, 3]], None, [[1, 1, 4, 4]]]), Boxes.from_lists([[[2, 2, 6, 6]]] * 3)
    plain, known = energy_in_box(maps, boxes), energy_in_box(maps, boxes, ignore=areas)
    assert known[0] > plain[0] and known[1].isnan() and known[2] > plain[2]
    unknown = areas.annotated_where(torch.tensor([False, False, True]))
    torch.testing.assert_close(
        energy_in_box(maps, boxes, ignore=unknown), torch.stack([plain[0], plain[1], known[2]]), equal_nan=True
    )
    share, defined = energy_pointing_game(maps[:0], boxes[:0], (9, 9), areas[:0])
    assert share.shape == defined.shape == (0,)
    with pytest.raises(ValueError, match="ignore must be of N=3 images, got 2"):
        energy_in_box(maps, boxes, ignore=areas[:2])
    with pytest.raises(TypeError, match=r"ignore must be debiaskd\.Boxes, got list"):
        energy_in_box(maps, boxes, ignore=[[0, 0, 1, 1]])


# ---- sizes of boxes ----


def test_bins_of_sizes():
    rows = [[[0, 0, 2, 5]], [[0, 0, 5, 5], [0, 0, 2, 2]], [[0, 0, 5, 6], [2, 3, 9, 9]], [], None, [[10, 0, 12, 9]]]
    boxes = Boxes.from_lists([*rows, [[-9, -9, 99, 99]]])
    coverage = box_coverage(boxes, (10, 10))
    expected = boxes.mask((10, 10)).double().mean((1, 2))
    assert coverage[4].isnan() and torch.equal(coverage[boxes.annotated], expected[boxes.annotated])
    assert box_size_bins(boxes, (10, 10), (0.1, 0.25)).tolist() == [1, 2, 2, -1, -1, -1, 2]
    assert box_size_bins(Boxes.from_lists([]), (10, 10), (0.1,)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, b: iou_with_boxes(a[0], b), ValueError, r"attribution must have shape \[N,H,W\], got \[4, 4\]"),
        (lambda a, b: iou_with_boxes(a[:, :0], b), ValueError, "attribution must have at least one pixel a map"),
        (lambda a, b: iou_with_boxes(a, b[:1]), ValueError, "boxes must be of N=2 images, got 1"),
        (lambda a, b: iou_with_boxes(a, b, 1.0), ValueError, r"threshold must lie in \[0,1\), got \[1.0\]"),
        (lambda a, b: iou_with_boxes(a, b, ()), ValueError, r"threshold must lie in \[0,1\), got \[\]"),
        (lambda a, b: iou_with_boxes(a, b, "0.5"), TypeError, "threshold must be a sequence, got str"),
        (lambda a, b: iou_with_boxes(a, b, [None]), TypeError, r"threshold\[0\] must be a number, got NoneType"),
        (lambda a, b: iou_with_boxes(a, b, size=(4, 0)), ValueError, "size must be"),
        (lambda a, b: box_size_bins(b, (4, 4), [0.5, 0.2]), ValueError, "edges must be rising fractions between 0"),
        (lambda a, b: box_size_bins(b, (4, 4), []), ValueError, "at least one, got"),
        (lambda a, b: box_coverage([[1]], (4, 4)), TypeError, "boxes must be debiaskd.Boxes, got list"),
    ],
)
def test_bad_localization_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 4, 4), Boxes.from_lists([[], [[0, 0, 1, 1]]]))
