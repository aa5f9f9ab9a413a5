"""Where the masks of a split's images come from: outlines in an annotation file, or a folder of PNG files."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.sources.problems import DataError
from debiaskd.data.sources.segmentation import rasterize

MISSING = "missing mask"
OTHER_SIZE = "mask of another size than its image, not used"
UNREADABLE = "mask that cannot be read"
EMPTY = "mask without a pixel, not used"
NO_CLASS = "mask with a value that is no class, not used"
#: One class of a mask is wrong, the others are used.
CLASS_EMPTY = "class without a pixel in its mask, its boxes used"
CLASS_UNKNOWN = "mask of a class that its image is not annotated with, left out"
FAULTS = (MISSING, OTHER_SIZE, UNREADABLE, EMPTY, NO_CLASS)
#: What VOC draws around objects: neither background nor a class.
VOID = 255

_Mask = NDArray[np.bool_]


class MaskFault(Exception):  # noqa: N818
    """The mask of one image cannot be used. `kind` is one of `FAULTS`; the text is the reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class MaskSource(Protocol):
    """The masks of a split, or of consecutive images of it."""

    def part(self, start: int, stop: int) -> MaskSource:
        """Those of the images `start` to `stop`, light enough to be sent to another process."""

    def of(self, i: int, name: str, size: tuple[int, int], target: int) -> dict[int, _Mask] | None:
        """The mask of each class in image `i`, bool [H,W]; None: nothing is known about its masks.

        Args:
            i: its number.
            name: its path.
            size: its (H, W).
            target: its class, -1 where it may show several.

        Raises:
            MaskFault: they cannot be used.
        """

    def update(self, digest: hashlib._Hash) -> None:
        """Feed all that is known without opening a file into a hash."""


class Outlines:
    """COCO's segmentations: of each image, serialized (label, segmentation) pairs."""

    def __init__(self) -> None:
        self.images: list[bytes] = []

    def add(self, outlines: Sequence[tuple[int, Any]], *, annotated: bool) -> None:
        self.images.append(marshal.dumps(list(outlines)) if annotated else b"")

    def part(self, start: int, stop: int) -> Outlines:
        found = Outlines()
        found.images = self.images[start:stop]
        return found

    def of(self, i: int, name: str, size: tuple[int, int], target: int) -> dict[int, _Mask] | None:
        if not self.images[i]:
            return None
        found: dict[int, _Mask] = {}
        for label, outline in marshal.loads(self.images[i]):
            own = outline.get("size") if isinstance(outline, dict) else None
            if own is not None and own != list(size):
                raise MaskFault(OTHER_SIZE, f"{own[1]}×{own[0]}, the image {size[1]}×{size[0]}")
            mask = rasterize(outline, *size)
            if mask is None:
                mask = np.zeros(size, np.bool_)
            found[label] = found[label] | mask if label in found else mask
        return found

    def update(self, digest: hashlib._Hash) -> None:
        for outlines in self.images:
            digest.update(outlines + b"\0")


@dataclass(frozen=True)
class MaskFiles:
    """A PNG file for each image, at the path of the image with the ending .png.

    Args:
        folder: what the paths start from.
        classes: K where a pixel of value k, from 1 to K, is of class k - 1, and 0 and 255 of none; 0: any pixel but 0
            is of the image's own class.
        optional: an image without a file has no mask; otherwise that is a fault.
    """

    folder: Path
    classes: int
    optional: bool = False

    def part(self, start: int, stop: int) -> MaskFiles:
        return self

    def of(self, i: int, name: str, size: tuple[int, int], target: int) -> dict[int, _Mask] | None:
        file = (self.folder / name).with_suffix(".png")
        if not file.is_file():
            if self.optional:
                return None
            raise MaskFault(MISSING, str(file))
        values = _levels(file)
        if values.shape != size:
            raise MaskFault(OTHER_SIZE, f"{values.shape[1]}×{values.shape[0]}, the image {size[1]}×{size[0]}")
        if not self.classes:
            if not values.any():
                raise MaskFault(EMPTY, str(file))
            return {target: values != 0}
        there = [v for v in np.unique(values).tolist() if v not in (0, VOID)]
        if any(v > self.classes for v in there):
            raise MaskFault(NO_CLASS, f"{max(there)}, there are {self.classes} classes")
        return {v - 1: values == v for v in there}

    def update(self, digest: hashlib._Hash) -> None:
        digest.update(f"masks {self.classes} {self.optional}".encode())


def _levels(file: Path) -> NDArray[Any]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            values = np.asarray(image)
    except Exception as error:  # whatever a broken file makes a decoder stumble over
        raise MaskFault(UNREADABLE, " ".join(f"{file} ({error})".split())) from None
    if values.ndim != 2:
        raise MaskFault(UNREADABLE, f"{file} (must have one channel or a palette, has {values.shape[2]} channels)")
    return values


def files_of(folder: Path, classes: int, *, optional: bool = False) -> Callable[[], MaskFiles]:
    """Make the `MaskFiles` of splits.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold the masks, PNG files at the paths of the images")
    return lambda: MaskFiles(folder, classes, optional)
