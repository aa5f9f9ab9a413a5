"""CelebA: attributes to classes and groups, and lists that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="images are made with pillow")

import data_trees as trees
import more_trees as more

from debiaskd.cli import entry as cli
from debiaskd.data import DataError, PackedDataset, prepare
from debiaskd.data.sources import celeba
from debiaskd.data.sources.records import Problems


@pytest.mark.parametrize("csv", [False, True])
def test_celeba(tmp_path: Path, csv: bool) -> None:
    problems = Problems()
    source = celeba.read(more.celeba(tmp_path, csv=csv), problems)
    assert source.classes == ("not Blond_Hair", "Blond_Hair")
    assert source.groups == (
        "not Blond_Hair, not Male",
        "not Blond_Hair, Male",
        "Blond_Hair, not Male",
        "Blond_Hair, Male",
    )
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 4, "val": 4, "test": 4}
    part = source.splits["train"].part(0, 4)  # rows 0, 3, 6, 9
    assert part.paths == ["000000.jpg", "000003.jpg", "000006.jpg", "000009.jpg"]
    assert part.classes.tolist() == [0, 1, 0, 1]
    assert part.groups.tolist() == [0, 3, 1, 2]
    assert not part.annotated.any()
    assert problems.found == {}


def test_other_attributes(tmp_path: Path) -> None:
    source = celeba.read(more.celeba(tmp_path), Problems(), target="Male", bias="Brown_Hair", splits=["val"])
    assert list(source.splits) == ["val"]
    assert source.groups[2] == "Male, not Brown_Hair"
    part = source.splits["val"].part(0, 4)  # rows 1, 4, 7, 10
    assert part.groups.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("csv", [False, True])
def test_end_to_end(tmp_path: Path, csv: bool, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = more.celeba(tmp_path / "src", csv=csv), tmp_path / "out"
    arguments = ["prepare", "celeba", str(src), str(out), "--size", "12", "--workers", "1", "--target", "Young"]
    assert cli.main([*arguments, "--bias", "Male"]) == 0
    assert "train: 4 images, 0 boxes" in capsys.readouterr().out
    data = PackedDataset(out, "train", verify=True)
    batch = data.__getitems__([1, 0])
    assert batch.groups is not None
    assert batch.groups.tolist() == [1, 0]
    assert batch.target.tolist() == [0, 0]
    assert batch.boxes.annotated.tolist() == [False, False]
    assert data.sizes.tolist() == [[22, 18]] * 4
    with pytest.raises(DataError, match="begun with target='Young', now target='Bald'"):
        prepare("celeba", src, out, size=12, target="Bald", bias="Male")


def test_lists_in_folders_of_their_own(tmp_path: Path) -> None:
    more.celeba(tmp_path)
    for folder, name in (
        ("Anno", "list_attr_celeba.txt"),
        ("Eval", "list_eval_partition.txt"),
        ("Img", "img_align_celeba"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / name).rename(tmp_path / folder / name)
    source = celeba.read(tmp_path, Problems())
    assert len(source.splits["train"]) == 4
    assert source.splits["train"].root == tmp_path / "Img" / "img_align_celeba"


def test_rows_that_do_not_go_together(tmp_path: Path) -> None:
    root = more.celeba(tmp_path, [(1, 1, 0), (1, 0, 0), (-1, 1, 3), (1, 1, 0), (-1, -1, "one")])
    attributes, partition = root / "list_attr_celeba.txt", root / "list_eval_partition.txt"
    attributes.write_text(attributes.read_text() + "000000.jpg -1 -1 -1 -1 -1\n\n000008.jpg 1 1 1 1 1\n")
    partition.write_text(partition.read_text() + "000000.jpg 1\n000009.jpg 1\n")
    trees.picture(root / "img_align_celeba" / "000077.jpg")
    problems = Problems()
    split = celeba.read(root, problems).splits["train"]
    assert split.paths == ["000000.jpg", "000003.jpg"]
    assert split.part(0, 2).groups.tolist() == [3, 3]
    assert problems.found == {
        "row that contradicts an earlier one, not used": [
            "list_attr_celeba.txt, line 8: 000000.jpg",
            "list_eval_partition.txt, line 6: 000000.jpg",
        ],
        "attribute that is neither 1 nor -1, its image left out": ["list_attr_celeba.txt, line 4: 000001.jpg"],
        "list of another length than it says": ["list_attr_celeba.txt: 6 images, not 5"],
        "row with unknown partition": [
            "list_eval_partition.txt, line 3: 000002.jpg: '3'",
            "list_eval_partition.txt, line 5: 000004.jpg: 'one'",
        ],
        "image without attributes, left out": [
            "list_eval_partition.txt, line 7: 000009.jpg",
            "img_align_celeba/000077.jpg",
        ],
        "image without a partition, left out": ["list_attr_celeba.txt: 000008.jpg"],
    }
    with pytest.raises(DataError, match="row that contradicts an earlier one"):
        celeba.read(root, Problems(strict=True))


def test_duplicate_rows_that_agree(tmp_path: Path) -> None:
    root = more.celeba(tmp_path, [(1, 1, 0), (-1, 1, 0)])
    partition = root / "list_eval_partition.txt"
    partition.write_text(partition.read_text() + "000000.jpg 0\n")
    problems = Problems()
    assert len(celeba.read(root, problems).splits["train"]) == 2
    assert problems.found == {"duplicate id": ["list_eval_partition.txt, line 3: 000000.jpg"]}


@pytest.mark.parametrize(("has", "lacks"), [("1", "0"), ("True", "False"), ("1.0", "-1.0")])
def test_attributes_in_other_words(tmp_path: Path, has: str, lacks: str) -> None:
    words = {True: has, False: lacks}
    rows = [(words[blond], words[male], "0.0") for blond in (False, True) for male in (False, True)]
    root = more.celeba(tmp_path, rows, csv=True)
    attributes = root / "list_attr_celeba.csv"
    attributes.write_text(attributes.read_text().replace(",Young", ", Young"))
    problems = Problems()
    split = celeba.read(root, problems).splits["train"]
    assert split.part(0, 4).groups.tolist() == [0, 1, 2, 3]
    assert problems.found == {}


def test_csv_with_numbered_rows(tmp_path: Path) -> None:
    whole = celeba.read(more.celeba(tmp_path / "a", csv=True), Problems()).fingerprint()
    root = more.celeba(tmp_path / "b", csv=True)
    for file in root.glob("*.csv"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join([f",{lines[0]}", *(f"{i},{line}" for i, line in enumerate(lines[1:]))]))
    assert celeba.read(root, Problems(strict=True)).fingerprint() == whole


def test_partition_of_no_known_split_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there are no images in it: 2 × row with unknown partition: .*'train'"):
        celeba.read(more.celeba(tmp_path, [(1, 1, "train"), (-1, 1, "train")]), Problems())


def test_row_whose_file_is_missing(tmp_path: Path) -> None:
    src = more.celeba(tmp_path / "src")
    (src / "img_align_celeba" / "000003.jpg").unlink()
    prepared = prepare("celeba", src, tmp_path / "out", size=8)
    assert [name.split(" ")[0] for name in prepared.problems.found["missing file"]] == ["000003.jpg"]
    assert PackedDataset(tmp_path / "out", "train").paths() == ["000000.jpg", "000006.jpg", "000009.jpg"]


@pytest.mark.parametrize("csv", [False, True])
def test_unknown_attributes_are_answered_with_close_ones(
    tmp_path: Path, csv: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = more.celeba(tmp_path / "src", csv=csv)
    with pytest.raises(DataError, match=r"no attribute 'blonde_hair'; close: Blond_Hair, Brown_Hair"):
        celeba.read(root, Problems(), target="blonde_hair")
    with pytest.raises(DataError, match=r"no attribute 'zzz'; there are Bald, Blond_Hair, Brown_Hair, Male, Young"):
        celeba.read(root, Problems(), bias="zzz")
    with pytest.raises(DataError, match="bias must be another attribute than target, got 'Male' for both"):
        celeba.read(root, Problems(), target="Male")
    assert cli.main(["prepare", "celeba", str(root), str(tmp_path / "out"), "--bias", "Men"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no attribute 'Men'; close: Male" in err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("list_attr_celeba.txt", None, "no list_attr_celeba.txt or list_attr_celeba.csv here"),
        ("list_eval_partition.txt", None, "no list_eval_partition.txt or list_eval_partition.csv here"),
        ("list_attr_celeba.txt", "", "its first line must be the number of images, got ''"),
        ("list_attr_celeba.txt", "Bald Male\n", "its first line must be the number of images, got 'Bald Male'"),
        ("list_attr_celeba.txt", "1\nBlond_Hair Male\na.jpg 1\n", "line 3: must have 3 values, got 2"),
        ("list_attr_celeba.txt", "1\nBlond_Hair Male\n../a.jpg 1 1\n", "leads out of the data set's folder; refused"),
        ("list_attr_celeba.txt", "\xff", "not a list of CelebA's"),
        ("list_eval_partition.txt", "000000.jpg\n", "line 1: must have 2 values, got 1"),
        ("list_eval_partition.txt", "/000000.jpg 1\n", "refused"),
        ("list_eval_partition.txt", "\n", "there are no images in it"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    root = more.celeba(tmp_path, [(1, 1, 0)])
    if text is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        celeba.read(root, Problems())


def test_csv_that_is_none_and_pictures_that_are_not_there(tmp_path: Path) -> None:
    root = more.celeba(tmp_path, csv=True)
    (root / "list_eval_partition.csv").write_text("image_id,split\n000000.jpg,0\n")
    with pytest.raises(DataError, match=r"list_eval_partition\.csv: no column 'partition'; there are split"):
        celeba.read(root, Problems())
    (root / "img_align_celeba").rename(root / "pictures")
    with pytest.raises(DataError, match="img_align_celeba: no such folder; it should hold the images"):
        celeba.read(root, Problems())
