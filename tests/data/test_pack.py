"""`debiaskd.pack`: any data set as prepared data, with the guarantees of `debiaskd prepare`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

import debiaskd as dk
from debiaskd.data import DataError, PackedDataset

pytestmark = pytest.mark.usefixtures("one_thread")


class Listed:
    """A data set of a list of items; callables are called when they are read."""

    def __init__(self, items: list[Any], classes: list[str] | None = None) -> None:
        self.items, self.read = items, list[int]()
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        self.read.append(number)
        item = self.items[number]
        return item() if callable(item) else item


def image(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def raises(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def pack(dataset: Any, out: Path, split: str = "train", **options: Any) -> Any:
    return dk.pack(dataset, out, split=split, progress=False, **options)


def shards(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_packed_is_read_again(tmp_path: Path, workers: int) -> None:
    items = [
        {"image": image(0), "target": 1, "boxes": [[0, 2, 4, 8.0]], "group": "water"},
        {"image": image(1), "label": np.int64(0), "boxes": [], "group": 0},
        {"image": image(2), "target": torch.tensor(1), "boxes": None, "group": "land"},
    ]
    packed = pack(Listed(items, ["cat", "dog"]), tmp_path, groups=["land", "water"], shard_size=2, workers=workers)
    assert packed.written == 2 and packed.manifest["splits"]["train"]["group_counts"] == [2, 1]
    found = PackedDataset(tmp_path, "train", verify=True)
    batch = found.__getitems__([0, 1, 2])
    assert found.classes == ("cat", "dog") and found.groups == ("land", "water") and found.size == (8, 8)
    for i in range(3):
        assert np.array_equal(batch.images[i].permute(1, 2, 0), np.asarray(image(i)))
    assert batch.target.tolist() == [1, 0, 1] and batch.groups.tolist() == [1, 0, 0]
    assert batch.boxes.coords.tolist() == [[0, 2, 4, 8]] and batch.boxes.annotated.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(192, dtype=torch.uint8).reshape(3, 8, 8),
        torch.arange(192, dtype=torch.uint8).reshape(3, 8, 8) / 255,
        np.arange(192, dtype=np.uint8).reshape(3, 8, 8).transpose(1, 2, 0),
    ],
    ids=["uint8", "float", "channels last"],
)
def test_arrays_and_tensors_are_the_same_images(tmp_path: Path, value: Any) -> None:
    pack(Listed([(value, 0), (value, 1)]), tmp_path)
    found = PackedDataset(tmp_path, "train")
    assert torch.equal(found.__getitems__([0]).images[0], torch.arange(192, dtype=torch.uint8).reshape(3, 8, 8))
    assert found.classes == ("0", "1")


def test_grey_images_get_three_channels(tmp_path: Path) -> None:
    pack(Listed([(np.full((8, 8), 7, np.uint8), 0), (torch.full((1, 8, 8), 9, dtype=torch.uint8), 1)]), tmp_path)
    images = PackedDataset(tmp_path, "train").__getitems__([0, 1]).images
    assert images.flatten(1).unique(dim=1).tolist() == [[7], [9]]


def test_larger_images_are_fitted_with_their_boxes(tmp_path: Path) -> None:
    pack(Listed([{"image": image(0, 20, 40), "target": 0, "boxes": [(8, 0, 32, 20)]}]), tmp_path, size=10, fit="pad")
    assert PackedDataset(tmp_path, "train").boxes.coords.tolist() == [[2, 2, 8, 7]]
    pack(Listed([(image(0, 20, 40), 0)]), tmp_path / "default")
    assert PackedDataset(tmp_path / "default", "train").size == (224, 224)


def test_several_classes_an_image(tmp_path: Path) -> None:
    vectors = [torch.tensor([1, 0, 1]), np.array([0.0, 0, 0])]
    items = [
        {"image": image(i), "target": v, "boxes": [[0, 0, 2, 2]], "box_labels": [2]} for i, v in enumerate(vectors)
    ]
    manifest = pack(Listed(items, ["a", "b", "c"]), tmp_path).manifest
    assert manifest["multi_label"] and manifest["splits"]["train"]["class_counts"] == [1, 0, 1]
    found = PackedDataset(tmp_path, "train")
    assert found.target.tolist() == [[1, 0, 1], [0, 0, 0]] and found.boxes.labels.tolist() == [2, 2]


def test_splits_share_classes_and_a_second_call_writes_nothing(tmp_path: Path) -> None:
    train, test = Listed([(image(i), i % 2) for i in range(5)], ["a", "b"]), Listed([(image(9), 1)], ["a", "b"])
    pack(train, tmp_path, shard_size=2)
    pack(test, tmp_path, "test", shard_size=2)
    before, train.read = shards(tmp_path), []
    again = pack(train, tmp_path, shard_size=2)
    assert (again.written, again.reused) == (0, 3) and shards(tmp_path) == before
    assert train.read == [0, 2, 4]  # one of each shard is compared
    assert list(again.manifest["splits"]) == ["train", "test"] and len(PackedDataset(tmp_path, "test")) == 1


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    items: list[Any] = [(image(i), i % 2) for i in range(6)]
    with pytest.raises(KeyboardInterrupt):
        pack(Listed([*items[:5], raises(KeyboardInterrupt())]), tmp_path / "a", shard_size=2)
    with pytest.raises(DataError, match="preparing did not come to its end"):
        PackedDataset(tmp_path / "a", "train")
    assert not list((tmp_path / "a").rglob(".unfinished*"))
    packed = pack(Listed(items), tmp_path / "a", shard_size=2)
    pack(Listed(items), tmp_path / "b", shard_size=2)
    assert (packed.written, packed.reused) == (1, 2) and shards(tmp_path / "a") == shards(tmp_path / "b")


def test_items_that_cannot_be_read_are_skipped_and_listed(tmp_path: Path) -> None:
    items = [(image(0), 0), raises(OSError("no such\nfile")), (image(2), 1)]
    packed = pack(Listed(items), tmp_path)
    assert packed.manifest["splits"]["train"]["skipped"] == [1] and len(PackedDataset(tmp_path, "train")) == 2
    assert packed.problems.found == {"item that cannot be read": ["train, item 1: OSError: no such file"]}
    assert "train, item 1: OSError: no such file" in (tmp_path / "problems.txt").read_text()
    with pytest.raises(DataError, match="train, item 1: OSError"):
        pack(Listed(items), tmp_path / "strict", strict=True)
    with pytest.raises(DataError, match="11 of 12 items were passed over"):
        pack(Listed([(image(0), 0), *[raises(OSError("gone"))] * 11]), tmp_path / "few")


BOX = {"image": image(0), "target": 0}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (image(1), r"must be \(image, target\) or a mapping with image and target, got Image"),
        ((image(1), 0, 1), "got tuple of 3"),
        ({"picture": 1, "label": 0}, "must have image, got a mapping with picture, label"),
        (("a.png", 0), "image must be a PIL image, an array or a tensor, got str"),
        ((torch.full((3, 8, 8), -1.5), 0), r"float images must lie in 0..1, got -1.5..-1.5; normalization"),
        ((torch.zeros(3, 8, 8, dtype=torch.int64), 0), r"must be uint8, or float in 0..1, got int64 \[3, 8, 8\]"),
        ((torch.zeros(4, 8, 8), 0), r"must have the shape \[H,W\], \[H,W,3\] or \[3,H,W\], got float32 \[4, 8, 8\]"),
        ((image(1), 2), r"target must lie in 0..1, got 2"),
        ((image(1), -1), r"target must lie in 0..1, got -1"),
        ((image(1), "cat"), "target must be a class's number, or a vector of 0 and 1 for each class, got 'cat'"),
        ((image(1), 0.5), "target must be a class's number"),
        ((image(1), [0, 2]), r"got int64 \[2\]"),
        ((image(1), [0, 1, 1]), "target must have a 0 or 1 for each of 2 classes, got 3"),
        ((image(1), [0, 1]), "its target is a vector of 2, those before are a class"),
        ({**BOX, "group": 5}, r"group must lie in 0..1, got 5"),
        ({**BOX, "group": "sea"}, "group 'sea' is unknown: groups are land, water"),
        ({**BOX, "group": [1]}, r"group must be a number or a name, got \[1\]"),
        ({**BOX, "boxes": [[4, 0, 2, 2]]}, "inverted box"),
        ({**BOX, "boxes": [[40, 0, 50, 2]]}, "must lie in the image of 8×8 pixels"),
        ({**BOX, "boxes": [[0, 0, 2, 2]], "box_labels": [1, 1]}, r"a class for each of 1 boxes, got \[2\]"),
        (raises(IndexError("list index out of range")), "IndexError: list index out of range"),
    ],
)
def test_what_is_no_item_is_refused_by_its_number(tmp_path: Path, item: Any, message: str) -> None:
    good = {"image": image(0), "target": 0, "group": 0}
    with pytest.raises(DataError, match=message) as caught:
        pack(Listed([good, item], ["a", "b"]), tmp_path, groups=["land", "water"])
    assert "item 1" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists() and not list((tmp_path / "train").iterdir())


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    pack(Listed([(image(0), 0), (image(1), 1)], ["a", "b"]), tmp_path)
    with pytest.raises(DataError, match=r"the splits packed before have 2 \(a, b\), this one 3 \(a, b, c\)"):
        pack(Listed([(image(2), 2)], ["a", "b", "c"]), tmp_path, "test")
    with pytest.raises(DataError, match=r"test, item 0: target must lie in 0\.\.1, got 2"):
        pack(Listed([(image(2), 2)]), tmp_path, "test")
    with pytest.raises(DataError, match="begun with count=2, now 1"):
        pack(Listed([(image(0), 0)], ["a", "b"]), tmp_path)
    with pytest.raises(DataError, match="was packed of another data set: its item 0 differs"):
        pack(Listed([(image(5), 0), (image(1), 1)], ["a", "b"]), tmp_path)
    with pytest.raises(DataError, match="begun with size=8, now size=16"):
        pack(Listed([(image(0), 0), (image(1), 1)], ["a", "b"]), tmp_path, size=16)
    with pytest.raises(DataError, match="some items have a group and others none"):
        pack(Listed([{**BOX, "group": 1}, BOX]), tmp_path / "groups")
    with pytest.raises(ValueError, match="classes must be names, each once"):
        pack(Listed([BOX]), tmp_path / "names", classes=["a", "a"])
    with pytest.raises(TypeError, match="dataset must have a length and be read by number, got generator"):
        pack((x for x in ()), tmp_path / "generator")
    with pytest.raises(DataError, match="the data set is empty"):
        pack(Listed([]), tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(DataError, match=r"holds 'thesis.txt' and is not a prepared data set"):
        pack(Listed([BOX]), tmp_path / "other")


def test_names_of_torchvision_hugging_face_and_subsets(tmp_path: Path) -> None:
    class Named:
        names = ("x", "y")

    hugging = Listed([{"image": image(0), "label": 1}])
    hugging.features = {"image": object(), "label": Named()}  # type: ignore[attr-defined]
    assert pack(hugging, tmp_path / "hugging").manifest["classes"] == ["x", "y"]
    subset = torch.utils.data.Subset(Listed([(image(0), 0), (image(1), 1)], ["a", "b"]), [1])  # type: ignore[arg-type]
    assert pack(subset, tmp_path / "subset").manifest["classes"] == ["a", "b"]
    folder = pytest.importorskip("torchvision.datasets")
    (tmp_path / "src" / "cat").mkdir(parents=True)
    image(3).save(tmp_path / "src" / "cat" / "1.png")
    pack(folder.ImageFolder(tmp_path / "src"), tmp_path / "folder")
    assert PackedDataset(tmp_path / "folder", "train").paths() == [str(tmp_path / "src" / "cat" / "1.png")]


def test_progress_rises_to_one(tmp_path: Path) -> None:
    from debiaskd.data.packed.pack import pack as packed

    seen: list[tuple[str, float]] = []
    packed(
        Listed([(image(i), 0) for i in range(5)]),
        tmp_path,
        split="val",
        shard_size=2,
        progress=lambda *s: seen.append(s),
    )
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[-1] == 1 and {name for name, _ in seen} == {"val"}
    assert json.loads((tmp_path / "manifest.json").read_text())["source"]["kind"] == "pack"
