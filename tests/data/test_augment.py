"""Augmentation moves boxes with pixels: masks of the boxes are the images here, so that each can be compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from debiaskd import Boxes
from debiaskd.data import Augment, Batch
from debiaskd.data import augment as augment_module
from debiaskd.data.crops import crop_resize, crop_resize_boxes, flip_boxes
from debiaskd.masks import Masks

pytestmark = pytest.mark.usefixtures("one_thread")

sides = st.integers(3, 40)


def some_boxes(generator: torch.Generator, count: int, height: int, width: int, most: int = 3) -> Boxes:
    lists: list[Any] = []
    for _ in range(count):
        rows = []
        for _ in range(int(torch.randint(0, most + 1, (), generator=generator))):
            x = torch.randperm(width + 1, generator=generator)[:2].sort().values.tolist()
            y = torch.randperm(height + 1, generator=generator)[:2].sort().values.tolist()
            rows.append([x[0], y[0], x[1], y[1]])
        lists.append(rows)
    return Boxes.from_lists(lists, [[7] * len(rows) for rows in lists])


def places(count: int, height: int, width: int) -> Tensor:
    """Images uint8 [N,3,H,W] that say where they are: a pixel's column, its row, and nothing. Interpolated linearly,
    they tell of every pixel of the result which place of the image it shows."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, x * 0]).to(torch.uint8).expand(count, -1, -1, -1)


def shown_in_boxes(images: Tensor, boxes: Boxes) -> Tensor:
    """bool [N,H,W]: which pixels of the augmented `places` show something from within the boxes before."""
    x, y = images[:, 0] * 255 + 0.5, images[:, 1] * 255 + 0.5
    inside = torch.zeros_like(x, dtype=torch.bool)
    for image, (x0, y0, x1, y1) in zip(boxes.image_ids().tolist(), boxes.coords.tolist()):
        inside[image] |= (x[image] >= x0) & (x[image] < x1) & (y[image] >= y0) & (y[image] < y1)
    return inside


def edges(mask: Tensor) -> Tensor:
    """bool: pixels of [N,H,W] that lie within one pixel of an edge of the mask."""
    image = mask.float()[:, None]
    return (F.max_pool2d(image, 3, 1, 1) != -F.max_pool2d(-image, 3, 1, 1))[:, 0]


def assert_boxes_went_along(augment: Augment, height: int, width: int, generator: torch.Generator) -> None:
    boxes = some_boxes(generator, 4, height, width, most=1)  # where two touch, rounding may move what is no edge
    made = augment(Batch(places(4, height, width), torch.zeros(4), boxes))
    mask = made.boxes.mask(augment.size)
    assert not ((shown_in_boxes(made.images, boxes) != mask) & ~edges(mask)).any()


@given(sides, sides, sides, sides, st.integers(0, 2**31), st.booleans())
def test_crops_and_flips_move_boxes_with_pixels(
    height: int, width: int, new_height: int, new_width: int, seed: int, flip: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"flip": flip, "mean": None, "std": None, "generator": generator}
    assert_boxes_went_along(Augment((new_height, new_width), crop_scale=(0.2, 1), **options), height, width, generator)


