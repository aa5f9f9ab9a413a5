"""A folder of folders, one for each class, and a CSV file with boxes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from debiaskd.data.records import DataError, Problems, Source, Split, box_fault, choose_splits, relative_path
from debiaskd.data.waterbirds import read_csv

SPLITS = ("train", "val", "valid", "validation", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_COLUMNS = ("path", "x0", "y0", "x1", "y1")
#: By picture: boxes with the names of their classes, "" for the class of the picture.
_Rows = dict[str, list[tuple[tuple[float, ...], str]]]


def read(path: Path, problems: Problems, *, splits: Sequence[str] | None = None, boxes: Path | None = None) -> Source:
    """`SRC/CLASS/*.jpg`, or `SRC/train/CLASS/*.jpg`, `SRC/val/CLASS/*.jpg`, … as torchvision's `ImageFolder` reads it.

    Args:
        path: the folder.
        problems: collects what is passed over.
        splits: among train, val, valid, validation and test; a folder without such splits is one, "train".
        boxes: CSV file with the columns path (from SRC on), x0, y0, x1, y1 (half-open pixels, fractions allowed) and,
            if wanted, label (a class; without it a box has its picture's). A picture with several boxes has several
            rows; one row without coordinates says that there is no box. Pictures without a row are not annotated.
            None: `SRC/boxes.csv`, if it is there.

    Raises:
        DataError: no classes; no pictures; another CSV; a path that climbs out of the folder.
    """
    # "train" may be the name of a class, too: that of a split holds folders.
    parts = {name: path / name for name in SPLITS if (path / name).is_dir() and _folders(path / name)}
    parts = parts or {"train": path}
    chosen = choose_splits(list(parts), splits, path, lambda: list(parts))
    classes = sorted({entry.name for folder in parts.values() for entry in _folders(folder)})
    if not classes:
        raise DataError(f"{path}: no folders with classes here")
    index = {name: i for i, name in enumerate(classes)}
    file = path / "boxes.csv" if boxes is None else boxes
    rows = _rows(file, problems) if boxes is not None or file.is_file() else {}
    unused = set(rows)
    made = {}
    for name in parts:
        split = Split(parts[name])
        prefix = "" if parts[name] == path else f"{name}/"
        for picture in _pictures(parts[name]):
            target = index[picture.split("/", 1)[0]]
            unused.discard(prefix + picture)
            known = rows.get(prefix + picture)
            found = []
            for coords, label in known or ():
                if label and label not in index:
                    problems.add("unknown category", f"{file.name}: {prefix}{picture}: {label!r}")
                else:
                    found.append((coords, index[label] if label else target, 0))
            split.add(picture, found, target=target, annotated=known is not None)
        made[name] = split
    for picture in sorted(unused):
        problems.add("annotation of an image that is not there", f"{file.name}: {picture}")
    if not any(len(made[name]) for name in chosen):
        raise DataError(f"{path}: no pictures here ({', '.join(EXTENSIONS)})")
    return Source("folder", path, tuple(classes), False, (), {name: made[name] for name in chosen})


def _folders(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if e.is_dir() and not e.name.startswith(".")), key=lambda e: e.name)


def _pictures(root: Path) -> Iterator[str]:
    for entry in _folders(root):
        for folder, below, files in os.walk(entry.path):
            below.sort()
            for file in sorted(files):
                if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                    yield Path(folder, file).relative_to(root).as_posix()


def _rows(file: Path, problems: Problems) -> _Rows:
    if not file.is_file():
        raise DataError(f"{file}: no such file; boxes must be a CSV file with the columns {', '.join(_COLUMNS)}")
    made: _Rows = {}
    for number, row in read_csv(file, _COLUMNS):
        where = f"{file.name}, line {number}"
        known = made.setdefault(relative_path(row["path"], f"{file}, line {number}"), [])
        texts = [row[key].strip() for key in _COLUMNS[1:]]
        if not any(texts):
            continue
        try:
            coords = tuple(map(float, texts))
        except ValueError:
            problems.add("box that is not four numbers", where)
            continue
        fault = box_fault(coords)
        if fault is not None:
            problems.add(fault, where)
        else:
            known.append((coords, (row.get("label") or "").strip()))
    return made
