"""Pascal VOC as it is distributed, `VOCdevkit/VOC2007` or `VOC2012` with one XML file an image, and images of one's
own in its format."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from debiaskd.data.sources.masks import files_of
from debiaskd.data.sources.names import EXTENSIONS, fold_case, named_splits
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.data.sources.records import (
    Source,
    Split,
    box_fault,
    box_flags,
    choose_splits,
    placeholder,
    relative_path,
    side_length,
)
from debiaskd.utils import checks

OPTIONS = ("keep", "drop", "mask")
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_SPLITS = ("train", "val", "valid", "validation", "test")


def read(
    path: Path, problems: Problems, *, splits: Sequence[str] | None = None, difficult: str = "keep", masks: bool = False
) -> Source:
    """VOC 2007 or 2012, or images of one's own in their format.

    Coordinates in the XML count from 1 and include the last pixel: (xmin, xmax) becomes the half-open xmin - 1, xmax.
    An image's target are the classes of its boxes.

    The classes are VOC's twenty where every object has one of their names, whatever its case. Otherwise they are the
    names that occur in train, val, test and trainval, whichever splits are read, in the order of the alphabet.

    An image all of whose objects were passed over is not annotated; it keeps the classes of those whose box alone was
    wrong.

    Args:
        path: one year's folder (VOC2007), or a folder with one year below it, directly or under VOCdevkit.
        problems: collects what is passed over.
        splits: names of files in ImageSets/Main; None: train, val and test as far as they are there, or else
            trainval.
        difficult: what becomes of an object that is marked as difficult: "keep", "drop", "mask" as for COCO's crowds.
        masks: read `SegmentationClass/NAME.png`, whose pixel values are the classes from 1 on, 255 for the edges of
            objects; images without such a file keep their boxes alone.

    Raises:
        DataError: no or several years, no or unknown splits, a name that climbs out of the folder.
    """
    checks.option("difficult", difficult, OPTIONS)
    year = _year(path)
    main = year / "ImageSets" / "Main"
    by_stem = {file.stem: file for file in sorted(main.glob("*.txt"))}
    lists = {name: by_stem[stem] for name, stem in named_splits(by_stem, main, problems).items()}

    def default() -> list[str]:
        return [n for n in _SPLITS if n in lists] or [n for n in ("trainval",) if n in lists]

    chosen = choose_splits(list(lists), splits, main, default)
    if not chosen:
        raise DataError(f"{main}: none of train.txt, val.txt, test.txt, trainval.txt is here")
    reader = _Reader(year, problems, difficult)
    made = {name: reader.read(name, lists[name]) for name in chosen}
    for name in (*_SPLITS, "trainval"):
        if name in lists and name not in chosen:
            reader.scan(name, lists[name])
    classes = reader.number(made)
    if masks:
        if classes != CLASSES:
            raise DataError(f"{year / 'SegmentationClass'}: masks are read where the classes are VOC's own alone")
        files = files_of(year / "SegmentationClass", len(classes), optional=True)
        for split in made.values():
            split.masks = files()
    options = {"difficult": difficult} | ({"masks": True} if masks else {})
    return Source("voc", path, classes, True, (), made, options)


def _year(path: Path) -> Path:
    if (path / "ImageSets" / "Main").is_dir():
        return path
    years = [
        y for folder in (path, path / "VOCdevkit") for y in sorted(folder.glob("VOC*")) if (y / "ImageSets").is_dir()
    ]
    if not years:
        raise DataError(f"{path}: no VOC2007 or VOC2012 here; SRC must be a folder that holds ImageSets/Main")
    if len(years) > 1:
        raise DataError(f"{path}: holds {', '.join(y.name for y in years)}; pass one of them as SRC")
    return years[0]


class _Reader:
    """Lists and annotations of one year. Labels are numbers of names in the order in which they are met until `number`
    makes classes of them, when all names are known."""

    def __init__(self, year: Path, problems: Problems, difficult: str) -> None:
        self.year, self.problems, self.difficult = year, problems, difficult
        self.names: dict[str, int] = {}
        self.by_split: dict[str, dict[str, str]] = {}  # of each split: names, and where each is met first
        self.read_files: set[str] = set()

    def read(self, split_name: str, file: Path) -> Split:
        split, seen = Split(self.year / "JPEGImages"), set()
        pictures = self.problems.tally(split_name, "images")
        self.by_split[split_name] = {}
        for line in _lines(file):
            pictures.total += 1
            name = self._listed(line, file)
            if name in seen:
                self.problems.add("duplicate id", f"{file.name}: {name}")
                pictures.total -= 1
                continue
            seen.add(name)
            annotation = self.year / "Annotations" / f"{name}.xml"
            try:
                root = ElementTree.fromstring(annotation.read_bytes())
            except FileNotFoundError:
                self.problems.add("image without annotation, left out", annotation.name, pictures)
            except (ElementTree.ParseError, ValueError, LookupError) as error:
                kind = "annotation that is not XML, its image left out"
                self.problems.add(kind, f"{annotation.name} ({error})", pictures)
            else:
                self.read_files.add(name)
                self._add(split, name, root, split_name)
        return split

    def scan(self, split_name: str, file: Path) -> None:
        """Takes only the names of classes from a list that is not read otherwise."""
        names: dict[str, str] = {}
        for line in _lines(file):
            name = self._listed(line, file)
            if name in self.read_files:
                continue
            try:
                root = ElementTree.fromstring((self.year / "Annotations" / f"{name}.xml").read_bytes())
            except (OSError, ElementTree.ParseError, ValueError, LookupError):
                continue
            for obj in root.iter("object"):
                if label := _name(obj):
                    names.setdefault(label, f"{name}.xml")
        self.by_split[split_name] = names

    def _listed(self, line: str, file: Path) -> str:
        """The name that a line of a list means: "a" in "a", "a.jpg", "JPEGImages/a.jpg" and "a -1"."""
        whole = relative_path(line, str(file))
        first = relative_path(line.split()[0], str(file))
        folder = self.year / "Annotations"
        for name in dict.fromkeys((whole, first)):
            stem = name[: -len(Path(name).suffix)] if name.lower().endswith(EXTENSIONS) else name
            for candidate in dict.fromkeys((name, stem, Path(stem).name)):
                if (folder / f"{candidate}.xml").is_file():
                    return candidate
        return first

    def _add(self, split: Split, name: str, root: ElementTree.Element, split_name: str) -> None:
        tally, where = self.problems.tally(split_name, "boxes"), f"{name}.xml"
        boxes, unusable = [], set()
        faults = False
        for obj in root.iter("object"):
            tally.total += 1
            label = _name(obj)
            coords, fault = _coordinates(obj)
            if not label:
                self.problems.add("object without a name", where, tally)
                faults = True
                continue
            self.by_split[split_name].setdefault(label, where)
            number = self.names.setdefault(label, len(self.names))
            if fault is not None:
                self.problems.add(fault, f"{where}: {label}", tally)
                unusable.add(number)
                faults = True
                continue
            flags = box_flags(False, (obj.findtext("difficult") or "").strip() == "1", self.difficult)
            if flags is None:
                tally.total -= 1  # left out because `difficult` says so
            else:
                boxes.append((coords, number, flags))
        height, width = _side(root, "height"), _side(root, "width")
        annotated = bool(boxes) or not faults
        split.add(
            self._picture(split.root, name, root),
            boxes if annotated else placeholder(unusable),
            size=(height, width) if height and width else (0, 0),
            annotated=annotated,
        )

    def _picture(self, folder: Path, name: str, root: ElementTree.Element) -> str:
        """VOC's images end with .jpg; others may end otherwise, or be called what the annotation says."""
        usual = f"{name}.jpg"
        if (folder / usual).is_file():
            return usual
        said = Path((root.findtext("filename") or "").strip().replace("\\", "/")).name
        endings = [ending for e in EXTENSIONS for ending in (e, e.upper())]
        for other in (*(f"{name}{ending}" for ending in endings), said):
            if other and (folder / other).is_file():
                return other
        return usual

    def number(self, made: dict[str, Split]) -> tuple[str, ...]:
        """The classes; labels of the splits become their numbers."""
        order = [*_SPLITS, "trainval"]  # the same whichever splits are read
        ordered = sorted(self.by_split, key=lambda name: order.index(name) if name in order else len(order))
        met = {name: where for split in reversed(ordered) for name, where in self.by_split[split].items()}
        known = {name.casefold(): name for name in CLASSES}
        classes: tuple[str, ...] = CLASSES
        if all(name.casefold() in known for name in met):
            used = {name: known[name.casefold()] for name in met}
            for name in sorted(met):
                if used[name] != name:
                    self.problems.note("class of VOC in another case", f"{met[name]}: {name!r} read as {used[name]!r}")
        else:
            used = fold_case({split: self.by_split[split] for split in ordered}, self.problems)
            classes = tuple(sorted(set(used.values())))
            for name in sorted(name for name in met if name.casefold() not in known):
                self.problems.note("class that VOC has not, so that the classes are those that occur", name)
        index = {name: i for i, name in enumerate(classes)}
        new = [index[used[name]] for name in self.names]
        for split in made.values():
            split.labels = array("q", (new[label] for label in split.labels))
        return classes


