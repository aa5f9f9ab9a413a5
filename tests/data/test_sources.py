"""What the readers make of annotations, good and bad, before any image is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="images are made with pillow")

import data_trees as trees
from data_trees import boxes_of

from debiaskd.data import DataError
from debiaskd.data.sources import coco, folder, voc, waterbirds
from debiaskd.data.sources.records import DIFFICULT, IGNORE, Problems, relative_path

# -- VOC -----------------------------------------------------------------------------------------------------------


def test_voc(tmp_path: Path) -> None:
    dog = trees.voc_object("dog", (1, 1, 40, 30))
    both = trees.voc_object("cat", (5, 6, 7, 8)) + trees.voc_object("person", (2.5, 3, 9, 10), difficult=1)
    problems = Problems()
    source = voc.read(trees.voc(tmp_path, [dog, both, ""]), problems)
    split = source.splits["train"]
    assert source.classes[11] == "dog"
    assert boxes_of(split, 0) == [([0, 0, 40, 30], 11, 0)]  # counted from 1, the last pixel included: the whole image
    assert boxes_of(split, 1) == [([4, 5, 7, 8], 7, 0), ([1.5, 2, 9, 10], 14, DIFFICULT)]
    assert boxes_of(split, 2) == []
    assert problems.found == {}


@pytest.mark.parametrize(("option", "expected"), [("keep", [DIFFICULT]), ("drop", []), ("mask", [DIFFICULT | IGNORE])])
def test_voc_difficult(tmp_path: Path, option: str, expected: list[int]) -> None:
    root = trees.voc(tmp_path, [trees.voc_object("dog", (1, 1, 4, 3), difficult=1)])
    split = voc.read(root, Problems(), difficult=option).splits["train"]
    assert [flags for _, _, flags in boxes_of(split, 0)] == expected


def test_voc_splits_and_years(tmp_path: Path) -> None:
    for split in ("train", "val", "trainval"):
        trees.voc(tmp_path, [""] * 2, split=split)
    assert list(voc.read(tmp_path, Problems()).splits) == ["train", "val"]  # trainval holds the same images again
    assert list(voc.read(tmp_path, Problems(), splits=["trainval"]).splits) == ["trainval"]
    assert list(voc.read(tmp_path / "VOCdevkit" / "VOC2007", Problems()).splits) == ["train", "val"]
    trees.voc(tmp_path, [""], year="VOC2012")
    with pytest.raises(DataError, match="holds VOC2007, VOC2012; pass one of them"):
        voc.read(tmp_path, Problems())
    with pytest.raises(DataError, match="no VOC2007 or VOC2012 here"):
        voc.read(tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages", Problems())


def test_voc_trainval_alone(tmp_path: Path) -> None:
    assert list(voc.read(trees.voc(tmp_path, [""], split="trainval"), Problems()).splits) == ["trainval"]
    with pytest.raises(DataError, match=r"none of train\.txt"):
        voc.read(trees.voc(tmp_path / "other", [""], split="dog_train"), Problems())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (trees.voc_object(" ", (1, 1, 5, 5)), "object without a name"),
        (trees.voc_object("dog", (9, 1, 5, 5)), "inverted box"),
        (trees.voc_object("dog", (6, 1, 5, 5)), "box without area"),
        (trees.voc_object("dog", ("nan", 1, 5, 5)), "box that is not finite"),
        (trees.voc_object("dog", ("", 1, 5, 5)), "box that is not four numbers"),
        ("<object><name>dog</name></object>", "box that is not four numbers"),
    ],
)
def test_voc_bad_objects(tmp_path: Path, text: str, kind: str) -> None:
    problems = Problems()
    split = voc.read(trees.voc(tmp_path, [text + trees.voc_object("dog", (1, 1, 2, 2))]), problems).splits["train"]
    assert boxes_of(split, 0) == [([0, 0, 2, 2], 11, 0)]
    assert list(problems.found) == [kind]
    assert "000000.xml" in problems.found[kind][0]


def test_voc_annotation_missing_broken_or_listed_twice(tmp_path: Path) -> None:
    root = trees.voc(tmp_path, [""] * 3)
    folder = root / "VOCdevkit" / "VOC2007"
    (folder / "Annotations" / "000000.xml").unlink()
    (folder / "Annotations" / "000001.xml").write_text("<annotation>")
    with open(folder / "ImageSets" / "Main" / "train.txt", "a") as file:
        file.write("\n000002\n")
    problems = Problems()
    assert voc.read(root, problems).splits["train"].paths == ["000002.jpg"]
    assert problems.found["image without annotation, left out"] == ["000000.xml"]
    assert problems.found["annotation that is not XML, its image left out"][0].startswith("000001.xml")
    assert problems.found["duplicate id"] == ["train.txt: 000002"]


@pytest.mark.parametrize("labels", [("hard hat", "person"), ("Hat", "vest"), ("dog", "dgo")])
def test_voc_with_classes_of_its_own(tmp_path: Path, labels: tuple[str, str]) -> None:
    first, second = (trees.voc_object(f" {label} ", (1, 1, 5, 5)) for label in labels)
    root = trees.voc(tmp_path, [second, first + second, ""])
    problems = Problems()
    source = voc.read(root, problems)
    assert source.classes == tuple(sorted(labels))
    index = source.classes.index
    assert [label for _, label, _ in boxes_of(source.splits["train"], 1)] == [index(labels[0]), index(labels[1])]
    assert problems.found == {}
    assert list(problems.notes) == ["class that VOC has not, so that the classes are those that occur"]


def test_voc_classes_are_the_same_whatever_is_read(tmp_path: Path) -> None:
    root = trees.voc(tmp_path, [trees.voc_object(label, (1, 1, 5, 5)) for label in ("hat", "Vest", "person")])
    lists = root / "VOCdevkit/VOC2007/ImageSets/Main"
    for name, entries in (("train", "000000\n000001"), ("val", "000002"), ("hat_val", "000002")):
        (lists / f"{name}.txt").write_text(entries)
    assert voc.read(root, Problems()).classes == ("Vest", "hat", "person")
    assert voc.read(root, Problems(), splits=["val"]).classes == ("Vest", "hat", "person")
    assert boxes_of(voc.read(root, Problems(), splits=["hat_val"]).splits["hat_val"], 0)[0][1] == 2


def test_voc_classes_in_another_case(tmp_path: Path) -> None:
    problems = Problems()
    split = voc.read(trees.voc(tmp_path, [trees.voc_object("TVmonitor", (1, 1, 5, 5))]), problems).splits["train"]
    assert boxes_of(split, 0) == [([0, 0, 5, 5], 19, 0)]
    assert list(problems.notes) == ["class of VOC in another case"]
    hats = [trees.voc_object(name, (1, 1, 5, 5)) for name in ("hat", "Hat")]
    root = trees.voc(tmp_path / "own", hats)
    for split_name, entry in (("train", "000000"), ("val", "000001")):
        (root / f"VOCdevkit/VOC2007/ImageSets/Main/{split_name}.txt").write_text(entry)
    assert voc.read(root, Problems(), splits=["val"]).classes == ("hat",)


@pytest.mark.parametrize(
    "entry",
    ["{}.jpg", "{}.PNG", "JPEGImages/{}.jpg", "VOC2007\\JPEGImages\\{}.jpg", "{} -1", "{}   1", "{}", " {}.jpg "],
)
def test_voc_list_entries(tmp_path: Path, entry: str) -> None:
    root = trees.voc(tmp_path, [trees.voc_object("dog", (1, 1, 5, 5))])
    (root / "VOCdevkit/VOC2007/ImageSets/Main/train.txt").write_text(f"\ufeff{entry.format('000000')}\n", "utf-8")
    problems = Problems()
    assert voc.read(root, problems).splits["train"].paths == ["000000.jpg"]
    assert problems.found == {}


@pytest.mark.parametrize("name", ["a b.png", "a b.JPEG", "scan.jpg"])
def test_voc_pictures_of_other_names(tmp_path: Path, name: str) -> None:
    text = f"{trees.voc_object('dog', (1, 1, 5, 5))}"
    root = trees.voc(tmp_path, [text]) / "VOCdevkit" / "VOC2007"
    (root / "JPEGImages" / "000000.jpg").rename(root / "JPEGImages" / name)
    (root / "Annotations" / "000000.xml").rename(root / "Annotations" / "a b.xml")
    (root / "Annotations" / "a b.xml").write_text(f"<annotation><filename>D:\\x\\{name}</filename>{text}</annotation>")
    (root / "ImageSets" / "Main" / "train.txt").write_text("a b\n")
    assert voc.read(root, Problems(strict=True)).splits["train"].paths == [name]


@pytest.mark.parametrize(
    "polygon", ["<x1>2</x1><y1>3</y1><x2>9.5</x2><y2>8</y2>", "<pt><x>2</x><y>8</y></pt><pt><x>9.5</x><y>3</y></pt>"]
)
def test_voc_polygons(tmp_path: Path, polygon: str) -> None:
    text = f"<object><name>dog</name><polygon>{polygon}</polygon></object>"
    assert boxes_of(voc.read(trees.voc(tmp_path, [text]), Problems()).splits["train"], 0) == [([1, 2, 9.5, 8], 11, 0)]


def test_voc_picture_whose_objects_were_all_passed_over_is_not_annotated(tmp_path: Path) -> None:
    bad, good = trees.voc_object("dog", (9, 1, 5, 5)), trees.voc_object("cat", (1, 1, 5, 5))
    split = voc.read(trees.voc(tmp_path, [bad, bad + good, "", good]), Problems()).splits["train"]
    assert split.part(0, 4).annotated.tolist() == [False, True, True, True]
    assert [label for _, label, _ in boxes_of(split, 0)] == [11]
    assert [label for _, label, _ in boxes_of(split, 1)] == [7]


# -- Waterbirds ----------------------------------------------------------------------------------------------------


def test_waterbirds(tmp_path: Path) -> None:
    problems = Problems()
    source = waterbirds.read(trees.waterbirds(tmp_path), problems)
    assert source.groups == ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 3, "val": 3, "test": 3}
    part = source.splits["train"].part(0, 3)  # rows 0, 3, 6
    assert part.classes.tolist() == [0, 1, 0]
    assert part.groups.tolist() == [0, 3, 1]
    assert part.coords.tolist() == [[8, 6, 24, 18]] * 3
    assert part.labels.tolist() == [0, 1, 0]
    assert problems.found == {}


def test_waterbirds_without_boxes(tmp_path: Path) -> None:
    root = trees.waterbirds(tmp_path / "birds", boxes=False)
    assert not waterbirds.read(root, Problems()).splits["train"].part(0, 3).annotated.any()
    trees.waterbirds(tmp_path / "cub")
    source = waterbirds.read(root, Problems(), boxes=tmp_path / "cub")
    assert source.splits["train"].part(0, 3).annotated.all()
    with pytest.raises(DataError, match=r"bounding_boxes.txt: no such file; boxes must be the folder of CUB"):
        waterbirds.read(root, Problems(), boxes=root)


def test_waterbirds_boxes_need_no_list_of_images(tmp_path: Path) -> None:
    whole = waterbirds.read(trees.waterbirds(tmp_path / "a"), Problems()).fingerprint()
    root = trees.waterbirds(tmp_path / "b")
    (root / "images.txt").unlink()
    problems = Problems()
    assert waterbirds.read(root, problems).fingerprint() == whole
    text = (root / "metadata.csv").read_text()
    lines = [line.split(",") for line in text.splitlines()]
    lines[1:] = [[f"{v}.0" if i in (0, 2, 3, 4) else v for i, v in enumerate(line)] for line in lines[1:]]
    (root / "metadata.csv").write_text("\n".join(map(",".join, lines)))
    assert waterbirds.read(root, problems).fingerprint() == whole
    with open(root / "bounding_boxes.txt", "a") as file:  # CUB's file where metadata.csv is a part
        file.write("77 1 1 2 2\n")
    assert waterbirds.read(root, problems).fingerprint() == whole
    assert problems.found == {}
    assert list(problems.notes.values()) == [["bounding_boxes.txt: 77"]]
    (root / "metadata.csv").write_text(text.replace("img_id", "number"))
    with pytest.raises(DataError, match=r"no integers in a column img_id, and no .*images\.txt"):
        waterbirds.read(root, Problems())


def test_waterbirds_ids_that_contradict_each_other(tmp_path: Path) -> None:
    root = trees.waterbirds(tmp_path)
    names = root / "images.txt"
    text = names.read_text()
    names.write_text(text.replace("1 birds/0.jpg", "1 birds/1.jpg").replace("2 birds/1.jpg", "2 birds/0.jpg"))
    with pytest.raises(
        DataError, match=r"metadata\.csv: img_id of birds/0\.jpg is 1, which birds/1\.jpg has in .*images"
    ):
        waterbirds.read(root, Problems())
    names.write_text("".join(f"{100 + i} birds/{i}.jpg\n" for i in range(9)))
    with pytest.raises(DataError, match=r"img_id of birds/0\.jpg is 1, which is 100 in .*images\.txt; --lenient"):
        waterbirds.read(root, Problems())
    names.unlink()
    (root / "metadata.csv").write_text((root / "metadata.csv").read_text().replace("\n2,", "\n1,"))
    with pytest.raises(DataError, match=r"img_id 1 is that of both birds/0\.jpg and birds/1\.jpg"):
        waterbirds.read(root, Problems())


def test_waterbirds_boxes_of_other_pictures(tmp_path: Path) -> None:
    root = trees.waterbirds(tmp_path, [(0, 0, 0)] * 2)
    (root / "images.txt").write_text("1 images/birds/0.jpg\n2 images/birds/1.jpg\n")
    with pytest.raises(DataError, match=r"img_id of birds/0\.jpg is 1, which images/birds/0\.jpg has"):
        waterbirds.read(root, Problems())
    (root / "images.txt").unlink()
    (root / "bounding_boxes.txt").write_text("71 1 1 2 2\n")
    with pytest.raises(DataError, match=r"bounding_boxes\.txt: 1 rows in it, and no box of an image in metadata\.csv"):
        waterbirds.read(root, Problems())
    problems = Problems(lenient=True)
    assert not waterbirds.read(root, problems).splits["train"].part(0, 2).annotated.any()


def test_waterbirds_rows_that_contradict_each_other(tmp_path: Path) -> None:
    root = trees.waterbirds(tmp_path, [(0, 0, 0), (1, 1, 1)])
    with open(root / "metadata.csv", "a") as file:
        file.write("1,birds/0.jpg,1,2,0,x\n2,birds/1.jpg,1,1,1,x\n")
    with open(root / "bounding_boxes.txt", "a") as file:
        file.write("1 1 1 2 2\n")
    problems = Problems()
    source = waterbirds.read(root, problems)
    assert {name: split.classes.tolist() for name, split in source.splits.items()} == {"train": [0], "val": [1]}
    assert boxes_of(source.splits["train"], 0)[0][0] == [8, 6, 24, 18]
    assert problems.found == {
        "row that contradicts an earlier one, not used": [
            "bounding_boxes.txt: 1 1 1 2 2",
            "metadata.csv, line 4: birds/0.jpg",
        ][::-1],
        "duplicate id": ["metadata.csv, line 5: birds/1.jpg"],
    }


def test_waterbirds_bad_rows(tmp_path: Path) -> None:
    root = trees.waterbirds(tmp_path, [(0, 0, 0), (2, 0, 0), (0, 3, 0), (0, 0, "sea"), (1, 0, 0)])
    with open(root / "metadata.csv", "a") as file:
        file.write("9,birds/0.jpg,0,0,0,x\n")
    (root / "bounding_boxes.txt").write_text("1 nan 6 16 12\n5 8 6 -16 12\n77 1 1 2 2\n4 a b c d\n\n")
    problems = Problems()
    split = waterbirds.read(root, problems).splits["train"]
    assert split.paths == ["birds/0.jpg", "birds/4.jpg"]
    assert not split.part(0, 2).annotated.any()
    assert {kind: len(names) for kind, names in problems.found.items()} == {
        "row with unknown y, split or place": 3,
        "duplicate id": 1,
        "box that is not finite": 1,
        "inverted box": 1,
        "annotation of an image that is not listed": 1,
        "box that is not four numbers": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "metadata.csv: no such file"),
        ("", "no column img_filename, y, split, place"),
        ("img_filename,y,split\n", "no column place"),
        ("img_filename,y,split,place\n", "there are no images in it"),
        ("img_filename,y,split,place\na.jpg,0\n", "line 2: the row is cut short"),
        ("img_filename,y,split,place\n\xff", "not a CSV file"),
    ],
)
def test_metadata_that_is_none(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "metadata.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        waterbirds.read(tmp_path, Problems())


# -- all of them ---------------------------------------------------------------------------------------------------


CLIMBING = ["../x.png", "a/../../x.png", "/etc/passwd", "..\\x.png", "C:\\x.png", "C:x.png", "\\\\host\\x.png", "a/.."]


@pytest.mark.parametrize("name", CLIMBING)
def test_names_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["file_name"] = name

    with pytest.raises(DataError, match="leads out of the data set's folder; refused"):
        coco.read(trees.coco(tmp_path / "coco", 1, change=change), Problems())
    root = trees.voc(tmp_path / "voc", [""])
    (root / "VOCdevkit/VOC2007/ImageSets/Main/train.txt").write_text(f"{name}\n")
    with pytest.raises(DataError, match="refused"):
        voc.read(root, Problems())
    with pytest.raises(DataError, match="refused"):
        folder.read(trees.folder(tmp_path / "folder", 1, f"{name},1,1,2,2,\n"), Problems())
    root = trees.waterbirds(tmp_path / "birds", [(0, 0, 0)])
    (root / "metadata.csv").write_text(f"img_filename,y,split,place\n{name},0,0,0\n")
    with pytest.raises(DataError, match="refused"):
        waterbirds.read(root, Problems())


@pytest.mark.parametrize("name", ["", "a\0b", None, 3])
def test_names_that_are_no_names(name: Any) -> None:
    with pytest.raises(DataError, match="must be a non-empty string"):
        relative_path(name, "here")


def test_names_are_put_in_one_form() -> None:
    assert [relative_path(n, "") for n in ("a/b.png", "a\\b.png", "./a//b.png")] == ["a/b.png"] * 3
    assert relative_path("..a/b..png", "") == "..a/b..png"


def test_fingerprint_follows_the_annotations(tmp_path: Path) -> None:
    first = coco.read(trees.coco(tmp_path / "a"), Problems()).fingerprint()
    again = coco.read(trees.coco(tmp_path / "b"), Problems()).fingerprint()
    assert first == again  # wherever it lies
    box = {"image_id": 10, "bbox": [1, 1, 5, 5], "category_id": 3}
    other = coco.read(trees.coco(tmp_path / "c", boxes=[box]), Problems()).fingerprint()
    assert other != first
    file = tmp_path / "a" / "annotations" / "instances_train2017.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["bbox"][0] += 0.25
    file.write_text(json.dumps(document))
    assert coco.read(tmp_path / "a", Problems()).fingerprint() != first


def test_sizes_that_cannot_be_true_are_not_known(tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["images"][0]["width"] = 10**40
        document["images"][1]["height"] = "30"

    split = coco.read(trees.coco(tmp_path / "coco", 2, change=change), Problems()).splits["train2017"]
    assert split.part(0, 2).sizes.tolist() == [[0, 0]] * 2
    size = f"<size><width>{'9' * 5000}</width><height>30</height></size>"
    split = voc.read(trees.voc(tmp_path / "voc", [""], size=size), Problems()).splits["train"]
    assert split.part(0, 1).sizes.tolist() == [[0, 0]]


def test_names_are_shown_as_what_can_be_printed() -> None:
    problems = Problems()
    problems.add("bad thing", "a\nb\x1b[2J\ud800é.jpg")
    assert problems.found == {"bad thing": ["a\\nb\\x1b[2J\\ud800é.jpg"]}


def test_problem_lines() -> None:
    problems = Problems()
    for i in range(5):
        problems.add("bad thing", f"{i}.jpg")
    assert problems.lines() == ["5 × bad thing: 0.jpg, 1.jpg, 2.jpg, and 2 more"]
