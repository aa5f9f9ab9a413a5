"""Reading what was prepared: batches, partial annotation, damage."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

pytest.importorskip("PIL", reason="images are prepared with pillow")

import data_trees as trees

from debiaskd import Boxes
from debiaskd.data import Batch, DataError, PackedDataset, StreamedDataset, collate, loader, prepare
from debiaskd.data.packed import shards
from debiaskd.data.packed.mapped import gather

COUNT = 23


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images in five shards, one of which had a bad image in it; image i has i % 3 boxes."""
    root = tmp_path_factory.mktemp("packed")
    src = trees.many(root / "src", COUNT)
    prepare("coco", src, root / "out", size=20, shard_size=5)
    return root / "out"


# -- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_pictures_in_order(prepared: Path) -> None:
    data = PackedDataset(prepared)
    assert (len(data), data.size, data.classes, data.multi_label) == (COUNT, (20, 20), ("cat", "dog", "person"), True)
    order = [22, 0, 7, 7, 4, 5]
    batch = data.__getitems__(order)
    assert batch.images.shape == (6, 3, 20, 20)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.index is not None
    assert batch.index.tolist() == order
    assert batch.groups is None
    for i, number in enumerate(order):
        image, target, boxes = data[number]
        assert torch.equal(batch.images[i], image)
        assert torch.equal(batch.target[i], target)
        assert batch.boxes[i].coords.tolist() == boxes.coords.tolist()
        assert len(boxes.coords) == number % 3
    blue = batch.images[:, 2].float().mean((1, 2)).tolist()  # what tells the images apart
    assert blue == [number * 37 % 256 for number in order]


def test_samplers_loaders_and_subsets_of_torch(prepared: Path) -> None:
    data = PackedDataset(prepared)
    batches = list(DataLoader(data, batch_size=6, shuffle=True, collate_fn=collate))
    assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(COUNT))
    (batch,) = DataLoader(Subset(data, [3, 2]), batch_size=2, collate_fn=collate)
    assert batch.index.tolist() == [3, 2]
    assert [len(b) for _, _, b in data] == [1] * COUNT  # ends by itself


def test_wrong_numbers(prepared: Path) -> None:
    data = PackedDataset(prepared)
    for wrong in ([COUNT], [0, -1]):
        with pytest.raises(IndexError, match=r"indices must lie in 0\.\.22"):
            data.__getitems__(wrong)
    assert len(data.__getitems__([])) == 0


def test_in_another_process(prepared: Path) -> None:
    data = PackedDataset(prepared)
    _ = data[0]
    content = pickle.dumps(data)
    assert len(content) < 20_000  # pixels are not carried along
    assert torch.equal(pickle.loads(content)[3][0], data[3][0])


def test_batches_move_and_pin(prepared: Path) -> None:
    batch = PackedDataset(prepared).__getitems__([0, 1])
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.boxes.device.type, moved.groups) == ("meta", "meta", None)
    if torch.cuda.is_available():
        pinned = next(iter(loader(PackedDataset(prepared), 4)))
        assert pinned.images.is_pinned() and pinned.boxes.coords.is_pinned() and pinned.target.is_pinned()


