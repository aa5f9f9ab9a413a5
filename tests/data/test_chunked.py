"""LitData's chunks read by number: the same as what is mapped into memory, here or fetched from where they lie."""

from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL", reason="images are prepared with pillow")
pytest.importorskip("litdata", reason="needs the data extra")
pytest.importorskip("torchdata", reason="needs the data extra")

import data_trees as trees
from litdata.streaming import downloader

from debiaskd.data import ChunkedDataset, DataError, PackedDataset, StreamedDataset, loader, prepare, set_epoch
from debiaskd.data.packed import chunked, shards
from debiaskd.utils import files

COUNT = 23


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images in six shards, the second without any that can be read; some have boxes, and some crowds."""
    root = tmp_path_factory.mktemp("chunked")
    trees.many(root / "src", COUNT + 5)
    annotations = root / "src" / "annotations" / "instances_train2017.json"
    annotations.write_text(annotations.read_text().replace('"iscrowd": 0', '"iscrowd": 1', 1))
    for i in range(5, 10):
        (root / "src" / "train2017" / f"{i:04d}.png").unlink()
    prepare("coco", root / "src", root / "npy", size=20, shard_size=5, crowd="mask")
    return root / "npy"


@pytest.fixture(scope="module")
def streamed(packed: Path) -> Path:
    prepare("coco", packed.parent / "src", packed.parent / "lit", size=20, shard_size=5, crowd="mask", format="litdata")
    return packed.parent / "lit"


@pytest.fixture
def far(streamed: Path, tmp_path: Path) -> Path:
    """All but the images, which lie elsewhere."""
    return Path(shutil.copytree(streamed, tmp_path / "far", ignore=shutil.ignore_patterns("*.bin", ".lock")))


def elsewhere(streamed: Path) -> str:
    return f"local:{streamed}/train2017"


def same(a: Any, b: Any) -> None:
    for name in ("images", "target", "index"):
        left, right = getattr(a, name), getattr(b, name)
        assert torch.equal(left, right) and left.dtype == right.dtype and left.stride() == right.stride()
    for left, right in ((a.boxes, b.boxes), (a.ignore, b.ignore)):
        for name in ("coords", "offsets", "labels", "annotated"):
            assert torch.equal(getattr(left, name), getattr(right, name))


# -- the same as npy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"annotated_fraction": 0.5, "seed": 3, "dilate": 0.25, "verify": True}])
def test_both_formats_hold_the_same(packed: Path, streamed: Path, options: dict[str, Any]) -> None:
    npy, lit = PackedDataset(packed, **options), ChunkedDataset(streamed, **options)
    assert len(lit) == len(npy) == COUNT and lit.paths() == npy.paths()
    assert (lit.classes, lit.size, lit.multi_label, lit.split) == (npy.classes, npy.size, npy.multi_label, npy.split)
    assert torch.equal(lit.target, npy.target) and torch.equal(lit.sizes, npy.sizes)
    assert lit.ignore is not None and int(lit.ignore.offsets[-1]) > 0
    for numbers in (range(COUNT), [22, 0, 7, 7, 4, 5], []):
        same(lit.__getitems__(numbers), npy.__getitems__(numbers))
    image, target, _ = lit[9]
    assert torch.equal(image, npy[9][0]) and torch.equal(target, npy[9][1])
    with pytest.raises(IndexError, match=r"indices must lie in 0\.\.22, got 0\.\.23"):
        lit.__getitems__([0, 23])


def test_streaming_reads_the_same_files(streamed: Path) -> None:
    data = ChunkedDataset(streamed)
    for batch in loader(StreamedDataset(streamed), 4):
        assert torch.equal(data.__getitems__(batch.index).images, batch.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_an_epoch_is_that_of_npy(packed: Path, streamed: Path, workers: int) -> None:
    def batches(data: Any) -> Any:
        return loader(data, 4, shuffle=True, seed=5, rank=1, world_size=2, workers=workers)

    lit = ChunkedDataset(streamed)
    assert lit.__getitems__([3]).images.any()  # workers begin with what this process had open
    mine, expected = batches(lit), batches(PackedDataset(packed))
    for epoch in (0, 1):
        for loading in (mine, expected):
            set_epoch(loading, epoch)
        found = list(mine)
        for a, b in zip(found, list(expected), strict=True):
            same(a, b)
        numbers = torch.cat([batch.index for batch in found]).tolist()
        assert len(numbers) == len(set(numbers)) == COUNT // 2


def test_another_process_opens_its_own(streamed: Path) -> None:
    data = ChunkedDataset(streamed)
    expected = data.__getitems__([4, 2])
    again = pickle.loads(pickle.dumps(data))
    assert again._reader is None
    same(again.__getitems__([4, 2]), expected)


# -- fetched ----------------------------------------------------------------------------------------------------------


def test_what_is_not_here_is_fetched_once_it_is_wanted(streamed: Path, far: Path) -> None:
    data, expected = ChunkedDataset(far, url=f"{elsewhere(streamed)}/"), ChunkedDataset(streamed)
    assert list(far.rglob("*.bin")) == []
    same(data.__getitems__([6, 5, 6]), expected.__getitems__([6, 5, 6]))
    assert [path.name for path in far.rglob("*.bin")] == ["chunk-0-2.bin"]  # of the second shard there is none
    same(data.__getitems__(range(COUNT)), expected.__getitems__(range(COUNT)))
    left = {path.name for path in far.rglob("*")} - {path.name for path in streamed.rglob("*")}
    assert left == set()
    again = ChunkedDataset(far, verify=True)  # nowhere else is asked any more
    same(again.__getitems__(range(COUNT)), expected.__getitems__(range(COUNT)))


def test_workers_fetch(streamed: Path, far: Path) -> None:
    batches = loader(ChunkedDataset(far, url=elsewhere(streamed)), 3, shuffle=True, workers=2)
    assert sorted(number for batch in batches for number in batch.index.tolist()) == list(range(COUNT))
    assert len(ChunkedDataset(far, verify=True)) == COUNT


def test_of_many_one_fetches(streamed: Path, far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    inner = downloader.LocalDownloaderWithCache.download_file

    def slow(self: Any, source: str, target: str) -> None:
        asked.append(Path(source).name)
        threading.Event().wait(0.1)
        inner(self, source, target)

    monkeypatch.setattr(downloader.LocalDownloaderWithCache, "download_file", slow)
    sets = [ChunkedDataset(far, url=elsewhere(streamed)) for _ in range(3)]
    threads = [threading.Thread(target=data.__getitems__, args=(range(COUNT),)) for data in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == ["chunk-0-0.bin", *(f"chunk-0-{i}.bin" for i in range(2, 6))]


def test_what_was_cut_short_is_fetched_anew(streamed: Path, far: Path) -> None:
    (far / "train2017" / "chunk-0-3.bin").write_bytes(b"half")
    (far / "train2017" / f"{files.TEMPORARY}chunk-0-0.bin").write_bytes(b"of one that was killed")
    found = ChunkedDataset(far, url=elsewhere(streamed)).__getitems__(range(COUNT))
    same(found, ChunkedDataset(streamed).__getitems__(range(COUNT)))


def test_what_cannot_be_fetched(streamed: Path, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    data = ChunkedDataset(far, url=f"local:{other}")
    with pytest.raises(DataError, match=r"other/chunk-0-0\.bin: cannot be fetched \(FileNotFoundError: .*exist"):
        data.__getitems__([0])
    content = (streamed / "train2017" / "chunk-0-0.bin").read_bytes()
    for wrong in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        (other / "chunk-0-0.bin").write_bytes(wrong)
        with pytest.raises(DataError, match=r"chunk-0-0\.bin: missing, cut short, or not what .*far was prepared with"):
            data.__getitems__([0])
        assert list(far.rglob("*.bin")) == []
    room = shutil.disk_usage(far)._replace(free=1000)
    monkeypatch.setattr(chunked.shutil, "disk_usage", lambda path: room)
    with pytest.raises(DataError, match=r"far: has room for 0\.0 GB, and 0\.0 GB are to be fetched from local:"):
        ChunkedDataset(far, url=elsewhere(streamed))
    with pytest.raises(ValueError, match="url must be None or say where the chunks lie, got ''"):
        ChunkedDataset(far, url="")


# -- what is wrong ----------------------------------------------------------------------------------------------------


def test_what_is_missing_or_damaged(streamed: Path, far: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"chunk-0-0\.bin: missing; say where it lies \(url\), or remove .*00000\.json"):
        ChunkedDataset(far)
    shutil.copytree(streamed, tmp_path / "b")
    column = tmp_path / "b" / "train2017" / "00003" / "target.npy"
    content = column.read_bytes()
    column.write_bytes(content[:-1] + b"\x07")
    assert len(ChunkedDataset(tmp_path / "b")) == COUNT
    with pytest.raises(DataError, match=r"00003/target\.npy: damaged; remove .*00003\.json and run the same"):
        ChunkedDataset(tmp_path / "b", verify=True)
    column.unlink()
    with pytest.raises(DataError, match=r"00003/target\.npy: missing; remove"):
        ChunkedDataset(tmp_path / "b", url=elsewhere(streamed))


def test_of_an_earlier_version_the_columns_are_added(packed: Path, streamed: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(streamed, tmp_path / "old"))
    manifest = shards.read_json(old / "manifest.json")
    for part in manifest["splits"]["train2017"]["shards"]:
        marker = old / "train2017" / f"{part['name']}.json"
        for facts in (part, shards.read_json(marker)):
            facts["files"] = {name: known for name, known in facts["files"].items() if name.endswith(".bin")}
        shards.write_json(marker, facts)
        shutil.rmtree(old / "train2017" / part["name"])
    shards.write_json(old / "manifest.json", manifest)
    assert len(list(loader(StreamedDataset(old), 4))) == 6  # which needs none
    with pytest.raises(DataError, match=r"old: prepared by a version .*; run the same `debiaskd prepare` again, which"):
        ChunkedDataset(old)
    done = prepare("coco", packed.parent / "src", old, size=20, shard_size=5, crowd="mask", format="litdata")
    assert (done.written, done.reused) == (6, 0)
    for name in ("manifest.json", "train2017/index.json", "train2017/chunk-0-4.bin"):
        assert (old / name).read_bytes() == (streamed / name).read_bytes()
    same(ChunkedDataset(old).__getitems__(range(COUNT)), PackedDataset(packed).__getitems__(range(COUNT)))
