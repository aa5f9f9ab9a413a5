"""Pascal VOC as it is distributed: `VOCdevkit/VOC2007` or `VOC2012`, one XML file a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from debiaskd import checks
from debiaskd.data.records import (
    DataError,
    Problems,
    Source,
    Split,
    box_fault,
    box_flags,
    choose_splits,
    relative_path,
    side_length,
)

OPTIONS = ("keep", "drop", "mask")
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_INDEX = {name: index for index, name in enumerate(CLASSES)}


def read(path: Path, problems: Problems, *, splits: Sequence[str] | None = None, difficult: str = "keep") -> Source:
    """VOC 2007 or 2012.

    Coordinates in the XML count from 1 and include the last pixel: (xmin, xmax) becomes the half-open xmin - 1, xmax.
    A picture's target are the classes of its boxes.

    Args:
        path: one year's folder (VOC2007), or a folder with one year below it, directly or under VOCdevkit.
        problems: collects what is passed over.
        splits: names of files in ImageSets/Main; None: train, val and test as far as they are there, or else
            trainval.
        difficult: what becomes of an object that is marked as difficult: "keep", "drop", "mask" as for COCO's crowds.

    Raises:
        DataError: no or several years, no or unknown splits, a name that climbs out of the folder.
    """
    checks.option("difficult", difficult, OPTIONS)
    year = _year(path)
    lists = {file.stem: file for file in sorted((year / "ImageSets" / "Main").glob("*.txt"))}

    def default() -> list[str]:
        return [n for n in ("train", "val", "test") if n in lists] or [n for n in ("trainval",) if n in lists]

    chosen = choose_splits(list(lists), splits, year / "ImageSets" / "Main", default)
    if not chosen:
        raise DataError(f"{year / 'ImageSets' / 'Main'}: none of train.txt, val.txt, test.txt, trainval.txt is here")
    made = {name: _read_split(year, lists[name], problems, difficult) for name in chosen}
    return Source("voc", path, CLASSES, True, (), made, {"difficult": difficult})


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


def _read_split(year: Path, file: Path, problems: Problems, difficult: str) -> Split:
    split, seen = Split(year / "JPEGImages"), set()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        name = relative_path(line.split()[0], str(file))
        if name in seen:
            problems.add("duplicate id", f"{file.name}: {name}")
            continue
        seen.add(name)
        annotation = year / "Annotations" / f"{name}.xml"
        try:
            root = ElementTree.fromstring(annotation.read_bytes())
        except FileNotFoundError:
            problems.add("picture without annotation, left out", annotation.name)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            problems.add("annotation that is not XML, its picture left out", f"{annotation.name} ({error})")
        else:
            boxes = [box for obj in root.iter("object") if (box := _object(obj, annotation.name, problems, difficult))]
            height, width = _side(root, "height"), _side(root, "width")
            split.add(f"{name}.jpg", boxes, size=(height, width) if height and width else (0, 0))
    return split


def _object(
    obj: ElementTree.Element, where: str, problems: Problems, difficult: str
) -> tuple[tuple[float, ...], int, int] | None:
    name = (obj.findtext("name") or "").strip()
    if name not in _INDEX:
        problems.add("unknown category", f"{where}: {name!r}")
        return None
    try:
        xmin, ymin, xmax, ymax = (float(obj.findtext(f"bndbox/{k}") or "") for k in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        problems.add("box that is not four numbers", f"{where}: {name}")
        return None
    coords = (xmin - 1, ymin - 1, xmax, ymax)
    fault = box_fault(coords)
    if fault is not None:
        problems.add(fault, f"{where}: {name}")
        return None
    flags = box_flags(False, (obj.findtext("difficult") or "").strip() == "1", difficult)
    return None if flags is None else (coords, _INDEX[name], flags)


def _side(root: ElementTree.Element, name: str) -> int:
    text = (root.findtext(f"size/{name}") or "").strip()
    return side_length(int(text)) if text.isdecimal() and len(text) < 12 else 0