def test_collate_of_any_samples() -> None:
    image = torch.zeros(3, 4, 4)
    batch = collate([(image, 1, [[0, 0, 2, 2]]), (image, 2, None), (image, 3, Boxes.from_lists([[]]))])
    assert batch.target.tolist() == [1, 2, 3]
    assert batch.boxes.annotated.tolist() == [True, False, True]
    assert collate(batch) is batch
    multi = collate([(image, torch.tensor([1, 0]), [])])
    assert multi.target.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("samples", "kind", "message"),
    [
        ([], ValueError, "samples must hold at least one"),
        (3, TypeError, "samples must be a sequence, got int"),
        ([3], TypeError, r"samples\[0\] must be \(image, target, boxes\), got int"),
        ([(1, 2)], TypeError, r"samples\[0\] must be \(image, target, boxes\), got 2 parts"),
        ([(1, 2, [])], TypeError, r"samples\[0\] image must be a torch.Tensor, got int"),
        ([(torch.zeros(4, 4), 2, [])], ValueError, r"samples\[0\] image must have shape \[3,H,W\]"),
        (
            [(torch.zeros(3, 4, 4), 2, []), (torch.zeros(3, 5, 4), 2, [])],
            ValueError,
            r"samples\[1\] image must have the",
        ),
        ([(torch.zeros(3, 4, 4), "cat", [])], TypeError, r"samples\[0\] target must be an integer"),
        ([(torch.zeros(3, 4, 4), 2, [[1, 2]])], ValueError, r"boxes\[0\] must have shape"),
        ([(torch.zeros(3, 4, 4), 2, Boxes.from_lists([[], []]))], ValueError, r"samples\[0\] boxes must be of one"),
    ],
)
def test_collate_of_something_else(samples: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        collate(samples)


# -- partial annotation, dilation ----------------------------------------------------------------------------------


def test_partial_annotation_is_fixed_by_the_seed(prepared: Path) -> None:
    some = PackedDataset(prepared, annotated_fraction=0.5, seed=1)
    again = PackedDataset(prepared, annotated_fraction=0.5, seed=1)
    other = PackedDataset(prepared, annotated_fraction=0.5, seed=2)
    kept = some.boxes.annotated
    assert int(kept.sum()) == round(COUNT / 2)
    assert torch.equal(kept, again.boxes.annotated)
    assert not torch.equal(kept, other.boxes.annotated)
    counts = torch.arange(COUNT) % 3
    assert torch.equal(some.boxes.offsets.diff(), counts * kept)
    assert torch.equal(some.target, PackedDataset(prepared).target)  # classes are known of all
    assert int(PackedDataset(prepared, annotated_fraction=0.01).boxes.annotated.sum()) == 1


def test_gathered_boxes_are_those_of_the_pictures() -> None:
    boxes = Boxes.from_lists(
        [[[0, 0, 2, 2], [1, 1, 3, 4]], None, [], [[2, 0, 3, 1]], [[0, 3, 4, 4]]], [[1, 0], [], [], [2], [3]]
    )
    for numbers in ([4, 1, 0], [3], [2, 2, 3, 0], []):
        found, expected = gather(boxes, np.array(numbers, np.int64)), boxes[numbers]
        for part in ("coords", "offsets", "labels", "annotated"):
            assert getattr(found, part).tolist() == getattr(expected, part).tolist(), part


def test_what_was_not_annotated_is_not_with_any_share(tmp_path: Path) -> None:
    prepare("waterbirds", trees.waterbirds(tmp_path / "src", boxes=False), tmp_path / "out", size=4, workers=1)
    for fraction in (0.5, 1.0):
        assert not PackedDataset(tmp_path / "out", "train", annotated_fraction=fraction).boxes.annotated.any()


def test_more_is_annotated_with_a_larger_share(prepared: Path) -> None:
    shares = [PackedDataset(prepared, annotated_fraction=f, seed=3).boxes.annotated for f in (0.1, 0.4, 1.0)]
    assert bool((shares[0] <= shares[1]).all()) and bool(shares[2].all())  # those of the smaller share stay


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_dilated_boxes(prepared: Path, fraction: float) -> None:
    plain, large = PackedDataset(prepared), PackedDataset(prepared, dilate=fraction)
    assert torch.equal(large.boxes.coords, plain.boxes.dilate(fraction, (20, 20)).coords)
    assert torch.equal(large.__getitems__([5, 2]).boxes.coords, large.boxes[[5, 2]].coords)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotated_fraction": 0}, r"annotated_fraction must be a share in \(0, 1\], got 0"),
        ({"annotated_fraction": 1.5}, "annotated_fraction must be a share"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"dilate": -0.1}, "dilate must be a finite number >= 0"),
        ({"split": "val"}, "no split 'val'; there are train2017"),
    ],
)
def test_bad_arguments(prepared: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedDataset(prepared, **options)


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_damage_is_named(copied: Path) -> None:
    file = copied / "train2017" / "00001" / "images.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    PackedDataset(copied)  # as long as before: only the checksum tells
    with pytest.raises(DataError, match=r"00001/images.npy: damaged; remove .*00001 and run the same"):
        PackedDataset(copied, verify=True)
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"images.npy: damaged"):
        PackedDataset(copied)
    file.unlink()
    with pytest.raises(DataError, match=r"images.npy: missing"):
        PackedDataset(copied)


