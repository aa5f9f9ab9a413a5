"""The files of CIFAR: labels are read at once, images on request."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.sources import pickled
from debiaskd.data.sources.records import DataError

SIDE = 32
_PIXELS = 3 * SIDE * SIDE  # red, green and blue planes, row by row
_AT_ONCE = 1000


@dataclass(frozen=True)
class Batch:
    """One file: `labels` int64 [n] by name, `pixels` the images of some rows, uint8 [m,32,32,3], and the names of its
    classes where it says them itself."""

    file: Path
    labels: Mapping[str, NDArray[np.int64]]
    pixels: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    classes: tuple[str, ...] = ()


class Images:
    """The images of a split: each is a row of one of its batches."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self._batch, self._row = array("q"), array("q")

    def add(self, batch: int, row: int) -> None:
        self._batch.append(batch)
        self._row.append(row)

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images by their numbers in the split: uint8 [n,32,32,3].

        Raises:
            DataError, OSError: a file can be read no more.
        """
        made = np.empty((len(numbers), SIDE, SIDE, 3), np.uint8)
        batch, row = np.asarray(self._batch)[numbers], np.asarray(self._row)[numbers]
        for index in np.unique(batch):
            chosen = batch == index
            made[chosen] = self.batches[index].pixels(row[chosen])
        return made

    def part(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.take(np.arange(start, stop))


def binary(file: Path, columns: Sequence[str]) -> Batch:
    """Records of one byte for each column and then the pixels. Only labels are held in memory."""
    length = len(columns) + _PIXELS
    size = file.stat().st_size
    if size % length:
        raise DataError(f"{file}: cut short, or not CIFAR's: {size} bytes are not whole records of {length}")
    parts = []
    with open(file, "rb") as content:
        while block := content.read(_AT_ONCE * length):
            parts.append(np.frombuffer(block, np.uint8).reshape(-1, length)[:, : len(columns)].astype(np.int64))
    rows = np.concatenate([np.zeros((0, len(columns)), np.int64), *parts])
    return Batch(file, dict(zip(columns, rows.T)), partial(_of_records, file, len(columns)))


def _of_records(file: Path, before: int, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    planes = np.empty((len(rows), _PIXELS), np.uint8)
    with open(file, "rb") as content:
        for plane, row in zip(planes, rows.tolist()):
            content.seek(row * (before + _PIXELS) + before)
            if content.readinto(plane.data) != _PIXELS:
                raise DataError(f"{file}: became shorter while it was read")
    return _as_pictures(planes)


def python(file: Path, columns: Sequence[str]) -> Batch:
    """A pickle of `data`, uint8 [n,3072], and a list for each column. All of it is held in memory."""
    held = pickled.load(file)
    planes = pickled.array(held.get("data"))
    if planes is None or planes.ndim != 2 or planes.shape[1] != _PIXELS:
        raise DataError(f"{file}: 'data' must be an array uint8 [N,{_PIXELS}]")
    labels = {name: _integers(file, name, held.get(name), len(planes)) for name in columns}
    return Batch(file, labels, partial(_of_planes, planes))


def _integers(file: Path, name: str, values: Any, count: int) -> NDArray[np.int64]:
    if not isinstance(values, list) or len(values) != count or not all(type(v) is int and 0 <= v < 256 for v in values):
        raise DataError(f"{file}: {name!r} must be a list of {count} integers in 0..255")
    return np.array(values, np.int64)


def _of_planes(planes: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    return _as_pictures(planes[rows])


def _as_pictures(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    pictures: NDArray[np.uint8] = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return pictures


def npz(file: Path, columns: Sequence[str]) -> Batch:
    """`images` uint8 [N,32,32,3], `classes` [K], and integers [N] for each column. All of it is held in memory."""
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in ("images", "classes", *columns) if name in held.files}
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{file}: not an npz file ({error})") from None
    except Exception as error:  # whatever a damaged file makes zip and numpy stumble over
        raise DataError(f"{file}: damaged, or not an npz file of plain arrays ({error})") from None
    images, classes = arrays.get("images"), arrays.get("classes")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3):
        raise DataError(f"{file}: images must be uint8 [N,{SIDE},{SIDE},3], got {_shown(images)}")
    if classes is None or classes.dtype.kind != "U" or classes.ndim != 1:
        raise DataError(f"{file}: classes must be text [K], got {_shown(classes)}")
    labels = {}
    for name in columns:
        values = arrays.get(name)
        if values is None or values.dtype.kind not in "iu" or values.shape != images.shape[:1]:
            raise DataError(f"{file}: {name} must be integers [N]=[{len(images)}], got {_shown(values)}")
        labels[name] = values.astype(np.int64)
    return Batch(file, labels, partial(np.take, images, axis=0), tuple(map(str, classes)))


def _shown(array: NDArray[Any] | None) -> str:
    return "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
