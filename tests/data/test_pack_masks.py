"""`debiaskd.pack` with masks: the bytes of `debiaskd prepare --masks`, one line for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

import data_trees as trees
from numpy.typing import NDArray
from PIL import Image

import debiaskd as dk
from debiaskd.data import DataError, PackedDataset, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH = 30, 40
BOXES = [[2, 3, 20, 25], [21, 4, 36, 28], [5, 10, 30, 20]]


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def mask(*box: int) -> NDArray[np.bool_]:
    """An ellipse in the box."""
    x0, y0, x1, y1 = box or BOXES[0]
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2 < 0.25


def pack(items: list[Any], out: Path, split: str = "train", **options: Any) -> Any:
    options = {"size": 20, "shard_size": 2, "progress": False, **options}
    return dk.pack(items, out, split=split, **options)


def columns(out: Path) -> dict[str, bytes]:
    """All files of the shards but the paths, which a list of images does not have."""
    files = sorted(out.rglob("*.npy"))
    return {str(file.relative_to(out)): file.read_bytes() for file in files if file.stem != "path"}


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_a_mask_an_image_is_stored_as_prepare_stores_it(tmp_path: Path, fit: str) -> None:
    items = []
    for i, name in enumerate(("cat/a", "cat/b", "dog/c")):
        for kind, value in (("images", image(i)), ("masks", Image.fromarray(mask(*BOXES[i]).astype(np.uint8) * 255))):
            file = tmp_path / kind / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            value.save(file)
        items.append({"image": image(i), "target": i // 2, "mask": mask(*BOXES[i])})
    options: dict[str, Any] = {"size": 20, "fit": fit, "shard_size": 2}
    prepared = prepare("folder", tmp_path / "images", tmp_path / "prepared", masks=tmp_path / "masks", **options)
    packed = pack(items, tmp_path / "packed", fit=fit, classes=["cat", "dog"])
    assert columns(tmp_path / "packed") == columns(tmp_path / "prepared")
    assert {"masks.npy", "mask_labels.npy"} <= {Path(name).name for name in columns(tmp_path / "packed")}
    for key in ("masks", "annotated", "boxes", "count"):
        assert packed.manifest["splits"]["train"][key] == prepared.manifest["splits"]["train"][key]
    assert packed.manifest["options"]["masks"] is True


def rectangle(number: int) -> NDArray[np.bool_]:
    x0, y0, x1, y1 = BOXES[number]
    found = np.zeros((HEIGHT, WIDTH), np.bool_)
    found[y0 + 2 : y1 - 1, x0 + 1 : x1 - 2] = True
    return found


def outline(number: int) -> dict[str, Any]:
    """COCO's run lengths of it, down the columns."""
    pixels = rectangle(number).T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], pixels])))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *(edges.tolist()), pixels.size]).tolist()}


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_of_objects_are_stored_as_prepare_stores_cocos(tmp_path: Path, workers: int) -> None:
    objects = [[(0, 0), (1, 1)], [(1, 0), (2, 0)], [(0, 1)]]  # of each image, its boxes and their classes
    annotations = []
    for i, each in enumerate(objects):
        for number, label in each:
            x0, y0, x1, y1 = BOXES[number]
            sides, category = [x0, y0, x1 - x0, y1 - y0], (3, 7)[label]
            annotations.append(
                {"image_id": 10 + i, "bbox": sides, "category_id": category, "segmentation": outline(number)}
            )
    trees.coco(tmp_path / "coco", 3, boxes=annotations)
    prepare("coco", tmp_path / "coco", tmp_path / "prepared", masks=True, size=20, shard_size=2)
    items = []
    for i, each in enumerate(objects):
        masks = np.stack([rectangle(number) for number, _ in each])
        item = {
            "image": Image.open(tmp_path / "coco" / "train2017" / f"{i:04d}.png").convert("RGB"),
            "target": [int(label in {k for _, k in each}) for label in range(3)],
            "boxes": [BOXES[number] for number, _ in each],
            "box_labels": [label for _, label in each],
            "mask": (masks, torch.from_numpy(masks), list(masks.astype(np.uint8)))[i],
        }
        items.append(item)
    pack(items, tmp_path / "packed", classes=["cat", "dog", "person"], workers=workers)
    found, expected = columns(tmp_path / "packed"), columns(tmp_path / "prepared")
    assert found == {name.replace("train2017", "train"): content for name, content in expected.items()}


def test_values_are_classes_where_an_image_may_show_several(tmp_path: Path) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:, :20], values[:5, 30:], values[29] = 3, 1, 255
    items = [{"image": image(0), "target": [1, 0, 1], "mask": Image.fromarray(values)}]
    pack(items, tmp_path, size=40)
    found = PackedDataset(tmp_path, masks=True).__getitems__([0]).boxes.masks
    assert found is not None and found.labels is not None
    assert found.labels.tolist() == [0, 2]
    assert found.dense().sum((1, 2)).tolist() == [10 * 7, 20 * 39]


