"""COCO as it is distributed: `SRC/annotations/instances_train2017.json` and the images, `SRC/[images/]train2017/`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from debiaskd.data.sources import segmentation
from debiaskd.data.sources.masks import Outlines
from debiaskd.data.sources.names import named_splits, number, whole
from debiaskd.data.sources.problems import DataError, Problems, Tally
from debiaskd.data.sources.records import (
    IGNORE,
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
_PREFIX = "instances_"
# Of no use: let go of as soon as each entry is read.
_UNUSED = ("area", "license", "coco_url", "flickr_url", "date_captured")
_BOUNDS, _OUTLINE = "bounds of its segmentation", "its segmentation"
_Box = tuple[tuple[float, ...], int, int]


def read(
    path: Path, problems: Problems, *, splits: Sequence[str] | None = None, crowd: str = "keep", masks: bool = False
) -> Source:
    """The instances of COCO 2014, 2017 or any data set in their layout.

    Category ids become classes 0, 1, … in the order of the ids. An image's target are the classes of its boxes. Ids
    may be written as text or floats. An annotation without `bbox` has the bounds of its segmentation (polygons or
    run-length encoded). Annotations of equal image, category, box and crowd flag are duplicates, whatever their ids.

    An image without annotations holds nothing, unless the file has none at all: then its images are not annotated. Nor
    is an image all of whose annotations were passed over; it keeps the classes of those whose box alone was wrong.

    Args:
        path: the folder that holds `annotations/`.
        problems: collects what is passed over.
        splits: such as ["train2017"]; None: every `instances_*.json` whose images are there.
        crowd: what becomes of a box around a crowd. "keep": a box like others, flagged. "drop": as if it had not
            been annotated: neither box nor class. "mask": its class counts, and its area is to be ignored, neither
            inside nor outside a box.
        masks: keep the segmentations, in as much memory as the file takes.

    Raises:
        DataError: no annotations; not JSON or not COCO's; a path out of the folder; an id that two images or two
            categories share; splits with different categories.
    """
    checks.option("crowd", crowd, OPTIONS)
    folder = path / "annotations"
    by_stem = {file.stem[len(_PREFIX) :]: file for file in sorted(folder.glob(f"{_PREFIX}*.json"))}
    if not by_stem:
        raise DataError(
            f"{folder}: no {_PREFIX}*.json here; SRC must hold annotations/{_PREFIX}train2017.json or alike"
        )
    files = {name: by_stem[stem] for name, stem in named_splits(by_stem, folder, problems).items()}
    present = {name: found for name, file in files.items() if (found := _pictures(path, file.stem[len(_PREFIX) :]))}
    chosen = choose_splits(list(files), splits, path, lambda: list(present))
    if not chosen:
        raise DataError(f"{path}: none of the folders with the images is here: {', '.join(by_stem)}")
    classes: tuple[str, ...] | None = None
    made = {}
    for name in files:
        if name not in chosen:
            if splits is None:
                problems.add("annotations without a folder of images", files[name].name)
            continue
        if name not in present:
            raise DataError(f"{path / name}: no such folder; it should hold the images of {files[name].name}")
        names, made[name] = _read_split(name, files[name], path, present[name], problems, crowd, masks)
        if classes not in (None, names):
            raise DataError(f"{files[name]}: its categories differ from those of the other splits")
        classes = names
    assert classes is not None
    if len(set(classes)) < len(classes):
        twice = sorted({name for name in classes if classes.count(name) > 1})
        problems.note("several categories of the same name, kept apart by their ids", ", ".join(twice))
    ordered = {name: made[name] for name in chosen}
    return Source("coco", path, classes, True, (), ordered, {"crowd": crowd} | ({"masks": True} if masks else {}))


def _pictures(path: Path, name: str) -> Path | None:
    """The folder of a split's images, also in another case."""
    exact = [above / name for above in (path, path / "images") if (above / name).is_dir()]
    if exact:
        return exact[0]
    for above in (path, path / "images"):
        same = [f for f in sorted(above.glob("*")) if f.name.casefold() == name.casefold() and f.is_dir()]
        if len(same) == 1:
            return same[0]
    return None


