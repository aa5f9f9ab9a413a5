"""A folder with one subfolder for each class, and CSV files with boxes and bias attributes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from debiaskd.data.sources.names import EXTENSIONS, SPLITS, fold_case, match_paths, named_splits, of_tools, split_name
from debiaskd.data.sources.problems import DataError, Problems, Tally
from debiaskd.data.sources.records import Source, Split, box_fault, choose_splits, relative_path
from debiaskd.data.sources.tables import read_csv

_COLUMNS = ("path", "x0", "y0", "x1", "y1")
_BIAS_COLUMNS = ("path", "bias")
_T = TypeVar("_T")


def read(
    path: Path,
    problems: Problems,
    *,
    splits: Sequence[str] | None = None,
    boxes: Path | None = None,
    bias: Path | None = None,
) -> Source:
    """`SRC/CLASS/*.jpg`, or `SRC/train/CLASS/*.jpg`, `SRC/val/CLASS/*.jpg`, … as torchvision's `ImageFolder` reads it.

    Splits are known whatever their case, "training" and "testing" too. A class is a folder with an image in some
    split; classes that differ in case alone are one, unless a split has both. Folders that are hidden or belong to a
    tool ("__MACOSX", "@eaDir") are passed over.

    Args:
        path: the folder.
        problems: collects what is passed over.
        splits: among train, val, valid, validation and test; a folder without such splits is one, "train".
        boxes: CSV file with the columns path (from SRC on), x0, y0, x1, y1 (half-open pixels, fractions allowed) and,
            if wanted, label (a class; without it a box has its image's). An image with several boxes has several
            rows; one row without coordinates says that there is no box. Images without a row, or none of whose rows
            can be used, are not annotated. None: `SRC/boxes.csv`, if it is there.
        bias: CSV file with the columns path and bias: the name of what goes along with the class in that image,
            "water". The group is class * number of biases + bias, both sorted by name over all splits that there are;
            images without a bias are left out. None: `SRC/bias.csv`, if it is there; without it there are no groups.

    Raises:
        DataError: no classes; no images; splits below the classes, or the data set in a folder of its own below
            `path`; another CSV; fewer than two biases, or none of an image that is read; a path that climbs out of
            the folder.
    """
    parts = _parts(path, problems)
    chosen = choose_splits(list(parts), splits, path, lambda: list(parts))
    if not any(_folders(folder) for folder in parts.values()):
        raise DataError(f"{path}: no folders with classes here")
    found = _Found(path, parts, {name: list(_pictures(folder)) for name, folder in parts.items()})
    if not any(found.pictures[name] for name in chosen):
        raise DataError(f"{path}: no images here ({', '.join(EXTENSIONS)})")
    names = fold_case({name: map(_class, pictures) for name, pictures in found.pictures.items()}, problems)
    _odd_folders(found, names, problems)
    classes = sorted(set(names.values()))
    index = {name: classes.index(used) for name, used in names.items()}
    boxes_file, bias_file = boxes or path / "boxes.csv", bias or path / "bias.csv"
    rows = _boxes(boxes_file, found, index, problems) if boxes is not None or boxes_file.is_file() else {}
    known = _biases(bias_file, found, problems) if bias is not None or bias_file.is_file() else None
    # Of all splits, as the classes are, so that a group has one number whatever is chosen.
    biases = {name: i for i, name in enumerate(sorted(set((known or {}).values())))}
    made = {name: Split(parts[name]) for name in chosen}
    for name, split in made.items():
        tally, tally_boxes = problems.tally(name, "images"), problems.tally(name, "boxes")
        for loose in _loose(parts[name]):
            tally.total += 1
            problems.add("image in no class's folder, left out", found.prefix(name) + loose, tally)
        for picture in found.pictures[name]:
            whole, target, group = found.prefix(name) + picture, index[_class(picture)], -1
            tally.total += 1
            if known is not None:
                if whole not in known:
                    problems.add("image without a bias, left out", whole, tally)
                    continue
                group = target * len(biases) + biases[known[whole]]
            usable, annotated = _usable(rows.get(whole), target, tally_boxes, problems)
            split.add(picture, usable, target=target, group=group, annotated=annotated)
    if not any(len(split) for split in made.values()):
        raise DataError(f"{bias_file}: none of the images of {', '.join(chosen)} has a bias")
    groups = tuple(f"{label}, {name}" for label in classes for name in biases)
    return Source("folder", path, tuple(classes), False, groups, made)


@dataclass(frozen=True)
class _Found:
    """The folders of the splits and, relative to them, their images."""

    path: Path
    parts: Mapping[str, Path]
    pictures: Mapping[str, Sequence[str]]

    def prefix(self, split: str) -> str:
        """What its images' paths begin with, seen from SRC."""
        return "" if self.parts[split] == self.path else f"{self.parts[split].name}/"

    def all(self) -> Iterator[str]:
        """Every image, seen from SRC."""
        return (self.prefix(name) + picture for name, found in self.pictures.items() for picture in found)


def _parts(path: Path, problems: Problems) -> dict[str, Path]:
    """The folders of the splits. "train" may be the name of a class, too: a split holds folders with images."""
    here = _folders(path)
    words = [e.name for e in here if split_name(e.name) and next(_pictures(path / e.name), None) is not None]
    written = named_splits(words, path, problems)
    for entry in here if written else ():
        if entry.name not in words and next(_pictures(path, entry.name), None) is not None:
            problems.note(f"folder beside {', '.join(words)}, not read", entry.name)
    order = list(dict.fromkeys(SPLITS.values()))
    return {name: path / written[name] for name in sorted(written, key=order.index)} or {"train": path}


def _odd_folders(found: _Found, names: Mapping[str, str], problems: Problems) -> None:
    """Takes a note of folders that are no classes; refuses layouts in which all classes would be wrong ones."""
    for split, folder in found.parts.items():
        for entry in _folders(folder):
            if entry.name not in names:
                problems.note("folder without an image, no class", found.prefix(split) + entry.name)
    if list(found.parts.values()) != [found.path]:
        return
    (pictures,) = found.pictures.values()
    below: dict[str, set[str]] = {}  # of each class: the folders of its images, "" where they lie in none
    for picture in pictures:
        first, *between = picture.split("/")[:-1]
        below.setdefault(first, set()).add(between[0] if between else "")
    for name, folders in below.items():
        splits = sorted(folder for folder in folders if split_name(folder))
        if len(below) == 1 and len(folders - {""}) > 1 and "" not in folders:
            listed = ", ".join(sorted(folders)[:5])
            problems.refuse(
                f"{found.path}: holds one folder, {name!r}, and that one {listed}: pass {found.path / name}"
            )
        elif len({split_name(folder) for folder in splits}) > 1:
            problems.refuse(
                f"{found.path / name}: holds {', '.join(splits)}, which would be images of one class; the folders of "
                "splits must be above those of classes, SRC/train/CLASS"
            )
        else:
            continue
        return


def _folders(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if e.is_dir() and not of_tools(e.name)), key=lambda e: e.name)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _pictures(root: Path, only: str | None = None) -> Iterator[str]:
    """Those in the folders of `root`, or in one of these."""
    for entry in _folders(root):
        if only not in (None, entry.name):
            continue
        for folder, below, files in os.walk(entry.path):
            below[:] = sorted(name for name in below if not of_tools(name))
            for file in sorted(files):
                if _is_picture(file):
                    yield Path(folder, file).relative_to(root).as_posix()


