"""Areas to be left out of any judgement of where a model looks, such as crowds: neither inside nor outside of boxes.

A pixel that lies in one of the object's own boxes too is inside as ever.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.boxes import Boxes


def of_class(boxes: Boxes, target: Tensor) -> Boxes:
    """Those of each image's class, int64 [N]; boxes without labels are of whatever it shows."""
    return boxes if boxes.labels is None else boxes.for_class(target)


def known_areas(areas: Boxes) -> Boxes:
    """Without those of images that are not annotated: of them nothing is known."""
    known = areas.annotated[areas.image_ids()]
    masks = areas.masks
    if masks is not None:
        masks = masks.keep(areas.annotated[masks.image_ids()])
    return areas._with_coords(areas.coords * known[:, None], masks)


def covering(boxes: Boxes) -> Tensor:
    """bool [N]: whether an image has a box or a mask that covers anything."""
    x0, y0, x1, y1 = boxes.coords.unbind(1)
    covers = ((x1 > x0) & (y1 > y0)).to(torch.int64)
    boxed = covers.new_zeros(len(boxes)).index_add_(0, boxes.image_ids(), covers) > 0
    return boxed if boxes.masks is None else boxed | boxes.masks.covering()


def judged(boxes: Boxes, target: Tensor, ignore: Boxes | None) -> tuple[Boxes, Boxes | None]:
    """The boxes, and the ignored areas, of each image's class.

    Args:
        boxes, ignore: of N images; those with labels are taken by class.
        target: int64 [N], -1 for none.

    Returns:
        both; no longer annotated are images without a class, and those that hold nothing of it but ignored areas.
    """
    boxes, known = of_class(boxes, target), target >= 0
    if ignore is None:
        return boxes.annotated_where(known), None
    ignore = of_class(ignore, target)
    return boxes.annotated_where(known & (covering(boxes) | ~covering(known_areas(ignore)))), ignore


def left_out(boxes: Boxes, ignore: Boxes, size: tuple[int, int]) -> Tensor:
    """bool [N,H,W]: the pixels of ignored areas that lie in none of the boxes."""
    return known_areas(ignore).mask(size) & ~boxes.mask(size)


def without(attribution: Tensor, dropped: Tensor, *, largest_one: bool) -> Tensor:
    """Maps at the size of `dropped`, 0 where it holds.

    Args:
        attribution: [N,h,w].
        dropped: bool [N,H,W].
        largest_one: divide by the largest absolute value: of the map as given, or where something was dropped, of what
            is left; an all-zero map stays so.

    Returns:
        [N,H,W] in float32 or wider, differentiable.
    """
    given = maps = attribution.to(torch.promote_types(attribution.dtype, torch.float32))
    if len(maps) and maps.shape[1:] != dropped.shape[1:]:
        size = (dropped.shape[1], dropped.shape[2])
        maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    maps = maps.masked_fill(dropped, 0)
    if largest_one and len(maps):
        some = dropped.any(2, keepdim=True).any(1, keepdim=True)
        left, whole = (each.abs().amax((1, 2), keepdim=True) for each in (maps, given))
        largest = torch.where(some, left, whole)
        maps = maps / torch.where(largest > 0, largest, 1)
    return maps