def test_what_is_left_out_is_named_and_costs_no_image(tmp_path: Path) -> None:
    empty = np.zeros((HEIGHT, WIDTH), np.bool_)
    items = [
        {"image": image(0), "target": 0, "mask": empty},
        {"image": image(1), "target": 0, "mask": empty, "boxes": [BOXES[0]]},
        {"image": image(2), "target": 0, "mask": None, "boxes": [BOXES[0]]},
        {"image": image(3), "target": 0, "mask": [mask(), mask(*BOXES[1])], "box_labels": [0, 1]},
    ]
    packed = pack(items, tmp_path, classes=["cat", "dog"])
    assert packed.problems.lines() == [
        "1 × class without a pixel in its mask, its boxes used: train, item 1 (class 0)",
        "1 × mask without a pixel, not used: train, item 0",
    ]
    assert (
        packed.manifest["splits"]["train"] | {"count": 4, "masks": 2, "annotated": 3, "skipped": []}
        == (packed.manifest["splits"]["train"])
    )
    data = PackedDataset(tmp_path, masks=True)
    masks = data.__getitems__([0, 1, 2, 3]).boxes.masks
    assert masks is not None
    assert masks.offsets.tolist() == [0, 0, 1, 1, 3]
    assert torch.equal(masks.dense()[0], data.boxes[torch.tensor([1])].mask((20, 20))[0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mask": mask().T}, "mask must have the size of its image, 40×30 pixels, got 30×40"),
        ({"mask": mask()[None, :20]}, "mask must have the size of its image, 40×30 pixels, got 40×20"),
        ({"mask": mask().astype(np.float32)}, r"integers or bool of the shape \[H,W\], .* got float32 \[30, 40\]"),
        ({"mask": mask()[None, None]}, r"\[k,H,W\] for k objects, got bool \[1, 1, 30, 40\]"),
        ({"mask": [mask()], "boxes": BOXES}, "mask must be one for each of 3 objects, got 1"),
        ({"mask": [mask()], "box_labels": [0, 1]}, "mask must be one for each of 2 objects, got 1"),
        ({"mask": [mask()], "box_labels": [7]}, r"box_labels must lie in 0\.\.1, got 7"),
        ({"mask": [mask()], "box_labels": "no"}, "box_labels must be a class for each object, got <U2"),
        ({"mask": mask()[None] * 7}, r"masks of objects must hold 0 and 1, got 0\.\.7"),
        ({"mask": mask(), "target": [1, 0]}, r"numbers of classes, 1 to 2 \(0 and 255: none\), .* got bool"),
        ({"mask": mask() * 9, "target": [1, 0]}, r"numbers of classes, 1 to 2 .* got 9"),
        ({"mask": [mask()], "target": [1, 0]}, "box_labels must say the class of each object's mask"),
    ],
)
def test_another_mask_is_one_line_that_names_the_item(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    good = {"image": image(0), "target": 0, "mask": mask()}
    if isinstance(changes.get("target"), list):
        good |= {"target": [1, 0], "mask": mask().astype(np.int64)}
    with pytest.raises(DataError, match=rf"^train, item 1: .*{text}") as caught:
        pack([good, {**good, **changes}], tmp_path, classes=["cat", "dog"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_a_class_that_the_target_lacks_is_left_out(tmp_path: Path) -> None:
    values = mask().astype(np.int64)
    values[mask(*BOXES[1])] = 2
    packed = pack([{"image": image(0), "target": [1, 0], "mask": values}], tmp_path)
    assert packed.problems.lines() == [
        "1 × mask of a class that its image is not annotated with, left out: train, item 0 (class 1)"
    ]
    with pytest.raises(DataError, match="left out: train, item 0"):
        pack([{"image": image(0), "target": [1, 0], "mask": values}], tmp_path / "strict", strict=True)


def test_splits_packed_later_are_as_the_first(tmp_path: Path) -> None:
    plain, masked = {"image": image(0), "target": 0}, {"image": image(1), "target": 0, "mask": mask()}
    pack([masked], tmp_path / "a")
    pack([plain], tmp_path / "a", "test")  # of which no image has a mask
    assert PackedDataset(tmp_path / "a", "test", masks=True).__getitems__([0]).boxes.masks is not None
    with pytest.raises(DataError, match="begun with masks=True, now masks=None"):
        pack([masked], tmp_path / "a", "val", masks=False)
    pack([plain], tmp_path / "b")
    with pytest.raises(DataError, match=r"^val, item 0: has a mask, and those before have none: say masks=True, or"):
        pack([masked], tmp_path / "b", "val")
    with pytest.raises(DataError, match="begun with masks=None, now masks=True"):
        pack([masked], tmp_path / "b", "val", masks=True)
    pack([masked], tmp_path / "b", "val", masks=False)
    assert not list((tmp_path / "b").rglob("masks.npy"))
    with pytest.raises(DataError, match=r"^train, item 1: has a mask, and those before have none"):
        pack([plain, masked], tmp_path / "c")
    pack([plain, masked], tmp_path / "d", masks=True)
    with pytest.raises(TypeError, match="masks must be True or False, got 'yes'"):
        pack([plain], tmp_path / "e", masks="yes")
