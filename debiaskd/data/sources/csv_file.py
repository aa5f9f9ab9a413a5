"""One CSV file that lists images with their classes and, if it has them, splits, bias attributes and boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from debiaskd.data.sources.names import fold_case, named_splits, whole
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.data.sources.records import Source, Split, box_fault, choose_splits, placeholder, relative_path
from debiaskd.data.sources.tables import read_csv

_CORNERS = ("x0", "y0", "x1", "y1")
#: Splits written as numbers, as Waterbirds and CelebA number theirs.
_NUMBERED = {"0": "train", "1": "val", "2": "test"}
_YES_NO = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False, "-1": False}
_Box = tuple[tuple[float, ...], int, int]


def read(
    path: Path,
    problems: Problems,
    *,
    splits: Sequence[str] | None = None,
    images: Path | None = None,
    path_column: str = "path",
    label_column: str = "label",
    label_columns: Sequence[str] = (),
    bias_columns: Sequence[str] = (),
    split_column: str = "split",
) -> Source:
    """Read a CSV file with one row per image, or one row per box.

    Rows with the same path are one image. If the file has the columns x0, y0, x1, y1 (half-open pixels, fractions
    allowed), a row with coordinates is a box of the row's class, and a row without them says that there is no box.
    Without these columns no image is annotated.

    Args:
        path: the CSV file. Columns are separated by commas, semicolons or tabs and found whatever their case.
        problems: collects what is skipped.
        splits: names of the splits to read; None: all.
        images: folder that the paths start from; None: the folder of the CSV file.
        path_column: name of the column with the paths.
        label_column: name of the column with the class. The rows of an image must agree.
        label_columns: names of columns that are 1 (true, yes) where the image shows that class and 0, -1 or empty
            elsewhere: images may then show several classes, `label_column` is not read, and no image is annotated,
            since a box does not say which of the classes it is of.
        bias_columns: names of columns with attributes that may go along with the class. Groups are class × attributes;
            images that lack one of them are left out.
        split_column: name of the column with the split ("train", "Validation", …; or 0, 1, 2 for train, val, test, if
            nothing else occurs); images without a split, and all if there is no such column, are "train".

    Raises:
        DataError: no such file, a column is missing, no row can be used, `bias_columns` with `label_columns`, fewer
            than two values of the attributes, or a path that leads out of the folder.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; SRC must be a CSV file with the columns {path_column}, {label_column}")
    if label_columns and bias_columns:
        raise DataError("bias_columns must be left out with label_columns: groups are those of one class per image")
    wanted = (path_column, *(label_columns or (label_column,)), *bias_columns)
    if len({name.casefold() for name in wanted}) < len(wanted):
        raise DataError(f"columns must be different ones, got {', '.join(wanted)}")
    rows = read_csv(path, wanted, (split_column, *_CORNERS))
    boxed = bool(rows) and set(_CORNERS) <= rows[0][1].keys() and not label_columns
    found = _Rows(path.name, path_column, label_column, tuple(label_columns), tuple(bias_columns), boxed, problems)
    numbered = _numbered(row.get(split_column) for _, row in rows)
    for number, row in rows:
        word = _plain(row.get(split_column) or "", fold=False) or "train"
        found.add(number, row, _NUMBERED.get(word, word) if numbered else word)
    images_found = found.images
    if not images_found:
        raise DataError(f"{path}: no row can be used{problems.why()}")
    written = named_splits(dict.fromkeys(image.split for image in images_found.values()), path.name, problems)
    named = {word: name for name, word in written.items()}
    chosen = choose_splits(list(written), splits, path, lambda: list(written))
    classes, index = _classes(found, problems)
    attributes = sorted({image.bias for image in images_found.values()})
    if bias_columns and len(attributes) < 2:
        got = ", ".join(" and ".join(values) for values in attributes)
        raise DataError(f"{path}: there must be two values or more in {', '.join(bias_columns)}, got {got}")
    made = {name: Split(path.parent if images is None else images) for name in chosen}
    for name, image in images_found.items():
        if (where := made.get(named[image.split])) is None:
            continue
        if label_columns:
            where.add(name, placeholder(index[cls] for cls in image.shown), annotated=False)
            continue
        target = index[image.label]
        group = target * len(attributes) + attributes.index(image.bias) if bias_columns else -1
        boxes: list[_Box] = [(coords, target, 0) for coords in image.boxes]
        where.add(name, boxes, target=target, group=group, annotated=image.annotated)
    groups = tuple(f"{cls}, {', '.join(values)}" for cls in classes for values in attributes) if bias_columns else ()
    return Source("csv", path, classes, bool(label_columns), groups, made)


