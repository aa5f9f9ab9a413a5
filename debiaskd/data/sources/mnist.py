"""MNIST's IDX files, packed or not: `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`, or with
`.idx3-ubyte` in place of `-idx3-ubyte`, as they are called when unpacked by some tools."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.sources.records import DataError

SIDE = 28
SETS = ("train", "t10k")
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def read(folder: Path) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The sets, "train" and "t10k", whose files are there: grey levels uint8 [N,28,28], ink 255, and digits uint8 [N].

    Raises:
        DataError: neither is there; one has images without labels or the reverse; damaged or other files.
        OSError: a file cannot be read.
    """
    made = {}
    for name in SETS:
        files = [_find(folder, f"{name}-{kind}") for kind in (_IMAGES, _LABELS)]
        if files == [None, None]:
            continue
        images, labels = (
            _idx(file or folder / f"{name}-{kind}.gz", sides)
            for file, kind, sides in zip(files, (_IMAGES, _LABELS), ((SIDE, SIDE), ()))
        )
        if len(images) != len(labels):
            raise DataError(f"{folder}: {name} has {len(images)} images and {len(labels)} labels")
        if labels.max(initial=0) > 9:
            raise DataError(f"{files[1]}: labels must be digits, got {labels.max()}")
        made[name] = images, labels
    if not made:
        raise DataError(f"{folder}: no MNIST here: neither {SETS[0]}-{_IMAGES}.gz nor {SETS[1]}-{_IMAGES}.gz")
    return made


def _find(folder: Path, name: str) -> Path | None:
    names = [spelled + packed for spelled in (name, name.replace("-idx", ".idx")) for packed in (".gz", "")]
    return next((folder / spelled for spelled in names if (folder / spelled).is_file()), None)


def _idx(file: Path, sides: tuple[int, ...]) -> NDArray[np.uint8]:
    """An IDX file of bytes, [N,*sides]; not a byte more is unpacked than it should hold."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as content:
            header = content.read(4 * (2 + len(sides)))
            if len(header) < 4 * (2 + len(sides)):
                raise DataError(f"{file}: cut short")
            magic, count, *found = struct.unpack(f">{2 + len(sides)}I", header)
            if magic != 0x0801 + len(sides) or tuple(found) != sides:
                expected = "images of 28×28 bytes" if sides else "labels of one byte"
                raise DataError(f"{file}: not an IDX file of {expected}")
            size = count * math.prod(sides)
            values = bytearray()
            while len(values) < size and (block := content.read(min(size - len(values), 1 << 20))):
                values += block  # by and by: the header alone must not decide how much memory is taken
            if len(values) < size or content.read(1):
                amount = "less" if len(values) < size else "more"
                raise DataError(f"{file}: there is {amount} in it than the {count} that it announces")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; images and labels go together") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: damaged ({error})") from None
    shaped: NDArray[np.uint8] = np.frombuffer(values, np.uint8).reshape(count, *sides)
    return shaped
