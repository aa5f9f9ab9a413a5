"""Prepared images streamed by LitData, with object stores, caching and sharding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from debiaskd.boxes import Boxes
from debiaskd.data.batch import Batch
from debiaskd.data.packed import manifest as manifests
from debiaskd.data.packed.mapped import annotated_choice, select_boxes
from debiaskd.data.packed.reading import load
from debiaskd.data.packed.stored_masks import StoredMasks
from debiaskd.utils import checks


class StreamedDataset(IterableDataset[Any]):
    """A split written by `debiaskd prepare --format litdata`, streamed by `litdata.StreamingDataset`; see `loader`.

    Args:
        path: the prepared folder with its manifest.
        split, annotated_fraction, seed, dilate: as for `PackedDataset`, with the same choice of images.
        url: where the split's files are, if not below `path`, such as "s3://bucket/coco-224/train2017". The manifest is
            small: keep a copy at `path`.
        masks: as for `PackedDataset`. Masks are not part of the stream: the split's folders of `.npy` files, one bit a
            pixel, must be below `path`.
        **options: further ones of `litdata.StreamingDataset`, such as cache_dir and max_cache_size.

    Raises:
        ModuleNotFoundError: LitData is not installed (`pip install 'debiaskd[data]'`).
        DataError, TypeError, ValueError: as for `PackedDataset`.

    Example:
        >>> dataset = StreamedDataset("coco-224", "train2017", url="s3://bucket/coco-224/train2017")  # doctest: +SKIP
        >>> for batch in loader(dataset, 64, shuffle=True, workers=4):  # doctest: +SKIP
        ...     ...
    """

    def __init__(
        self,
        path: Path | str,
        split: str | None = None,
        *,
        url: str | None = None,
        annotated_fraction: float = 1.0,
        seed: int = 0,
        dilate: float = 0.0,
        masks: bool = False,
        **options: Any,
    ) -> None:
        self.path = Path(path)
        manifest = manifests.read(self.path, "litdata")
        self.split, facts = manifests.choose_split(self.path, manifest, split)
        self.classes, self.groups = tuple(manifest["classes"]), tuple(manifest["groups"])
        self.multi_label: bool = manifest["multi_label"]
        side = manifest["options"]["size"]
        self.size = (side, side)
        self.count: int = facts["count"]
        checks.flag("masks", masks)
        manifests.check_masks(self.path, manifest, masks, dilate)
        annotated = annotated_choice(self.count, annotated_fraction, seed)
        self.collate = StreamCollate(
            self.size,
            bool(self.groups),
            np.array(facts["skipped"], np.int64),
            annotated,
            checks.number("dilate", dilate, minimum=0),
            manifests.has_ignored(manifest),
            _stored(self.path / self.split, facts["shards"], side, annotated) if masks else None,
        )
        self.place, self.options = url or str(self.path / self.split), options
        self.stream = self.reader()

    def reader(self, *, shuffle: bool = False, seed: int = 0) -> Any:
        """A `litdata.StreamingDataset` of the stored samples, which `collate` makes batches of. Its order, if
        `shuffle`, depends on `seed`, the epoch, and how many ranks and workers read."""
        import litdata

        # What LitData chooses decodes a window of 256 samples for each one that is wanted: a tenth of the speed.
        options = {"batch_decode": 0, **self.options}
        return litdata.StreamingDataset(self.place, shuffle=shuffle, seed=seed, **options)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Boxes]]:
        """(image uint8 [3,H,W], target, boxes) of each image."""
        for sample in self.stream:
            batch = self.collate([sample])
            yield batch.images[0], batch.target[0], batch.boxes


def _stored(folder: Path, parts: Sequence[dict[str, Any]], side: int, annotated: Tensor) -> StoredMasks:
    """The masks of the columns beside the chunks.

    Raises:
        DataError: a file is not there.
    """
    folders = [folder / part["name"] for part in parts]
    starts = np.cumsum([0, *(part["count"] for part in parts)])
    known = np.concatenate([np.zeros(0, np.bool_), *(load(one / "annotated.npy") for one in folders)])
    return StoredMasks(folders, starts, side, torch.from_numpy(known) & annotated)


@dataclass(frozen=True)
class StreamCollate:
    """Collate stored samples into a `Batch`."""

    size: tuple[int, int]
    grouped: bool
    skipped: Any
    annotated: Tensor
    dilate: float
    has_ignored: bool
    masks: StoredMasks | None = None

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        def column(name: str) -> Any:
            return np.stack([np.asarray(sample[name]) for sample in samples])

        def joined(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([sample[name] for sample in samples]))

        position = column("position").astype(np.int64)
        index = torch.from_numpy(position - np.searchsorted(self.skipped, position))  # as if there were no bad files
        annotated = torch.from_numpy(column("annotated").astype(bool)) & self.annotated[index]
        counts = [len(sample["coords"]) for sample in samples]
        image = torch.from_numpy(np.repeat(np.arange(len(samples)), counts))
        rows = (joined("coords"), joined("labels"), joined("flags"), image)
        boxes, ignore = select_boxes(*rows, annotated, self.has_ignored)
        if self.dilate:
            boxes = boxes.dilate(self.dilate, self.size)
        if self.masks is not None:
            boxes = self.masks.applied(boxes, index.numpy())
        target = torch.from_numpy(column("target"))
        groups = torch.from_numpy(column("group").astype(np.int64)) if self.grouped else None
        images = torch.from_numpy(column("image")).permute(0, 3, 1, 2)
        return Batch(images, target, boxes, groups, index, ignore)