def _loose(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_picture(entry.name) and entry.is_file())


def _class(picture: str) -> str:
    return picture.split("/", 1)[0]


@dataclass(frozen=True)
class _Row:
    """A row with coordinates: `label` is a class, -1 for the image's; `fault` is why it cannot be used."""

    coords: tuple[float, ...]
    label: int
    fault: str | None
    where: str


def _boxes(file: Path, found: _Found, index: Mapping[str, int], problems: Problems) -> dict[str, list[_Row]]:
    """By image that has a row."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; boxes must be a CSV file with the columns {', '.join(_COLUMNS)}")
    folded: dict[str, set[int]] = {}
    for name, label in index.items():
        folded.setdefault(name.casefold(), set()).add(label)
    made: dict[str, list[_Row]] = {}
    for number, row in read_csv(file, _COLUMNS, ("label",)):
        where = f"{file.name}, line {number}"
        known = made.setdefault(relative_path(row["path"].strip(), f"{file}, line {number}"), [])
        texts, name = [row[key].strip() for key in _COLUMNS[1:]], (row.get("label") or "").strip()
        if not any(texts):
            continue
        try:
            coords = tuple(map(float, texts))
            fault = box_fault(coords)
        except ValueError:
            coords, fault = (), "box that is not four numbers"
        labels = {index[name]} if name in index else folded.get(name.casefold(), set()) if name else {-1}
        if len(labels) != 1:
            fault, where = fault or "unknown category", f"{where}: {name!r}"
        elif name and name not in index:
            problems.note("label written in another case", f"{where}: {name!r}")
        known.append(_Row(coords, next(iter(labels), -1), fault, where))
    return _placed(made, found, file, problems)


def _usable(
    rows: Sequence[_Row] | None, target: int, tally: Tally, problems: Problems
) -> tuple[list[tuple[tuple[float, ...], int, int]], bool]:
    """As `Split.add` takes them, and whether there are annotations that can be used."""
    made = []
    for row in rows or ():
        tally.total += 1
        if row.fault is not None:
            problems.add(row.fault, row.where, tally)
        else:
            made.append((row.coords, target if row.label < 0 else row.label, 0))
    return made, bool(made) or rows == []


def _biases(file: Path, found: _Found, problems: Problems) -> dict[str, str]:
    """By image that is there and has one: the name of its bias. Two of them or more."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; bias must be a CSV file with the columns {', '.join(_BIAS_COLUMNS)}")
    rows: dict[str, list[str]] = {}
    spelled: dict[str, str] = {}
    for number, row in read_csv(file, _BIAS_COLUMNS):
        picture, name = relative_path(row["path"].strip(), f"{file}, line {number}"), row["bias"].strip()
        used = spelled.setdefault(name.casefold(), name)
        if used != name:
            problems.note("bias written in another case", f"{file.name}, line {number}: {name!r} read as {used!r}")
        known = rows.setdefault(picture, [used])
        if known[0] != used:
            where = f"{file.name}, line {number}: {picture}"
            problems.add("row that contradicts an earlier one, not used", where)
    made = {picture: names[0] for picture, names in _placed(rows, found, file, problems).items() if names[0]}
    names = sorted(set(made.values()))
    if not names:
        example = next(found.all())
        raise DataError(f"{file}: no bias of an image that is here; its paths must be like {example!r}{problems.why()}")
    if len(names) == 1:
        raise DataError(f"{file}: there must be two biases or more, and all images that have one have {names[0]!r}")
    return made


def _placed(rows: dict[str, list[_T]], found: _Found, file: Path, problems: Problems) -> dict[str, list[_T]]:
    """`rows` by images that are there, whose paths may be written in another case or from the folder above on."""
    unknown = set(rows)
    unknown.difference_update(found.all())
    renamed = match_paths(unknown, found.all(), found.path.resolve().name) if unknown else {}
    tally = problems.tally(file.name, "images", of_file=True)
    made: dict[str, list[_T]] = {}
    for picture, items in rows.items():
        tally.total += 1
        if picture in renamed:
            problems.note("path written otherwise", f"{file.name}: {picture!r} read as {renamed[picture]!r}")
        elif picture in unknown:
            problems.add("annotation of an image that is not there", f"{file.name}: {picture}", tally)
            continue
        made.setdefault(renamed.get(picture, picture), []).extend(items)
    return made
