"""Digits on photographs: groups, splits and boxes are what they are said to be, and the same bytes come every time."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="images are drawn with pillow")

import more_trees as more
from data_trees import SHARED, files_of

from debiaskd.cli import entry as cli
from debiaskd.data import DataError, PackedDataset, pixels, prepare
from debiaskd.data.sources import mnist, mnist_on_cifar, pasting
from debiaskd.data.sources.records import Problems

SMALL = {"train": 80, "val": 16, "test": 16}


def read(root: Path, **options: Any) -> Any:
    return mnist_on_cifar.read(root, Problems(strict=True), **{**SMALL, **options})


def parts(source: Any) -> dict[str, Any]:
    return {name: split.part(0, len(split)) for name, split in source.splits.items()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return more.mnist_on_cifar(tmp_path_factory.mktemp("drawn") / "src")


def test_groups(tree: Path) -> None:
    source = read(tree)
    assert source.classes == ("0 to 4", "5 to 9")
    assert source.groups == ("0 to 4 on land", "0 to 4 on water", "5 to 9 on land", "5 to 9 on water")
    made = parts(source)
    assert {name: np.bincount(part.groups).tolist() for name, part in made.items()} == {
        "train": [38, 2, 2, 38],
        "val": [4] * 4,
        "test": [4] * 4,
    }
    for part in made.values():
        digits, photographs = zip(*(path.split(" on ") for path in part.paths))
        # In the tree the label of a digit and of a photograph is its number's last figure.
        assert [int(name[-1]) >= 5 for name in digits] == part.classes.tolist()
        assert [{7: 0, 9: 0, 8: 1}[int(name[-1])] for name in photographs] == (part.groups - 2 * part.classes).tolist()
        assert part.labels.tolist() == part.classes.tolist()
        assert part.annotated.all()
        assert part.offsets.tolist() == list(range(len(part) + 1))


@pytest.mark.parametrize(("agreement", "expected"), [(0.5, [20] * 4), (1, [40, 0, 0, 40]), (0.0, [0, 40, 40, 0])])
def test_agreement(tree: Path, agreement: float, expected: list[int]) -> None:
    made = parts(read(tree, agreement=agreement))
    assert np.bincount(made["train"].groups, minlength=4).tolist() == expected
    assert np.bincount(made["test"].groups).tolist() == [4] * 4


@pytest.mark.parametrize("both", [False, True])
def test_no_digit_and_no_photograph_is_in_two_splits(tmp_path: Path, both: bool) -> None:
    made = parts(read(more.mnist_on_cifar(tmp_path, both=both), train=800, val=400, test=400))
    used: dict[int, list[set[str]]] = {0: [], 1: []}
    for part in made.values():
        for which in (0, 1):
            used[which].append({path.split(" on ")[which] for path in part.paths})
    for train, validation, test in used.values():
        assert min(len(train), len(validation), len(test)) >= 3
        assert train.isdisjoint(validation) and train.isdisjoint(test) and validation.isdisjoint(test)
    digits = [{name.split(":")[0] for name in names} for names in used[0]]
    assert digits == ([{"train"}, {"train"}, {"t10k"}] if both else [{"t10k"}] * 3)
    photographs = [{name.split(":")[0] for name in names} for names in used[1]]
    assert photographs == [{"train_1.npz"}, {"train_1.npz"}, {"test_1.npz"}]


@pytest.mark.parametrize("size", [32, 64, 97])
def test_boxes_are_exact(tmp_path: Path, size: int) -> None:
    """On photographs of one grey the digit is what differs from it."""
    out = tmp_path / "out"
    prepare("mnist_on_cifar", more.mnist_on_cifar(tmp_path / "src", grey=100), out, size=size, **SMALL)
    data = PackedDataset(out, "train", verify=True)
    assert data.size == (size, size)
    for i in range(len(data)):
        image, _, boxes = data[i]
        touched = (image != 100).any(0).numpy()
        rows, columns = np.flatnonzero(touched.any(1)), np.flatnonzero(touched.any(0))
        tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert boxes.coords.tolist() == [tight]
        middle, across = touched[(rows[0] + rows[-1]) // 2], touched[:, (columns[0] + columns[-1]) // 2]
        assert (middle.sum(), across.sum()) == (tight[2] - tight[0], tight[3] - tight[1])  # a bar, without holes
    x0, y0, x1, y1 = data.boxes.coords.T
    assert min(int(x0.min()), int(y0.min())) <= 0.1 * size
    assert max(int(x1.max()), int(y1.max())) >= 0.9 * size
    assert len((y1 - y0).unique()) > 5


def test_nothing_but_the_digit_is_drawn(tree: Path) -> None:
    part = parts(read(tree))["val"]
    names = {f"train_1.npz:{i}": picture for i, picture in enumerate(more.cifar_pictures(60))}
    for i, path in enumerate(part.paths):
        changed = part.pictures[i] != pixels.resized(names[path.split(" on ")[1]], 64)
        x0, y0, x1, y1 = part.coords[i].astype(int)
        assert changed[y0:y1, x0:x1].any(2).mean() > 0.9
        changed[y0:y1, x0:x1] = False
        assert not changed.any()


def test_ink_stands_out(tree: Path) -> None:
    """Against black, white and halves of both."""
    for levels in ((0, 0), (255, 255), (0, 255), (128, 128), (90, 200)):
        under = np.repeat(np.array(levels, np.uint8), 50)[:, None].repeat(3, 1)
        for tint in ((0, 0, 0), (pasting.TINTS - 1,) * 3):
            colour = pasting.contrasting(under, np.array(tint))
            assert np.abs(under.astype(int) - colour).max(1).min() >= 128 - pasting.TINTS


def test_faint_blur_belongs_to_neither_digit_nor_box() -> None:
    digit = more.mnist_digits(1)[0]
    assert (digit == 20).any()
    rows, columns = (np.flatnonzero((digit == 255).any(axis)) for axis in (1, 0))
    ink = pasting.scaled_ink(digit, 28)
    assert ink.shape == (len(rows), len(columns))
    assert (ink == 255).all()


# -- the same every time ----------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("processes")
@pytest.mark.usefixtures("forked_workers")
def test_the_seed_decides_everything(tree: Path, tmp_path: Path) -> None:
    for name, seed, workers in (("a", 5, 1), ("b", 5, 2), ("c", 6, 1)):
        prepare("mnist_on_cifar", tree, tmp_path / name, seed=seed, workers=workers, shard_size=30, **SMALL)
    first, again, other = (files_of(tmp_path / name) for name in "abc")
    assert first == again
    for name in ("images", "coords", "target", "path"):
        assert first[f"train/00000/{name}.npy"] != other[f"train/00000/{name}.npy"]


def test_the_same_pictures_from_every_form_of_the_files(tree: Path, tmp_path: Path) -> None:
    made = parts(read(tree))
    for layout in ("binary", "python"):
        src = more.mnist_on_cifar(tmp_path / layout, layout)
        if layout == "binary":
            for file in (src / "mnist").iterdir():
                file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
                file.unlink()
        for name, part in parts(read(src)).items():
            assert (part.coords == made[name].coords).all()
            assert all((part.pictures[i] == made[name].pictures[i]).all() for i in range(len(part)))


def test_a_split_does_not_depend_on_the_others(tree: Path) -> None:
    made = parts(read(tree))["test"]
    alone = parts(read(tree, splits=["test"], train=9, agreement=0.6))
    assert list(alone) == ["test"]
    assert alone["test"].paths == made.paths
    assert all((alone["test"].pictures[i] == made.pictures[i]).all() for i in range(len(made)))


def test_other_options_are_refused(tree: Path, tmp_path: Path) -> None:
    prepare("mnist_on_cifar", tree, tmp_path / "out", **SMALL)
    assert prepare("mnist_on_cifar", tree, tmp_path / "out", **SMALL).written == 0
    with pytest.raises(DataError, match=r"begun with agreement=0\.95, now agreement=0\.9"):
        prepare("mnist_on_cifar", tree, tmp_path / "out", agreement=0.9, **SMALL)


def test_from_the_command_line(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [
        "prepare",
        "mnist_on_cifar",
        str(tree),
        str(out),
        "--workers",
        "1",
        "--agreement",
        "0.75",
        "--seed",
        "3",
    ]
    assert cli.main([*arguments, "--train", "40", "--val", "8", "--test", "12"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "train: 40 images, 40 boxes; 2 of 2 classes, 4 of 4 groups",
        "val: 8 images, 8 boxes; 2 of 2 classes, 4 of 4 groups",
        "test: 12 images, 12 boxes; 2 of 2 classes, 4 of 4 groups",
    ]
    data = PackedDataset(out, "train")
    assert data.size == (64, 64)
    assert data.group_ids is not None
    assert data.group_ids.bincount().tolist() == [15, 5, 5, 15]
    assert cli.main([*arguments, "--test", "3"]) == 2
    assert capsys.readouterr().err == "debiaskd: test must be >= 4, got 3\n"


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 31}, DataError, "size must be >= 32, got 31"),
        ({"seed": -1}, DataError, "seed must be >= 0, got -1"),
        ({"seed": 1 << 32}, DataError, r"seed must be < 2\^32, got 4294967296"),
        ({"train": 3}, DataError, "train must be >= 4, got 3"),
        ({"test": 8.0}, TypeError, "test must be an integer, got 8.0"),
        ({"agreement": 1.5}, DataError, r"agreement must be a share in \[0, 1\], got 1\.5"),
        ({"agreement": "much"}, TypeError, "agreement must be a number, got str"),
        ({"splits": ["valid"]}, DataError, "no split 'valid'; there are test, train, val"),
    ],
)
def test_bad_arguments(tree: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(tree, **options)


def test_digits_without_ink_are_left_out(tmp_path: Path) -> None:
    root = more.mnist_on_cifar(tmp_path)
    images = more.mnist_digits(100)
    images[[3, 77]] = 0
    (root / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(more.idx(images), mtime=0))
    problems = Problems()
    source = mnist_on_cifar.read(root, problems, train=2000, val=4, test=4)
    assert problems.found == {"digit without ink, left out": ["t10k:3", "t10k:77"]}
    used = {path.split(" on ")[0] for path in source.splits["train"].paths}
    assert len(used) > 50
    assert used.isdisjoint(["t10k:3", "t10k:77"])


def test_labels_without_a_class_are_counted_among_the_photographs(tmp_path: Path) -> None:
    root = more.mnist_on_cifar(tmp_path)
    more.cifar10(root / "cifar10", "npz", [7, 8, 9] * 4 + [10] * 200, [7, 8, 9])
    with pytest.raises(DataError, match="train: 200 of 212 images were passed over: 200 × unknown category"):
        mnist_on_cifar.read(root, Problems(), train=4, val=4, test=4)
    problems = Problems(lenient=True)
    source = mnist_on_cifar.read(root, problems, train=4, val=4, test=4)
    assert len(problems.found["unknown category"]) == 200
    assert ("train", "pictures") not in problems.tallies and len(source.splits["train"]) == 4


def test_what_is_not_there(tmp_path: Path) -> None:
    root = more.mnist_on_cifar(tmp_path)
    (root / "cifar10" / "test_1.npz").unlink()
    with pytest.raises(DataError, match="cifar10: no split 'test'; there are train"):
        read(root)
    shutil.rmtree(root / "cifar10")
    more.cifar100(root / "cifar10", "binary", [1], [1])
    with pytest.raises(DataError, match="cifar10: must be CIFAR-10, and has no class horse, truck, ship"):
        read(root)
    shutil.rmtree(root / "cifar10")
    with pytest.raises(DataError, match="cifar10: no such folder; SRC must hold mnist/ and cifar10/"):
        read(root)
    more.cifar10(root / "cifar10", "npz", [7, 8, 9], [7, 8, 9])
    with pytest.raises(DataError, match="cifar10: too few photographs: none of some kind is left for val"):
        read(root)
    more.mnist(root / "mnist", [1] * 50)
    with pytest.raises(DataError, match="mnist: too few digits: none of some kind is left for train"):
        read(root)


# -- real digits and photographs --------------------------------------------------------------------------------------

REAL = all((SHARED / name).is_dir() for name in ("mnist", "cifar10"))


@pytest.mark.skipif(not REAL, reason=f"no real digits and photographs at {SHARED}")
def test_real_digits_and_photographs(tmp_path: Path) -> None:
    prepared = prepare("mnist_on_cifar", SHARED, tmp_path / "out", train=400, val=80, test=80, strict=True)
    assert {name: split["boxes"] for name, split in prepared.manifest["splits"].items()} == {
        "train": 400,
        "val": 80,
        "test": 80,
    }
    labels = mnist.read(SHARED / "mnist")["t10k"][1]
    assert len(labels) == 10000
    data = PackedDataset(tmp_path / "out", "train", verify=True)
    assert data.group_ids is not None
    assert data.group_ids.bincount().tolist() == [190, 10, 10, 190]
    drawn = [int(path.split(" on ")[0].split(":")[1]) for path in data.paths()]
    assert (labels[drawn] >= 5).tolist() == data.target.bool().tolist()
    x0, y0, x1, y1 = data.boxes.coords.T
    longest = (x1 - x0).maximum(y1 - y0)
    assert int(longest.min()) >= 20  # 0.55 × 64 × 20 / 28, a pixel of blur on either side or not
    assert int(longest.max()) <= 48
