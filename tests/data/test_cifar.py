"""CIFAR in each of its forms: the same images from all of them, and nothing run that a file names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="images are fitted with pillow")

import more_trees as more
from data_trees import SHARED, files_of

from debiaskd.cli import entry as cli
from debiaskd.data import DataError, PackedDataset, pixels, prepare
from debiaskd.data.sources import cifar
from debiaskd.data.sources.records import Problems

TRAIN, TEST = [8, 9, 0, 7, 3, 3, 1], [2, 6]
BATCH = {"binary": "data_batch_2.bin", "python": "data_batch_2", "npz": "train_1.npz"}
REAL = SHARED / "cifar10"


@pytest.mark.parametrize("layout", more.LAYOUTS)
def test_ten_classes_at_their_own_size(tmp_path: Path, layout: str) -> None:
    prepared = prepare("cifar", more.cifar10(tmp_path / "src", layout, TRAIN, TEST), tmp_path / "out")
    assert prepared.problems.found == {}
    assert prepared.manifest["classes"] == list(more.TEN)
    assert prepared.manifest["options"]["size"] == 32
    for seed, (split, labels) in enumerate((("train", TRAIN), ("test", TEST))):
        data = PackedDataset(tmp_path / "out", split, verify=True)
        batch = data.__getitems__(range(len(labels)))
        assert batch.target.tolist() == labels
        expected = more.cifar_pictures(len(labels), seed)
        assert (batch.images.permute(0, 2, 3, 1).numpy() == expected).all()  # not a bit is changed
        assert data.sizes.tolist() == [[32, 32]] * len(labels)
        assert not data.boxes.annotated.any()
        assert batch.groups is None


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_a_hundred_classes(tmp_path: Path, layout: str) -> None:
    src = more.cifar100(tmp_path, layout, fine=[99, 0, 42], coarse=[19, 3, 0])
    for labels, names, expected in (
        (None, more.HUNDRED, [99, 0, 42]),
        ("fine", more.HUNDRED, [99, 0, 42]),
        ("coarse", more.TWENTY, [19, 3, 0]),
    ):
        source = cifar.read(src, Problems(), labels=labels)
        assert source.classes == names
        assert source.options == {"labels": labels or "fine"}
        part = source.splits["test"].part(0, 3)
        assert part.classes.tolist() == expected
        assert part.pictures is not None
        assert (np.stack([part.pictures[i] for i in range(3)]) == more.cifar_pictures(3, 1)).all()


def test_an_archive_unpacked(tmp_path: Path) -> None:
    more.cifar10(tmp_path / "cifar-10-batches-py", "python", TRAIN, TEST)
    source = cifar.read(tmp_path, Problems(), splits=["test"])
    assert list(source.splits) == ["test"]
    assert source.splits["test"].paths == ["test_batch:0", "test_batch:1"]
    more.cifar100(tmp_path / "cifar-100-binary", "binary", [1], [1])
    with pytest.raises(DataError, match="holds CIFAR-10, Python version; CIFAR-100, binary version; pass the folder"):
        cifar.read(tmp_path, Problems())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no CIFAR here: neither data_batch_1\.bin"):
        cifar.read(tmp_path / "empty", Problems())


@pytest.mark.parametrize("layout", more.LAYOUTS)
def test_label_without_a_class_leaves_its_picture_out(tmp_path: Path, layout: str) -> None:
    prepared = prepare("cifar", more.cifar10(tmp_path / "src", layout, [8, 10, 0, 7, 255], TEST), tmp_path / "out")
    name = {"npz": "train_1.npz:{}"}.get(layout, BATCH[layout].replace("2", "{}") + ":0")
    numbers = (1, 4) if layout == "npz" else (2, 5)
    assert prepared.problems.found == {
        "unknown category": [f"{name.format(number)}: {label}" for number, label in zip(numbers, (10, 255))]
    }
    batch = PackedDataset(tmp_path / "out", "train").__getitems__(range(3))
    assert batch.target.tolist() == [8, 0, 7]
    assert (batch.images.permute(0, 2, 3, 1).numpy() == more.cifar_pictures(5)[[0, 2, 3]]).all()


def test_labels_are_for_a_hundred_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = more.cifar10(tmp_path / "src", "binary", TRAIN, TEST)
    assert cli.main(["prepare", "cifar", str(src), str(tmp_path / "out"), "--labels", "coarse"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "labels must be 'fine' or 'coarse' of CIFAR-100, got 'coarse' with CIFAR-10, binary version" in err
    with pytest.raises(DataError, match="got 'rough' with CIFAR-100, binary version"):
        cifar.read(more.cifar100(tmp_path / "b", "binary", [1], [1]), Problems(), labels="rough")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = more.cifar100(tmp_path / "src", "python", [1, 2], [3, 4]), tmp_path / "out"
    arguments = ["prepare", "cifar", str(src), str(out), "--workers", "1", "--labels", "coarse"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 2 images, 0 boxes; 0 annotated, 2 of 20 classes "
        "(not: coarse 0, coarse 1, coarse 2, coarse 5, coarse 6, and 13 more)",
        "test: 2 images, 0 boxes; 0 annotated, 2 of 20 classes "
        "(not: coarse 0, coarse 1, coarse 2, coarse 5, coarse 6, and 13 more)",
        f"classes: {', '.join(more.TWENTY)}",
        f"{out / 'manifest.json'}",
    ]
    with pytest.raises(DataError, match="begun with labels='coarse', now labels='fine'"):
        prepare("cifar", src, out)


# -- whole, resumed, the same -----------------------------------------------------------------------------------------


@pytest.mark.xdist_group("processes")
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("layout", ["binary", "npz"])
def test_goes_on_where_it_was(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = more.cifar10(tmp_path / "src", layout, TRAIN, TEST), tmp_path / "out"
    made, left = pixels.from_array, iter(range(3))

    def interrupted(array: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return made(array)

    with monkeypatch.context() as patch:
        patch.setattr(pixels, "from_array", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("cifar", src, out, shard_size=2)
    assert [path.name for path in (out / "train").iterdir()] == ["00000"]
    prepared = prepare("cifar", src, out, shard_size=2)
    assert (prepared.written, prepared.reused) == (4, 1)
    prepare("cifar", src, tmp_path / "two", shard_size=2, workers=2)
    assert files_of(out) == files_of(tmp_path / "two")


def test_changed_labels_are_refused(tmp_path: Path) -> None:
    prepare("cifar", more.cifar10(tmp_path / "src", "binary", TRAIN, TEST), tmp_path / "out")
    more.cifar10(tmp_path / "src", "binary", TRAIN[::-1], TEST)
    with pytest.raises(DataError, match="the source has changed"):
        prepare("cifar", tmp_path / "src", tmp_path / "out")


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", more.LAYOUTS)
def test_batches_that_are_damaged_or_missing(tmp_path: Path, layout: str) -> None:
    src = more.cifar10(tmp_path / "src", layout, TRAIN, TEST)
    file = src / BATCH[layout]
    file.write_bytes(file.read_bytes()[:-1])
    message = {"binary": "6145 bytes are not whole records of 3073", "python": "refused as a pickle", "npz": "damaged"}
    with pytest.raises(DataError, match=f"{BATCH[layout]}: .*{message[layout]}"):
        cifar.read(src, Problems())
    assert len(cifar.read(src, Problems(), splits=["test"]).splits["test"]) == 2
    file.unlink()
    if layout == "npz":
        with pytest.raises(DataError, match="no split 'train'; there are test"):
            cifar.read(src, Problems(), splits=["train"])
    else:
        with pytest.raises(DataError, match=f"{BATCH[layout]}: no such file; it is part of CIFAR-10"):
            cifar.read(src, Problems())


def test_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no images in it"):
        cifar.read(more.cifar10(tmp_path, "binary", [], TEST), Problems())


def test_a_batch_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    src = more.cifar10(tmp_path, "binary", TRAIN, TEST)
    split = cifar.read(src, Problems()).splits["test"]
    os.truncate(src / "test_batch.bin", 3073)
    with pytest.raises(DataError, match=r"test_batch\.bin: became shorter while it was read"):
        split.part(0, 2)


@pytest.mark.parametrize(("layout", "file"), [("binary", "batches.meta.txt"), ("python", "batches.meta")])
def test_names_of_the_classes(tmp_path: Path, layout: str, file: str) -> None:
    src = more.cifar10(tmp_path, layout, TRAIN, TEST)
    short = b"cat\ndog\n" if layout == "binary" else more.python2_pickle({b"label_names": [b"cat", b"dog"]})
    (src / file).write_bytes(short)
    with pytest.raises(DataError, match=f"{file}: must name 10 classes, got 2"):
        cifar.read(src, Problems())
    (src / file).unlink()
    with pytest.raises(DataError, match=f"{file}: no such file; it names the classes"):
        cifar.read(src, Problems())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, r"'data' must be an array uint8 \[N,3072\]"),
        ({b"data": b"\0" * 3072, b"labels": [1]}, "'data' must be an array"),
        ({b"data": np.zeros((1, 3072), np.int8), b"labels": [1]}, "'data' must be an array"),
        ({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}, "'data' must be an array"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, "'labels' must be a list of 1 integers"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "'labels' must be a list of 1 integers"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [1]}, "'labels' must be a list of 1 integers"),
        ([1], "must hold a dictionary, got list"),
    ],
)
def test_pickles_of_something_else(tmp_path: Path, batch: Any, message: str) -> None:
    src = more.cifar10(tmp_path, "python", TRAIN, TEST)
    (src / "test_batch").write_bytes(more.python2_pickle(batch))
    with pytest.raises(DataError, match=f"test_batch: {message}"):
        cifar.read(src, Problems(), splits=["test"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": np.zeros((2, 3, 32, 32), np.uint8)},
            r"images must be uint8 \[N,32,32,3\], got uint8 \[2, 3, 32, 32\]",
        ),
        ({"images": np.zeros((2, 32, 32, 3))}, "got float64"),
        ({"images": None}, r"images must be uint8 \[N,32,32,3\], got nothing"),
        ({"labels": np.zeros(3, np.int64)}, r"labels must be integers \[N\]=\[2\], got int64 \[3\]"),
        ({"labels": np.zeros(2)}, "got float64"),
        ({"classes": np.arange(10)}, r"classes must be text \[K\], got int64 \[10\]"),
        ({"classes": np.array(["cat"] * 10, object)}, "damaged, or not an npz file of plain arrays"),
        ({"classes": np.array(more.TEN[::-1])}, "its classes differ from those of the other split"),
    ],
)
def test_npz_of_something_else(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    src = more.cifar10(tmp_path, "npz", TRAIN, TEST)
    arrays = {"images": more.cifar_pictures(2), "labels": np.array(TEST), "classes": np.array(more.TEN), **change}
    np.savez(src / "test_1.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=message):
        cifar.read(src, Problems())


def test_several_npz_files(tmp_path: Path) -> None:
    src = more.cifar10(tmp_path, "npz", TRAIN, TEST)
    (src / "train_2.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"several train\*\.npz: train_1\.npz, train_2\.npz"):
        cifar.read(src, Problems())


# -- real images ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images at {REAL}")
def test_real_pictures(tmp_path: Path) -> None:
    prepared = prepare("cifar", REAL, tmp_path / "out")
    assert prepared.problems.found == {}
    assert prepared.manifest["classes"] == list(more.TEN)
    for split, each in (("train", 400), ("test", 200)):
        data = PackedDataset(tmp_path / "out", split, verify=True)
        assert data.target.bincount().tolist() == [each] * 10
        with np.load(next(REAL.glob(f"{split}*.npz")), allow_pickle=False) as held:
            images = held["images"]
        batch = data.__getitems__(range(0, len(data), 7))
        assert (batch.images.permute(0, 2, 3, 1).numpy() == images[::7]).all()
