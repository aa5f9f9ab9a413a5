"""`Masks`: what they hold, and that a rectangle moves as the box does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import blobs

import debiaskd as dk
from debiaskd.data.crops import crop_resize, crop_resize_boxes, flip_boxes
from debiaskd.masks import Masks, pack_bits, unpack_bits

lengths = st.sampled_from((1, 5, 31, 32, 33, 70))


@given(height=lengths, width=lengths, seed=st.integers(0, 99))
def test_bits_come_back_as_they_went_in(height, width, seed):
    dense = blobs(3, height, width, seed)
    words = pack_bits(dense)
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-height // 32), width)
    assert torch.equal(unpack_bits(words, height), dense)


def test_one_mask_for_each_class_of_an_image_and_their_union():
    dense = blobs(4, 9, 12, seed=3)
    masks = Masks.from_lists([dense[:3], None, dense[3]], [[5, 2, 5], [], [2]])
    assert masks.labels.tolist() == [2, 5, 2]
    assert torch.equal(masks.dense()[1], dense[0] | dense[2])
    union = unpack_bits(masks.union(), 9)
    assert torch.equal(union[0], dense[:3].any(0))
    assert not union[1].any()
    fives = unpack_bits(masks.for_class(torch.tensor([5, 5, 5])).union(), 9)
    assert torch.equal(fives[0], dense[0] | dense[2])
    assert not fives[1:].any()
    assert masks.covering().tolist() == [True, False, True]
    again = Masks.cat([masks[torch.tensor([2])], masks[torch.tensor([0, 1])]])
    assert torch.equal(again.union(), masks.union()[[2, 0, 1]])


windows = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))


@given(box=windows, window=windows, size=st.tuples(st.integers(1, 60), st.integers(1, 60)), flipped=st.booleans())
def test_a_rectangle_moves_as_its_box_unless_that_keeps_a_pixel_it_would_lose(box, window, size, flipped):
    x, y, w, h = box
    boxes = dk.Boxes.from_lists([[[x, y, x + w, y + h]]])
    cut = torch.tensor([[window[0], window[1], window[0] + window[2], window[1] + window[3]]])
    moved = crop_resize_boxes(boxes.with_masks(Masks.from_lists(list(boxes.mask((40, 40))))), cut, size)
    moved = flip_boxes(moved, torch.tensor([flipped]), size[1])
    as_box, as_mask = moved.with_masks(None).mask(size), unpack_bits(moved.masks.union(), size[0])
    if as_mask.any():
        assert torch.equal(as_mask, as_box)
    else:
        assert as_box.any(1).sum() <= 1 or as_box.any(2).sum() <= 1


def test_masks_move_as_pixels_do():
    dense = blobs(2, 36, 40, seed=4)
    cut = torch.tensor([[4, 6, 24, 26], [10, 0, 40, 30]])
    flipped = torch.tensor([True, False])
    boxes = dk.Boxes.from_lists([[], []]).with_masks(Masks.from_lists(list(dense)))
    moved = flip_boxes(crop_resize_boxes(boxes, cut, (60, 60)), flipped, 60)
    # Enlarged a whole number of times, bilinear pixels are nearest to the pixel that the mask takes.
    pixels = crop_resize(dense[:, None].double(), cut, (60, 60), flipped)[:, 0] > 0.5
    centre = torch.arange(1, 60, 3)
    assert torch.equal(unpack_bits(moved.masks.union(), 60)[0][centre][:, centre], pixels[0][centre][:, centre])
    for done, expected in (
        (boxes.hflip(40), dense.flip(2)),
        (boxes.crop(-2, 3, 20, 50), torch.nn.functional.pad(dense, (0, 13, 2, 0))[:, :20, 3:53]),
        (boxes.resize((36, 40), (72, 40)), dense.repeat_interleave(2, 1)),
    ):
        assert torch.equal(unpack_bits(done.masks.union(), done.masks.height), expected)


@pytest.mark.parametrize(
    ("masks", "labels", "options", "text"),
    [
        ([None], None, {}, "size must be given where no image has a mask"),
        ([torch.zeros(2, 2) > 0, torch.zeros(2, 3) > 0], None, {}, r"masks\[1\] must be of 2×2 pixels, got 2×3"),
        ([torch.zeros(2, 2, 2) > 0], [[1]], {}, r"labels\[0\] must have one class a mask, 2, got 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(masks, labels, options, text):
    with pytest.raises(ValueError, match=text):
        Masks.from_lists(masks, labels, **options)


def test_masks_belong_to_as_many_images_as_boxes():
    boxes = dk.Boxes.from_lists([[], []])
    with pytest.raises(ValueError, match="masks must be of N=2 images, as boxes are, got 1"):
        boxes.with_masks(Masks.from_lists([torch.zeros(2, 2) > 0]))
    with pytest.raises(ValueError, match="must both have labels or neither"):
        boxes.with_masks(Masks.from_lists([torch.zeros(2, 2) > 0, None], [[1], []]))
