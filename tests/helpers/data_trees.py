"""Small data sets in the layouts in which the real ones are distributed."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def picture(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> Path:
    """Smooth colours, another for each seed; PNG or JPEG by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, seed * 37 % 256)], 2)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def coco(
    root: Path,
    pictures: int = 5,
    *,
    split: str = "train2017",
    boxes: Sequence[dict[str, Any]] | None = None,
    change: Any = None,
    seed: int = 0,
) -> Path:
    """Image i is 000i.png with image id 10 + i; by default two boxes in the first, one crowd in the second."""
    images = []
    for i in range(pictures):
        picture(root / split / f"{i:04d}.png", seed=seed + i)
        images.append({"id": 10 + i, "file_name": f"{i:04d}.png", "height": 30, "width": 40, "license": 1})
    if boxes is None:
        boxes = [
            {"image_id": 10, "bbox": [4, 3, 10, 6], "category_id": 7},
            {"image_id": 10, "bbox": [20.4, 10.6, 10, 10], "category_id": 3},
            {"image_id": 11, "bbox": [0, 0, 40, 30], "category_id": 90, "iscrowd": 1},
        ]
    annotations = [{"id": 100 + i, "iscrowd": 0, "area": 1, "segmentation": [[0, 0]], **b} for i, b in enumerate(boxes)]
    categories = [{"id": key, "name": name} for key, name in ((7, "dog"), (3, "cat"), (90, "person"))]
    document = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
    if change is not None:
        document = change(document) or document
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))
    return root


def voc_object(name: str, box: Sequence[Any], difficult: int = 0) -> str:
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def voc(root: Path, objects: Sequence[str], *, split: str = "train", year: str = "VOC2007", size: str = "") -> Path:
    """Image i is 00000i.jpg with the XML of `objects[i]`."""
    folder = root / "VOCdevkit" / year
    size = size or "<size><width>40</width><height>30</height><depth>3</depth></size>"
    names = [f"{i:06d}" for i in range(len(objects))]
    for i, (name, text) in enumerate(zip(names, objects)):
        picture(folder / "JPEGImages" / f"{name}.jpg", seed=i)
        file = folder / "Annotations" / f"{name}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<annotation><filename>{name}.jpg</filename>{size}{text}</annotation>")
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def waterbirds(root: Path, rows: Sequence[tuple[Any, Any, Any]] | None = None, *, boxes: bool = True) -> Path:
    """Rows are (y, split, place); image i is birds/i.jpg."""
    rows = [(i % 2, i % 3, (i // 2) % 2) for i in range(9)] if rows is None else rows
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        for i, (y, split, place) in enumerate(rows):
            picture(root / "birds" / f"{i}.jpg", seed=i)
            writer.writerow([i + 1, f"birds/{i}.jpg", y, split, place, "/x/y.jpg"])
    if boxes:
        (root / "images.txt").write_text("".join(f"{i + 1} birds/{i}.jpg\n" for i in range(len(rows))))
        (root / "bounding_boxes.txt").write_text("".join(f"{i + 1} 8.0 6.0 16.0 12.0\n" for i in range(len(rows))))
    return root


def folder(root: Path, count: int = 3, boxes: str | None = "", bias: str | None = None, seed: int = 0) -> Path:
    """Classes cat and dog with `count` images each, others for each seed; `boxes` and `bias` are the rows of
    the files boxes.csv and bias.csv, None: no such file."""
    for label in ("cat", "dog"):
        for i in range(count):
            picture(root / label / f"{i}.png", seed=seed + i + (label == "dog"))
    if boxes is not None:
        (root / "boxes.csv").write_text("path,x0,y0,x1,y1,label\n" + boxes)
    if bias is not None:
        (root / "bias.csv").write_text("path,bias\n" + bias)
    return root


def boxes_of(split: Any, i: int) -> list[tuple[list[float], int, int]]:
    """(coordinates, label, flags) of each box of image `i` of a `Split`."""
    part = split.part(i, i + 1)
    return list(zip(part.coords.tolist(), part.labels.tolist(), part.flags.tolist()))


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of all files below, but for the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def unfinished(folder: Path) -> list[Path]:
    return list(folder.rglob(".unfinished-*"))


def spoiled(root: Path) -> Path:
    """Six images, of which 1 is truncated, 3 is none, and 4 is missing."""
    coco(root, 6)
    pictures = root / "train2017"
    content = (pictures / "0001.png").read_bytes()
    (pictures / "0001.png").write_bytes(content[: len(content) // 2])
    (pictures / "0003.png").write_text("no image")
    (pictures / "0004.png").unlink()
    return root


def many(root: Path, count: int) -> Path:
    """`count` images, of which number i has i % 3 boxes, and a bad one behind them."""
    boxes = [
        {"image_id": 10 + i, "bbox": [4 * k, 3, 8 + i, 6], "category_id": (3, 7)[k]}
        for i in range(count)
        for k in range(i % 3)
    ]
    coco(root, count + 1, boxes=boxes)
    (root / "train2017" / f"{count:04d}.png").write_text("no image")
    return root