def _lines(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if line.strip():
            yield line.strip()


def _name(obj: ElementTree.Element) -> str:
    return " ".join((obj.findtext("name") or "").split())


def _coordinates(obj: ElementTree.Element) -> tuple[tuple[float, ...], str | None]:
    """(x0, y0, x1, y1) of an object, half-open, and what is wrong with them. Without a `bndbox`: the bounds of its
    polygon (x1, y1, x2, …, as exporters write it, or pt/x, pt/y)."""
    try:
        if obj.find("bndbox") is None and obj.find("polygon") is not None:
            points = [(e.tag, float(e.text or "")) for e in obj.iterfind("polygon//*") if e.tag[:1] in ("x", "y")]
            xs, ys = ([value for tag, value in points if tag[0] == axis] for axis in "xy")
            if not xs or not ys:
                return (), "box that is not four numbers"
            xmin, ymin, xmax, ymax = min(xs), min(ys), max(xs), max(ys)
        else:
            sides = ("xmin", "ymin", "xmax", "ymax")
            xmin, ymin, xmax, ymax = (float(obj.findtext(f"bndbox/{side}") or "") for side in sides)
    except ValueError:
        return (), "box that is not four numbers"
    coords = (xmin - 1, ymin - 1, xmax, ymax)
    return coords, box_fault(coords)


def _side(root: ElementTree.Element, name: str) -> int:
    text = (root.findtext(f"size/{name}") or "").strip()
    return side_length(int(text)) if text.isdecimal() and len(text) < 12 else 0
