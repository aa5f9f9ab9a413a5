"""What `prepare` says it made, and that it refuses where almost nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="images are decoded with pillow")

import data_trees as trees
import more_trees as more
from data_trees import files_of

from debiaskd.cli import entry as cli
from debiaskd.data import DataError, PackedDataset, prepare


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    code = cli.main(["prepare", *map(str, arguments), "--size", "8", "--workers", "1"])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()[-1] if captured.err else ""


GOOD: dict[str, Any] = {"image_id": 10, "bbox": [1, 1, 5, 5], "category_id": 3}


def bad_boxes(bad: int, good: int) -> list[dict[str, Any]]:
    wrong = [{**GOOD, "bbox": [1 + i, 1, 0, 5]} for i in range(bad)]
    return wrong + [{**GOOD, "bbox": [1 + i, 1, 2, 5]} for i in range(good)]


# -- the summary ---------------------------------------------------------------------------------------------------


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [GOOD, {**GOOD, "image_id": 11, "bbox": [1, 1, 0, 5]}, {**GOOD, "id": 3}, {**GOOD, "bbox": [2, 2, 9, 9]}]
    code, lines, _ = command(capsys, "coco", trees.coco(tmp_path / "src", 3, boxes=boxes), tmp_path / "out")
    assert code == 0
    assert lines == [
        "train2017: 3 images, 2 boxes; 2 annotated, 1 of 3 classes (not: dog, person)",
        "classes: cat, dog, person",
        "passed over:",
        "1 × box without area: instances_train2017.json: annotation 101 of 0001.png",
        "1 × duplicate annotation: instances_train2017.json: annotation 3 of 0000.png",
        f"all of them: {tmp_path / 'out' / 'problems.txt'}",
        f"{tmp_path / 'out' / 'manifest.json'}",
    ]
    split = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train2017"]
    assert (split["class_counts"], split["group_counts"], split["annotated"]) == ([2, 0, 0], [], 2)


def test_notes_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees.voc(tmp_path / "src", [trees.voc_object("Dog", (1, 1, 5, 5))])
    _, lines, _ = command(capsys, "voc", root, tmp_path / "out")
    assert "read with a correction, or worth a look:" in lines
    assert "1 × class of VOC in another case: 000000.xml: 'Dog' read as 'dog'" in lines
    assert not any(line.startswith("passed over") for line in lines)
    notes = json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"]
    assert notes == {"class of VOC in another case": {"count": 1, "first": ["000000.xml: 'Dog' read as 'dog'"]}}


def test_pictures_in_two_splits_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        root = trees.voc(tmp_path / "src", [trees.voc_object("dog", (1, 1, 5, 5))] * 2, split=split)
    (root / "VOCdevkit/VOC2007/ImageSets/Main/val.txt").write_text("000001\n")
    lines = command(capsys, "voc", root, tmp_path / "out")[1]
    assert "1 × image in two splits: 000001.jpg in train and val" in lines


def test_many_classes_are_one_line_that_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = more.cifar100(tmp_path / "src", "binary", [1], [1])
    lines = command(capsys, "cifar", src, tmp_path / "out")[1]
    assert lines[0].endswith("1 of 100 classes (not: fine 0, fine 2, fine 3, fine 4, fine 5, and 94 more)")
    assert lines[2] == f"classes: {', '.join(f'fine {i}' for i in range(100))}"


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "good", "code"), [(1, 0, 2), (19, 2, 2), (18, 2, 0), (0, 0, 0)])
def test_more_than_nine_tenths_of_the_boxes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: int, good: int, code: int
) -> None:
    src, out = trees.coco(tmp_path / "src", 2, boxes=bad_boxes(bad, good)), tmp_path / "out"
    got, lines, err = command(capsys, "coco", src, out)
    assert got == code
    if code:
        assert lines == []
        assert err == (
            f"debiaskd: train2017: {bad} of {bad + good} boxes were passed over: {bad} × box without area, such as "
            "instances_train2017.json: annotation 100 of 0000.png; --lenient (lenient=True) goes on"
        )
        assert not out.exists()
        assert command(capsys, "coco", src, out, "--lenient")[0] == 0
        assert PackedDataset(out).boxes.annotated.tolist() == [good > 0, True]


def test_what_is_found_out_with_the_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(document: dict[str, Any]) -> None:
        for image in document["images"]:
            image["width"] = 80  # of a copy with larger images

    src, out = trees.coco(tmp_path / "src", 2, change=change), tmp_path / "out"
    code, _, err = command(capsys, "coco", src, out)
    assert code == 2
    assert "train2017: 3 of 3 boxes were passed over: 3 × image of another size than annotated" in err
    assert "0000.png (40×30, annotated 80×30)" in err
    with pytest.raises(DataError, match="did not come to its end"):
        PackedDataset(out)
    shard = files_of(out / "train2017")
    assert command(capsys, "coco", src, out, "--lenient")[0] == 0  # goes on with what was written
    assert files_of(out / "train2017") == shard
    assert not PackedDataset(out).boxes.annotated.any()


def test_missing_pictures(tmp_path: Path) -> None:
    src = trees.coco(tmp_path / "src", 21, boxes=[GOOD])
    for i in range(1, 20):
        (src / "train2017" / f"{i:04d}.png").unlink()
    with pytest.raises(
        DataError, match=r"train2017: 19 of 21 images were passed over: 19 × missing file, such as 0001"
    ):
        prepare("coco", src, tmp_path / "out", size=8)
    prepared = prepare("coco", src, tmp_path / "out", size=8, lenient=True)
    assert prepared.manifest["splits"]["train2017"]["count"] == 2


@pytest.mark.parametrize("kind", ["waterbirds", "celeba", "cifar"])
def test_lists_whose_rows_are_almost_all_passed_over(tmp_path: Path, kind: str) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    if kind == "waterbirds":
        trees.waterbirds(src, [("bird", 0, 0)] * 19 + [(1, 0, 0)])
        message = r"metadata\.csv: 19 of 20 rows were passed over: 19 × row with unknown y, split or place"
    elif kind == "celeba":
        more.celeba(src, [("no", 1, 0)] * 19 + [(1, 1, 0)])
        message = "train: 19 of 20 images were passed over: 19 × attribute that is neither 1 nor -1"
    else:
        more.cifar10(src, "npz", [10] * 19 + [1], [2])
        message = r"train: 19 of 20 images were passed over: 19 × unknown category, such as train_1\.npz:0: 10"
    with pytest.raises(DataError, match=message):
        prepare(kind, src, out, size=8)
    assert prepare(kind, src, out, size=8, lenient=True).manifest["splits"]["train"]["count"] == 1


def test_a_list_that_names_no_picture_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = trees.voc(tmp_path / "src", [trees.voc_object("dog", (1, 1, 5, 5))])
    (root / "VOCdevkit/VOC2007/ImageSets/Main/train.txt").write_text("b\nc\n")
    code, _, err = command(capsys, "voc", root, tmp_path / "out")
    assert code == 2
    assert "train: 2 of 2 images were passed over: 2 × image without annotation, left out, such as b.xml" in err
    code, _, err = command(capsys, "voc", root, tmp_path / "out", "--lenient")
    assert code == 2
    assert err.endswith("there are no images in train: 2 × image without annotation, left out: b.xml, and 1 more")
    trees.voc(tmp_path / "src", [trees.voc_object("dog", (1, 1, 5, 5))], split="val")
    (root / "VOCdevkit/VOC2007/ImageSets/Main/train.txt").write_text("")
    code, _, err = command(capsys, "voc", root, tmp_path / "out")
    assert code == 2
    assert err == "debiaskd: train: there are no images in it; --lenient (lenient=True) goes on"
    assert command(capsys, "voc", root, tmp_path / "out", "--lenient")[0] == 0


def test_boxes_in_shares_of_the_picture(tmp_path: Path) -> None:
    src = trees.folder(tmp_path / "src", 1, "cat/0.png,0.1,0.2,0.5,1,\n")
    with pytest.raises(DataError, match="train: its boxes all lie within one pixel: they must be in pixels"):
        prepare("folder", src, tmp_path / "out", size=8)
    (src / "boxes.csv").write_text("path,x0,y0,x1,y1\ncat/0.png,0,0,1,1\n")  # a pixel
    prepare("folder", src, tmp_path / "out", size=8)


def test_strict_and_lenient_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = trees.coco(tmp_path / "src", 1)
    with pytest.raises(ValueError, match="strict and lenient exclude each other, got both"):
        prepare("coco", src, tmp_path / "out", strict=True, lenient=True)
    code, _, err = command(capsys, "coco", src, tmp_path / "out", "--strict", "--lenient")
    assert code == 2
    assert "--lenient" in err
