"""Masks of an item of a user's data set, by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.packed.item_values import Wrong, array_of
from debiaskd.data.sources.masks import VOID
from debiaskd.utils import checks


def masks_by_class(
    value: Any, size: tuple[int, int], target: int | NDArray[np.uint8], labels: NDArray[np.int64] | None
) -> dict[int, NDArray[np.bool_]]:
    """bool [H,W] for each class that a mask says something about.

    Args:
        value: one mask for each object, [k,H,W] of 0 and 1; or one for the image, [H,W]: any value but 0 is its class
            or, where it may show several, a value k from 1 to K is class k - 1, and 0 and 255 are none. A PIL image, an
            array or a tensor.
        size: (H, W) of the image.
        target: its class, or uint8 [K].
        labels: int64 [k], the objects' classes; None: all are the image's own.

    Raises:
        Wrong: it is something else; says what was expected and what came.
    """
    masks = array_of(value, "mask")
    if masks.dtype.kind not in "iub" or masks.ndim not in (2, 3):
        got = f"{masks.dtype} {list(masks.shape)}"
        raise Wrong(f"mask must be integers or bool of the shape [H,W], or [k,H,W] for k objects, got {got}")
    if masks.shape[-2:] != size:
        height, width = masks.shape[-2:]
        raise Wrong(f"mask must have the size of its image, {size[1]}×{size[0]} pixels, got {width}×{height}")
    if masks.ndim == 3:
        return _by_object(masks, target, labels)
    if isinstance(target, int):
        return {target: masks != 0}
    there = [int(level) for level in np.unique(masks) if level not in (0, VOID)]
    if masks.dtype.kind == "b" or any(not 1 <= level <= len(target) for level in there):
        got = "bool" if masks.dtype.kind == "b" else str(next(k for k in there if not 1 <= k <= len(target)))
        raise Wrong(
            f"mask must hold numbers of classes, 1 to {len(target)} (0 and {VOID}: none), where an image may show "
            f"several, got {got}"
        )
    return {level - 1: masks == level for level in there}


def _by_object(
    masks: NDArray[Any], target: int | NDArray[np.uint8], labels: NDArray[np.int64] | None
) -> dict[int, NDArray[np.bool_]]:
    if masks.size and (masks.min() < 0 or masks.max() > 1):
        raise Wrong(f"masks of objects must hold 0 and 1, got {masks.min()}..{masks.max()}")
    if labels is None and not isinstance(target, int):
        raise Wrong("box_labels must say the class of each object's mask where an image may show several")
    if labels is not None and len(labels) != len(masks):
        raise Wrong(f"mask must be one for each of {len(labels)} objects, got {len(masks)}")
    each = [target] * len(masks) if labels is None else labels.tolist()
    found: dict[int, NDArray[np.bool_]] = {}
    for label, mask in zip(each, masks != 0):
        found[label] = found[label] | mask if label in found else mask
    return found


def with_masks(dataset: Any, asked: bool | None, before: Mapping[str, Any] | None) -> bool | None:
    """Whether masks are stored; False: they are left out; None: nobody expects any, and an item with one is refused.

    Args:
        dataset: of items.
        asked: what the caller says.
        before: options of the splits packed before.
    """
    if asked is not None:
        checks.flag("masks", asked)
        return asked
    if before is not None:
        return True if before.get("masks") else None
    try:
        first = dataset[0]
    except Exception:  # whatever it is, it is said where the item is packed
        return None
    return True if isinstance(first, Mapping) and "mask" in first else None
