"""Noise on boxes and masks, for studies of how much guidance depends on exact annotations.

Each side of a box moves by a share of the box's width or height, uniform in [-fraction, fraction], rounded to whole
pixels. A mask is stretched and moved as the smallest box around it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debiaskd.boxes import Boxes
from debiaskd.masks import Masks


def noise(count: int, seed: int) -> Tensor:
    """float64 [count,4], uniform in [-1, 1): of the seed and a row's place alone."""
    drawn = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 2 * drawn - 1


def moved_sides(coords: Tensor, shares: Tensor, size: tuple[int, int]) -> Tensor:
    """int32 [M,4]: boxes whose sides have moved by `shares` [M,4] of their width and height.

    A box that covers pixels of an image of `size` (H, W) covers at least one afterwards.
    """
    wide = coords.double()
    extent = (wide[:, 2:] - wide[:, :2]).repeat(1, 2)
    sides = (wide + shares * extent + 0.5).floor()
    limit = torch.tensor([size[1], size[0]], dtype=torch.float64, device=coords.device)
    start = torch.minimum(sides[:, :2], sides[:, 2:]).clamp(min=0).minimum(limit - 1)
    end = torch.maximum(sides[:, :2], sides[:, 2:]).minimum(limit).maximum(start + 1)
    covers = (extent > 0).all(1, keepdim=True)
    return torch.where(covers, torch.cat([start, end], 1), wide).to(torch.int32)


def jitter_boxes(boxes: Boxes, fraction: float, size: tuple[int, int], seed: int) -> Boxes:
    """Move the sides of every box by up to `fraction` of its size, always the same way for the same seed.

    Args:
        boxes: of all images, in their order; masks stay.
        fraction: >= 0; 0.1 moves a side of a box 100 pixels wide by up to 10 pixels.
        size: (H, W) of the images.
        seed: of the numbers that are drawn.

    Example:
        >>> boxes = Boxes.from_lists([[[20, 20, 40, 40]]])
        >>> jitter_boxes(boxes, 0.25, (64, 64), seed=0).coords.sub(boxes.coords).abs().max().item() <= 5
        True
    """
    coords = moved_sides(boxes.coords, fraction * noise(len(boxes.coords), seed), size)
    return Boxes(coords, boxes.offsets, boxes.labels, boxes.annotated, boxes.masks)


def jitter_masks(masks: Masks, shares: Tensor) -> Masks:
    """Stretch and move each mask as its smallest box is by `shares`, float64 [M,4]; see `moved_sides`."""
    old = bounds(masks)
    new = moved_sides(old, shares, masks.size).long()
    columns, rows = (_from(old.long(), new, axis, masks.size[1 - axis]) for axis in (0, 1))
    return masks.sample(rows, columns)


def bounds(masks: Masks) -> Tensor:
    """int32 [M,4], the smallest box around each mask; without area where there is no pixel."""
    dense = masks.dense()
    found = []
    for axis in (1, 2):  # what columns hold, what rows hold
        some = dense.any(axis)
        place = torch.arange(some.shape[1], device=some.device)
        end = torch.where(some, place + 1, 0).amax(1)
        found.append((torch.where(some, place, some.shape[1]).amin(1).minimum(end), end))
    (x0, x1), (y0, y1) = found
    return torch.stack([x0, y0, x1, y1], 1).to(torch.int32)


def _from(old: Tensor, new: Tensor, axis: int, length: int) -> Tensor:
    """int64 [M,length]: the row or column that each one of the result shows, -1 outside of the moved box."""
    place = torch.arange(length, device=old.device)[None]
    begin, end = new[:, axis, None], new[:, axis + 2, None]
    before = old[:, axis + 2, None] - old[:, axis, None]
    centre = (2 * (place - begin) + 1) * before
    source = old[:, axis, None] + torch.div(centre - 1, 2 * (end - begin).clamp(min=1), rounding_mode="floor")
    return torch.where((place >= begin) & (place < end), source, -1)
