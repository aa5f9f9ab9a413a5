"""COCO as it is distributed: `SRC/annotations/instances_train2017.json`, and the pictures in `SRC/train2017/`
or `SRC/images/train2017/`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
_PREFIX = "instances_"
# Most of the file and nothing that is used: let go of as soon as each entry is read.
_UNUSED = ("segmentation", "area", "license", "coco_url", "flickr_url", "date_captured")


def read(path: Path, problems: Problems, *, splits: Sequence[str] | None = None, crowd: str = "keep") -> Source:
    """The instances of COCO 2014, 2017 or any data set in their layout.

    Category ids become classes 0, 1, … in the order of the ids. A picture's target are the classes of its boxes.

    Args:
        path: the folder that holds `annotations/`.
        problems: collects what is passed over.
        splits: such as ["train2017"]; None: every `instances_*.json` whose pictures are there.
        crowd: what becomes of a box around a crowd. "keep": a box like others, flagged. "drop": as if it had not
            been annotated: neither box nor class. "mask": its class counts, and its area is to be ignored, neither
            inside nor outside of a box.

    Raises:
        DataError: no annotations; not JSON, or not COCO's; a path that climbs out of the folder; an id that two
            pictures or two categories share; splits with different categories.
    """
    checks.option("crowd", crowd, OPTIONS)
    folder = path / "annotations"
    files = {file.stem[len(_PREFIX) :]: file for file in sorted(folder.glob(f"{_PREFIX}*.json"))}
    if not files:
        raise DataError(
            f"{folder}: no {_PREFIX}*.json here; SRC must hold annotations/{_PREFIX}train2017.json or alike"
        )
    places = {name: [path / name, path / "images" / name] for name in files}
    present = {name: folder for name in files for folder in places[name] if folder.is_dir()}
    chosen = choose_splits(list(files), splits, path, lambda: list(present))
    if not chosen:
        raise DataError(f"{path}: none of the folders with the pictures is here: {', '.join(files)}")
    classes: tuple[str, ...] | None = None
    made = {}
    for name in files:
        if name not in chosen:
            if splits is None:
                problems.add("annotations without a folder of pictures", files[name].name)
            continue
        if name not in present:
            raise DataError(f"{path / name}: no such folder; it should hold the pictures of {files[name].name}")
        names, made[name] = _read_split(files[name], present[name], problems, crowd)
        if classes not in (None, names):
            raise DataError(f"{files[name]}: its categories differ from those of the other splits")
        classes = names
    assert classes is not None
    ordered = {name: made[name] for name in chosen}
    return Source("coco", path, classes, True, (), ordered, {"crowd": crowd})


def _read_split(file: Path, root: Path, problems: Problems, crowd: str) -> tuple[tuple[str, ...], Split]:
    document = _load(file)
    classes, names = _categories(document["categories"], file)
    images = _images(document["images"], file, problems)
    boxes: dict[Any, list[tuple[tuple[float, ...], int, int]]] = {}
    seen: set[Any] = set()
    for entry in document["annotations"]:
        read = _annotation(entry, file, classes, images, seen, problems, crowd)
        if read is not None:
            boxes.setdefault(entry["image_id"], []).append(read)
    split = Split(root)
    for key, (name, size) in images.items():
        split.add(name, boxes.get(key, ()), size=size)
    return names, split


def _load(file: Path) -> dict[str, list[Any]]:
    def lighter(entry: dict[str, Any]) -> dict[str, Any]:
        for key in _UNUSED:
            entry.pop(key, None)
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


def _categories(entries: list[Any], file: Path) -> tuple[dict[int, int], tuple[str, ...]]:
    names: dict[int, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise DataError(f"{file}: a category must have an integer id and a name, got {_short(entry)}")
        if entry["id"] in names:
            raise DataError(f"{file}: category id {entry['id']} is there twice")
        names[entry["id"]] = entry["name"]
    if not names:
        raise DataError(f"{file}: there are no categories")
    order = sorted(names)
    return {key: index for index, key in enumerate(order)}, tuple(names[key] for key in order)


def _images(entries: list[Any], file: Path, problems: Problems) -> dict[int, tuple[str, tuple[int, int]]]:
    images: dict[int, tuple[str, tuple[int, int]]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            problems.add("image entry without id or file_name", f"{file.name}: {_short(entry)}")
            continue
        name = relative_path(entry["file_name"], str(file))
        known = images.get(entry["id"])
        if known is not None:
            if known[0] != name:
                raise DataError(f"{file}: image id {entry['id']} is that of both {known[0]} and {name}")
            problems.add("duplicate image id", f"{file.name}: {entry['id']}")
            continue
        height, width = side_length(entry.get("height")), side_length(entry.get("width"))
        images[entry["id"]] = name, (height, width) if height and width else (0, 0)
    return images


def _annotation(
    entry: Any,
    file: Path,
    classes: dict[int, int],
    images: dict[int, Any],
    seen: set[Any],
    problems: Problems,
    crowd: str,
) -> tuple[tuple[float, ...], int, int] | None:
    if not isinstance(entry, dict) or not _is_id(entry.get("image_id")):
        problems.add("annotation without image_id", f"{file.name}: {_short(entry)}")
        return None
    key, image = entry.get("id"), entry["image_id"]
    where = f"{file.name}: annotation {key}"
    if image not in images:
        problems.add("annotation of an image that is not listed", f"{where} of image {image}")
        return None
    where += f" of {images[image][0]}"
    if key is not None:
        if not _is_id(key) or key in seen:
            problems.add("duplicate annotation id" if _is_id(key) else "annotation id that is no integer", where)
            return None
        seen.add(key)
    category = entry.get("category_id")
    if not _is_id(category) or category not in classes:
        problems.add("unknown category", f"{where}: {category!r}")
        return None
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        problems.add("box that is not four numbers", where)
        return None
    try:
        x, y, w, h = map(float, box)
    except OverflowError:
        x = y = w = h = float("inf")
    coords = (x, y, x + w, y + h)
    fault = box_fault(coords)
    if fault is not None:
        problems.add(fault, where)
        return None
    flags = box_flags(entry.get("iscrowd") in (1, True), False, crowd)
    return None if flags is None else (coords, classes[category], flags)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 60 else text[:57] + "..."
