"""What the reader of COCO makes of annotations, good and bad, before any picture is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="pictures are made with pillow")

import data_trees as trees
from data_trees import boxes_of

from debiaskd.data import DataError, coco
from debiaskd.data.records import CROWD, IGNORE, Problems


def test_coco(tmp_path: Path) -> None:
    problems = Problems()
    source = coco.read(trees.coco(tmp_path), problems)
    split = source.splits["train2017"]
    assert source.classes == ("cat", "dog", "person")  # by id: 3, 7, 90
    assert source.multi_label
    assert len(split) == 5
    assert boxes_of(split, 0) == [([4, 3, 14, 9], 1, 0), ([20.4, 10.6, 30.4, 20.6], 0, 0)]
    assert boxes_of(split, 1) == [([0, 0, 40, 30], 2, CROWD)]
    assert boxes_of(split, 2) == []  # known to hold nothing
    trees.picture(tmp_path / "train2017" / "unlisted.png")
    assert len(coco.read(tmp_path, Problems(strict=True)).splits["train2017"]) == 5
    assert split.part(0, 5).annotated.all()
    assert split.part(0, 1).sizes.tolist() == [[30, 40]]
    assert problems.found == {}


@pytest.mark.parametrize(("option", "expected"), [("keep", [CROWD]), ("drop", []), ("mask", [CROWD | IGNORE])])
def test_coco_crowds(tmp_path: Path, option: str, expected: list[int]) -> None:
    split = coco.read(trees.coco(tmp_path), Problems(), crowd=option).splits["train2017"]
    assert [flags for _, _, flags in boxes_of(split, 1)] == expected
    assert len(boxes_of(split, 0)) == 2


def test_coco_splits(tmp_path: Path) -> None:
    trees.coco(tmp_path, 2)
    trees.coco(tmp_path, 3, split="val2017")
    assert list(coco.read(tmp_path, Problems()).splits) == ["train2017", "val2017"]
    assert list(coco.read(tmp_path, Problems(), splits=["val2017"]).splits) == ["val2017"]
    with pytest.raises(DataError, match="no split 'test'; there are train2017, val2017"):
        coco.read(tmp_path, Problems(), splits=["test"])
    with pytest.raises(DataError, match="each once"):
        coco.read(tmp_path, Problems(), splits=["val2017", "val2017"])


def test_coco_with_all_pictures_below_one_folder(tmp_path: Path) -> None:
    trees.coco(tmp_path, 2)
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images" / "train2017")
    assert coco.read(tmp_path, Problems()).splits["train2017"].root == tmp_path / "images" / "train2017"


def test_coco_annotations_without_their_pictures(tmp_path: Path) -> None:
    trees.coco(tmp_path, 2)
    trees.coco(tmp_path, 2, split="val2017")
    for path in (tmp_path / "val2017").iterdir():
        path.unlink()
    (tmp_path / "val2017").rmdir()
    problems = Problems()
    assert list(coco.read(tmp_path, problems).splits) == ["train2017"]
    assert problems.found == {"annotations without a folder of pictures": ["instances_val2017.json"]}
    with pytest.raises(DataError, match="val2017: no such folder"):
        coco.read(tmp_path, Problems(), splits=["val2017"])
    with pytest.raises(DataError, match="instances_val2017"):
        coco.read(tmp_path, Problems(strict=True))


def test_coco_splits_with_different_categories(tmp_path: Path) -> None:
    trees.coco(tmp_path, 1)
    trees.coco(tmp_path, 1, split="val2017", boxes=[], change=lambda d: d["categories"].pop() and None)
    with pytest.raises(DataError, match="categories differ"):
        coco.read(tmp_path, Problems())


good = {"image_id": 10, "bbox": [1, 1, 5, 5], "category_id": 3}
BAD_ANNOTATIONS = [
    ({**good, "bbox": [1, 1, float("nan"), 5]}, "box that is not finite"),
    ({**good, "bbox": [1, 1, float("inf"), 5]}, "box that is not finite"),
    ({**good, "bbox": [1, 1, 10**400, 5]}, "box that is not finite"),
    ({**good, "bbox": [9, 1, -5, 5]}, "inverted box"),
    ({**good, "bbox": [1, 1, 5, 0]}, "box without area"),
    ({**good, "bbox": [1, 1, 5]}, "box that is not four numbers"),
    ({**good, "bbox": None}, "box that is not four numbers"),
    ({**good, "bbox": ["1", 1, 5, 5]}, "box that is not four numbers"),
    ({**good, "category_id": 4}, "unknown category"),
    ({**good, "category_id": "cat"}, "unknown category"),
    ({**good, "image_id": 999}, "annotation of an image that is not listed"),
    ({**good, "image_id": None}, "annotation without image_id"),
    ({**good, "id": 100}, "duplicate annotation id"),
    ({**good, "id": "one"}, "annotation id that is no integer"),
]


@pytest.mark.parametrize(
    ("entry", "kind"), BAD_ANNOTATIONS, ids=[f"{i}-{k}" for i, (_, k) in enumerate(BAD_ANNOTATIONS)]
)
def test_coco_bad_annotations_are_named_and_passed_over(tmp_path: Path, entry: dict[str, Any], kind: str) -> None:
    trees.coco(tmp_path, 1, boxes=[good, entry])
    problems = Problems()
    split = coco.read(tmp_path, problems).splits["train2017"]
    assert boxes_of(split, 0) == [([1, 1, 6, 6], 0, 0)]
    assert {kind: len(names) for kind, names in problems.found.items()} == {kind: 1}
    assert "instances_train2017.json" in problems.found[kind][0]
    with pytest.raises(DataError, match=kind):
        coco.read(tmp_path, Problems(strict=True))


def test_coco_bad_image_entries(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"] += [document["images"][0], {"id": 99}, "nonsense", {"file_name": "x.png", "id": True}]

    problems = Problems()
    split = coco.read(trees.coco(tmp_path, 2, change=change), problems).splits["train2017"]
    assert len(split) == 2
    assert problems.found["duplicate image id"] == ["instances_train2017.json: 10"]
    assert len(problems.found["image entry without id or file_name"]) == 3


def test_coco_one_id_for_two_pictures_is_refused(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][1]["id"] = 10

    with pytest.raises(DataError, match=r"image id 10 is that of both 0000\.png and 0001\.png"):
        coco.read(trees.coco(tmp_path, 2, change=change), Problems())


def test_coco_duplicate_category_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="category id 7 is there twice"):
        coco.read(trees.coco(tmp_path, 1, change=lambda d: d["categories"].append({"id": 7, "name": "x"})), Problems())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must be an object, got list"),
        ("{}", "'images' must be a list, got nothing"),
        ('{"images": [], "annotations": {}, "categories": []}', "'annotations' must be a list, got dict"),
        ('{"images": [], "annotations": [], "categories": []}', "there are no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": "a"}]}', "a category must have an integer id"),
    ],
)
def test_json_that_is_not_coco(tmp_path: Path, text: str, message: str) -> None:
    trees.coco(tmp_path, 1)
    (tmp_path / "annotations" / "instances_train2017.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message) as error:
        coco.read(tmp_path, Problems())
    assert "instances_train2017.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_that_is_not_coco(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no instances_\*.json here"):
        coco.read(tmp_path, Problems())
