"""Preparing and reading real images; skipped where they are not at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL", reason="images are decoded with pillow")

import data_trees as trees

from debiaskd.data import Augment, PackedDataset, collate, prepare
from debiaskd.data.sources import waterbirds
from debiaskd.data.sources.records import Problems

VOC, COCO = trees.SHARED / "voc2012_sample", trees.SHARED / "coco64"
BIRDS = trees.SHARED / "waterbirds100"


@pytest.mark.skipif(not VOC.is_dir(), reason=f"no real images at {VOC}")
def test_voc(tmp_path: Path) -> None:
    prepared = prepare("voc", VOC, tmp_path / "out", size=96, shard_size=40)
    assert prepared.problems.found == prepared.problems.notes == {}
    data = PackedDataset(tmp_path / "out", verify=True)
    assert len(data) == 100
    assert data.boxes.coords.shape == (273, 4)
    assert len(data.classes) == 20
    # Every class of an image has a box, and every box some area within the image.
    assert data.boxes.labels is not None
    assert ((data.boxes.coords >= 0) & (data.boxes.coords <= 96)).all()
    assert (data.boxes.coords[:, 2:] > data.boxes.coords[:, :2]).all()
    for i in range(100):
        labels = data.boxes[i].labels
        assert labels is not None
        assert data.target[i].nonzero()[:, 0].tolist() == sorted(set(labels.tolist()))
    batch = data.__getitems__(range(64))
    made = Augment(64, crop_scale=(0.3, 1), generator=torch.Generator().manual_seed(0))(batch)
    assert made.images.isfinite().all()
    assert 0 < len(made.boxes.coords) <= len(batch.boxes.coords)
    dropped = prepare("voc", VOC, tmp_path / "dropped", size=8, difficult="drop")
    assert dropped.manifest["splits"]["trainval"]["boxes"] == 273 - 38


@pytest.mark.skipif(not BIRDS.is_dir(), reason=f"no real images at {BIRDS}")
def test_waterbirds_without_the_list_of_images(tmp_path: Path) -> None:
    problems = Problems()
    whole = waterbirds.read(BIRDS, problems)
    shutil.copy(BIRDS / "bounding_boxes.txt", tmp_path)
    alone = waterbirds.read(BIRDS, problems, boxes=tmp_path)
    assert alone.fingerprint() == whole.fingerprint()
    assert {name: len(split) for name, split in alone.splits.items()} == {"train": 4795, "val": 1199, "test": 5794}
    assert all(split.part(0, len(split)).annotated.all() for split in alone.splits.values())
    assert problems.found == problems.notes == {}


@pytest.mark.skipif(not COCO.is_dir(), reason=f"no real images at {COCO}")
def test_coco(tmp_path: Path) -> None:
    document = json.loads((COCO / "annotations" / "instances_train2017.json").read_text())
    prepared = prepare("coco", COCO, tmp_path / "out", size=96, crowd="mask")
    assert prepared.problems.found == prepared.problems.notes == {}
    data = PackedDataset(tmp_path / "out", verify=True)
    assert len(data) == 64
    assert len(data.classes) == 80
    assert data.ignore is not None
    assert len(data.ignore.coords) == 13
    assert len(data.boxes.coords) == 565 - 13
    shown: dict[Any, set[str]] = {}
    names = {entry["id"]: entry["name"] for entry in document["categories"]}
    for entry in document["annotations"]:
        shown.setdefault(entry["image_id"], set()).add(names[entry["category_id"]])
    for i, image in enumerate(document["images"]):
        classes = {data.classes[k] for k in data.target[i].nonzero()[:, 0].tolist()}
        assert classes == shown.get(image["id"], set())
    assert data.paths() == [image["file_name"] for image in document["images"]]
    assert len(collate(data.__getitems__(range(64)))) == 64
