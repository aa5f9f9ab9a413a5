"""Loading what was prepared: ranks, order, going on, and the same through LitData."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

pytest.importorskip("PIL", reason="images are prepared with pillow")

import data_trees as trees

from debiaskd.data import (
    DataError,
    EpochSampler,
    PackedDataset,
    StreamedDataset,
    loader,
    open_dataset,
    prepare,
    set_epoch,
)

COUNT = 23


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images in five shards, one of which had a bad image in it; image i has i % 3 boxes."""
    root = tmp_path_factory.mktemp("packed")
    src = trees.many(root / "src", COUNT)
    prepare("coco", src, root / "out", size=20, shard_size=5)
    return root / "out"


@pytest.fixture(scope="module")
def streamed(prepared: Path) -> Path:
    pytest.importorskip("litdata", reason="needs the data extra")
    out = prepared.parent / "streamed"
    prepare("coco", prepared.parent / "src", out, size=20, shard_size=5, format="litdata")
    return out


# -- ranks, order, going on ----------------------------------------------------------------------------------------


def numbers(batches: Any) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [number for batch in numbers(batches) for number in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 30])
def test_ranks_do_not_overlap(world_size: int) -> None:
    for shuffle in (False, True):
        parts = []
        for rank in range(world_size):
            sampler = EpochSampler(range(COUNT), shuffle=shuffle, seed=4, rank=rank, world_size=world_size)
            parts.append(list(sampler))
            assert len(parts[-1]) == len(sampler)
        together = [number for part in parts for number in part]
        assert len(set(together)) == len(together)
        if shuffle:
            assert {len(part) for part in parts} == {COUNT // world_size}
        else:
            assert sorted(together) == list(range(COUNT))


def test_order_depends_on_seed_and_epoch_alone(prepared: Path) -> None:
    pytest.importorskip("torchdata", reason="needs the data extra")
    data = PackedDataset(prepared)

    def order(seed: int, epoch: int, **options: Any) -> list[int]:
        made = loader(data, 4, shuffle=True, seed=seed, **options)
        made.sampler.set_epoch(epoch)
        return flat(made)

    first = order(1, 1)
    assert sorted(first) == list(range(COUNT))
    assert order(1, 1) == order(1, 1, workers=2) == first
    assert order(1, 2) != first
    assert order(5, 1) != first
    torch.manual_seed(99)
    assert order(1, 1) == first
    assert flat(loader(data, 4)) == list(range(COUNT))
    # All ranks together read what one would, in turns.
    ranks = [order(1, 1, rank=rank, world_size=2) for rank in range(2)]
    assert [number for pair in zip(*ranks) for number in pair] == first[: COUNT // 2 * 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_within_an_epoch(prepared: Path, workers: int) -> None:
    pytest.importorskip("torchdata", reason="needs the data extra")
    data = PackedDataset(prepared)

    def made() -> Any:
        return loader(data, 4, shuffle=True, seed=7, workers=workers)

    whole = made()
    whole.sampler.set_epoch(3)
    expected = numbers(whole)
    begun = made()
    begun.sampler.set_epoch(3)
    iterator = iter(begun)
    seen = [next(iterator).index.tolist() for _ in range(2)]
    state = pickle.loads(pickle.dumps(begun.state_dict()))
    del iterator
    resumed = made()
    resumed.load_state_dict(state)
    assert seen + numbers(resumed) == expected
    resumed.sampler.set_epoch(4)
    whole.sampler.set_epoch(4)
    assert numbers(resumed) == numbers(whole)  # the epoch after is whole again


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_that_was_over_when_it_was_saved(prepared: Path, workers: int) -> None:
    pytest.importorskip("torchdata", reason="needs the data extra")
    whole = loader(PackedDataset(prepared), 4, shuffle=True)
    whole.sampler.set_epoch(1)
    following = numbers(whole)
    resumed = loader(PackedDataset(prepared), 4, shuffle=True, workers=workers)
    saved = loader(PackedDataset(prepared), 4, shuffle=True, workers=workers)
    _ = numbers(saved)
    state = saved.state_dict()
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(1)
    assert numbers(resumed) == following


def test_ranks_of_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchdata", reason="needs the data extra")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    (batch,) = loader(Plain(), 5)
    assert batch.target.tolist() == [1, 3]


def test_sampler_of_other_data_is_refused() -> None:
    state = EpochSampler(range(5), seed=1).state_dict()
    for other in (
        EpochSampler(range(6), seed=1),
        EpochSampler(range(5), seed=2),
        EpochSampler(range(5), shuffle=False),
        EpochSampler(range(5), seed=1, world_size=2),
    ):
        with pytest.raises(ValueError, match="state must be of the same data: it has"):
            other.load_state_dict(state)


class Plain(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> tuple[Tensor, int, list[list[int]]]:
        return torch.full((3, 8, 8), i, dtype=torch.uint8), i, [[0, 0, i + 1, 4]]


def test_any_data_set_works_without_preparing() -> None:
    pytest.importorskip("torchdata", reason="needs the data extra")
    from debiaskd.data import Augment

    batches = list(loader(Plain(), 2, shuffle=True, seed=1))
    assert sorted(number for batch in batches for number in batch.target.tolist()) == list(range(5))
    assert all(torch.equal(b.boxes.coords[:, 2] - 1, b.target.int()) for b in batches)
    assert Augment(6)(batches[0]).images.shape == (2, 3, 6, 6)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: loader(Plain(), 0), ValueError, "batch_size must be an integer >= 1, got 0"),
        (lambda: loader(Plain(), 2, workers=-1), ValueError, "workers must be an integer >= 0, got -1"),
        (lambda: loader(iter([]), 2), TypeError, "dataset must have __getitem__ and __len__"),  # type: ignore[arg-type]
        (lambda: loader(Plain(), 2, rank=0), ValueError, "rank and world_size must be given together"),
        (lambda: loader(Plain(), 2, rank=2, world_size=2), ValueError, "rank must lie in 0"),
        (lambda: EpochSampler(Plain(), seed=0.5), TypeError, "seed must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_loader_bad_arguments(call: Any, kind: type[Exception], message: str) -> None:
    pytest.importorskip("torchdata", reason="needs the data extra")
    with pytest.raises(kind, match=message):
        call()


# -- LitData -------------------------------------------------------------------------------------------------------


def test_litdata_holds_the_same_samples(prepared: Path, streamed: Path) -> None:
    options: dict[str, Any] = {"annotated_fraction": 0.5, "seed": 3, "dilate": 0.25}
    packed, stream = PackedDataset(prepared, **options), StreamedDataset(streamed, **options)
    assert stream.reader().batch_decode == 0  # or every sample is decoded with hundreds of others
    assert len(stream) == len(packed)
    assert (stream.classes, stream.size, stream.multi_label) == (packed.classes, packed.size, packed.multi_label)
    expected, got = list(loader(packed, 5)), list(loader(stream, 5))
    assert len(expected) == len(got)
    for a, b in zip(expected, got):
        assert torch.equal(a.images, b.images)
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.target, b.target) and a.target.dtype == b.target.dtype
        assert torch.equal(a.index, b.index)
        assert b.groups is None and b.ignore is None
        for name in ("coords", "offsets", "labels", "annotated"):
            left, right = getattr(a.boxes, name), getattr(b.boxes, name)
            assert torch.equal(left, right) and left.dtype == right.dtype
    assert [target.tolist() for _, target, _ in stream] == packed.target.tolist()


def test_litdata_shuffles_and_goes_on(streamed: Path) -> None:
    def made() -> Any:
        return loader(StreamedDataset(streamed), 4, shuffle=True, seed=1)

    expected = numbers(made())
    assert sorted(number for batch in expected for number in batch) == list(range(COUNT))
    assert expected != [list(range(i, min(i + 4, COUNT))) for i in range(0, COUNT, 4)]
    begun = made()
    iterator = iter(begun)
    seen = [next(iterator).index.tolist() for _ in range(2)]
    state = begun.state_dict()
    resumed = made()
    resumed.load_state_dict(state)
    assert seen + numbers(resumed) == expected


@pytest.mark.parametrize("format", ["npy", "litdata"])
def test_epochs_are_set_alike_for_both_formats(prepared: Path, streamed: Path, format: str) -> None:
    pytest.importorskip("torchdata", reason="needs the data extra")
    path = prepared if format == "npy" else streamed

    def order(batches: Any, epoch: int) -> list[list[int]]:
        set_epoch(batches, epoch)
        return numbers(batches)

    def made() -> Any:
        return loader(open_dataset(path), 4, shuffle=True, seed=2)

    batches = made()
    orders = [order(batches, epoch) for epoch in range(3)]
    assert all(sorted(n for batch in o for n in batch) == list(range(COUNT)) for o in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [order(made(), epoch) for epoch in (2, 0)] == [orders[2], orders[0]]
    begun = made()
    set_epoch(begun, 1)
    iterator = iter(begun)
    _ = [next(iterator) for _ in range(2)]
    state = begun.state_dict()
    for epoch, expected in ((1, orders[1][2:]), (2, orders[2])):  # goes on; begins another
        resumed = made()
        resumed.load_state_dict(state)
        assert order(resumed, epoch) == expected
    with pytest.raises(ValueError, match="epoch must be an integer >= 0, got -1"):
        set_epoch(batches, -1)


@pytest.mark.parametrize("format", ["npy", "litdata"])
def test_epochs_and_states_go_through_lightning_fabric(
    prepared: Path, streamed: Path, tmp_path: Path, format: str
) -> None:
    """Its loaders count their own iterations and give that to the sampler, whatever was set before."""
    pytest.importorskip("torchdata", reason="needs the data extra")
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    path = prepared if format == "npy" else streamed

    def made() -> Any:
        return loader(open_dataset(path), 4, shuffle=True, seed=2)

    orders = []
    for epoch in range(4):
        alone = made()
        set_epoch(alone, epoch)
        orders.append(numbers(alone))
    wrapped = fabric.setup_dataloaders(made())
    for epoch in (2, 0, 3):
        set_epoch(wrapped, epoch)
        assert numbers(wrapped) == orders[epoch]
    counted = fabric.setup_dataloaders(made())
    if format == "npy":
        assert [numbers(counted) for _ in range(2)] == orders[:2], "its own count, where none was set"
    begun = made()
    set_epoch(begun, 2)
    iterator = iter(begun)
    _ = [next(iterator) for _ in range(2)]
    state = begun.state_dict()
    for epoch, expected in ((2, orders[2][2:]), (3, orders[3]), (1, orders[1])):  # goes on; begins another
        resumed = made()
        resumed.load_state_dict(state)
        resumed = fabric.setup_dataloaders(resumed)
        set_epoch(resumed, epoch)
        assert numbers(resumed) == expected
    if format == "npy":
        wrapped = fabric.setup_dataloaders(made())
        set_epoch(wrapped, 2)
        iterator = iter(wrapped)
        _ = [next(iterator) for _ in range(2)]
        fabric.save(tmp_path / "state.ckpt", {"batches": wrapped})
        resumed = fabric.setup_dataloaders(made())
        fabric.load(tmp_path / "state.ckpt", {"batches": resumed})
        set_epoch(resumed, 2)
        assert numbers(resumed) == orders[2][2:]
        forgotten = made()
        forgotten.load_state_dict(state)
        with pytest.raises(ValueError, match=r"of epoch 2, .* called with 0, .* say which epoch comes next"):
            numbers(fabric.setup_dataloaders(forgotten))


def test_what_has_no_epochs_of_ours_is_refused() -> None:
    with pytest.raises(TypeError, match=r"what debiaskd.data.loader returned, got DataLoader"):
        set_epoch(torch.utils.data.DataLoader([1, 2]), 1)


def test_litdata_groups_and_areas_to_be_ignored(tmp_path: Path) -> None:
    pytest.importorskip("litdata", reason="needs the data extra")
    prepare("waterbirds", trees.waterbirds(tmp_path / "birds"), tmp_path / "b", size=10, format="litdata")
    (batch,) = loader(StreamedDataset(tmp_path / "b", "train"), 3)
    assert batch.groups.tolist() == [0, 3, 1]
    assert batch.target.tolist() == [0, 1, 0]
    assert batch.target.dtype == torch.int64
    prepare("coco", trees.coco(tmp_path / "coco"), tmp_path / "c", size=10, format="litdata", crowd="mask")
    (batch,) = loader(StreamedDataset(tmp_path / "c"), 5)
    assert batch.ignore.mask((10, 10)).sum((1, 2)).tolist() == [0, 100, 0, 0, 0]


def test_litdata_goes_on_where_it_was(streamed: Path, tmp_path: Path) -> None:
    src, out = streamed.parent / "src", tmp_path / "out"
    prepare("coco", src, out, size=20, shard_size=5, format="litdata")
    (out / "manifest.json").unlink()
    (out / "train2017" / "index.json").unlink()
    (out / "train2017" / "00002.json").unlink()  # as if it had ended between the chunk and its being declared whole
    stamp = (out / "train2017" / "chunk-0-1.bin").stat().st_mtime_ns
    again = prepare("coco", src, out, size=20, shard_size=5, format="litdata")
    assert (again.written, again.reused) == (1, 4)
    assert (out / "train2017" / "chunk-0-1.bin").stat().st_mtime_ns == stamp
    assert flat(loader(StreamedDataset(out), 4)) == list(range(COUNT))


def test_each_format_by_its_own_reader(prepared: Path, streamed: Path) -> None:
    with pytest.raises(DataError, match="prepared with format 'litdata', which StreamedDataset reads"):
        PackedDataset(streamed)
    with pytest.raises(DataError, match="prepared with format 'npy', which PackedDataset reads"):
        StreamedDataset(prepared)
    assert isinstance(open_dataset(prepared), PackedDataset)
    assert isinstance(open_dataset(streamed, "train2017", dilate=0.1), StreamedDataset)
    with pytest.raises(ValueError, match="rank and world_size are not for a StreamedDataset"):
        loader(StreamedDataset(streamed), 4, rank=0, world_size=1)
