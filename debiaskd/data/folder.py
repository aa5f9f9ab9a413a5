"""A folder of folders, one for each class, and CSV files with boxes and with what goes along with the classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from debiaskd.data.records import DataError, Problems, Source, Split, box_fault, choose_splits, relative_path
from debiaskd.data.waterbirds import read_csv

SPLITS = ("train", "val", "valid", "validation", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_COLUMNS = ("path", "x0", "y0", "x1", "y1")
_BIAS_COLUMNS = ("path", "bias")
#: By picture: boxes with the names of their classes, "" for the class of the picture.
_Rows = dict[str, list[tuple[tuple[float, ...], str]]]


def read(
    path: Path,
    problems: Problems,
    *,
    splits: Sequence[str] | None = None,
    boxes: Path | None = None,
    bias: Path | None = None,
) -> Source:
    """`SRC/CLASS/*.jpg`, or `SRC/train/CLASS/*.jpg`, `SRC/val/CLASS/*.jpg`, … as torchvision's `ImageFolder` reads it.

    Args:
        path: the folder.
        problems: collects what is passed over.
        splits: among train, val, valid, validation and test; a folder without such splits is one, "train".
        boxes: CSV file with the columns path (from SRC on), x0, y0, x1, y1 (half-open pixels, fractions allowed) and,
            if wanted, label (a class; without it a box has its picture's). A picture with several boxes has several
            rows; one row without coordinates says that there is no box. Pictures without a row are not annotated.
            None: `SRC/boxes.csv`, if it is there.
        bias: CSV file with the columns path and bias: the name of what goes along with the class in that picture,
            "water". The group is class * number of biases + bias, both sorted by name over all splits that there are;
            pictures without a bias are left out. None: `SRC/bias.csv`, if it is there; without it there are no groups.

    Raises:
        DataError: no classes; no pictures; another CSV; fewer than two biases, or none of a picture that is read; a
            path that climbs out of the folder.
    """
    # "train" may be the name of a class, too: that of a split holds folders.
    parts = {name: path / name for name in SPLITS if (path / name).is_dir() and _folders(path / name)}
    parts = parts or {"train": path}
    chosen = choose_splits(list(parts), splits, path, lambda: list(parts))
    classes = sorted({entry.name for folder in parts.values() for entry in _folders(folder)})
    if not classes:
        raise DataError(f"{path}: no folders with classes here")
    index = {name: i for i, name in enumerate(classes)}
    prefixes = {name: "" if folder == path else f"{name}/" for name, folder in parts.items()}
    pictures = {name: list(_pictures(folder)) for name, folder in parts.items()}
    if not any(pictures[name] for name in chosen):
        raise DataError(f"{path}: no pictures here ({', '.join(EXTENSIONS)})")

    def here() -> Iterator[str]:
        return (prefixes[name] + picture for name, found in pictures.items() for picture in found)

    boxes_file, bias_file = boxes or path / "boxes.csv", bias or path / "bias.csv"
    rows = _rows(boxes_file, problems) if boxes is not None or boxes_file.is_file() else {}
    _strangers(rows, here(), boxes_file, problems)
    known = _biases(bias_file, here, problems) if bias is not None or bias_file.is_file() else None
    # Of all splits, as the classes are, so that a group has one number whatever is chosen.
    biases = {name: i for i, name in enumerate(sorted(set((known or {}).values())))}
    made = {name: Split(parts[name]) for name in chosen}
    for name, split in made.items():
        for picture in pictures[name]:
            whole, target, group = prefixes[name] + picture, index[picture.split("/", 1)[0]], -1
            if known is not None:
                if whole not in known:
                    problems.add("picture without a bias, left out", whole)
                    continue
                group = target * len(biases) + biases[known[whole]]
            found = _boxes(rows.get(whole, []), target, index, f"{boxes_file.name}: {whole}", problems)
            split.add(picture, found, target=target, group=group, annotated=whole in rows)
    if not any(len(split) for split in made.values()):
        raise DataError(f"{bias_file}: none of the pictures of {', '.join(chosen)} has a bias")
    groups = tuple(f"{label}, {name}" for label in classes for name in biases)
    return Source("folder", path, tuple(classes), False, groups, made)


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


def _boxes(
    rows: Sequence[tuple[tuple[float, ...], str]], target: int, index: dict[str, int], where: str, problems: Problems
) -> list[tuple[tuple[float, ...], int, int]]:
    """As `Split.add` takes them."""
    made = []
    for coords, label in rows:
        if label and label not in index:
            problems.add("unknown category", f"{where}: {label!r}")
        else:
            made.append((coords, index[label] if label else target, 0))
    return made


def _biases(file: Path, here: Callable[[], Iterator[str]], problems: Problems) -> dict[str, str]:
    """By picture that is there and has one: the name of its bias. Two of them or more."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; bias must be a CSV file with the columns {', '.join(_BIAS_COLUMNS)}")
    made: dict[str, str] = {}
    for number, row in read_csv(file, _BIAS_COLUMNS):
        picture, name = relative_path(row["path"], f"{file}, line {number}"), row["bias"].strip()
        if made.setdefault(picture, name) != name:
            problems.add("duplicate id", f"{file.name}, line {number}: {picture}")
    strangers = _strangers(made, here(), file, problems)
    made = {picture: name for picture, name in made.items() if name and picture not in strangers}
    names = sorted(set(made.values()))
    if not names:
        raise DataError(f"{file}: no bias of a picture that is here; its paths must be like {next(here())!r}")
    if len(names) == 1:
        raise DataError(f"{file}: there must be two biases or more, and all pictures that have one have {names[0]!r}")
    return made


def _strangers(annotated: Iterable[str], here: Iterator[str], file: Path, problems: Problems) -> set[str]:
    """Those of the `annotated` pictures that are not there."""
    strangers = set(annotated)
    strangers.difference_update(here)
    for picture in sorted(strangers):
        problems.add("annotation of an image that is not there", f"{file.name}: {picture}")
    return strangers