@given(sides, sides, sides, sides, st.integers(0, 2**31))
def test_resizing_moves_boxes_with_pixels(height: int, width: int, new_height: int, new_width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    augment = Augment((new_height, new_width), mean=None, std=None, generator=generator)
    assert_boxes_went_along(augment, height, width, generator)


@given(sides, sides, st.integers(0, 2**31))
def test_a_crop_that_is_not_resized_is_exact(height: int, width: int, seed: int) -> None:
    """Pixels are copied, and masks of moved boxes are the moved masks, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    h, w = (
        int(torch.randint(1, height + 1, (), generator=generator)),
        int(torch.randint(1, width + 1, (), generator=generator)),
    )
    y = torch.randint(0, height - h + 1, (5,), generator=generator)
    x = torch.randint(0, width - w + 1, (5,), generator=generator)
    windows = torch.stack([x, y, x + w, y + h], 1)
    flipped = torch.rand(5, generator=generator) < 0.5
    images = torch.randint(0, 256, (5, 3, height, width), generator=generator).float()
    boxes = some_boxes(generator, 5, height, width)
    made = crop_resize(images, windows, (h, w), flipped)
    moved = flip_boxes(crop_resize_boxes(boxes, windows, (h, w)), flipped, w).mask((h, w))
    masks = boxes.mask((height, width))
    for i in range(5):
        cut = (slice(int(y[i]), int(y[i]) + h), slice(int(x[i]), int(x[i]) + w))
        picture, mask = images[i][:, cut[0], cut[1]], masks[i][cut]
        if flipped[i]:
            picture, mask = picture.flip(2), mask.flip(1)
        torch.testing.assert_close(made[i], picture, rtol=0, atol=2e-3)
        assert (moved[i] == mask).all()


@given(sides, sides, sides, sides, st.integers(0, 2**31))
def test_boxes_of_a_crop_agree_with_the_geometry_of_boxes(h: int, w: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = some_boxes(generator, 1, 40, 40)
    y, x = (int(torch.randint(0, 41 - side, (), generator=generator)) for side in (h, w))
    made = crop_resize_boxes(boxes, torch.tensor([[x, y, x + w, y + h]]), (height, width))
    expected = boxes.crop(y, x, h, w).resize((h, w), (height, width))
    assert made.coords.tolist() == expected.coords.tolist()
    assert made.offsets.tolist() == expected.offsets.tolist()


def test_boxes_that_leave_disappear_and_cut_ones_are_clipped() -> None:
    boxes = Boxes.from_lists([[[0, 0, 4, 4], [2, 2, 12, 12], [9, 9, 10, 10]], None, []], [[1, 2, 3], None, []])
    windows = torch.tensor([[4, 4, 12, 12]] * 3)
    made = crop_resize_boxes(boxes, windows, (16, 16))
    assert made.coords.tolist() == [[0, 0, 16, 16], [10, 10, 12, 12]]
    assert made.labels is not None
    assert made.labels.tolist() == [2, 3]
    assert made.offsets.tolist() == [0, 2, 2, 2]
    assert made.annotated.tolist() == [True, False, True]


EVERYTHING: dict[str, Any] = {
    "crop_scale": (0.1, 1),
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "rand_augment": (2, 9),
    "mixup": 0.2,
    "cutmix": 1.0,
}


def test_nothing_is_read_back_from_an_accelerator() -> None:
    """On the meta device reading any value raises."""
    boxes = Boxes.from_lists([[[0, 0, 4, 4], [9, 9, 10, 10]], [[1, 1, 2, 2]]])
    masks = Masks.from_lists(list(boxes.mask((16, 16))))
    boxes = boxes.with_masks(masks).to("meta")
    batch = Batch(torch.empty(2, 3, 16, 16, dtype=torch.uint8, device="meta"), torch.empty(2, device="meta"), boxes)
    for options in ({"crop_scale": (0.1, 1)}, {}, {"flip": False}, EVERYTHING):
        made = Augment(8, **options)(batch)
        assert made.images.shape == (2, 3, 8, 8)
        assert made.boxes.coords.shape == (3, 4)  # none is taken out, since counting would wait


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_makes_the_same_crops_from_a_generator_on_the_cpu() -> None:
    boxes = some_boxes(torch.Generator().manual_seed(1), 8, 32, 32)
    batch = Batch(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.zeros(8), boxes)
    here = Augment(24, crop_scale=(0.1, 1), generator=torch.Generator().manual_seed(3))(batch)
    there = Augment(24, crop_scale=(0.1, 1), generator=torch.Generator().manual_seed(3))(batch.to("cuda"))
    torch.testing.assert_close(there.images.cpu(), here.images, rtol=0, atol=1e-3)
    assert (there.boxes.mask((24, 24)).cpu() == here.boxes.mask((24, 24))).all()
    everything, moved = Augment(24, **EVERYTHING), batch.to("cuda")
    everything(moved)  # moves its tables to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        Augment(24, crop_scale=(0.1, 1))(batch.to("cuda", non_blocking=True))
        everything(moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_areas_to_be_ignored_move_too() -> None:
    boxes, ignore = Boxes.from_lists([[[0, 0, 8, 16]]]), Boxes.from_lists([[[8, 0, 16, 16]]])
    batch = Batch(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1), boxes, ignore=ignore)
    for seed in range(4):
        made = Augment(16, crop_scale=(0.3, 1), generator=torch.Generator().manual_seed(seed))(batch)
        assert made.ignore is not None
        assert (made.boxes.mask((16, 16)) ^ made.ignore.mask((16, 16))).all()


def test_normalisation_and_memory_order() -> None:
    pixels = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    expected = (pixels.float() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    boxes = Boxes.from_lists([[]] * 4)
    options: dict[str, Any] = {"flip": False, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    for order in (torch.contiguous_format, torch.channels_last):
        batch = Batch(pixels.contiguous(memory_format=order), torch.zeros(4), boxes)
        made = Augment(9, **options)(batch)
        torch.testing.assert_close(made.images, expected)
        assert made.images.is_contiguous(memory_format=order)
        assert Augment(6, crop_scale=(0.5, 1), **options)(batch).images.is_contiguous(memory_format=order)
    assert Augment(9, dtype=torch.bfloat16, **options)(batch).images.dtype == torch.bfloat16


def windows_of(augment: Augment, count: int, height: int, width: int) -> Tensor:
    drawn = augment._random((count, 2 * augment_module._TRIES + 2), torch.device("cpu"))
    return augment._windows(drawn, height, width)


def test_crops_are_of_the_size_asked_for() -> None:
    augment = Augment(10, crop_scale=(0.25, 0.5), generator=torch.Generator().manual_seed(0))
    windows = windows_of(augment, 2000, 60, 80)
    w, h = windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1]
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, 2] <= 80).all() and (windows[:, 3] <= 60).all()
    area, ratio = (w * h / 4800).double(), (w / h).double()
    assert area.min() > 0.24 and area.max() < 0.52
    assert area.mean().item() == pytest.approx(0.375, abs=0.01)
    assert ratio.min() > 0.71 and ratio.max() < 1.4
    assert ratio.log().mean().abs() < 0.02
    # Every place that a window fits at is as likely, the last row and column too.
    assert (windows[:, 0] == 0).any() and (windows[:, 2] == 80).any() and (windows[:, 3] == 60).any()


def test_size_shape_and_place_of_a_crop_are_drawn_apart() -> None:
    augment = Augment(10, crop_scale=(0.1, 0.2), crop_ratio=(1.5, 2.5), generator=torch.Generator().manual_seed(0))
    windows = windows_of(augment, 3000, 400, 400).double()
    w, h = windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1]
    assert (w / h).min() > 1.45 and (w / h).max() < 2.55, "width to height, not the other way round"
    x, y = windows[:, 0] / (400 - w), windows[:, 1] / (400 - h)
    correlation = torch.corrcoef(torch.stack([w * h, w / h, x, y]))
    assert (correlation - torch.eye(4)).abs().max() < 0.06


def test_nothing_shines_in_from_outside_of_a_crop() -> None:
    images = torch.full((1, 3, 12, 12), 255.0)
    images[:, :, 4:7, 3:9] = 0
    for flipped in (None, torch.tensor([True])):
        assert not crop_resize(images, torch.tensor([[3, 4, 9, 7]]), (30, 20), flipped).any()


def test_a_smaller_picture_averages_its_pixels() -> None:
    stripes = ((torch.arange(32) % 8 == 0) * 200).to(torch.uint8).expand(1, 3, 32, 32)
    made = Augment(4, flip=False, mean=None, std=None)(Batch(stripes, torch.zeros(1), Boxes.from_lists([[]])))
    inner = made.images[..., 1:3]  # beyond the edges there is nothing to average
    torch.testing.assert_close(inner, torch.full((1, 3, 4, 2), 25 / 255), rtol=0, atol=0.01)


@pytest.mark.parametrize("crop_scale", [None, (0.5, 1)])
def test_pictures_that_are_not_annotated_stay_so(crop_scale: Any) -> None:
    pixels, boxes = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), Boxes.from_lists([None, [[0, 0, 8, 8]], []])
    made = Augment(6, crop_scale=crop_scale)(Batch(pixels, torch.zeros(3), boxes, ignore=boxes))
    assert made.ignore is not None
    assert made.boxes.annotated.tolist() == made.ignore.annotated.tolist() == [False, True, True]


def test_crop_where_no_shape_fits() -> None:
    augment = Augment(4, crop_scale=(1, 1), crop_ratio=(1, 1))
    assert windows_of(augment, 3, 10, 40).tolist() == [[15, 0, 25, 10]] * 3
    assert windows_of(augment, 1, 1, 1).tolist() == [[0, 0, 1, 1]]


def test_half_of_the_pictures_are_flipped() -> None:
    pixels = torch.arange(2, dtype=torch.uint8).expand(400, 3, 1, 2)
    made = Augment((1, 2), mean=None, std=None, generator=torch.Generator().manual_seed(0))(
        Batch(pixels, torch.zeros(400), Boxes.from_lists([[[0, 0, 1, 1]]] * 400))
    )
    flipped = made.images[:, 0, 0, 0] > 0
    assert 175 < flipped.sum() < 225
    assert (made.boxes.coords[:, 0] == flipped).all()


def test_same_generator_same_crops() -> None:
    batch = Batch(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8), torch.zeros(3), Boxes.from_lists([[]] * 3))
    first, again = (
        Augment(8, crop_scale=(0.1, 1), generator=torch.Generator().manual_seed(5))(batch) for _ in range(2)
    )
    assert torch.equal(first.images, again.images)


def test_empty_batch() -> None:
    batch = Batch(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0), Boxes.from_lists([]))
    assert Augment(4, crop_scale=(0.1, 1))(batch).images.shape == (0, 3, 4, 4)


good = Batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1), Boxes.from_lists([[]]))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Augment(0), ValueError, "size must be"),
        (lambda: Augment(8.0), TypeError, "size must be"),  # type: ignore[arg-type]
        (lambda: Augment(8, flip=1), TypeError, "flip must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: Augment(8, crop_scale=(0, 1)), ValueError, "crop_scale must be a finite number > 0, got 0"),
        (lambda: Augment(8, crop_scale=(0.5, 2)), ValueError, "crop_scale must lie in"),
        (lambda: Augment(8, crop_scale=(0.5, 0.1)), ValueError, "crop_scale must be a .smallest, largest. pair"),
        (lambda: Augment(8, crop_scale=0.5), TypeError, "crop_scale must be a"),  # type: ignore[arg-type]
        (lambda: Augment(8, mean=None), ValueError, "mean and std must be given together"),
        (lambda: Augment(8, dtype=torch.uint8), TypeError, "dtype must be a floating-point dtype, got torch.uint8"),
        (lambda: Augment(8)(good.images), TypeError, "batch must be a Batch, got Tensor"),  # type: ignore[arg-type]
        (lambda: Augment(8)(Augment(8)(good)), TypeError, "images must be torch.uint8, got torch.float32"),
        (lambda: Augment(8, mean=(1, 2), std=(1, 2))(good), ValueError, "images must have 2 channels"),
        (lambda: crop_resize_boxes(good.boxes, torch.zeros(2, 4), (8, 8)), ValueError, "windows must have shape"),
        (lambda: flip_boxes(good.boxes, torch.zeros(2), 8), ValueError, "flipped must have shape"),
    ],
)
def test_bad_arguments(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
