"""Annotations of a data set, read before any image is opened: one `Split` for each part.

Stored in packed columns, about a hundred bytes per image besides its path.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.sources.masks import MaskSource
from debiaskd.data.sources.names import split_name
from debiaskd.data.sources.problems import DataError as DataError
from debiaskd.data.sources.problems import Problems as Problems

#: Bits of a box's flags.
CROWD, DIFFICULT, IGNORE = 1, 2, 4


class Pictures(Protocol):
    """The pixels of a split whose images are not files of their own."""

    def part(self, start: int, stop: int) -> Pixels:
        """Those of the images `start` to `stop`, light enough to be sent to another process.

        Raises:
            DataError, OSError: they cannot be read any more.
        """


class Pixels(Protocol):
    """Images by number, each uint8 [H,W,3], RGB: an array, or what makes them one by one."""

    def __getitem__(self, i: int, /) -> NDArray[np.uint8]: ...


class Split:
    """One part of a data set: where each image lies and what is known about it.

    Columns grow by `add`: paths (relative to `root`; with `images`, which then have the pixels, names alone), class
    or -1 where the boxes tell, group or -1, recorded size (height, width) or zeros, whether the boxes are known, and
    the boxes themselves as float64 (x0, y0, x1, y1) in half-open pixels of the stored image, with label and flags.
    """

    def __init__(self, root: Path, pictures: Pictures | None = None) -> None:
        self.root = root
        self.pictures = pictures
        self.masks: MaskSource | None = None
        self.paths: list[str] = []
        self.classes, self.groups, self.sizes = array("q"), array("q"), array("q")
        self.annotated, self.flags = array("B"), array("B")
        self.coords, self.labels, self.offsets = array("d"), array("q"), array("q", [0])

    def __len__(self) -> int:
        return len(self.paths)

    def add(
        self,
        path: str,
        boxes: Iterable[tuple[Sequence[float], int, int]] = (),
        *,
        target: int = -1,
        group: int = -1,
        size: tuple[int, int] = (0, 0),
        annotated: bool = True,
    ) -> None:
        """`boxes` holds (coordinates, label, flags)."""
        self.paths.append(path)
        self.classes.append(target)
        self.groups.append(group)
        self.sizes.extend(size)
        self.annotated.append(annotated)
        for coords, label, flags in boxes:
            self.coords.extend(coords)
            self.labels.append(label)
            self.flags.append(flags)
        self.offsets.append(len(self.labels))

    def part(self, start: int, stop: int) -> Part:
        """The images `start` to `stop`, light enough to be sent to another process."""
        low, high = self.offsets[start], self.offsets[stop]
        return Part(
            self.root,
            start,
            self.paths[start:stop],
            np.array(self.classes[start:stop], np.int64),
            np.array(self.groups[start:stop], np.int64),
            np.array(self.sizes[2 * start : 2 * stop], np.int64).reshape(-1, 2),
            np.array(self.annotated[start:stop], bool),
            np.array(self.coords[4 * low : 4 * high], np.float64).reshape(-1, 4),
            np.array(self.offsets[start : stop + 1], np.int64) - low,
            np.array(self.labels[low:high], np.int64),
            np.array(self.flags[low:high], np.uint8),
            None if self.pictures is None else self.pictures.part(start, stop),
            None if self.masks is None else self.masks.part(start, stop),
        )

    def update(self, digest: Any) -> None:
        """Feeds all that is known into a hash."""
        for path in self.paths:
            digest.update(path.encode("utf-8", "surrogatepass") + b"\0")
        columns = (self.classes, self.groups, self.sizes, self.annotated, self.coords, self.labels, self.flags)
        for column in (*columns, self.offsets):
            digest.update(column)
        if self.masks is not None:
            self.masks.update(digest)


@dataclass(frozen=True)
class Part:
    """Consecutive images of a `Split`, as arrays; `start` is the place of the first one in the split."""

    root: Path
    start: int
    paths: list[str]
    classes: NDArray[np.int64]
    groups: NDArray[np.int64]
    sizes: NDArray[np.int64]
    annotated: NDArray[np.bool_]
    coords: NDArray[np.float64]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    flags: NDArray[np.uint8]
    pictures: Pixels | None = None
    masks: MaskSource | None = None

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Source:
    """A data set as its annotations describe it.

    Attributes:
        kind: the name of its reader, such as "coco".
        path: where it lies.
        classes: their names.
        multi_label: whether an image may show several classes: its target is then the set of its boxes' labels.
        groups: their names, or () where there are none.
        splits: by name.
        options: those of the source that change what is read.
    """

    kind: str
    path: Path
    classes: tuple[str, ...]
    multi_label: bool
    groups: tuple[str, ...]
    splits: dict[str, Split]
    options: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Changes with whatever the annotations say; pixels are not looked at."""
        digest = hashlib.sha256(repr((self.kind, self.classes, self.multi_label, self.groups)).encode())
        for name, split in self.splits.items():
            digest.update(f"{name}:{len(split)}\0".encode())
            split.update(digest)
        return digest.hexdigest()


def side_length(value: Any) -> int:
    """The recorded width or height of an image; 0 where it is not known, or cannot be true."""
    return value if isinstance(value, int) and 0 < value < 1 << 31 else 0


def box_fault(coords: Sequence[float]) -> str | None:
    """What is wrong with (x0, y0, x1, y1), or None. That a box lies in its image is checked with the pixels."""
    if not all(map(math.isfinite, coords)):
        return "box that is not finite"
    x0, y0, x1, y1 = coords
    if x1 < x0 or y1 < y0:
        return "inverted box"
    return "box without area" if x1 == x0 or y1 == y0 else None


def placeholder(classes: Iterable[int]) -> list[tuple[tuple[float, ...], int, int]]:
    """For an image that is not annotated: what makes it keep `classes`. Its boxes are never stored."""
    return [((0.0, 0.0, 1.0, 1.0), label, 0) for label in sorted(classes)]


def relative_path(value: Any, where: str) -> str:
    """A path below the data set's folder, with forward slashes.

    Raises:
        DataError: it is no path, or climbs out of the folder, or is absolute, on any system.
    """
    if not isinstance(value, str) or not value or "\0" in value:
        raise DataError(f"{where}: a file's name must be a non-empty string, got {value!r}")
    windows = PureWindowsPath(value)
    if windows.drive or windows.root or ".." in windows.parts:  # takes both kinds of slashes
        raise DataError(f"{where}: {value!r} leads out of the data set's folder; refused")
    return str(PurePosixPath(value.replace("\\", "/")))


def choose_splits(
    found: Sequence[str], wanted: Sequence[str] | None, path: Path, default: Callable[[], list[str]]
) -> list[str]:
    """Which splits to read: those that were asked for, in that order, all of which must be there.

    Raises:
        DataError: one is missing, or asked for twice.
    """
    if wanted is None:
        return default()
    if not wanted or len({split_name(name) or name for name in wanted}) < len(wanted):
        raise DataError(f"split must name at least one split, each once, got {list(wanted)}")
    wanted = [name if name in found else split_name(name) or name for name in wanted]
    for name in wanted:
        if name not in found:
            raise DataError(f"{path}: no split {name!r}; there are {', '.join(sorted(found)) or 'none'}")
    return list(wanted)


def box_flags(crowd: bool, difficult: bool, option: str) -> int | None:
    """The flags of a crowd or difficult box under keep, drop or mask; None where the box is left out."""
    special = crowd or difficult
    if special and option == "drop":
        return None
    return CROWD * crowd | DIFFICULT * difficult | (IGNORE if special and option == "mask" else 0)
