"""`Boxes`: what moves the pixels moves the boxes, and batches come apart and together again."""

import pickle

import numpy as np
import pytest
import torch
from cases import GOLDEN, box_lists
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

import debiaskd as dk

Boxes = dk.Boxes
LISTS = [[[0, 0, 4, 3], [2, 1, 5, 6]], [], None, [[1, 1, 2, 2]]]
LABELS = [[7, 3], [], None, [3]]


def as_lists(boxes):
    """Back to what `from_lists` takes."""
    bounds = boxes.offsets.tolist()
    return [
        boxes.coords[start:end].tolist() if known else None
        for start, end, known in zip(bounds, bounds[1:], boxes.annotated.tolist())
    ]


def naive_mask(lists, height, width):
    mask = torch.zeros(len(lists), height, width, dtype=torch.bool)
    for image, boxes in zip(mask, lists):
        for x0, y0, x1, y1 in boxes or []:
            image[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask


@st.composite
def pictures(draw):
    """(lists, height, width)"""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return draw(box_lists(draw(st.integers(0, 4)), height, width)), height, width


# ---- making them ----


def test_from_lists_packs_coordinates_offsets_labels_and_annotation():
    boxes = Boxes.from_lists(LISTS, LABELS)
    assert boxes.coords.tolist() == [[0, 0, 4, 3], [2, 1, 5, 6], [1, 1, 2, 2]]
    assert boxes.offsets.tolist() == [0, 2, 2, 2, 3]
    assert boxes.labels.tolist() == [7, 3, 3]
    assert boxes.annotated.tolist() == [True, True, False, True]
    assert (boxes.coords.dtype, boxes.offsets.dtype, boxes.labels.dtype) == (torch.int32, torch.int64, torch.int64)
    assert len(boxes) == 4
    assert boxes.device.type == "cpu"
    assert repr(boxes) == "Boxes(4 images, 3 boxes, labels, device=cpu)"
    assert boxes.image_ids().tolist() == [0, 0, 3]


@given(pictures())
def test_from_lists_and_back_changes_nothing(picture):
    assert as_lists(Boxes.from_lists(picture[0])) == picture[0]


@pytest.mark.parametrize(
    "rows",
    [
        np.array([[0, 0, 4, 3]]),
        np.array([[0.0, 0.0, 4.0, 3.0]], dtype=np.float32),
        torch.tensor([[0, 0, 4, 3]], dtype=torch.uint8),
        torch.tensor([[0, 0, 4, 3]]).half(),
        [(0, 0, 4, 3)],
    ],
    ids=("int64 array", "float32 array", "uint8", "float16", "tuples"),
)
def test_from_lists_takes_whole_numbers_of_every_kind(rows):
    assert Boxes.from_lists([rows]).coords.tolist() == [[0, 0, 4, 3]]


def test_no_images_and_no_boxes_are_boxes_too():
    for boxes, images in ((Boxes.from_lists([]), 0), (Boxes.from_lists([[], np.zeros((0, 4))], [[], None]), 2)):
        assert len(boxes) == images
        assert boxes.coords.shape == (0, 4)
        assert not boxes.mask((3, 4)).any()
        assert len(boxes.resize((4, 4), (8, 8)).crop(0, 0, 2, 2).hflip(2).dilate(0.5, (2, 2))) == images


def test_constructor_takes_all_images_for_annotated():
    boxes = Boxes(torch.tensor([[0, 0, 1, 1]], dtype=torch.int32), torch.tensor([0, 1, 1]))
    assert boxes.annotated.tolist() == [True, True]
    assert boxes.labels is None


# ---- the batch ----


@pytest.mark.parametrize(
    ("index", "images"),
    [
        (0, [0]),
        (-1, [3]),
        (np.int64(2), [2]),
        (torch.tensor(1), [1]),
        (slice(1, None), [1, 2, 3]),
        (slice(None, None, 2), [0, 2]),
        (slice(2, 2), []),
        ([3, 0, 0], [3, 0, 0]),
        ([-1, -4], [3, 0]),
        ([], []),
        (torch.tensor([2, 3]), [2, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        ([False, True, True, False], [1, 2]),
        (np.array([1, 0], dtype=np.int32), [1, 0]),
    ],
    ids=str,
)
def test_index_takes_whole_images(index, images):
    boxes = Boxes.from_lists(LISTS, LABELS)[index]
    assert as_lists(boxes) == [LISTS[i] for i in images]
    assert boxes.labels.tolist() == [label for i in images for label in LABELS[i] or []]


def test_iteration_and_cat_are_each_others_inverse():
    boxes = Boxes.from_lists(LISTS, LABELS)
    parts = list(boxes)
    assert [len(p) for p in parts] == [1, 1, 1, 1]
    joined = Boxes.cat([boxes[:2], boxes[2:2], *parts[2:]])
    assert as_lists(joined) == LISTS
    assert joined.labels.tolist() == boxes.labels.tolist()


def test_for_class_keeps_boxes_of_each_images_class_and_the_annotation():
    boxes = Boxes.from_lists([*LISTS, [[0, 0, 1, 1]]], [*LABELS, [3]])
    chosen = boxes.for_class(torch.tensor([3, 3, 3, 9, 3]))
    assert as_lists(chosen) == [[[2, 1, 5, 6]], [], None, [], [[0, 0, 1, 1]]]
    assert chosen.labels.tolist() == [3, 3]


def test_pickle_keeps_everything():
    boxes = Boxes.from_lists(LISTS, LABELS)
    copy = pickle.loads(pickle.dumps(boxes))
    assert as_lists(copy) == LISTS
    assert copy.labels.tolist() == boxes.labels.tolist()


def test_to_moves_every_part():
    moved = Boxes.from_lists(LISTS, LABELS).to("meta")
    assert {t.device.type for t in (moved.coords, moved.offsets, moved.labels, moved.annotated)} == {"meta"}
    assert moved.device.type == "meta"


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="pinned memory needs an accelerator")
def test_pin_memory_pins_every_part():
    pinned = Boxes.from_lists(LISTS, LABELS).pin_memory()
    assert all(t.is_pinned() for t in (pinned.coords, pinned.offsets, pinned.labels, pinned.annotated))


class Pictures(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        boxes = None if i == 4 else [[k, 0, k + 1, i] for k in range(i % 3)]
        return {
            "image": torch.full((3, 2, 2), i),
            "boxes": Boxes.from_lists([boxes], [range(i % 3) if boxes else None]),
        }


@pytest.mark.parametrize("workers", (0, 2))
def test_collate_joins_boxes_inside_a_data_loader(workers):
    batches = list(DataLoader(Pictures(), batch_size=4, num_workers=workers, collate_fn=dk.collate))
    assert [len(b["boxes"]) for b in batches] == [4, 2]
    assert batches[0]["image"].shape == (4, 3, 2, 2)
    assert as_lists(batches[0]["boxes"]) == [[], [[0, 0, 1, 1]], [[0, 0, 1, 2], [1, 0, 2, 2]], []]
    assert as_lists(batches[1]["boxes"]) == [None, [[0, 0, 1, 5], [1, 0, 2, 5]]]
    assert batches[1]["boxes"].labels.tolist() == [0, 1]


# ---- geometry ----


@given(pictures())
def test_mask_is_the_union_of_the_boxes(picture):
    lists, height, width = picture
    assert torch.equal(Boxes.from_lists(lists).mask((height, width)), naive_mask(lists, height, width))


@given(pictures())
def test_hflip_moves_boxes_as_it_moves_pixels(picture):
    lists, height, width = picture
    flipped = Boxes.from_lists(lists).hflip(width)
    assert torch.equal(flipped.mask((height, width)), naive_mask(lists, height, width).flip(2))
    assert as_lists(flipped.hflip(width)) == lists


@given(pictures(), st.data())
def test_crop_moves_boxes_as_it_moves_pixels(picture, data):
    lists, height, width = picture
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - y)), data.draw(st.integers(1, width - x))
    cropped = Boxes.from_lists(lists).crop(y, x, h, w)
    assert torch.equal(cropped.mask((h, w)), naive_mask(lists, height, width)[:, y : y + h, x : x + w])
    assert (cropped.coords[:, 2:] > cropped.coords[:, :2]).all()  # what left the image is gone
    assert len(cropped) == len(lists)


@given(pictures(), st.integers(1, 4), st.integers(1, 4))
def test_resize_by_whole_factors_moves_boxes_as_it_moves_pixels(picture, by_y, by_x):
    lists, height, width = picture
    large = (height * by_y, width * by_x)
    mask = naive_mask(lists, height, width).repeat_interleave(by_y, 1).repeat_interleave(by_x, 2)
    grown = Boxes.from_lists(lists).resize((height, width), large)
    assert torch.equal(grown.mask(large), mask)
    back = grown.resize(large, (height, width))
    assert torch.equal(back.mask((height, width)), naive_mask(lists, height, width))


@given(pictures(), st.integers(1, 12), st.integers(1, 12))
def test_resize_to_any_size_loses_no_visible_box_and_shows_no_invisible_one(picture, height, width):
    lists, old_height, old_width = picture
    singles = [[box] for boxes in lists for box in boxes or []]
    before = Boxes.from_lists(singles).mask((old_height, old_width)).flatten(1).any(1)
    after = Boxes.from_lists(singles).resize((old_height, old_width), (height, width)).mask((height, width))
    assert torch.equal(after.flatten(1).any(1), before)


def test_resize_rounds_to_the_nearest_pixel_edge():
    boxes = Boxes.from_lists([[[1, 1, 4, 4], [0, 3, 10, 10], [9, 9, 10, 10]]])
    assert boxes.resize((10, 10), (5, 3)).coords.tolist() == [[0, 1, 1, 2], [0, 2, 3, 5], [2, 4, 3, 5]]


@pytest.mark.parametrize("percent", (10, 25, 50))
def test_dilate_reproduces_the_published_boxes(percent):
    with np.load(GOLDEN / "metrics.npz") as file:
        before, expected = file["dilate_in"], file[f"dilated_{percent}"]
    boxes = Boxes.from_lists([before]).dilate(percent / 100, (224, 224), inclusive_clip=True)
    assert boxes.coords.tolist() == expected.tolist()


def test_dilate_clips_at_the_picture_and_rounds_down():
    boxes = Boxes.from_lists([[[2, 4, 8, 7]], [[0, 0, 10, 9]]])
    assert boxes.dilate(0.5, (9, 10)).coords.tolist() == [[0, 3, 10, 8], [0, 0, 10, 9]]
    assert boxes.dilate(0.5, (9, 10), inclusive_clip=True).coords.tolist() == [[0, 3, 9, 8], [0, 0, 9, 8]]
    assert boxes.dilate(0, (9, 10)).coords.tolist() == boxes.coords.tolist()


@given(pictures(), st.sampled_from((0.1, 0.25, 0.5, 2.0)))
def test_dilate_never_uncovers_a_pixel(picture, fraction):
    lists, height, width = picture
    boxes = Boxes.from_lists(lists)
    assert (boxes.dilate(fraction, (height, width)).mask((height, width)) >= boxes.mask((height, width))).all()


def test_inclusive_clip_leaves_the_last_row_and_column_outside():
    boxes = Boxes.from_lists([[[0, 0, 10, 10]]]).resize((10, 10), (4, 6), inclusive_clip=True)
    assert boxes.coords.tolist() == [[0, 0, 5, 3]]


def test_coordinates_at_the_ends_of_int32_do_not_wrap_around():
    low, high = -(2**31), 2**31 - 1
    boxes = Boxes.from_lists([[[low, low, high, high]]])
    for moved in (boxes, boxes.crop(1, 1, 4, 5), boxes.hflip(5), boxes.resize((9, 9), (4, 5)), boxes.dilate(1, (4, 5))):
        assert moved.mask((4, 5)).all()
    beside = Boxes.from_lists([[[high - 1, 0, high, 4]], [[low, 0, low + 1, 4]]])
    assert not beside.hflip(5).mask((4, 5)).any()
    assert not beside.crop(-9, -9, 4, 5).mask((4, 5)).any()


def test_geometry_leaves_the_boxes_themselves_alone():
    boxes = Boxes.from_lists(LISTS, LABELS)
    for moved in (boxes.hflip(6), boxes.crop(1, 1, 3, 3), boxes.resize((6, 6), (3, 3)), boxes.dilate(0.5, (6, 6))):
        assert len(moved) == 4
        assert moved.annotated.tolist() == boxes.annotated.tolist()
        assert len(moved.labels) == len(moved.coords)
    assert as_lists(boxes) == LISTS


def test_annotation_can_be_forgotten_and_never_learned():
    boxes = dk.Boxes.from_lists(LISTS, LABELS).annotated_where(torch.tensor([True, False, True, False]))
    assert boxes.annotated.tolist() == [True, False, False, False]
    assert torch.equal(boxes.coords, dk.Boxes.from_lists(LISTS).coords)
