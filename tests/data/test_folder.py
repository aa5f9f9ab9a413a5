"""Folders of classes: boxes and biases from CSV files, groups of class and bias, and files that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="images are made with pillow")

import data_trees as trees
from data_trees import boxes_of, files_of

from debiaskd.cli import entry as cli
from debiaskd.data import ChunkedDataset, DataError, PackedDataset, prepare
from debiaskd.data.sources import folder
from debiaskd.data.sources.records import Problems


def test_folder(tmp_path: Path) -> None:
    rows = "cat/0.png,1,2,3,4,\ncat/0.png,5,6,7.5,8,dog\ndog/1.png,,,,,\n"
    problems = Problems()
    source = folder.read(trees.folder(tmp_path, boxes=rows), problems)
    split = source.splits["train"]
    assert source.classes == ("cat", "dog")
    assert split.paths == [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(3)]
    assert boxes_of(split, 0) == [([1, 2, 3, 4], 0, 0), ([5, 6, 7.5, 8], 1, 0)]
    part = split.part(0, 6)
    assert part.classes.tolist() == [0, 0, 0, 1, 1, 1]
    assert part.annotated.tolist() == [True, False, False, False, True, False]
    assert problems.found == {}


def test_folder_with_splits_and_other_files(tmp_path: Path) -> None:
    trees.folder(tmp_path / "train", 2, None)
    trees.folder(tmp_path / "val", 1, None)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "boxes.csv").write_text("path,x0,y0,x1,y1\nval/dog/0.png,1,1,2,2\n")
    problems = Problems()
    source = folder.read(tmp_path, problems)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 4, "val": 2}
    assert source.splits["val"].part(0, 2).annotated.tolist() == [False, True]
    assert problems.found == {}


def test_folder_with_a_class_that_is_called_train(tmp_path: Path) -> None:
    trees.folder(tmp_path, 2, None)
    trees.picture(tmp_path / "train" / "0.png")
    source = folder.read(tmp_path, Problems())
    assert source.classes == ("cat", "dog", "train")
    assert len(source.splits["train"]) == 5


def test_folder_bad_rows(tmp_path: Path) -> None:
    rows = (
        "cat/9.png,1,1,2,2,\ncat/0.png,a,1,2,2,\ncat/0.png,1,1,nan,2,\ncat/0.png,3,1,2,2,\ncat/0.png,1,1,1,2,\n"
        "cat/0.png,1,1,2,2,unicorn\n"
    )
    problems = Problems()
    split = folder.read(trees.folder(tmp_path, boxes=rows), problems).splits["train"]
    assert boxes_of(split, 0) == []
    assert {kind: len(names) for kind, names in problems.found.items()} == {
        "annotation of an image that is not there": 1,
        "box that is not four numbers": 1,
        "box that is not finite": 1,
        "inverted box": 1,
        "box without area": 1,
        "unknown category": 1,
    }


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folders with classes"):
        folder.read(tmp_path, Problems())
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="no images here"):
        folder.read(tmp_path, Problems())
    trees.picture(tmp_path / "cat" / "0.png")
    with pytest.raises(DataError, match=r"x\.csv: no such file; boxes must be a CSV file"):
        folder.read(tmp_path, Problems(), boxes=tmp_path / "x.csv")


def tree(root: Path, *pictures: str) -> Path:
    for i, picture in enumerate(pictures):
        trees.picture(root / picture, seed=i)
    return root


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("Train", "Val", "Test"), ["train", "val", "test"]),
        (("training", "VALIDATION", "Testing"), ["train", "validation", "test"]),
        (("test", "valid"), ["valid", "test"]),
    ],
)
def test_splits_whatever_their_case(tmp_path: Path, folders: tuple[str, ...], expected: list[str]) -> None:
    tree(tmp_path, *(f"{name}/{label}/0.png" for name in folders for label in ("gull", "tern")))
    source = folder.read(tmp_path, Problems())
    assert list(source.splits) == expected
    assert source.classes == ("gull", "tern")
    assert all(split.paths == ["gull/0.png", "tern/0.png"] for split in source.splits.values())
    assert list(folder.read(tmp_path, Problems(), splits=[folders[1]]).splits) == [
        expected[1 if folders[1] != "valid" else 0]
    ]


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, "train/gull/0.png", "Training/gull/0.png")
    with pytest.raises(DataError, match="both 'Training' and 'train' name the split 'train'; remove or rename one"):
        folder.read(tmp_path, Problems())


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    tree(
        tmp_path, "train/gull/0.png", "train/@eaDir/gull/0.png", "train/gull/.ipynb_checkpoints/0.png", "val/gull/0.png"
    )
    tree(tmp_path, "train/__MACOSX/gull/0.png", "train/.thumbs/0.png", "unlabeled/0/0.png", "train/gull/._0.png")
    for name in ("train/old", "val/tern", "__MACOSX"):
        (tmp_path / name).mkdir()
    problems = Problems()
    source = folder.read(tmp_path, problems)
    assert source.classes == ("gull",)
    assert source.splits["train"].paths == ["gull/0.png"]
    assert problems.found == {}
    assert problems.notes == {
        "folder beside train, val, not read": ["unlabeled"],
        "folder without an image, no class": ["train/old", "val/tern"],
    }


def test_classes_that_differ_in_case(tmp_path: Path) -> None:
    tree(tmp_path, "train/gull/0.png", "train/Tern/0.png", "val/Gull/0.png", "val/tern/0.png")
    problems = Problems()
    source = folder.read(tmp_path, problems)
    assert source.classes == ("Tern", "gull")
    assert source.splits["val"].paths == ["Gull/0.png", "tern/0.png"]
    assert source.splits["val"].classes.tolist() == [1, 0]
    assert problems.notes == {
        "class written in another case": ["'tern' read as 'Tern'", "'Gull' read as 'gull'"],
    }
    assert folder.read(tmp_path, Problems(), splits=["val"]).classes == source.classes


def test_letters_are_classes_of_their_own(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{split}/{label}/0.png" for split in ("train", "val") for label in "aAb"))
    problems = Problems()
    assert folder.read(tmp_path, problems).classes == ("A", "a", "b")
    assert problems.notes == {"classes that differ in case alone": ["A, a in train"]}


def test_pictures_in_no_class(tmp_path: Path) -> None:
    tree(tmp_path / "src", "0.png", "old/0.png", *(f"{i}.png" for i in range(19)))
    with pytest.raises(DataError, match=r"train: 19 of 20 images .* 19 × image in no class's folder, left out, .* 0"):
        prepare("folder", tmp_path / "src", tmp_path / "out", size=8)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (
            ["gull/train/0.png", "gull/test/0.png", "tern/train/0.png"],
            "gull: holds test, train, which would be images",
        ),
        (["birds/gull/0.png", "birds/tern/0.png"], "holds one folder, 'birds', and that one gull, tern: pass .*birds"),
        (
            ["birds/train/gull/0.png", "birds/val/gull/0.png"],
            "holds one folder, 'birds', and that one train, val: pass",
        ),
    ],
)
def test_layouts_in_which_all_classes_would_be_wrong(tmp_path: Path, pictures: list[str], message: str) -> None:
    tree(tmp_path, *pictures)
    with pytest.raises(DataError, match=message):
        folder.read(tmp_path, Problems())
    problems = Problems(lenient=True)
    folder.read(tmp_path, problems)
    assert list(problems.notes) == ["not refused, being lenient"]


@pytest.mark.parametrize(
    "text", ["PATH;X0;Y0;X1;Y1; Label\n{};1;2;3;4;DOG\n", "x1\tx0\ty0\ty1\tpath\n3\t1\t2\t4\t {}\n"]
)
@pytest.mark.parametrize("path", ["./Cat\\0.PNG", "mine/cat/0.png", "Mine/CAT/0.png"])
def test_boxes_as_spreadsheets_write_them(tmp_path: Path, text: str, path: str) -> None:
    root = trees.folder(tmp_path / "mine", 1, None)
    (root / "boxes.csv").write_text(text.format(path))
    problems = Problems()
    split = folder.read(root, problems).splits["train"]
    assert boxes_of(split, 0) == [([1, 2, 3, 4], int("DOG" in text), 0)]
    assert problems.found == {}
    assert len(problems.notes["path written otherwise"]) == 1


def test_a_picture_whose_rows_were_all_passed_over_is_not_annotated(tmp_path: Path) -> None:
    rows = "cat/0.png,5,1,2,2,\ncat/1.png,5,1,2,2,\ncat/1.png,,,,,\ncat/2.png,1,1,2,2,\ncat/2.png,1,1,1,2,\n"
    split = folder.read(trees.folder(tmp_path, 3, rows), Problems()).splits["train"]
    assert split.part(0, 4).annotated.tolist() == [False, False, True, False]


# -- biases and groups ---------------------------------------------------------------------------------------------

#: Of two cats and two dogs; "water" goes along with the dogs.
BIAS = "cat/0.png,land\ncat/1.png,water\ndog/0.png,water\ndog/1.png,water\n"
GROUPS = ("cat, land", "cat, water", "dog, land", "dog, water")


def test_bias_makes_groups(tmp_path: Path) -> None:
    problems = Problems()
    source = folder.read(trees.folder(tmp_path, 2, "cat/1.png,1,2,3,4,\n", BIAS), problems)
    split = source.splits["train"]
    assert (source.classes, source.groups) == (("cat", "dog"), GROUPS)
    assert split.paths == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert split.part(0, 4).groups.tolist() == [0, 1, 3, 3]
    assert split.part(0, 4).annotated.tolist() == [False, True, False, False]
    assert boxes_of(split, 1) == [([1, 2, 3, 4], 0, 0)]
    assert problems.found == {}


def test_groups_have_one_number_whatever_is_read(tmp_path: Path) -> None:
    trees.folder(tmp_path / "train", 1, None)
    trees.folder(tmp_path / "val", 1, None)
    rows = "train/cat/0.png,sand\ntrain/dog/0.png,water\nval/cat/0.png,water\nval/dog/0.png,land\n"
    (tmp_path / "bias.csv").write_text("path,bias\n" + rows)
    both, val = folder.read(tmp_path, Problems()), folder.read(tmp_path, Problems(), splits=["val"])
    assert both.groups == val.groups == tuple(f"{c}, {b}" for c in ("cat", "dog") for b in ("land", "sand", "water"))
    assert both.splits["train"].groups.tolist() == [1, 5]
    assert both.splits["val"].groups.tolist() == val.splits["val"].groups.tolist() == [2, 3]


def test_bias_from_elsewhere_and_in_other_columns(tmp_path: Path) -> None:
    src = trees.folder(tmp_path / "src", 1, bias="cat/0.png,a\ndog/0.png,b\n")
    (tmp_path / "mine.csv").write_text("bias,note,path\n y ,1,.\\cat\\0.png\nx,2,dog/0.png\n")
    source = folder.read(src, Problems(), bias=tmp_path / "mine.csv")
    assert source.groups == ("cat, x", "cat, y", "dog, x", "dog, y")
    assert source.splits["train"].groups.tolist() == [1, 2]


def test_biases_and_their_paths_in_any_case(tmp_path: Path) -> None:
    rows = BIAS.replace("cat/0.png,land", "./CAT/0.png,Land").replace("cat/1.png,water", "src\\cat\\1.png,Water")
    problems = Problems()
    source = folder.read(trees.folder(tmp_path / "src", 2, None, rows + "dog/1.png,WATER\n"), problems)
    assert source.groups == ("cat, Land", "cat, Water", "dog, Land", "dog, Water")
    assert source.splits["train"].groups.tolist() == [0, 1, 3, 3]
    assert problems.found == {}
    assert {kind: len(names) for kind, names in problems.notes.items()} == {
        "bias written in another case": 3,
        "path written otherwise": 2,
    }


def test_rows_and_pictures_that_do_not_go_together(tmp_path: Path) -> None:
    rows = BIAS + "cat/1.png,land\ncat/0.png,land\ncat/9.png,moon\ncat/2.png, \ncat/2.png,land\n"
    problems = Problems()
    source = folder.read(trees.folder(tmp_path, 3, None, rows), problems)
    assert source.groups == GROUPS  # "moon" goes along with no image that is there
    assert source.splits["train"].paths == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert source.splits["train"].groups.tolist() == [0, 1, 3, 3]  # the first row of cat/1.png counts
    assert problems.found == {
        "annotation of an image that is not there": ["bias.csv: cat/9.png"],
        "row that contradicts an earlier one, not used": [
            "bias.csv, line 6: cat/1.png",
            "bias.csv, line 10: cat/2.png",
        ],
        "image without a bias, left out": ["cat/2.png", "dog/2.png"],
    }
    (tmp_path / "bias.csv").write_text("path,bias\n" + BIAS)
    with pytest.raises(DataError, match=r"^image without a bias, left out: cat/2\.png$"):
        folder.read(tmp_path, Problems(strict=True))


def test_pictures_that_are_not_read_need_no_bias(tmp_path: Path) -> None:
    trees.folder(tmp_path / "train", 2, None)
    trees.folder(tmp_path / "test", 2, None)
    rows = "".join(f"train/{row}\n" for row in BIAS.split())
    (tmp_path / "bias.csv").write_text("path,bias\n" + rows)
    source = folder.read(tmp_path, Problems(strict=True), splits=["train"])
    assert source.splits["train"].groups.tolist() == [0, 1, 3, 3]
    with pytest.raises(DataError, match=r"bias\.csv: none of the images of test has a bias"):
        folder.read(tmp_path, Problems(), splits=["test"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,place\n", "no column bias in its first line"),
        ("", "no column path, bias in its first line"),
        ("path,bias\ncat/0.png\n", "line 2: the row is cut short"),
        ("path,bias\n,land\n", "line 2: a file's name must be a non-empty string"),
        ("path,bias\n../cat/0.png,land\n", "line 2: '../cat/0.png' leads out of the data set's folder; refused"),
        ("path,bias\n\xff,land\n", "not a CSV file"),
        ("path,bias\n", "no bias of an image that is here; its paths must be like 'cat/0.png'"),
        ("path,bias\nsrc/cat/0.png,a\nsrc/dog/0.png,b\n", "no bias of an image that is here"),
        ("path,bias\ncat/0.png,a\ndog/9.png,b\n", "two biases or more, and all images that have one have 'a'"),
    ],
)
def test_a_list_of_biases_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (trees.folder(tmp_path, 1) / "bias.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        folder.read(tmp_path, Problems())
    assert message in str(caught.value) and "bias.csv" in str(caught.value)


def test_a_named_list_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.csv: no such file; bias must be a CSV file with the columns path, bias"):
        folder.read(trees.folder(tmp_path), Problems(), bias=tmp_path / "x.csv")


# -- prepared ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["npy", "litdata"])
def test_end_to_end(tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    if format == "litdata":
        pytest.importorskip("litdata")
    src, out = trees.folder(tmp_path / "src", 3, bias=BIAS), tmp_path / "out"
    arguments = ["prepare", "folder", str(src), str(out), "--size", "12", "--workers", "1", "--format", format]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 4 images, 0 boxes; 0 annotated, 2 of 2 classes, 3 of 4 groups (not: dog, land)"
    assert "classes: cat, dog" in lines
    assert "groups: cat, land; cat, water; dog, land; dog, water" in lines
    assert "2 × image without a bias, left out: cat/2.png, dog/2.png" in lines
    data = PackedDataset(out, "train") if format == "npy" else ChunkedDataset(out, "train")
    assert data.groups == GROUPS
    batch = data.__getitems__([3, 0, 1])
    assert batch.groups is not None
    assert batch.groups.tolist() == [3, 0, 1]
    assert batch.target.tolist() == [1, 0, 0]


def test_changed_biases_are_noticed(tmp_path: Path) -> None:
    src, out = trees.folder(tmp_path / "src", 2, bias=BIAS), tmp_path / "out"
    prepare("folder", src, out, size=8)
    before = files_of(out)
    assert prepare("folder", src, out, size=8).written == 0
    (src / "bias.csv").write_text("path,bias\n" + BIAS.replace("dog/0.png,water", "dog/0.png,land"))
    with pytest.raises(DataError, match="the source has changed"):
        prepare("folder", src, out, size=8)
    (src / "bias.csv").unlink()
    with pytest.raises(DataError, match="the source has changed"):
        prepare("folder", src, out, size=8)
    assert files_of(out) == before


@pytest.mark.usefixtures("one_thread")
def test_from_a_folder_to_a_student_evaluated_by_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("lightning_fabric", "jsonargparse", "torchdata", "safetensors"):
        pytest.importorskip(package)
    import training_runs as runs

    src = tmp_path / "src"
    for seed, split in ((0, "train"), (10, "val"), (20, "test")):
        trees.folder(src / split, 6, None, seed=seed)
    rows = [
        f"{split}/{c}/{i}.png,{'red' if i % 3 else 'blue'}"
        for split in ("train", "val", "test")
        for c in ("cat", "dog")
        for i in range(6)
    ]
    (src / "bias.csv").write_text("\n".join(["path,bias", *rows]))
    prepare("folder", src, tmp_path / "out", size=16)
    fast = {"epochs": 1, "batch": 6}
    document = {
        "teacher": {"name": "plain/6", "method": "group_dro", "schedule": fast},
        "student": {"name": "plain/4"},
        "transplant": {},
        "weights": {"method": "groups"},
        "terms": {"match": {}},
        "schedule": fast,
        "compute": {"accelerator": "cpu"},
    }
    stage = runs.train(runs.write(tmp_path / "recipe.yaml", tmp_path / "out", document), tmp_path / "run")
    assert stage.facts["selection"].startswith("worst-group accuracy on validation")
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    named = dict(line.strip().rsplit(" ", 1) for line in capsys.readouterr().out.splitlines()[1:-1])
    groups = [float(named[name]) for name in ("cat, blue", "cat, red", "dog, blue", "dog, red")]
    assert min(groups) == float(named["worst group"])
    assert sum(groups) / 4 == pytest.approx(float(named["unbiased"]), abs=1e-4)
