"""CSV files that list images: classes, several classes, splits, groups, boxes, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_runs import command, failed

from debiaskd.data import DataError
from debiaskd.data.sources import csv_file
from debiaskd.data.sources.problems import Problems

pytest.importorskip("PIL")
from PIL import Image


def written(folder: Path, *lines: str) -> Path:
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


def read(folder: Path, *lines: str, **options: Any) -> Any:
    problems = Problems()
    return csv_file.read(written(folder, *lines), problems, **options), problems


def test_classes_splits_groups_and_boxes(tmp_path: Path) -> None:
    source, problems = read(
        tmp_path,
        "Path;label;place;split;x0;y0;x1;y1",
        "a/1.jpg;cat;grass;Train;1;2;5;6.5",
        "a/1.jpg;cat;grass;Train;7;7;9;9",
        "2.jpg;dog;snow;Train;;;;",
        "3.jpg;cat;snow;test;5;5;4;9",
        "4.jpg;dog;;test;;;;",
        bias_columns=["place"],
    )
    assert source.classes == ("cat", "dog") and not source.multi_label
    assert source.groups == ("cat, grass", "cat, snow", "dog, grass", "dog, snow")
    train, test = source.splits["train"], source.splits["test"]
    assert train.root == tmp_path and train.paths == ["a/1.jpg", "2.jpg"] and test.paths == ["3.jpg"]
    assert list(train.classes) == [0, 1] and list(train.groups) == [0, 3] and list(test.groups) == [1]
    assert list(train.coords) == [1, 2, 5, 6.5, 7, 7, 9, 9] and list(train.offsets) == [0, 2, 2]
    assert list(train.annotated) == [1, 1] and list(test.annotated) == [0]
    assert problems.found == {
        "inverted box": ["list.csv, line 5"],
        "image without a bias, left out": ["list.csv, line 6"],
    }


def test_two_attributes_numbered_splits_and_numbers_as_classes(tmp_path: Path) -> None:
    source, _ = read(
        tmp_path,
        "img_filename,y,split,place,sex",
        *(
            f"{i}.jpg,{label},{i % 3},{place},{sex}"
            for i, (label, place, sex) in enumerate([(10, "l", "f"), (9, "w", "m"), (10, "w", "f")])
        ),
        path_column="img_filename",
        label_column="y",
        bias_columns=["place", "sex"],
        images=tmp_path / "pictures",
    )
    assert source.classes == ("9", "10") and list(source.splits) == ["train", "val", "test"]
    assert source.groups[:3] == ("9, l, f", "9, w, f", "9, w, m")
    assert [list(split.groups) for split in source.splits.values()] == [[3], [2], [4]]
    assert source.splits["val"].root == tmp_path / "pictures"


def test_several_classes_an_image(tmp_path: Path) -> None:
    source, problems = read(
        tmp_path,
        "path,cat,dog,x0,y0,x1,y1",
        "1.jpg,1,true,0,0,3,3",
        "2.jpg,-1,1.0,,,,",
        "3.jpg,0,maybe,,,,",
        "4.jpg,0,,,,,",
        label_columns=["cat", "dog"],
    )
    train = source.splits["train"]
    assert source.multi_label and source.classes == ("cat", "dog") and train.paths == ["1.jpg", "2.jpg", "4.jpg"]
    assert list(train.labels) == [0, 1, 1] and list(train.offsets) == [0, 2, 3, 3] and not any(train.annotated)
    assert problems.found == {"dog that is neither 0 nor 1": ["list.csv, line 4"]}


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    source, problems = read(
        tmp_path,
        "path,label,x0,y0,x1,y1",
        ",cat,,,,",
        "1.jpg,,,,,",
        "2.jpg,cat,1,1,b,2",
        "2.jpg,dog,,,,",
        "3.jpg,Dog,,,,",
    )
    assert source.splits["train"].paths == ["2.jpg", "3.jpg"] and list(source.splits["train"].annotated) == [0, 1]
    assert {kind: len(where) for kind, where in problems.found.items()} == {
        "row without a path": 1,
        "row without a class": 1,
        "box that is not four numbers": 1,
        "row that contradicts an earlier one, not used": 1,
    }


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["path,class", "1.jpg,a"], {}, "no column label"),
        (["path,label", ",a"], {}, "no row can be used: 1 × row without a path"),
        (["path,label", "../1.jpg,a"], {}, "leads out of the data set's folder"),
        (["path,label,b", "1.jpg,a,x"], {"bias_columns": ["b"]}, "two values or more in b, got x"),
        (["path,a,b", "1.jpg,1,0"], {"label_columns": ["a"], "bias_columns": ["b"]}, "must be left out with"),
        (["path,label", "1.jpg,a"], {"bias_columns": ["Label"]}, "must be different ones"),
        (["path,label,split", "1.jpg,a,train", "2.jpg,a,Train"], {}, "both 'train' and 'Train' name the split"),
        (["path,label,split", "1.jpg,a,train"], {"splits": ["val"]}, "no split 'val'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, lines: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, *lines, **options)


def test_prepare_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1.png", "2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    file = written(tmp_path, "path,label,place", "1.png,a,land", "2.png,b,water")
    options = ("--bias-columns", "place", "--size", 8, "--workers", 1)
    code, out, _ = command(capsys, "prepare", "csv", file, tmp_path / "out", *options)
    assert code == 0 and "groups: a, land; a, water; b, land; b, water" in out
    assert "no such file" in failed(*command(capsys, "prepare", "csv", tmp_path / "no.csv", tmp_path / "other"))
