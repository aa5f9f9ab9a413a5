"""What the reader of COCO makes of annotations, good and bad, before any image is opened."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("PIL", reason="images are made with pillow")

import data_trees as trees
from data_trees import boxes_of

from debiaskd.data import DataError
from debiaskd.data.sources import coco
from debiaskd.data.sources.records import CROWD, IGNORE, Problems


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
    assert problems.found == {"annotations without a folder of images": ["instances_val2017.json"]}
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
    ({**good, "bbox": None}, "annotation with neither a box nor a segmentation that has bounds"),
    ({**good, "bbox": ["one", 1, 5, 5]}, "box that is not four numbers"),
    ({**good, "category_id": 4}, "unknown category"),
    ({**good, "category_id": "cat"}, "unknown category"),
    ({**good, "image_id": 999}, "annotation of an image that is not listed"),
    ({**good, "image_id": None}, "annotation without image_id"),
    ({**good, "id": 100}, "duplicate annotation"),
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


def test_boxes_whose_numbers_are_text(tmp_path: Path) -> None:
    problems = Problems()
    trees.coco(tmp_path, 1, boxes=[{**good, "bbox": ["1", " 1.0", 5, "5.5"]}])
    assert boxes_of(coco.read(tmp_path, problems).splits["train2017"], 0) == [([1, 1, 6, 6.5], 0, 0)]
    assert not problems.found


def test_ids_of_annotations_do_not_matter(tmp_path: Path) -> None:
    boxes = [{**good, "id": 0, "category_id": c, "bbox": [c, 1, 5, 5]} for c in (3, 7)]
    boxes += [{**good, "id": "x"}, {**good, "id": None, "iscrowd": 1}, {**good, "id": 5}]
    problems = Problems()
    split = coco.read(trees.coco(tmp_path, 1, boxes=boxes), problems).splits["train2017"]
    assert [(coords[0], label, flags) for coords, label, flags in boxes_of(split, 0)] == [
        (3, 0, 0),
        (7, 1, 0),
        (1, 0, 0),
        (1, 0, CROWD),
    ]
    assert list(problems.found) == ["duplicate annotation"]  # the last one, of another id and equal otherwise
    assert problems.tallies["train2017", "boxes"].total == 4


@pytest.mark.parametrize("written", [str, float, lambda i: f" {i}.0"])
def test_ids_in_any_writing(tmp_path: Path, written: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        for image in document["images"]:
            image["id"] = written(image["id"])
        for annotation in document["annotations"][::2]:
            annotation["image_id"] = written(annotation["image_id"])
        for annotation in document["annotations"][1:]:
            annotation["category_id"] = written(annotation["category_id"])
            annotation["iscrowd"] = str(annotation["iscrowd"])
        document["categories"][0]["id"] = written(document["categories"][0]["id"])

    problems = Problems()
    source = coco.read(trees.coco(tmp_path / "a", change=change), problems)
    assert problems.found == problems.notes == {}
    assert source.fingerprint() == coco.read(trees.coco(tmp_path / "b"), Problems()).fingerprint()


def test_a_picture_with_several_ids(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"] += [{**document["images"][0], "id": i} for i in (50, 51, 50)]

    boxes = [{**good, "image_id": i, "category_id": c} for i, c in ((10, 3), (51, 7), (50, 90), (50, 3))]
    problems = Problems()
    split = coco.read(trees.coco(tmp_path, 2, boxes=boxes, change=change), problems).splits["train2017"]
    assert split.paths == ["0000.png", "0001.png"]
    assert [label for _, label, _ in boxes_of(split, 0)] == [0, 1, 2]
    assert {kind: len(names) for kind, names in problems.found.items()} == {
        "duplicate image id": 1,
        "duplicate annotation": 1,
    }
    assert [len(names) for names in problems.notes.values()] == [2]


def test_image_ids_that_are_names(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["id"] = document["annotations"][0]["image_id"] = "scan-a"

    split = coco.read(trees.coco(tmp_path, 1, boxes=[good], change=change), Problems()).splits["train2017"]
    assert boxes_of(split, 0) == [([1, 1, 6, 6], 0, 0)]


@pytest.mark.parametrize("box", [{}, {"bbox": None}, {"bbox": []}, {"bbox": [0, 0, 0, 0]}])
def test_annotations_with_an_outline_and_no_box(tmp_path: Path, box: dict[str, Any]) -> None:
    outlines = [
        [[5, 4, 15, 4, 15, 12, 5, 12]],
        [[1, 1, 3, 1, 3, 2], [7, 8.5, 9, 8, 8, 6]],
        {"size": [30, 40], "counts": [2 * 30 + 3, 4, 26 + 2 * 30, 2]},
    ]
    boxes = [{"image_id": 10, "category_id": 3, **box, "segmentation": outline} for outline in outlines]
    problems = Problems()
    split = coco.read(trees.coco(tmp_path, 1, boxes=boxes), problems).splits["train2017"]
    assert [coords for coords, _, _ in boxes_of(split, 0)] == [[5, 4, 15, 12], [1, 1, 9, 8.5], [2, 3, 6, 7]]
    assert problems.found == {}
    assert [len(names) for names in problems.notes.values()] == [3]


def test_pictures_whose_annotations_were_all_passed_over_are_not_annotated(tmp_path: Path) -> None:
    bad = {**good, "bbox": [1, 1, 0, 5]}
    boxes = [bad, {**bad, "category_id": 90}, {**good, "image_id": 11}, {**bad, "image_id": 11, "category_id": 7}]
    boxes += [{**good, "image_id": 12, "category_id": 4}]
    problems = Problems()
    split = coco.read(trees.coco(tmp_path, 4, boxes=boxes), problems).splits["train2017"]
    assert split.part(0, 4).annotated.tolist() == [False, True, False, True]
    assert [label for _, label, _ in boxes_of(split, 0)] == [0, 2]  # known to show these, not where
    assert boxes_of(split, 1) == [([1, 1, 6, 6], 0, 0)]
    assert boxes_of(split, 2) == []
    tally = problems.tallies["train2017", "boxes"]
    assert (tally.total, tally.skipped) == (5, 4)


def test_a_file_without_annotations_says_nothing_about_its_pictures(tmp_path: Path) -> None:
    problems = Problems()
    split = coco.read(trees.coco(tmp_path, 2, boxes=[]), problems).splits["train2017"]
    assert not split.part(0, 2).annotated.any()
    assert list(problems.notes.values()) == [["instances_train2017.json"]]


@pytest.mark.parametrize(
    "prefix", ["train2017/", "images/train2017/", ".\\images\\train2017\\", "data/images/train2017/"]
)
def test_file_names_with_folders(tmp_path: Path, prefix: str) -> None:
    def change(document: dict[str, Any]) -> None:
        for image in document["images"]:
            image["file_name"] = prefix + image["file_name"]

    root = trees.coco(tmp_path / "data", 2, change=change)
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "train2017")
    assert coco.read(root, Problems()).splits["train2017"].paths == ["0000.png", "0001.png"]


def test_file_names_with_folders_that_are_there(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["file_name"] = "train2017/0000.png"

    trees.picture(trees.coco(tmp_path, 1, change=change) / "train2017" / "train2017" / "0000.png")
    assert coco.read(tmp_path, Problems()).splits["train2017"].paths == ["train2017/0000.png"]


def test_splits_in_another_case(tmp_path: Path) -> None:
    root = trees.coco(tmp_path, 1, split="Train")
    (root / "Train").rename(root / "train")
    problems = Problems()
    source = coco.read(root, problems, splits=["Train"])
    assert source.splits["train"].root == root / "train"
    assert list(problems.notes.values()) == [["'Train' read as 'train'"]]
    (root / "annotations" / "instances_train.json").write_text("{}")
    with pytest.raises(DataError, match="both 'Train' and 'train' name the split 'train'"):
        coco.read(root, Problems())


def test_categories_of_one_name(tmp_path: Path) -> None:
    problems = Problems()
    source = coco.read(
        trees.coco(tmp_path, 1, change=lambda d: d["categories"].append({"id": 1, "name": "dog"})), problems
    )
    assert source.classes == ("dog", "cat", "dog", "person")
    assert list(problems.notes.values()) == [["dog"]]


def readable(entries: list[dict[str, Any]]) -> bool:
    """Whether one of them gives a box."""
    return any(entry["category_id"] in (3, "7", 90) and entry["bbox"] in BOXES[:3] for entry in entries)


BOXES: list[Any] = [[1, 1, 5, 5], [1.0, 1, 5, 5], [2, 2, 9, 9], [1, 1, 0, 5], [9, 9, -1, 1], None, "x"]
ENTRIES = st.fixed_dictionaries(
    {
        "id": st.sampled_from([0, 1, "1", None, "x"]),
        "image_id": st.sampled_from([10, "10", 11.0, 12, 99, None]),
        "category_id": st.sampled_from([3, "7", 90.0, 4, None]),
        "bbox": st.sampled_from(BOXES),
        "iscrowd": st.sampled_from([0, 1, "1", True]),
    }
)


@settings(max_examples=40)
@given(st.lists(ENTRIES, max_size=12), st.sampled_from(coco.OPTIONS))
def test_no_annotation_vanishes(entries: list[dict[str, Any]], crowd: str) -> None:
    """Each is a box, or is named as passed over, or is left out as `crowd` says; no image is a negative for want of a
    readable annotation."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "annotations").mkdir()
        (root / "train2017").mkdir()
        document = {
            "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(3)],
            "categories": [{"id": key, "name": str(key)} for key in (3, 7, 90)],
            "annotations": entries,
        }
        (root / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
        problems = Problems()
        split = coco.read(root, problems, crowd=crowd).splits["train2017"]
    part = split.part(0, 3)
    counts = part.offsets[1:] - part.offsets[:-1]
    boxes = int(counts[part.annotated].sum())
    tally = problems.tallies["train2017", "boxes"]
    assert tally.total - tally.skipped == boxes
    named = sum(map(len, problems.found.values()))
    crowds = len(entries) - boxes - named
    assert crowds == 0 or (crowd == "drop" and crowds > 0)
    for i in range(3):
        mine = [entry for entry in entries if entry["image_id"] in (10 + i, str(10 + i))]
        if crowd != "drop":
            assert part.annotated[i] == (bool(entries) and (not mine or readable(mine)))


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
