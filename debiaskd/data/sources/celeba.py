"""CelebA as it is distributed: `img_align_celeba/`, `list_attr_celeba.txt` and `list_eval_partition.txt`, or Kaggle's
CSV files of these names."""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from debiaskd.data.sources.names import whole
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.data.sources.records import Source, Split, choose_splits, relative_path

SPLITS = ("train", "val", "test")
_CONTRADICTS = "row that contradicts an earlier one, not used"
_NEITHER = "attribute that is neither 1 nor -1, its image left out"
_ATTRIBUTES, _PARTITION, _PICTURES = "list_attr_celeba", "list_eval_partition", "img_align_celeba"


def read(
    path: Path,
    problems: Problems,
    *,
    splits: Sequence[str] | None = None,
    target: str = "Blond_Hair",
    bias: str = "Male",
) -> Source:
    """The aligned images of CelebA: one attribute is to be told, and another one goes along with it.

    Class 1 has the attribute `target`, class 0 does not; the group is 2 * class + `bias`. No image is annotated:
    CelebA's boxes lie in the images as they were before they were aligned.

    Args:
        path: the folder that holds the lists and `img_align_celeba/`. They may lie in its folders Anno, Eval and Img,
            and the images, as Kaggle has them, in another folder img_align_celeba within that one.
        problems: collects what is passed over.
        splits: among "train", "val" and "test", which the partition calls 0, 1 and 2; None: all that occur.
        target, bias: two attributes, by their names in the list.

    Raises:
        DataError: a list or the images are not there, or another list is; `target` or `bias` is no attribute; a path
            that climbs out of the folder.
    """
    if target == bias:
        raise DataError(f"bias must be another attribute than target, got {bias!r} for both")
    attributes, partition = _list(path, "Anno", _ATTRIBUTES), _list(path, "Eval", _PARTITION)
    folder = _pictures(path)
    known = _read_attributes(attributes, target, bias, problems)
    found: dict[str, Split] = {}
    seen: dict[str, str] = {}
    rows = problems.tally(partition.name, "rows", of_file=True)
    for number, name, (value,) in _rows(partition, ["partition"], None):
        where = f"{partition.name}, line {number}: {name}"
        rows.total += 1
        if name in seen:
            problems.add("duplicate id" if seen[name] == value else _CONTRADICTS, where)
            rows.total -= 1
            continue
        seen[name] = value
        number_of_split = whole(value)
        if number_of_split not in (0, 1, 2):
            problems.add("row with unknown partition", f"{where}: {value!r}", rows)
            continue
        name_of_split = SPLITS[number_of_split]
        pictures = problems.tally(name_of_split, "images")
        pictures.total += 1
        if name not in known:
            problems.add("image without attributes, left out", where, pictures)
        elif (group := known[name]) is None:
            pictures.skip(_NEITHER, where)
        else:
            split = found.setdefault(name_of_split, Split(folder))
            split.add(name, target=group // 2, group=group, annotated=False)
    for name in known:
        if name not in seen:
            problems.add("image without a partition, left out", f"{attributes.name}: {name}")
    with os.scandir(folder) as entries:
        for name in sorted(entry.name for entry in entries if entry.name.lower().endswith(".jpg")):
            if name not in known and name not in seen:
                problems.add("image without attributes, left out", f"{folder.name}/{name}")
    present = [name for name in SPLITS if name in found]
    chosen = choose_splits(present, splits, path, lambda: present)
    if not chosen:
        raise DataError(f"{partition}: there are no images in it{problems.why()}")
    classes = f"not {target}", target
    groups = tuple(f"{first}, {second}" for first in classes for second in (f"not {bias}", bias))
    made = {name: found[name] for name in chosen}
    return Source("celeba", path, classes, False, groups, made, {"target": target, "bias": bias})


def _list(path: Path, folder: str, name: str) -> Path:
    for file in (place / f"{name}{suffix}" for place in (path, path / folder) for suffix in (".txt", ".csv")):
        if file.is_file():
            return file
    raise DataError(f"{path}: no {name}.txt or {name}.csv here; SRC must be the folder that holds it")


def _pictures(path: Path) -> Path:
    folder = next((f for f in (path / _PICTURES, path / "Img" / _PICTURES) if f.is_dir()), None)
    if folder is None:
        raise DataError(f"{path / _PICTURES}: no such folder; it should hold the images")
    return folder / _PICTURES if (folder / _PICTURES).is_dir() else folder


def _read_attributes(file: Path, target: str, bias: str, problems: Problems) -> dict[str, int | None]:
    """By image 2 * target + bias; None where a value is neither 1 nor -1. A list without any -1 says 0 instead."""
    read: dict[str, tuple[int | None, ...]] = {}
    places: dict[str, int] = {}
    stated: list[int] = []
    for number, name, texts in _rows(file, [target, bias], stated):
        values = tuple(map(_value, texts))
        if name in read:
            kind = "duplicate id" if read[name] == values else _CONTRADICTS
            problems.add(kind, f"{file.name}, line {number}: {name}")
        else:
            read[name], places[name] = values, number
    occurring = {value for values in read.values() for value in values}
    lacks = 0 if 0 in occurring and -1 not in occurring else -1
    if lacks == 0:
        problems.note("attributes with 0 in place of -1", file.name)
    known: dict[str, int | None] = {}
    for name, values in read.items():
        if all(value in (1, lacks) for value in values):
            known[name] = 2 * (values[0] == 1) + (values[1] == 1)
        else:
            problems.add(_NEITHER, f"{file.name}, line {places[name]}: {name}")
            known[name] = None
    if stated and stated[0] != len(known):
        problems.add("list of another length than it says", f"{file.name}: {len(known)} images, not {stated[0]}")
    return known


def _value(text: str) -> int | None:
    words = {"true": 1, "false": 0}
    return words.get(text.casefold(), whole(text))


def _rows(file: Path, wanted: list[str], stated: list[int] | None) -> Iterator[tuple[int, str, list[str]]]:
    """Number of the line, image, and the `wanted` values of each row.

    A text file of attributes says in its first line how many rows there are, which `stated` takes, and their names in
    its second; that of the partition (`stated` None) begins with the first row. CSV has its names in the first line.
    """
    as_csv = file.suffix == ".csv"
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = enumerate(csv.reader(lines) if as_csv else (line.split() for line in lines), 1)
            names, key = wanted, 0
            if as_csv:
                header = [name.strip() for name in next(rows, (0, []))[1]]
                key = header.index("image_id") if "image_id" in header else 0  # behind a column of row numbers, for one
                names = header[:key] + header[key + 1 :]
            elif stated is not None:
                count = " ".join(next(rows, (0, []))[1])
                if not count.isdecimal():
                    raise DataError(f"{file}: its first line must be the number of images, got {count[:60]!r}")
                stated.append(int(count))
                names = next(rows, (0, []))[1]
            columns = _columns(file, names, wanted)
            for number, row in rows:
                if not row:
                    continue
                if len(row) != 1 + len(names):
                    raise DataError(f"{file}, line {number}: must have {1 + len(names)} values, got {len(row)}")
                name = relative_path(row.pop(key).strip(), f"{file}, line {number}")
                yield number, name, [row[column].strip() for column in columns]
    except DataError:
        raise
    except (ValueError, csv.Error) as error:  # not text, for one
        raise DataError(f"{file}: not a list of CelebA's ({error})") from None


def _columns(file: Path, names: list[str], wanted: list[str]) -> list[int]:
    for name in wanted:
        if name not in names:
            by_lower = {known.lower(): known for known in names}
            close = [by_lower[found] for found in difflib.get_close_matches(name.lower(), list(by_lower), 5, 0.5)]
            near = f"close: {', '.join(close)}" if close else f"there are {', '.join(names) or 'none'}"
            raise DataError(f"{file}: no {'column' if wanted == ['partition'] else 'attribute'} {name!r}; {near}")
    return [names.index(name) for name in wanted]
