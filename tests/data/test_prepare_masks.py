"""Masks from annotation files and PNG files to batches: stored, read, and refused in one line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_trees as trees
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("PIL", reason="images are prepared with pillow")
from PIL import Image

from debiaskd.data import DataError, PackedDataset, prepare
from debiaskd.data.sources.segmentation import rasterize
from debiaskd.masks import Masks

pytestmark = pytest.mark.usefixtures("one_thread")
TRIANGLE = [4.0, 3.0, 30.0, 5.0, 12.5, 24.0]
L_SHAPE = [20.0, 10.0, 38.0, 10.0, 38.0, 14.0, 25.0, 14.0, 25.0, 28.0, 20.0, 28.0]


def coco(root: Path, **change: Any) -> Path:
    crowd = {"size": [30, 40], "counts": [0, 60, 1140]}
    boxes: list[dict[str, Any]] = [
        {"image_id": 10, "bbox": [4, 3, 26, 21], "category_id": 7, "segmentation": [TRIANGLE]},
        {"image_id": 10, "bbox": [20, 10, 18, 18], "category_id": 3, "segmentation": [L_SHAPE]},
        {"image_id": 11, "bbox": [0, 0, 2, 30], "category_id": 90, "iscrowd": 1, "segmentation": crowd},
        {"image_id": 12, "bbox": [7, 7, 1, 1], "category_id": 7, "segmentation": [[7.1, 7.1, 7.2, 7.1, 7.2, 7.2]]},
    ]
    boxes[0].update(change)
    return trees.coco(root, 4, boxes=boxes)


def masks_of(dataset: PackedDataset, number: int) -> dict[int, NDArray[np.bool_]]:
    masks = dataset.__getitems__([number]).boxes.masks
    assert masks is not None
    assert masks.labels is not None
    return dict(zip(masks.labels.tolist(), masks.dense().numpy()))


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_coco_outlines_are_stored_as_their_image_is(tmp_path: Path, fit: str) -> None:
    made = prepare("coco", coco(tmp_path / "coco"), tmp_path / "out", size=20, fit=fit, masks=True)
    assert made.manifest["splits"]["train2017"]["masks"] == 4
    assert made.problems.found == {"class without a pixel in its mask, its boxes used": ["0002.png (class 1)"]}
    data = PackedDataset(tmp_path / "out", masks=True)
    placed, corner = ((20, 20), (0, 0)) if fit == "squash" else ((15, 20), (2, 0))
    for label, outline in ((1, TRIANGLE), (0, L_SHAPE)):
        outlined = rasterize([outline], 30, 40)
        assert outlined is not None
        whole = Masks.from_lists([torch.from_numpy(outlined.copy())])
        moved = whole.resize(placed).crop(-corner[0], -corner[1], 20, 20).dense()[0].numpy()
        assert np.array_equal(masks_of(data, 0)[label], moved)
        assert 0 < moved.sum() < 200
    assert masks_of(data, 1)[2].any(0).tolist() == [True, *[False] * 19]  # the crowd
    assert masks_of(data, 2)[1].sum() == 1  # of a box that keeps a pixel
    boxes = data.__getitems__([3, 0]).boxes  # nothing is in the first
    assert boxes.annotated.tolist() == [True, True]
    assert len(boxes.coords) == 0
    assert not boxes.mask((20, 20))[0].any()
    assert torch.equal(boxes[1].for_class(torch.tensor([1])).mask((20, 20))[0], torch.from_numpy(masks_of(data, 0)[1]))


def test_without_being_asked_for_masks_change_nothing(tmp_path: Path) -> None:
    source = coco(tmp_path / "coco")
    prepare("coco", source, tmp_path / "plain", size=20)
    prepare("coco", source, tmp_path / "masks", size=20, masks=True)
    plain, masked = PackedDataset(tmp_path / "plain"), PackedDataset(tmp_path / "masks")
    for a, b in ((plain.boxes, masked.boxes), (plain.__getitems__([0, 1]).boxes, masked.__getitems__([0, 1]).boxes)):
        assert torch.equal(a.coords, b.coords)
        assert b.masks is None
    assert torch.equal(plain.target, masked.target)
    assert not (tmp_path / "plain" / "train2017" / "00000" / "masks.npy").exists()
    assert "masks" not in json.loads((tmp_path / "plain" / "manifest.json").read_text())["options"]
    with pytest.raises(DataError, match="prepared without masks; run `debiaskd prepare` with --masks"):
        PackedDataset(tmp_path / "plain", masks=True)
    with pytest.raises(ValueError, match=r"with masks it must be 0, got 0\.1"):
        PackedDataset(tmp_path / "masks", masks=True, dilate=0.1)


def test_masks_of_images_that_are_not_annotated_are_not_read(tmp_path: Path) -> None:
    prepare("coco", coco(tmp_path / "coco"), tmp_path / "out", size=20, masks=True, shard_size=2)
    data = PackedDataset(tmp_path / "out", masks=True, annotated_fraction=0.25)
    boxes = data.__getitems__([0, 1, 2, 3]).boxes
    assert int(boxes.annotated.sum()) == 1
    assert boxes.masks is not None
    assert not boxes.masks.covering()[~boxes.annotated].any()


def png(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def half(width: int = 40, height: int = 30, value: int = 255) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = value
    return mask


def test_voc_reads_its_segmentations_where_there_are_some(tmp_path: Path) -> None:
    cat, dog = trees.voc_object("cat", [1, 1, 20, 30]), trees.voc_object("dog", [21, 11, 40, 20])
    trees.voc(tmp_path / "voc", [cat + dog, dog, cat])
    values = half(value=8)
    values[12:18, 25:35], values[0], values[29, 39] = 12, 255, 15
    png(tmp_path / "voc/VOCdevkit/VOC2007/SegmentationClass/000000.png", values)
    made = prepare("voc", tmp_path / "voc", tmp_path / "out", size=40, masks=True)
    assert list(made.problems.found) == ["mask of a class that its image is not annotated with, left out"]
    data = PackedDataset(tmp_path / "out", masks=True)
    found = masks_of(data, 0)
    assert list(found) == [7, 11]
    assert found[7][:, :20].mean() == pytest.approx(39 / 40)  # but for the edge around objects
    assert found[11].sum() == 8 * 10
    boxes = data.__getitems__([1]).boxes
    assert boxes.coords.tolist() == [[20, 13, 40, 27]]  # no segmentation: its box


def test_a_folder_of_pngs_annotates_the_class_of_each_image(tmp_path: Path) -> None:
    trees.folder(tmp_path / "src", 2, boxes=None)
    for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
        png(tmp_path / "masks" / f"{name}.png", half())
    made = prepare("folder", tmp_path / "src", tmp_path / "out", size=20, masks=tmp_path / "masks")
    assert made.manifest["splits"]["train"]["annotated"] == 4
    data = PackedDataset(tmp_path / "out", masks=True)
    assert data.boxes.coords.tolist() == [[0, 0, 10, 20]] * 4
    assert data.boxes.labels is not None
    assert data.boxes.labels.tolist() == [0, 0, 1, 1]
    assert masks_of(data, 3)[1].sum() == 200


def test_pixel_values_are_classes_where_an_image_may_show_several(tmp_path: Path) -> None:
    trees.picture(tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("path,cat,dog,hat\na.png,1,0,1\n")
    values = half(value=3)
    values[:5, 30:] = 1
    png(tmp_path / "masks" / "a.png", values)
    options: dict[str, Any] = {"label_columns": ("cat", "dog", "hat"), "masks": tmp_path / "masks"}
    prepare("csv", tmp_path / "table.csv", tmp_path / "out", size=40, **options)
    data = PackedDataset(tmp_path / "out", masks=True)
    assert data.target.tolist() == [[1, 0, 1]]
    assert {label: int(mask.sum()) for label, mask in masks_of(data, 0).items()} == {0: 10 * 7, 2: 800}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (half(30, 40), "mask of another size than its image, not used: cat/0.png (30×40, the image 40×30)"),
        (np.zeros((30, 40)), "mask without a pixel, not used: cat/0.png"),
        (np.zeros((30, 40, 3)), "mask that cannot be read: cat/0.png"),
        (None, "missing mask: cat/0.png"),
    ],
)
def test_masks_that_cannot_be_used_are_one_line_each(tmp_path: Path, values: Any, line: str) -> None:
    trees.folder(tmp_path / "src", 2, boxes="cat/0.png,0,0,20,15,\n")
    for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
        if name != "cat/0" or values is not None:
            png(tmp_path / "masks" / f"{name}.png", values if name == "cat/0" else half())
    made = prepare("folder", tmp_path / "src", tmp_path / "out", size=20, masks=tmp_path / "masks")
    (found,) = [text for text in made.problems.lines() if "mask" in text]
    assert found.startswith(f"1 × {line}")
    assert made.manifest["splits"]["train"]["masks"] == 3
    data = PackedDataset(tmp_path / "out", masks=True)
    assert data.__getitems__([0]).boxes.coords.tolist() == [[0, 0, 10, 10]]  # its box is used
    with pytest.raises(DataError, match=line.split(":")[0]):
        prepare("folder", tmp_path / "src", tmp_path / "strict", size=20, masks=tmp_path / "masks", strict=True)


def test_a_folder_in_which_no_mask_fits_is_refused(tmp_path: Path) -> None:
    trees.folder(tmp_path / "src", 2)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="4 of 4 masks were passed over: 4 × missing mask, such as cat"):
        prepare("folder", tmp_path / "src", tmp_path / "out", size=20, masks=tmp_path / "masks")
    with pytest.raises(DataError, match="no such folder; it should hold the masks"):
        prepare("folder", tmp_path / "src", tmp_path / "out", size=20, masks=tmp_path / "nowhere")


def test_litdata_has_the_same_masks(tmp_path: Path) -> None:
    pytest.importorskip("litdata", reason="needs the data extra")
    from debiaskd.data import ChunkedDataset, StreamedDataset, loader, open_dataset

    source = coco(tmp_path / "coco")
    (source / "train2017" / "0001.png").unlink()  # so that numbers are not places
    for format in ("npy", "litdata"):
        prepare("coco", source, tmp_path / format, size=20, masks=True, format=format, shard_size=2)
    options: dict[str, Any] = {"masks": True, "annotated_fraction": 0.7, "seed": 1}
    plain, chunked = (c(tmp_path / n, **options) for c, n in ((PackedDataset, "npy"), (ChunkedDataset, "litdata")))
    a, b = (data.__getitems__([2, 0, 1]).boxes.mask((20, 20)) for data in (plain, chunked))
    assert torch.equal(a, b)
    assert a.any()
    streamed = open_dataset(tmp_path / "litdata", **options)
    assert isinstance(streamed, StreamedDataset)
    seen = []
    for batch in loader(streamed, 2, workers=1):
        expected = plain.__getitems__(batch.index).boxes
        assert torch.equal(batch.boxes.mask((20, 20)), expected.mask((20, 20)))
        assert batch.boxes.masks is not None and expected.masks is not None
        assert torch.equal(batch.boxes.masks.words, expected.masks.words)
        assert torch.equal(batch.boxes.coords, expected.coords)
        seen += batch.index.tolist()
    assert sorted(seen) == [0, 1, 2]


def test_a_stream_whose_masks_are_not_there_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("litdata", reason="needs the data extra")
    from debiaskd.data import StreamedDataset

    source = coco(tmp_path / "coco")
    prepare("coco", source, tmp_path / "plain", size=20, format="litdata")
    prepare("coco", source, tmp_path / "masks", size=20, format="litdata", masks=True)
    with pytest.raises(DataError, match="prepared without masks"):
        StreamedDataset(tmp_path / "plain", masks=True)
    with pytest.raises(ValueError, match=r"with masks it must be 0, got 0\.1"):
        StreamedDataset(tmp_path / "masks", masks=True, dilate=0.1)
    with pytest.raises(TypeError, match="masks must be True or False, got 1"):
        StreamedDataset(tmp_path / "masks", masks=1)  # type: ignore[arg-type]
    (tmp_path / "masks" / "train2017" / "00000" / "mask_offsets.npy").unlink()
    with pytest.raises(DataError, match=r"mask_offsets\.npy: missing or damaged"):
        StreamedDataset(tmp_path / "masks", masks=True)
    assert len(StreamedDataset(tmp_path / "masks")) == 4
