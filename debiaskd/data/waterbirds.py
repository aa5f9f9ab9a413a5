"""Waterbirds as it is distributed: `metadata.csv` beside its pictures, and CUB-200-2011's boxes if they are there."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from debiaskd.data.records import DataError, Problems, Source, Split, box_fault, choose_splits, relative_path

CLASSES, PLACES = ("landbird", "waterbird"), ("land", "water")
#: Group 2 * y + place.
GROUPS = tuple(f"{bird} on {place}" for bird in CLASSES for place in PLACES)
SPLITS = ("train", "val", "test")
_COLUMNS = ("img_filename", "y", "split", "place")


def read(path: Path, problems: Problems, *, splits: Sequence[str] | None = None, boxes: Path | None = None) -> Source:
    """Waterbirds (any share of birds on the wrong background, Waterbirds-100 too).

    Args:
        path: the folder that holds `metadata.csv`.
        problems: collects what is passed over.
        splits: among "train", "val" and "test"; None: all that occur.
        boxes: folder with CUB's `images.txt` and `bounding_boxes.txt`; None: `path`, if they are there. Without them
            no picture is annotated; with them, those that have a box.

    Raises:
        DataError: no or another `metadata.csv`; `boxes` without the two files; a path that climbs out of the folder.
    """
    file = path / "metadata.csv"
    if not file.is_file():
        raise DataError(f"{file}: no such file; SRC must be the folder that holds it")
    birds = _birds(path, boxes, problems)
    found: dict[str, Split] = {}
    seen = set()
    for number, row in read_csv(file, _COLUMNS):
        name = relative_path(row["img_filename"], f"{file}, line {number}")
        if name in seen:
            problems.add("duplicate id", f"{file.name}, line {number}: {name}")
            continue
        seen.add(name)
        y, split, place = (row[key].strip() for key in ("y", "split", "place"))
        if y not in ("0", "1") or place not in ("0", "1") or split not in ("0", "1", "2"):
            problems.add("row with unknown y, split or place", f"{file.name}, line {number}: {name}")
            continue
        box = birds.get(name)
        found.setdefault(SPLITS[int(split)], Split(path)).add(
            name,
            [] if box is None else [(box, int(y), 0)],
            target=int(y),
            group=2 * int(y) + int(place),
            annotated=box is not None,
        )
    present = [name for name in SPLITS if name in found]
    chosen = choose_splits(present, splits, path, lambda: present)
    if not chosen:
        raise DataError(f"{file}: there are no pictures in it")
    return Source("waterbirds", path, CLASSES, False, GROUPS, {name: found[name] for name in chosen})


def _birds(path: Path, boxes: Path | None, problems: Problems) -> dict[str, tuple[float, ...]]:
    folder = path if boxes is None else boxes
    names, coordinates = folder / "images.txt", folder / "bounding_boxes.txt"
    missing = next((file for file in (names, coordinates) if not file.is_file()), None)
    if missing is not None:
        if boxes is not None:
            raise DataError(f"{missing}: no such file; boxes must be the folder of CUB-200-2011 that holds it")
        return {}
    ids = {}
    for line in names.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, name = line.strip().partition(" ")
        if key and name:
            ids[key] = relative_path(name.strip(), str(names))
    made: dict[str, tuple[float, ...]] = {}
    for line in coordinates.read_text(encoding="utf-8", errors="replace").splitlines():
        key, *values = line.split() or [""]
        if not key:
            continue
        if key not in ids:
            problems.add("annotation of an image that is not listed", f"{coordinates.name}: {key}")
            continue
        try:
            x, y, w, h = map(float, values)
        except ValueError:
            problems.add("box that is not four numbers", f"{coordinates.name}: {line.strip()}")
            continue
        fault = box_fault((x, y, x + w, y + h))
        if fault is not None:
            problems.add(fault, f"{coordinates.name}: {line.strip()}")
        else:
            made[ids[key]] = (x, y, x + w, y + h)
    return made


def read_csv(file: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows with their line numbers; every row has all of its header's columns.

    Raises:
        DataError: not text, a column is missing, or a row is cut short.
    """
    rows = []
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{file}: no column {', '.join(missing)} in its first line")
            for row in reader:
                if any(value is None for value in row.values()):
                    raise DataError(f"{file}, line {reader.line_num}: the row is cut short")
                rows.append((reader.line_num, row))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a CSV file ({error})") from None
    return rows