def _read_split(
    name: str, file: Path, path: Path, root: Path, problems: Problems, crowd: str, masks: bool
) -> tuple[tuple[str, ...], Split]:
    document = _load(file, masks)
    classes, names = _categories(document["categories"], file)
    images, aliases = _images(document["images"], file, path, root, problems, problems.tally(name, "images"))
    annotations = _Annotations(file, classes, images, aliases, crowd, problems, problems.tally(name, "boxes"))
    for entry in document["annotations"]:
        annotations.add(entry)
    if not document["annotations"]:
        problems.note("file without annotations, whose images count as not annotated", file.name)
    split, outlines = Split(root), Outlines()
    split.masks = outlines if masks else None
    for key, (picture, size) in images.items():
        boxes = annotations.boxes.get(key, [])
        unusable = annotations.unusable.get(key)
        annotated = bool(document["annotations"]) and (bool(boxes) or unusable is None)
        split.add(picture, boxes if annotated else placeholder(unusable or ()), size=size, annotated=annotated)
        if masks:
            outlines.add(annotations.outlines.get(key, []), annotated=annotated)
    return names, split


def _load(file: Path, masks: bool) -> dict[str, list[Any]]:
    def lighter(entry: dict[str, Any]) -> dict[str, Any]:
        for key in _UNUSED:
            entry.pop(key, None)
        outline = entry.pop("segmentation", None)
        if outline is not None and _no_box(entry.get("bbox")):
            entry[_BOUNDS] = segmentation.bounds(outline)
        if masks and outline is not None:
            entry[_OUTLINE] = outline
        return entry

    try:
        document = json.loads(file.read_bytes(), object_hook=lighter)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise DataError(f"{file}: not COCO's: must be an object, got {type(document).__name__}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            got = type(document[key]).__name__ if key in document else "nothing"
            raise DataError(f"{file}: not COCO's: {key!r} must be a list, got {got}")
    return document


def _no_box(box: Any) -> bool:
    """Whether an annotation has no `bbox`, as exporters write it: none, null, empty, or four zeros."""
    return box is None or (isinstance(box, list) and not any(box))


def _categories(entries: list[Any], file: Path) -> tuple[dict[int, int], tuple[str, ...]]:
    names: dict[int, str] = {}
    for entry in entries:
        key = whole(entry.get("id")) if isinstance(entry, dict) else None
        if key is None or not isinstance(entry.get("name"), str):
            raise DataError(f"{file}: a category must have an integer id and a name, got {_short(entry)}")
        if key in names:
            raise DataError(f"{file}: category id {key} is there twice")
        names[key] = entry["name"]
    if not names:
        raise DataError(f"{file}: there are no categories")
    order = sorted(names)
    return {key: index for index, key in enumerate(order)}, tuple(names[key] for key in order)


def _key(value: Any) -> int | str | None:
    """An image's id: an integer in any writing, or other text, which some tools have; None for anything else."""
    number = whole(value)
    return value if number is None and isinstance(value, str) and value else number


_Images = dict[int | str, tuple[str, tuple[int, int]]]
_Aliases = dict[int | str, int | str]


def _images(
    entries: list[Any], file: Path, path: Path, root: Path, problems: Problems, tally: Tally
) -> tuple[_Images, _Aliases]:
    """Images by id, and further ids of an image with the one by which it is there."""
    images: _Images = {}
    aliases: _Aliases = {}
    first: dict[str, int | str] = {}
    for entry in entries:
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        tally.total += 1
        if key is None or not isinstance(entry.get("file_name"), str):
            problems.add("image entry without id or file_name", f"{file.name}: {_short(entry)}", tally)
            continue
        name = _below(root, path, relative_path(entry["file_name"], str(file)))
        known = images.get(aliases.get(key, key))
        if known is not None:
            if known[0] != name:
                raise DataError(f"{file}: image id {key} is that of both {known[0]} and {name}")
            problems.add("duplicate image id", f"{file.name}: {key}")
            tally.total -= 1
            continue
        if first.setdefault(name, key) != key:
            aliases[key] = first[name]
            problems.note("image with several image ids, read once with all of its annotations", f"{file.name}: {name}")
            tally.total -= 1
            continue
        height, width = side_length(entry.get("height")), side_length(entry.get("width"))
        images[key] = name, (height, width) if height and width else (0, 0)
    return images, aliases


def _below(root: Path, path: Path, name: str) -> str:
    """`name` as a path below `root`, where it begins above that, at the data set's folder or its own above that."""
    if "/" not in name or (root / name).is_file():
        return name
    above = root.relative_to(path).parts
    parts = tuple(name.split("/"))
    for start in (above, above[-1:], (path.name, *above)):
        rest = parts[len(start) :]
        if rest and parts[: len(start)] == start and root.joinpath(*rest).is_file():
            return "/".join(rest)
    return name


@dataclass
class _Annotations:
    """Boxes by image, and for images with annotations that were passed over the classes of those."""

    file: Path
    classes: Mapping[int, int]
    images: _Images
    aliases: _Aliases
    crowd: str
    problems: Problems
    tally: Tally
    boxes: dict[int | str, list[_Box]] = field(default_factory=dict)
    unusable: dict[int | str, set[int]] = field(default_factory=dict)
    outlines: dict[int | str, list[tuple[int, Any]]] = field(default_factory=dict)

    def add(self, entry: Any) -> None:
        self.tally.total += 1
        image = _key(entry.get("image_id")) if isinstance(entry, dict) else None
        if image is None:
            self.problems.add("annotation without image_id", f"{self.file.name}: {_short(entry)}", self.tally)
            return
        image = self.aliases.get(image, image)
        where = f"{self.file.name}: annotation {entry.get('id')}"
        if image not in self.images:
            unlisted = "annotation of an image that is not listed"
            self.problems.add(unlisted, f"{where} of image {image}", self.tally)
            return
        where += f" of {self.images[image][0]}"
        category = whole(entry.get("category_id"))
        if category is None or category not in self.classes:
            self.problems.add("unknown category", f"{where}: {entry.get('category_id')!r}", self.tally)
            self.unusable.setdefault(image, set())
            return
        label = self.classes[category]
        coords, fault = _coordinates(entry)
        if fault is not None:
            self.problems.add(fault, where, self.tally)
            self.unusable.setdefault(image, set()).add(label)
            return
        is_crowd = whole(entry.get("iscrowd")) == 1 or entry.get("iscrowd") is True
        flags = box_flags(is_crowd, False, self.crowd)
        if flags is None:
            self.tally.total -= 1  # left out because `crowd` says so
        elif (coords, label, flags) in (boxes := self.boxes.setdefault(image, [])):
            self.problems.add("duplicate annotation", where)
            self.tally.total -= 1
        else:
            boxes.append((coords, label, flags))
            if _OUTLINE in entry and not flags & IGNORE:
                self.outlines.setdefault(image, []).append((label, entry[_OUTLINE]))
            if entry.get(_BOUNDS):
                self.problems.note("annotation without bbox, read as the bounds of its segmentation", where)


def _coordinates(entry: dict[str, Any]) -> tuple[tuple[float, ...], str | None]:
    """(x0, y0, x1, y1) of an annotation, and what is wrong with them."""
    if entry.get(_BOUNDS):
        return entry[_BOUNDS], None
    box = entry.get("bbox")
    if box is None or box == []:
        return (), "annotation with neither a box nor a segmentation that has bounds"
    numbers = [number(value) for value in box] if isinstance(box, list) else []
    if len(numbers) != 4 or None in numbers:
        return (), "box that is not four numbers"
    x, y, w, h = (float(value) for value in numbers if value is not None)
    coords = (x, y, x + w, y + h)
    return coords, box_fault(coords)


def _short(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 60 else text[:57] + "..."
