"""Boxes together with a mask that is given to an op as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from debiaskd.boxes import Boxes
from debiaskd.masks import Masks, pack_bits
from debiaskd.utils import checks


def with_mask(boxes: Boxes, mask: Tensor | None, size: tuple[int, int]) -> Boxes:
    """Return boxes without labels and with one mask an image: all that the boxes' own masks and `mask` cover.

    Args:
        boxes: of N images.
        mask: bool [N,H,W]; None: the boxes are returned as they are.
        size: (H, W).

    Raises:
        TypeError, ValueError: the mask is of another dtype, shape or device, or the boxes' masks are of another size.
    """
    if mask is None:
        return boxes
    if checks.tensor("mask", mask).dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
    checks.shape("mask", mask, "[N,H,W]", [len(boxes), *size])
    checks.same_device("mask", mask, "boxes", boxes.coords)
    own = Masks(pack_bits(mask), size[0], torch.arange(len(boxes) + 1, device=mask.device))
    if boxes.masks is not None:
        boxes.mask_words(size)  # which checks their size
        own = own.either(boxes.masks)
    return Boxes(boxes.coords, boxes.offsets, None, boxes.annotated, own)
