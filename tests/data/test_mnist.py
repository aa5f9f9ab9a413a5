"""MNIST's IDX files, whole and damaged."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the small data sets are made with pillow")

import more_trees as more

from debiaskd.data import DataError
from debiaskd.data.sources import mnist


@pytest.mark.parametrize("packed", [True, False])
def test_both_sets(tmp_path: Path, packed: bool) -> None:
    more.mnist(tmp_path, [1, 2, 3], packed=packed)
    more.mnist(tmp_path, [9, 0], name="train", packed=packed, seed=1)
    made = mnist.read(tmp_path)
    assert list(made) == ["train", "t10k"]
    for name, labels, seed in (("train", [9, 0], 1), ("t10k", [1, 2, 3], 0)):
        assert made[name][1].tolist() == labels
        assert (made[name][0] == more.mnist_digits(len(labels), seed)).all()


def test_files_with_a_dot_in_place_of_the_hyphen(tmp_path: Path) -> None:
    more.mnist(tmp_path, [1, 2, 3], packed=False)
    for file in list(tmp_path.iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    assert mnist.read(tmp_path)["t10k"][1].tolist() == [1, 2, 3]


def packed(content: bytes) -> bytes:
    """Without the time, which would be in the names of tests."""
    return gzip.compress(content, mtime=0)


IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
WHOLE = {IMAGES: more.idx(more.mnist_digits(3)), LABELS: more.idx(np.array([1, 2, 3], np.uint8))}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (IMAGES, None, f"{IMAGES}: no such file; images and labels go together"),
        (LABELS, None, f"{LABELS}: no such file; images and labels go together"),
        (IMAGES, packed(WHOLE[IMAGES])[:-20], f"{IMAGES}: damaged"),
        (IMAGES, WHOLE[IMAGES], f"{IMAGES}: damaged"),  # not packed, in spite of its name
        (IMAGES, packed(WHOLE[IMAGES][:-1]), "there is less in it than the 3 that it announces"),
        (
            IMAGES,
            packed(b"\0\0\x08\x03" + b"\xff" * 4 + WHOLE[IMAGES][8:]),
            "there is less in it than the 4294967295",
        ),
        (LABELS, packed(WHOLE[LABELS] + b"\0"), "there is more in it than the 3 that it announces"),
        (IMAGES, packed(WHOLE[LABELS]), "cut short"),
        (LABELS, packed(WHOLE[IMAGES]), "not an IDX file of labels of one byte"),
        (IMAGES, packed(more.idx(np.zeros((3, 8, 8), np.uint8))), "not an IDX file of images of 28×28 bytes"),
        (LABELS, packed(more.idx(np.array([1, 2], np.uint8))), "t10k has 3 images and 2 labels"),
        (LABELS, packed(more.idx(np.array([1, 2, 10], np.uint8))), "labels must be digits, got 10"),
    ],
)
def test_idx_files_that_are_damaged(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    for name, whole in WHOLE.items():
        (tmp_path / name).write_bytes(packed(whole))
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        mnist.read(tmp_path)


def test_idx_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no MNIST here: neither train-images-idx3-ubyte\.gz nor t10k-"):
        mnist.read(tmp_path)
