"""Waterbirds as it is distributed: `metadata.csv` beside its images, and CUB-200-2011's boxes if they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from debiaskd.data.sources.names import whole
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.data.sources.records import Source, Split, box_fault, choose_splits, relative_path
from debiaskd.data.sources.tables import read_csv

CLASSES, PLACES = ("landbird", "waterbird"), ("land", "water")
#: Group 2 * y + place.
GROUPS = tuple(f"{bird} on {place}" for bird in CLASSES for place in PLACES)
SPLITS = ("train", "val", "test")
_COLUMNS = ("img_filename", "y", "split", "place")
_Box = tuple[float, ...]


def read(path: Path, problems: Problems, *, splits: Sequence[str] | None = None, boxes: Path | None = None) -> Source:
    """Waterbirds (any share of birds on the wrong background, Waterbirds-100 too).

    Args:
        path: the folder that holds `metadata.csv`.
        problems: collects what is passed over.
        splits: among "train", "val" and "test"; None: all that occur.
        boxes: folder with CUB's `bounding_boxes.txt`; None: `path`, if it is there. Without it no image is annotated;
            with it, those that have a box. Its ids are `img_id` of `metadata.csv`, which are CUB's, or, where CUB's
            `images.txt` lies beside it, those of the names there.

    Raises:
        DataError: no or another `metadata.csv`; `boxes` without the file; ids that contradict each other, or none;
            a path that climbs out of the folder.
    """
    file = path / "metadata.csv"
    if not file.is_file():
        raise DataError(f"{file}: no such file; SRC must be the folder that holds it")
    rows = _rows(file, problems)
    birds = _birds(path, file, boxes, rows, problems)
    found: dict[str, Split] = {}
    for name, row in rows.items():
        split = SPLITS[row.split]
        if birds is not None and (name in birds.found or name in birds.faults):
            tally = problems.tally(split, "boxes")
            tally.total += 1
            if name in birds.faults:
                tally.skip(*birds.faults[name])
        box = None if birds is None else birds.found.get(name)
        found.setdefault(split, Split(path)).add(
            name,
            [] if box is None else [(box, row.y, 0)],
            target=row.y,
            group=2 * row.y + row.place,
            annotated=box is not None,
        )
    present = [name for name in SPLITS if name in found]
    chosen = choose_splits(present, splits, path, lambda: present)
    if not chosen:
        raise DataError(f"{file}: there are no images in it{problems.why()}")
    return Source("waterbirds", path, CLASSES, False, GROUPS, {name: found[name] for name in chosen})


@dataclass(frozen=True)
class _Row:
    y: int
    split: int
    place: int
    id: int | None


def _rows(file: Path, problems: Problems) -> dict[str, _Row]:
    """By image."""
    made: dict[str, _Row] = {}
    tally = problems.tally(file.name, "rows", of_file=True)
    for number, row in read_csv(file, _COLUMNS, ("img_id",)):
        tally.total += 1
        name = relative_path(row["img_filename"].strip(), f"{file}, line {number}")
        where = f"{file.name}, line {number}: {name}"
        y, split, place = (whole(row[key]) for key in ("y", "split", "place"))
        if y not in (0, 1) or place not in (0, 1) or split not in (0, 1, 2):
            problems.add("row with unknown y, split or place", where, tally)
            continue
        read = _Row(y, split, place, whole(row.get("img_id", "")))
        known = made.setdefault(name, read)
        if known is not read:
            same = (known.y, known.split, known.place) == (y, split, place)
            problems.add("duplicate id" if same else "row that contradicts an earlier one, not used", where)
            tally.total -= 1
    return made


@dataclass
class _Birds:
    """Boxes by image, and why some have none: reason and example."""

    found: dict[str, _Box] = field(default_factory=dict)
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)


def _birds(
    path: Path, metadata: Path, boxes: Path | None, rows: Mapping[str, _Row], problems: Problems
) -> _Birds | None:
    folder = path if boxes is None else boxes
    file = folder / "bounding_boxes.txt"
    if not file.is_file():
        if boxes is not None:
            raise DataError(f"{file}: no such file; boxes must be the folder of CUB-200-2011 that holds it")
        return None
    names = _names(folder / "images.txt", metadata, rows, problems)
    listed = (folder / "images.txt").is_file()
    made, used, count = _Birds(), 0, 0
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        key, *values = line.split() or [""]
        if not key:
            continue
        count += 1
        number = whole(key)
        if number is None or number not in names:
            if number is None or listed:
                problems.add("annotation of an image that is not listed", f"{file.name}: {key}")
            else:  # CUB's file is often whole where metadata.csv is a part of it
                problems.note(f"box of an image that is not in {metadata.name}, not used", f"{file.name}: {key}")
            continue
        name, where = names[number], f"{file.name}: {line.strip()}"
        used += name in rows
        try:
            x, y, w, h = map(float, values)
        except ValueError:
            fault: str | None = "box that is not four numbers"
        else:
            fault = box_fault((x, y, x + w, y + h))
        if fault is not None:
            problems.add(fault, where)
            made.faults.setdefault(name, (fault, where))
        elif made.found.setdefault(name, (x, y, x + w, y + h)) != (x, y, x + w, y + h):
            problems.add("row that contradicts an earlier one, not used", where)
    for name in made.found:
        made.faults.pop(name, None)
    if rows and not used:
        there = f"{count} rows" if count else "nothing"
        problems.refuse(f"{file}: {there} in it, and no box of an image in {metadata.name}{problems.why()}")
    return made


def _names(file: Path, metadata: Path, rows: Mapping[str, _Row], problems: Problems) -> dict[int, str]:
    """Names of images by CUB's id: those of `images.txt`, or else of the metadata.

    Raises:
        DataError: there is neither, two images have one id, or the two files contradict each other.
    """
    own: dict[int, str] = {}
    for name, row in rows.items():
        if row.id is not None and own.setdefault(row.id, name) != name:
            raise DataError(f"{metadata}: img_id {row.id} is that of both {own[row.id]} and {name}")
    if not file.is_file():
        if rows and not own:
            problems.refuse(
                f"{metadata}: no integers in a column img_id, and no {file}: whose the boxes are is not known"
            )
        return own
    made: dict[int, str] = {}
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        key, _, name = line.strip().partition(" ")
        if (number := whole(key)) is not None and name:
            made[number] = relative_path(name.strip(), str(file))
    ids = {name: number for number, name in made.items()}
    for number, name in own.items():
        if made.get(number, name) != name or ids.get(name, number) != number:
            other = f"{made[number]} has in" if number in made else f"is {ids[name]} in"
            problems.refuse(f"{metadata}: img_id of {name} is {number}, which {other} {file}")
            break
    return made
