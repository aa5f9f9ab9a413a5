"""Check that enough of a data set can be used, and refuse it if too much was skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.packed.write_shard import OTHER_SIZE, OUTSIDE
from debiaskd.data.sources import masks
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.data.sources.records import Source, Split

_Facts = dict[tuple[str, int], dict[str, Any]]


def check_annotations(source: Source, problems: Problems) -> None:
    """Judges what the reader has read, before any image is opened.

    Raises:
        DataError: more than 90 % of something was passed over, a split has no images, or all boxes of a split lie in
            the first pixel, as shares of the image do. With `problems.lenient`: no split has images.
    """
    problems.check(source.splits)
    for name, split in source.splits.items():
        if not len(split):
            problems.refuse(f"{name}: there are no images in it{problems.why()}")
        elif _are_shares(split):
            problems.refuse(
                f"{name}: its boxes all lie within one pixel: they must be in pixels, not shares of the image"
            )
    _note_shared(source, problems)
    if not any(map(len, source.splits.values())):
        raise DataError(f"{source.path}: there are no images in {', '.join(source.splits)}{problems.why()}")


def _note_shared(source: Source, problems: Problems) -> None:
    """Takes a note of images that are in several splits."""
    where: dict[Any, str] = {}
    for name, split in source.splits.items() if len(source.splits) > 1 else ():
        if split.pictures is None:
            for path in split.paths:
                first = where.setdefault((split.root, path), name)
                if first != name:
                    problems.note("image in two splits", f"{path} in {first} and {name}")


def _are_shares(split: Split) -> bool:
    coords = np.frombuffer(split.coords, np.float64).reshape(-1, 4)[_of_annotated(split)]
    return bool(len(coords) and coords.min() >= -1 and coords.max() <= 1 and (coords % 1).any())


def _counts(split: Split) -> NDArray[np.int64]:
    """Boxes of each image."""
    offsets: NDArray[np.int64] = np.frombuffer(split.offsets, np.int64)
    return offsets[1:] - offsets[:-1]


def _of_annotated(split: Split) -> NDArray[np.bool_]:
    """Which boxes are those of annotated images; those of others are placeholders."""
    return np.repeat(np.frombuffer(split.annotated, np.bool_), _counts(split))


def check_decoded(source: Source, whole: _Facts, problems: Problems) -> None:
    """Judges what is left when images have been opened.

    Args:
        source: as it was read.
        whole: facts of all shards by (split, number).
        problems: has the tallies of what was read, to which this adds.

    Raises:
        DataError: more than 90 % of something was passed over, and `problems.lenient` is False.
    """
    for name, split in source.splits.items():
        mine = [facts for (part, _), facts in sorted(whole.items()) if part == name]
        pictures, boxes = problems.tally(name, "images"), problems.tally(name, "boxes")
        counts = _counts(split) * np.frombuffer(split.annotated, np.bool_)
        if not pictures.total:
            pictures.total = len(split)
        if not boxes.total:
            boxes.total = int(counts.sum())
        for facts in mine:
            for kind, found in facts["problems"].items():
                if kind in masks.FAULTS:
                    tally = problems.tally(name, "masks")
                    tally.total = len(split)
                    tally.skip(kind, found[0], len(found))
                elif kind not in (OUTSIDE, OTHER_SIZE, masks.CLASS_EMPTY, masks.CLASS_UNKNOWN):
                    pictures.skip(kind, found[0], len(found))
        lost = int(np.delete(counts, [p for facts in mine for p in facts["skipped"]]).sum())
        lost -= sum(facts["boxes"] for facts in mine)
        outside = [n for facts in mine for n in facts["problems"].get(OUTSIDE, [])]
        of_others = [n for facts in mine for n in facts["problems"].get(OTHER_SIZE, [])]
        if outside:
            boxes.skip(OUTSIDE, outside[0], len(outside))
        if of_others:
            boxes.skip(OTHER_SIZE, of_others[0], lost - len(outside))
    problems.check(source.splits)
    asked = [facts for facts in whole.values() if "masks" in facts]
    if asked and not any(facts["masks"] for facts in asked):
        problems.refuse(f"{source.path}: none of its images has a mask")
