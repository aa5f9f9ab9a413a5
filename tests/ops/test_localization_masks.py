"""Masks are read as boxes that cover the same pixels: in `localization_loss`, `box_overlap`, and what is left out."""

import pytest
import torch
from cases import DTYPES, KINDS, attribution, covering, every_way
from mask_cases import as_boxes, blobs
from test_localization import loss_and_gradient

import debiaskd as dk
from debiaskd.masks import Masks
from debiaskd.metrics import box_coverage, energy_in_box, iou_with_boxes
from debiaskd.ops.box_overlap import box_overlap

pytestmark = pytest.mark.usefixtures("one_thread")
BOXES = [[[3, 1, 9, 20]], [], [[0, 0, 400, 2], [5, 30, 8, 70]], None, []]
SIZES = [
    ((33, 40), None),
    ((70, 300), None),
    ((1, 5), None),
    ((7, 9), (65, 70)),
    ((30, 31), (31, 33)),
    ((40, 9), (64, 8)),
]


@every_way("localization")
@covering(kind=KINDS, dtype=DTYPES, own__size=SIZES, reduction=("mean", "none"))
def test_a_mask_is_the_boxes_that_cover_the_same_pixels(way, kind, dtype, own, size, reduction):
    maps = way.put(attribution(kind, len(BOXES), *own, dtype=dtype))
    mask = blobs(len(BOXES), *(size or own))
    options = {"kind": kind, "size": size, "reduction": reduction}
    boxes = dk.Boxes.from_lists(BOXES)
    with way.active():
        loss, gradient = loss_and_gradient(maps, boxes, mask=mask.to(maps.device), **options)
        expected = loss_and_gradient(maps, as_boxes(mask, BOXES), **options)
        assert not torch.equal(loss, loss_and_gradient(maps, boxes, **options)[0])
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@every_way("localization")
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_carry_masks_by_class_and_areas_to_ignore_may_be_masks(way, kind):
    maps = way.put(attribution(kind, 3, 20, 34))
    masks, areas = blobs(3, 20, 34), blobs(3, 20, 34, seed=1)
    carried = Masks.from_lists([torch.stack([masks[0], areas[0]]), masks[1], None], [[4, 2], [7], []], size=(20, 34))
    boxes = dk.Boxes.from_lists([[], [[0, 0, 5, 5]], [[1, 1, 9, 9]]], [[], [1], [7]]).with_masks(carried)
    target = torch.tensor([2, 7, 7])
    chosen = torch.stack([areas[0], masks[1], torch.zeros(20, 34) > 0])
    plain = as_boxes(chosen, [[], [], [[1, 1, 9, 9]]])
    ignore = dk.Boxes.from_lists([[], [], []]).with_masks(Masks.from_lists(list(areas.flip(0))))
    options = {"kind": kind, "normalize": True}
    with way.active():
        assert torch.equal(
            loss_and_gradient(maps, boxes.for_class(target), **options)[1], loss_and_gradient(maps, plain, **options)[1]
        )
        found = loss_and_gradient(maps, boxes.for_class(target), ignore=ignore.to(maps.device), **options)
        same = as_boxes(areas.flip(0), [[], [], []]).to(maps.device)
        expected = loss_and_gradient(maps, plain, ignore=same, **options)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@every_way("box_overlap")
@pytest.mark.parametrize("own", [(33, 40), (9, 11)], ids=str)
def test_overlap_counts_the_pixels_of_masks(way, own):
    maps, size = way.put(attribution("energy", 5, *own)), (33, 40)
    mask, areas = blobs(5, *size), blobs(5, *size, seed=2)
    boxes = dk.Boxes.from_lists(BOXES).with_masks(Masks.from_lists(list(mask)))
    ignore = dk.Boxes.from_lists([[]] * 5).with_masks(Masks.from_lists(list(areas)))
    device = maps.device
    for left in (None, ignore):
        plain = None if left is None else as_boxes(areas, [[]] * 5).to(device)
        with way.active():
            found = box_overlap(maps, boxes.to(device), (0.2, 0.6), size=size, ignore=left and left.to(device))
            expected = box_overlap(maps, as_boxes(mask, BOXES).to(device), (0.2, 0.6), size=size, ignore=plain)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_metrics_of_masks_are_those_of_the_same_pixels():
    maps, mask, areas = attribution("energy", 5, 33, 40), blobs(5, 33, 40), blobs(5, 33, 40, seed=2)
    boxes = dk.Boxes.from_lists(BOXES).with_masks(Masks.from_lists(list(mask)))
    ignore = dk.Boxes.from_lists([[]] * 5).with_masks(Masks.from_lists(list(areas)))
    plain, left = as_boxes(mask, BOXES), as_boxes(areas, [[]] * 5)
    assert torch.equal(box_coverage(boxes, (33, 40))[:3], box_coverage(plain, (33, 40))[:3])
    for metric in (energy_in_box, lambda m, b, ignore: iou_with_boxes(m, b, ignore=ignore)):
        torch.testing.assert_close(metric(maps, boxes, ignore=ignore), metric(maps, plain, ignore=left), equal_nan=True)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.zeros(1, 4, 4), TypeError, "mask must be torch.bool, got torch.float32"),
        (torch.zeros(1, 4, 5) > 0, ValueError, r"mask must have shape \[N,H,W\]=\[1, 4, 4\], got \[1, 4, 5\]"),
        ("no", TypeError, "mask must be a torch.Tensor, got str"),
    ],
)
def test_a_mask_of_another_kind_or_size_is_refused(mask, error, text):
    with pytest.raises(error, match=text):
        dk.localization_loss(torch.ones(1, 4, 4), dk.Boxes.from_lists([[]]), mask=mask)
    carried = dk.Boxes.from_lists([[]]).with_masks(Masks.from_lists([torch.zeros(4, 5) > 0]))
    with pytest.raises(ValueError, match=r"size must be that of the masks, \(4, 5\), got \(4, 4\)"):
        dk.localization_loss(torch.ones(1, 4, 4), carried)
