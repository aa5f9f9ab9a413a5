"""DataLoaders for training: sharding over ranks, order, and resuming within an epoch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from debiaskd.data.batch import collate
from debiaskd.data.packed import manifest
from debiaskd.data.packed.mapped import PackedDataset
from debiaskd.data.packed.streamed import StreamedDataset
from debiaskd.utils import checks


class EpochSampler(DistributedSampler[Any]):
    """A `DistributedSampler` whose ranks never share an image, and that can resume within an epoch.

    The order of an epoch depends only on `seed` and the epoch (`set_epoch`). Ranks take turns. With shuffling, all
    ranks get equally many images, so that up to `world_size - 1` images, different ones in every epoch, are left out;
    without, every image is read exactly once and some ranks may get one fewer.

    Args:
        dataset: only its length is used.
        shuffle, seed: see above.
        rank, world_size: this process, and the number of processes.
        weights: [N] >= 0 and not all 0; with shuffling, an epoch then draws N images with replacement, with
            probabilities proportional to the weights. None: each image once.

    Raises:
        TypeError, ValueError: arguments out of range.

    Example:
        >>> from debiaskd.data import EpochSampler
        >>> list(EpochSampler(range(5), shuffle=False, rank=1, world_size=2))
        [1, 3]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: Tensor | None = None,
    ) -> None:
        checks.flag("shuffle", shuffle)
        if weights is not None:
            checks.shape("weights", checks.floating("weights", weights), "[N]", [len(dataset)])
            if not shuffle:
                raise ValueError("weights must be left out without shuffle, got both")
        checks.integer("seed", seed)
        if checks.integer("world_size", world_size) < 1 or not 0 <= checks.integer("rank", rank) < world_size:
            raise ValueError(f"rank must lie in 0..world_size - 1, got rank={rank}, world_size={world_size}")
        super().__init__(dataset, world_size, rank, shuffle=shuffle, seed=seed, drop_last=shuffle)
        self.total, self.weights = len(dataset), weights
        self.position = self.start = 0
        self.wanted: int | None = None
        self.certain = False

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as in torch; Lightning Fabric's loaders call it automatically, counting from 0.

        Because they ignore a loaded state, an epoch before that of the state is refused when the iteration begins.
        `debiaskd.data.set_epoch` and `start_at` override the loaded state.
        """
        super().set_epoch(epoch)
        self.certain = self.certain and epoch == self.wanted
        self.wanted = epoch

    def __len__(self) -> int:
        world_size, rank = self.num_replicas, self.rank
        return self.total // world_size if self.shuffle else len(range(rank, self.total, world_size))

    def __iter__(self) -> Iterator[int]:
        self.position, self.start = self.start, 0
        # Where torch fills up with images of other ranks, what is too much is at the end.
        for index in self._order()[self.position : len(self)]:
            self.position += 1
            yield index

    def _order(self) -> list[int]:
        if self.weights is None:
            return list(super().__iter__())
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.multinomial(self.weights, self.total, replacement=True, generator=generator)
        return drawn[self.rank :: self.num_replicas].tolist()

    def start_at(self, epoch: int, position: int) -> None:
        """Start the next iteration at `position` images of this rank in `epoch`; overrides a loaded state of another
        epoch.
        """
        self.set_epoch(epoch)
        self.certain = True
        self.position = self.start = position

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state` was taken, unless another epoch was set.

        Raises:
            ValueError: the state is of another order (seed, number of images or ranks differ), or of a later epoch than
                the one that torch's `set_epoch` set.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(
                    f"state must be of the same data: it has {key}={state.get(key)!r}, here it is {value!r}"
                )
        # A DataLoader calls this only when it begins to iterate: which epoch that is may have been said since.
        same = self.wanted in (None, state["epoch"])
        if self.wanted is not None and self.wanted < state["epoch"] and not self.certain:
            raise ValueError(
                f"the state that was loaded is of epoch {state['epoch']}, and the sampler's set_epoch was called with "
                f"{self.wanted}, as Lightning Fabric's loaders do, which count from 0: say which epoch comes next with "
                "debiaskd.data.set_epoch(batches, epoch), before each"
            )
        self.epoch = state["epoch"] if self.wanted is None else self.wanted
        self.position = self.start = state["position"] if same else 0

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "pictures": self.total, "world_size": self.num_replicas, "shuffle": self.shuffle}


def loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> Any:
    """Make a DataLoader for a `PackedDataset`, a `StreamedDataset`, or any data set of (image, target, boxes).

    Call `set_epoch(batches, epoch)` before each epoch; the order depends only on seed and epoch. `state_dict()` and
    `load_state_dict()` contain the position within an epoch: the next iteration reads the rest of it or, if another
    epoch was set, all of that one. A `PackedDataset` needs no workers, because reading it is copying.

    Lightning Fabric's `setup_dataloaders` keeps the sampler; `set_epoch`, `Fabric.save` and `Fabric.load` work with the
    result. Make the loader after `launch()`, or pass `rank` and `world_size`. Without `set_epoch` Fabric counts epochs
    from 0, and resuming from the state of a later one is refused.

    For a `StreamedDataset` LitData takes the rank from torch.distributed, and the order depends on the numbers of ranks
    and workers as well.

    Args:
        dataset: see above; only a `StreamedDataset` may lack `__getitem__`.
        batch_size: images per batch.
        shuffle, seed, rank, world_size: see `EpochSampler`; None: those of torch.distributed if it is initialised.
        workers: number of processes that read.
        drop_last: drop an incomplete last batch.
        pin_memory: None: if there is a CUDA device.
        weights: see `EpochSampler`; not for a `StreamedDataset`.
        **options: further ones of torchdata's `StatefulDataLoader` (LitData's `StreamingDataLoader`).

    Returns:
        torchdata's `StatefulDataLoader`, or LitData's `StreamingDataLoader`.

    Raises:
        ModuleNotFoundError: torchdata is not installed (`pip install 'debiaskd[data]'`).
        TypeError, ValueError: arguments out of range.

    Example:
        >>> images = [(torch.zeros(3, 8, 8, dtype=torch.uint8), 1, None)] * 5
        >>> [len(batch) for batch in loader(images, 2, shuffle=True)]
        [2, 2, 1]
    """
    if checks.integer("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size}")
    if checks.integer("workers", workers) < 0:
        raise ValueError(f"workers must be an integer >= 0, got {workers}")
    checks.flag("drop_last", drop_last)
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    options |= {"batch_size": batch_size, "num_workers": workers, "drop_last": drop_last}
    if isinstance(dataset, StreamedDataset):
        if rank is not None or world_size is not None:
            raise ValueError("rank and world_size are not for a StreamedDataset: LitData asks torch.distributed")
        if weights is not None:
            raise ValueError("weights are not for a StreamedDataset, which reads in an order of its own")
        from litdata import StreamingDataLoader

        options["drop_last"] = drop_last or None  # by itself LitData knows that ranks need equally many
        reader = dataset.reader(shuffle=shuffle, seed=seed)
        return StreamingDataLoader(reader, collate_fn=dataset.collate, pin_memory=pin, **options)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must have __getitem__ and __len__, got {type(dataset).__name__}")
    from torchdata.stateful_dataloader import StatefulDataLoader

    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given together, got rank={rank}, world_size={world_size}")
    if rank is None or world_size is None:
        rank, world_size = _distributed()
    sampler = EpochSampler(dataset, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, weights=weights)
    if pin and workers == 0 and isinstance(dataset, PackedDataset):
        packed = copy.copy(dataset)
        packed.pin_memory, pin = True, False  # copied once, from the file into pinned memory, rather than twice
        dataset = packed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # what torchdata calls, nobody here can help
        return StatefulDataLoader(dataset, sampler=sampler, collate_fn=collate, pin_memory=pin, **options)


def open_dataset(path: Path | str, split: str | None = None, **options: Any) -> PackedDataset | StreamedDataset:
    """Open a prepared data set with the class for its format.

    Args:
        path, split: see `PackedDataset`.
        **options: options of the class; annotated_fraction, seed, dilate and masks are common to both.

    Raises:
        DataError: as for `PackedDataset`.
    """
    format = manifest.read(Path(path))["options"]["format"]
    return (PackedDataset if format == "npy" else StreamedDataset)(path, split, **options)


def set_epoch(batches: Any, epoch: int) -> None:
    """Set the epoch, counted from 0, of the next iteration of a DataLoader that `loader` returned.

    After `load_state_dict` with a state of this epoch the iteration resumes; otherwise it starts from the beginning.
    The result of `Fabric.setup_dataloaders` is accepted too; without `set_epoch` it counts its own iterations.

    Raises:
        TypeError, ValueError: the epoch is not an integer >= 0, or the DataLoader was not made by `loader`.
    """
    if checks.integer("epoch", epoch) < 0:
        raise ValueError(f"epoch must be an integer >= 0, got {epoch}")
    if hasattr(batches, _FABRICS_COUNT):
        setattr(batches, _FABRICS_COUNT, epoch)
    inner = getattr(batches, "_dataloader", batches)
    sampler = getattr(inner, "sampler", None)
    if isinstance(sampler, EpochSampler):
        sampler.set_epoch(epoch)
        sampler.certain = True
    elif not hasattr(inner, "current_epoch"):
        raise TypeError(f"batches must be what debiaskd.data.loader returned, got {type(inner).__name__}")
    elif not (inner.restore and inner.current_epoch == epoch + 1):  # LitData counts from 1 as it begins
        inner.restore, inner.current_epoch = False, epoch


#: Where a loader of Lightning Fabric's keeps the epoch that it gives to the sampler as it begins to iterate.
_FABRICS_COUNT = "_num_iter_calls"


def _distributed() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
