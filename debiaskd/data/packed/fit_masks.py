"""Masks of one image brought to the stored size, one for each class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from debiaskd.data.sources import masks as sources
from debiaskd.data.sources.records import IGNORE, DataError, Part, Problems, Source
from debiaskd.masks import Masks, pack_bits


@dataclass(frozen=True)
class FittedMasks:
    """Of k classes: `words` int32 [k,ceil(S/32),S], `labels` int64 [k] rising, `bounds` int32 [k,4]."""

    words: NDArray[np.int32]
    labels: NDArray[np.int64]
    bounds: NDArray[np.int32]


def fitted_masks(
    part: Part,
    i: int,
    size: tuple[int, int],
    side: int,
    placed: tuple[int, int],
    corner: tuple[int, int],
    boxes: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8]],
    problems: Problems,
) -> FittedMasks | None:
    """The masks of an image of a source, as `pixels.fit` placed it.

    Args:
        part, i: what is known of the image.
        size: its (height, width) as it lies in its file.
        side, placed, corner, boxes: see `fit_classes`.
        problems: takes what is wrong with the masks.

    Returns:
        None where nothing is known about its masks, or they cannot be used.
    """
    if part.masks is None:
        return None
    name, target = part.paths[i], int(part.classes[i])
    try:
        found = part.masks.of(i, name, size, target)
    except sources.MaskFault as fault:
        problems.add(fault.kind, f"{name} ({fault})")
        return None
    if found is None:
        return None
    rows = slice(part.offsets[i], part.offsets[i + 1])
    classes = set(part.labels[rows][(part.flags[rows] & IGNORE) == 0].tolist()) | ({target} if target >= 0 else set())

    def report(kind: str, label: int) -> None:
        problems.add(kind, f"{name} (class {label})")

    return fit_classes(found, classes, side, placed, corner, boxes, report)


def fit_classes(
    found: Mapping[int, NDArray[np.bool_]],
    classes: Collection[int],
    side: int,
    placed: tuple[int, int],
    corner: tuple[int, int],
    boxes: tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8]],
    report: Callable[[str, int], None],
) -> FittedMasks:
    """The masks of an image's classes, as `pixels.fit` placed it.

    A class whose mask has no pixel, as annotated or when stored, takes the area of its boxes. Classes that the image is
    not annotated with are left out.

    Args:
        found: masks of the image as it lies in its file, bool [H,W], by class.
        classes: those that the image is annotated with.
        side: of the stored image.
        placed, corner: (height, width) and (top, left) that the image takes in it.
        boxes: stored coordinates, labels and flags of the image's boxes.
        report: is told the kind of problem and the class of what is wrong.
    """
    coords, labels, flags = boxes
    for label in sorted(set(found) - set(classes)):
        report(sources.CLASS_UNKNOWN, label)
    wanted, dense = [], []
    for label in sorted(classes):
        own = coords[(labels == label) & ((flags & IGNORE) == 0)]
        mask = found.get(label)
        if (mask is None or not mask.any()) and len(own):
            report(sources.CLASS_EMPTY, label)
        stored = np.zeros((side, side), np.bool_) if mask is None else _placed(mask, side, placed, corner)
        if not stored.any():
            for x0, y0, x1, y1 in own:
                stored[y0:y1, x0:x1] = True
        if stored.any():
            wanted.append(label)
            dense.append(stored)
    if not wanted:
        empty = np.zeros((0, -(-side // 32), side), np.int32)
        return FittedMasks(empty, np.zeros(0, np.int64), np.zeros((0, 4), np.int32))
    whole = np.stack(dense)
    return FittedMasks(pack_bits(torch.from_numpy(whole)).numpy(), np.array(wanted, np.int64), _bounds(whole))


def _placed(mask: NDArray[np.bool_], side: int, placed: tuple[int, int], corner: tuple[int, int]) -> Any:
    moved = Masks.from_lists([torch.from_numpy(mask)]).resize(placed)
    if corner != (0, 0) or placed != (side, side):
        moved = moved.crop(-corner[0], -corner[1], side, side)
    return moved.dense()[0].numpy()


def _bounds(masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """int32 [k,4], the smallest box around each mask."""
    sides = []
    for axis in (1, 2):  # over rows: what columns hold; over columns: what rows hold
        some: NDArray[np.bool_] = np.any(masks, axis)
        sides.append((some.argmax(1), some.shape[1] - some[:, ::-1].argmax(1)))
    (x0, x1), (y0, y1) = sides
    return np.stack([x0, y0, x1, y1], 1).astype(np.int32)


def with_mask_files(source: Source, folder: Path) -> Source:
    """The same data set with a PNG file for each image below `folder`.

    Raises:
        DataError: no such folder, or its images are not files of their own.
    """
    if any(split.pictures is not None for split in source.splits.values()):
        raise DataError(f"masks must be left out for {source.kind}, whose images are not files of their own")
    files = sources.files_of(folder, len(source.classes) if source.multi_label else 0)
    for split in source.splits.values():
        split.masks = files()
    return replace(source, options={**source.options, "masks": True})