def test_array_that_is_none(copied: Path) -> None:
    file = copied / "train2017" / "00001" / "target.npy"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(DataError, match=r"target.npy: missing or damaged"):
        PackedDataset(copied)


def test_manifests_that_are_none(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.json here; make it with"):
        PackedDataset(tmp_path / "nothing")
    manifest = json.loads((copied / "manifest.json").read_text())
    for change, message in (
        ({"version": 99}, "prepared in version 99, this reads 1"),
        ({"format": "x"}, "not that of"),
    ):
        (copied / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(DataError, match=message):
            PackedDataset(copied)
    (copied / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged; prepare again"):
        PackedDataset(copied)


def test_split_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    prepare("waterbirds", trees.waterbirds(tmp_path / "src"), tmp_path / "out", size=4)
    with pytest.raises(DataError, match="split must be given; there are train, val, test"):
        PackedDataset(tmp_path / "out")
    assert len(PackedDataset(tmp_path / "out", "val", verify=True)) == 3


def test_shard_in_which_all_was_bad(tmp_path: Path) -> None:
    src = trees.coco(tmp_path / "src", 4)
    for i in (0, 1):
        (src / "train2017" / f"{i:04d}.png").unlink()
    for format in ("npy", "litdata"):
        if format == "litdata":
            pytest.importorskip("litdata", reason="needs the data extra")
        prepare("coco", src, tmp_path / format, size=8, shard_size=2, format=format)
        data: Any = PackedDataset(tmp_path / format) if format == "npy" else StreamedDataset(tmp_path / format)
        assert [batch.index.tolist() for batch in loader(data, 4)] == [[0, 1]]
    assert PackedDataset(tmp_path / "npy", verify=True).paths() == ["0002.png", "0003.png"]
    assert np.load(tmp_path / "npy" / "train2017" / "00000" / "images.npy").shape == (0, 8, 8, 3)
    assert shards.read_json(tmp_path / "npy" / "manifest.json")["splits"]["train2017"]["count"] == 2


def test_batch_has_a_length() -> None:
    assert len(Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2), Boxes.from_lists([[], []]))) == 2


def test_labels_are_numbered_among_the_classes_of_another_data_set(tmp_path: Path) -> None:
    prepare("coco", trees.coco(tmp_path / "src"), tmp_path / "several", size=20, workers=1)
    prepare(
        "folder", trees.folder(tmp_path / "pets", boxes="dog/0.png,0,0,9,9,dog\n"), tmp_path / "one", size=20, workers=1
    )
    names = ["person", "dog", "zebra", "cat"]
    for name in ("several", "one"):
        data, as_it_was = PackedDataset(tmp_path / name), PackedDataset(tmp_path / name)
        data.number_among(names)
        assert data.classes == tuple(names)
        place = {old: names.index(label) for old, label in enumerate(as_it_was.classes)}
        batch, before = (one.__getitems__(range(len(one))) for one in (data, as_it_was))
        if data.multi_label:
            assert batch.target.shape == (len(data), 4) and batch.target.dtype == before.target.dtype
            for old, new in place.items():
                assert torch.equal(batch.target[:, new], before.target[:, old])
            assert not batch.target[:, 2].any()
        else:
            assert batch.target.tolist() == [place[old] for old in before.target.tolist()]
        assert batch.boxes.labels is not None and before.boxes.labels is not None
        assert batch.boxes.labels.tolist() == [place[old] for old in before.boxes.labels.tolist()]
        assert torch.equal(batch.boxes.coords, before.boxes.coords) and len(batch.boxes.coords)
        with pytest.raises(ValueError, match=r"classes must have those of .*, got none called zebra"):
            data.number_among(names[:2] + names[3:])
