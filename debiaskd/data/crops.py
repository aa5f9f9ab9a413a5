"""Crops and flips of images, and of the boxes and masks that go with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.masks import Masks
from debiaskd.utils import checks


def crop_resize(images: Tensor, windows: Tensor, size: tuple[int, int], flipped: Tensor | None = None) -> Tensor:
    """Crop a window of every image, resize it bilinearly and, where `flipped`, mirror it.

    Args:
        images: floating point [N,C,H,W].
        windows: integers [N,4], rows (x0, y0, x1, y1) within the image, at least a pixel large.
        size: (height, width) of the result.
        flipped: bool [N], or None.

    Returns:
        [N,C,*size].
    """
    height, width = images.shape[2:]
    (x, left), (y, top) = (_samples(windows, axis, size[1 - axis]) for axis in (0, 1))
    if flipped is not None:
        x = torch.where(flipped[:, None], x.flip(1), x)
    # Pixels outside the window must not contribute to its edge.
    x = x.clamp(left[0][:, None] + 0.5, left[1][:, None] - 0.5) * (2 / width) - 1
    y = y.clamp(top[0][:, None] + 0.5, top[1][:, None] - 0.5) * (2 / height) - 1
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], -1)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


def _samples(windows: Tensor, axis: int, steps: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    start, end = windows[:, axis].float(), windows[:, axis + 2].float()
    centres = (torch.arange(steps, device=windows.device) + 0.5) / steps
    return start[:, None] + (end - start)[:, None] * centres, (start, end)


def crop_resize_boxes(boxes: Boxes, windows: Tensor, size: tuple[int, int]) -> Boxes:
    """Transform boxes like `crop_resize`: clip them to the window, and remove those outside it.

    On an accelerator they become empty instead of being removed, as in `Boxes.crop`. A box that covers part of the
    window keeps at least one pixel. Masks move too, by `Masks.crop_resize`, and may lose what is thinner than a pixel.

    Args:
        boxes: of N images.
        windows, size: as for `crop_resize`.

    Raises:
        ValueError: not one window per image.
    """
    checks.shape("windows", windows, "[N,4]", [len(boxes), 4])
    mine = windows[boxes.image_ids()].long()
    begin, extent = mine[:, :2], mine[:, 2:] - mine[:, :2]
    coords = boxes.coords.long()
    start = (coords[:, :2] - begin).clamp(min=0).minimum(extent)
    end = (coords[:, 2:] - begin).clamp(min=0).minimum(extent)
    seen = (end > start).all(1)
    target = torch.tensor([size[1], size[0]], device=coords.device)
    # Rounded to the nearest edge with integers: exact, and equal on every device.
    first = torch.div(2 * start * target + extent, 2 * extent, rounding_mode="floor").minimum(target - 1)
    last = torch.div(2 * end * target + extent, 2 * extent, rounding_mode="floor").maximum(first + 1)
    masks = None if boxes.masks is None else boxes.masks.crop_resize(windows, size)
    return kept(boxes, torch.cat([first, last], 1).to(torch.int32), seen, masks)


def flip_boxes(boxes: Boxes, flipped: Tensor, width: int) -> Boxes:
    """Mirror boxes in images `width` pixels wide where `flipped`, bool [N]."""
    checks.shape("flipped", flipped, "[N]", [len(boxes)])
    x0, y0, x1, y1 = boxes.coords.unbind(1)
    mirrored = torch.stack([width - x1, y0, width - x0, y1], 1)
    coords = torch.where(flipped[boxes.image_ids()][:, None], mirrored, boxes.coords)
    masks = None if boxes.masks is None else boxes.masks.hflip(flipped)
    return Boxes(coords, boxes.offsets, boxes.labels, boxes.annotated, masks)


def kept(boxes: Boxes, coords: Tensor, keep: Tensor, masks: Masks | None) -> Boxes:
    """The boxes with other coordinates and masks; those that are not to `keep`, bool [M], are removed or, on an
    accelerator, made empty."""
    if coords.device.type != "cpu":  # counting the remaining boxes would synchronise with the device
        return Boxes(coords * keep[:, None], boxes.offsets, boxes.labels, boxes.annotated, masks)
    before = torch.cat([boxes.offsets.new_zeros(1), keep.cumsum(0)])
    labels = None if boxes.labels is None else boxes.labels[keep]
    return Boxes(coords[keep], before[boxes.offsets], labels, boxes.annotated, masks)