@dataclass
class _Image:
    """What the rows of an image say; `annotated`: whether they say which boxes it has."""

    split: str
    label: str
    bias: tuple[str, ...]
    shown: tuple[str, ...]
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    annotated: bool = False


@dataclass
class _Rows:
    """The images of a file, by path, in the order of their first rows."""

    file: str
    path_column: str
    label_column: str
    label_columns: tuple[str, ...]
    bias_columns: tuple[str, ...]
    boxed: bool
    problems: Problems
    images: dict[str, _Image] = field(default_factory=dict)

    def add(self, number: int, row: dict[str, str], split: str) -> None:
        where = f"{self.file}, line {number}"
        tally = self.problems.tally(self.file, "rows", of_file=True)
        tally.total += 1
        reason = self._use(row, split, where)
        if reason is not None:
            self.problems.add(reason, where, tally)

    def _use(self, row: dict[str, str], split: str, where: str) -> str | None:
        """Use a row, or return why it is skipped."""
        text, label = row[self.path_column].strip(), ""
        shown: tuple[str, ...] = ()
        if not text:
            return "row without a path"
        name, bias = relative_path(text, where), tuple(row[column].strip() for column in self.bias_columns)
        if not all(bias):
            return "image without a bias, left out"
        if self.label_columns:
            values = [_YES_NO.get(_plain(row[column])) for column in self.label_columns]
            if None in values:
                return f"{self.label_columns[values.index(None)]} that is neither 0 nor 1"
            shown = tuple(column for column, value in zip(self.label_columns, values) if value)
        elif not (label := row[self.label_column].strip()):
            return "row without a class"
        known = self.images.get(name)
        if known is not None and (known.split, known.label, known.bias, known.shown) != (split, label, bias, shown):
            return "row that contradicts an earlier one, not used"
        image = self.images.setdefault(name, _Image(split, label, bias, shown))
        return self._box(image, [row[key].strip() for key in _CORNERS]) if self.boxed else None

    def _box(self, image: _Image, texts: list[str]) -> str | None:
        """Add the row's box to its image, or return what is wrong with it; the image itself stays."""
        if not any(texts):
            image.annotated = True
            return None
        try:
            coords = tuple(map(float, texts))
        except ValueError:
            return "box that is not four numbers"
        if (fault := box_fault(coords)) is None:
            image.boxes.append(coords)
            image.annotated = True
        return fault


def _plain(text: str, fold: bool = True) -> str:
    """A whole number without ".0" and spaces ("1.0" is "1"), other words without spaces, in lower case if `fold`."""
    number = whole(text)
    if number is not None:
        return str(number)
    return text.strip().casefold() if fold else text.strip()


def _numbered(texts: Iterable[str | None]) -> bool:
    """Whether splits are written as 0, 1 and 2."""
    words = {_plain(text) for text in texts if text and text.strip()}
    return "0" in words and words <= _NUMBERED.keys()


def _classes(found: _Rows, problems: Problems) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes' names in their order, numbers by value, and the index of each as it is written."""
    if found.label_columns:
        return found.label_columns, {name: i for i, name in enumerate(found.label_columns)}
    by_split: dict[str, list[str]] = {}
    for image in found.images.values():
        by_split.setdefault(image.split, []).append(image.label)
    names = fold_case(by_split, problems)
    used = sorted(set(names.values()))
    if all(whole(name) is not None for name in used):
        used.sort(key=lambda name: whole(name) or 0)
    return tuple(used), {name: used.index(other) for name, other in names.items()}
