"""The files of a prepared data set, and how they are written atomically.

    OUT/prepare.json            written first: what is being made, of what
    OUT/train/00000/*.npy       one shard: `shard.json` in it has the length and SHA-256 of each file
    OUT/manifest.json           written last: counts, names, splits, shards

A shard is written in a folder with a temporary name, synchronised to the disk, and renamed: a folder with a shard's
name is complete. For LitData a shard is `OUT/train/chunk-0-0.bin`, `OUT/train/00000/*.npy` without the images and,
written when both are whole, `OUT/train/00000.json`; `OUT/train/index.json` comes last.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from debiaskd.utils.files import TEMPORARY as TEMPORARY
from debiaskd.utils.files import read_json as read_json
from debiaskd.utils.files import sha256 as sha256
from debiaskd.utils.files import sync
from debiaskd.utils.files import write_json as write_json

FORMAT, VERSION = "debiaskd-packed", 1
MANIFEST, PLAN, SHARD, INDEX = "manifest.json", "prepare.json", "shard.json", "index.json"
FORMATS = ("npy", "litdata")


@dataclass(frozen=True)
class Sample:
    """One image as it is stored: pixels uint8 [S,S,3], boxes int32 [k,4] with labels and flags, target int64 or
    uint8 [K], its place in the split as annotated, the original (height, width), and masks by class as the words of
    `debiaskd.masks`, int32 [m,ceil(S/32),S]. `problems`, which are not stored: what is wrong with it, by kind."""

    image: NDArray[np.uint8]
    coords: NDArray[np.int32]
    labels: NDArray[np.int64]
    flags: NDArray[np.uint8]
    target: Any
    group: int
    annotated: bool
    size: tuple[int, int]
    position: int
    path: str
    masks: NDArray[np.int32] | None = None
    mask_labels: NDArray[np.int64] | None = None
    problems: tuple[tuple[str, str], ...] = ()


class Writer(Protocol):
    def add(self, sample: Sample) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class NpyWriter:
    """Files of one shard in `folder`. Images go to the disk one by one, so that memory holds one at a time."""

    def __init__(self, folder: Path, size: int, masks: bool = False) -> None:
        self.folder, self.size = folder, size
        self.count = 0
        self.pixels: BinaryIO = open(folder / "images.npy", "wb")  # noqa: SIM115  # for as long as the shard takes
        self.header_bytes = self._header(0)
        self.columns = ColumnWriter(folder, size if masks else None)

    def _header(self, count: int) -> int:
        """numpy pads headers so that a count that grows fits into the same bytes."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, self.size, self.size, 3)}
        np.lib.format.write_array_header_1_0(self.pixels, header)
        return self.pixels.tell()

    def add(self, sample: Sample) -> None:
        self.pixels.write(np.ascontiguousarray(sample.image).data)
        self.count += 1
        self.columns.add(sample)

    def close(self) -> None:
        self.pixels.seek(0)
        if self._header(self.count) != self.header_bytes:
            raise RuntimeError("the header of images.npy outgrew its place")
        self.pixels.close()
        self.columns.close()

    def abandon(self) -> None:
        with suppress(OSError):
            self.pixels.close()


class ColumnWriter:
    """All of a shard but its images: what is looked up by number, before anything is read. `masks` is the side of the
    stored masks, None where there are none."""

    def __init__(self, folder: Path, masks: int | None = None) -> None:
        self.folder = folder
        self.masks = None if masks is None else MaskColumns(masks)
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.offsets = [0]

    def add(self, sample: Sample) -> None:
        self.offsets.append(self.offsets[-1] + len(sample.coords))
        for name, column in self.columns.items():
            column.append(getattr(sample, name))
        if self.masks is not None:
            self.masks.add(sample)

    def close(self) -> None:
        for name, words in ({} if self.masks is None else self.masks.arrays()).items():
            _save(self.folder / f"{name}.npy", words)
        _save(self.folder / "offsets.npy", np.array(self.offsets, np.int64))
        for name, (dtype, shape, joined) in COLUMNS.items():
            rows = self.columns[name]
            if dtype is None:
                array: NDArray[Any] = np.array(rows, np.str_)
            elif joined:
                array = np.concatenate([np.zeros((0, *shape), dtype), *rows])
            elif rows:
                array = np.array(rows, dtype=getattr(rows[0], "dtype", dtype))
            else:
                array = np.zeros((0, *shape), dtype)
            _save(self.folder / f"{name}.npy", array)


class MaskColumns:
    """Masks of a shard: image `i` has `masks[mask_offsets[i]:mask_offsets[i + 1]]`, each of a class."""

    def __init__(self, size: int) -> None:
        self.words = [np.zeros((0, -(-size // 32), size), np.int32)]
        self.labels = [np.zeros(0, np.int64)]
        self.offsets = [0]

    def add(self, sample: Sample) -> None:
        if sample.masks is not None and sample.mask_labels is not None:
            self.words.append(sample.masks)
            self.labels.append(sample.mask_labels)
        self.offsets.append(self.offsets[-1] + (0 if sample.masks is None else len(sample.masks)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "masks": np.concatenate(self.words),
            "mask_labels": np.concatenate(self.labels),
            "mask_offsets": np.array(self.offsets, np.int64),
        }


class LitdataWriter:
    """One chunk for LitData's `StreamingDataset`, in `folder`, and the columns beside it, in `columns`. LitData itself
    keeps a chunk in memory until it is written, so that this takes as much as a shard."""

    def __init__(self, folder: Path, columns: Path, index: int, masks: int | None = None) -> None:
        from litdata.streaming.writer import BinaryWriter

        columns.mkdir()
        self.count, self.columns = 0, ColumnWriter(columns, masks)
        self.writer = BinaryWriter(str(folder), chunk_size=1 << 31, chunk_index=index)

    def add(self, sample: Sample) -> None:
        fields = {name: getattr(sample, name) for name in ("image", *COLUMNS)}
        fields |= {"annotated": int(sample.annotated), "size": np.array(sample.size, np.int64)}
        self.writer.add_item(self.count, fields)
        self.columns.add(sample)
        self.count += 1

    def close(self) -> None:
        if self.count:
            self.writer.done()
        self.columns.close()

    def abandon(self) -> None:
        pass


#: Of each column beside the images: dtype (None: text), shape of a row, whether rows are joined end to end.
COLUMNS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "coords": (np.int32, (4,), True),
    "labels": (np.int64, (), True),
    "flags": (np.uint8, (), True),
    "target": (np.int64, (), False),
    "group": (np.int64, (), False),
    "annotated": (np.bool_, (), False),
    "size": (np.int64, (2,), False),
    "position": (np.int64, (), False),
    "path": (None, (), False),
}


def _save(path: Path, array: NDArray[Any]) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def known(folder: Path) -> dict[str, dict[str, Any]]:
    """Length and SHA-256 of every file in `folder`, all of them brought to the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        sync(path)
    return files


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """`shard.json` with `facts` and what is `known` of every other file."""
    write_json(folder / SHARD, {**facts, "files": known(folder)})


def move(unfinished: Path, final: Path) -> None:
    """A folder or file gets its name once all of it is on the disk."""
    sync(unfinished)
    os.rename(unfinished, final)
    sync(final.parent)


def clear(folder: Path) -> None:
    """Removes what was left unfinished."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
