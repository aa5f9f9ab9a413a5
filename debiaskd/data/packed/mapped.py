"""Prepared images, mapped into memory: reading a batch copies its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from debiaskd.boxes import Boxes
from debiaskd.data.batch import Batch
from debiaskd.data.packed import manifest as manifests
from debiaskd.data.packed import shards
from debiaskd.data.packed.jitter import jitter_boxes
from debiaskd.data.packed.reading import load
from debiaskd.data.packed.stored_masks import StoredMasks
from debiaskd.data.sources.records import IGNORE, DataError
from debiaskd.utils import checks


class PackedDataset(Dataset[Any]):
    """A split written by `debiaskd prepare --format npy`. It works with all of torch's samplers and DataLoaders; see
    `loader`.

    Pixels stay in the files until they are read; annotations, some tens of bytes per image and box, are in memory.

    Args:
        path: the folder that was prepared.
        split: one of its splits; may be omitted if there is only one.
        annotated_fraction: this share of the images, in (0, 1] and at least one image, keeps its boxes; the others
            count as not annotated. The choice depends only on `seed` and the number of images.
        seed: see `annotated_fraction`.
        dilate: boxes are enlarged by this share of their width and height on every side, clipped to the image.
        verify: read all of the split's files and compare checksums.
        jitter: sides of boxes and masks are moved by up to this share of their width and height, by amounts that depend
            on `seed` alone and belong to each box; see `debiaskd.data.packed.jitter`.
        masks: images that were prepared with masks have those instead of their boxes, in what is read by number;
            `boxes`, of all images, stay boxes. Only for data that was prepared with masks, and without `dilate`.
        pin_memory: copy batches from the files directly into pinned memory. Not possible in worker processes; there use
            the DataLoader's `pin_memory`.

    Attributes:
        classes, groups: names; `groups` is empty if there are none.
        multi_label: whether targets are uint8 [N,K] instead of int64 [N].
        size: (height, width) of every image.
        boxes: boxes of all images. `target`, `group_ids`, `sizes` (original height and width): likewise.

    Raises:
        DataError: not prepared, not finished, of another version, without the split, or damaged.
        TypeError, ValueError: arguments out of range.

    Example:
        >>> dataset = PackedDataset("coco-224", "train2017", annotated_fraction=0.1)  # doctest: +SKIP
        >>> batch = dataset.__getitems__([3, 1, 2])  # doctest: +SKIP
        >>> batch.images.shape, len(batch.boxes)  # doctest: +SKIP
        (torch.Size([3, 3, 224, 224]), 3)
    """

    format = "npy"

    def __init__(
        self,
        path: Path | str,
        split: str | None = None,
        *,
        annotated_fraction: float = 1.0,
        seed: int = 0,
        dilate: float = 0.0,
        jitter: float = 0.0,
        masks: bool = False,
        verify: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.path = Path(path)
        manifest = manifests.read(self.path, self.format)
        self.split, facts = manifests.choose_split(self.path, manifest, split)
        self.classes, self.groups = tuple(manifest["classes"]), tuple(manifest["groups"])
        self.multi_label: bool = manifest["multi_label"]
        self.has_ignored = manifests.has_ignored(manifest)
        side = manifest["options"]["size"]
        self.size = (side, side)
        self.pin_memory = pin_memory
        self.count: int = facts["count"]
        self._folders = [self.path / self.split / shard["name"] for shard in facts["shards"]]
        self._starts = np.cumsum([0, *(shard["count"] for shard in facts["shards"])])
        self._inspect(facts["shards"], verify)
        self._pixels: list[NDArray[np.uint8] | None] = [None] * len(self._folders)
        self.target = self._column("target")
        self.group_ids = self._column("group") if self.groups else None
        self.sizes = self._column("size")
        annotated = self._column("annotated") & annotated_choice(self.count, annotated_fraction, seed)
        self.boxes, self.ignore = self._boxes(annotated)
        self.dilate = checks.number("dilate", dilate, minimum=0)
        manifests.check_masks(self.path, manifest, masks, dilate)
        self.masks = StoredMasks(self._folders, self._starts, side, annotated) if masks else None
        if checks.number("jitter", jitter, minimum=0):
            self.boxes = jitter_boxes(self.boxes, jitter, self.size, seed)
            if self.masks is not None:
                self.masks.jitter(jitter, seed)
        if dilate:
            self.boxes = self.boxes.dilate(dilate, self.size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Boxes]:
        """Return (image uint8 [3,H,W], target, boxes) of one image."""
        batch = self.__getitems__([index])
        return batch.images[0], batch.target[0], batch.boxes

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the images of these indices, in this order, as a `Batch`; a DataLoader calls it for a batch.

        Raises:
            IndexError: there is no such image.
        """
        index = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        numbers = index.numpy()
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.count):
            raise IndexError(f"indices must lie in 0..{self.count - 1}, got {numbers.min()}..{numbers.max()}")
        images = torch.empty(len(index), *self.size, 3, dtype=torch.uint8, pin_memory=self.pin_memory)
        self._read(images.numpy(), numbers)
        ignore = None if self.ignore is None else gather(self.ignore, numbers)
        groups = None if self.group_ids is None else self.group_ids[index]
        boxes = gather(self.boxes, numbers)
        if self.masks is not None:
            boxes = self.masks.applied(boxes, numbers)
        rest = Batch(images.permute(0, 3, 1, 2), self.target[index], boxes, groups, index, ignore)
        return rest.pin_memory() if self.pin_memory else rest

    def number_among(self, classes: Sequence[str]) -> None:
        """Renumber labels by the positions of their class names in `classes`, which contains those of this data set.

        Raises:
            ValueError: a class is not among them.
        """
        strangers = [name for name in self.classes if name not in classes]
        if strangers:
            raise ValueError(f"classes must have those of {self.path}, got none called {', '.join(strangers)}")
        places = torch.tensor([list(classes).index(name) for name in self.classes])
        if self.multi_label:
            target = self.target.new_zeros(len(self.target), len(classes))
            self.target = target.index_copy_(1, places, self.target)
        else:
            self.target = places[self.target]
        self.boxes = _renumbered(self.boxes, places)
        if self.masks is not None:
            self.masks.renumber(places)
        self.ignore = None if self.ignore is None else _renumbered(self.ignore, places)
        self.classes = tuple(classes)

    def regroup(self, group_ids: Tensor | None, groups: Sequence[str]) -> None:
        """Replace the groups that the data was prepared with.

        Args:
            group_ids: int64 [N] in [0, len(groups)), the group of each image; None: there are none.
            groups: names.
        """
        if group_ids is not None:
            checks.shape("group_ids", group_ids, "[N]", [self.count])
            if len(group_ids) and not 0 <= int(group_ids.min()) <= int(group_ids.max()) < len(groups):
                raise ValueError(f"group_ids must lie in [0, {len(groups)}), got {int(group_ids.max())}")
        self.group_ids, self.groups = group_ids, tuple(groups)

    def paths(self) -> list[str]:
        """Return the original path of each image, relative to the folder of its split's images."""
        return [str(name) for folder in self._folders for name in load(folder / "path.npy")]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": [None] * len(self._folders)}  # another process maps the files itself

    def _inspect(self, parts: Sequence[dict[str, Any]], verify: bool) -> None:
        for folder, shard in zip(self._folders, parts):
            inspect(folder, shard["files"], verify, folder)

    def _read(self, rows: NDArray[np.uint8], numbers: NDArray[np.int64]) -> None:
        """Into `rows` the pixels of these images."""
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        for row, shard, place in zip(rows, shard_of.tolist(), (numbers - self._starts[shard_of]).tolist()):
            row[...] = self._shard(shard)[place]

    def _shard(self, shard: int) -> NDArray[np.uint8]:
        mapped = self._pixels[shard]
        if mapped is None:
            mapped = load(self._folders[shard] / "images.npy", mapped=True)
            mapped = self._pixels[shard] = mapped.view(np.ndarray)  # memmap's own indexing takes longer
        return mapped

    def _column(self, name: str) -> Tensor:
        parts = [load(folder / f"{name}.npy") for folder in self._folders]
        if not parts:
            raise DataError(f"{self.path / self.split}: there are no images in it")
        used = [part for part in parts if len(part)] or parts[:1]  # of an empty one not even the shape is known
        return torch.from_numpy(np.concatenate(used))

    def _boxes(self, annotated: Tensor) -> tuple[Boxes, Boxes | None]:
        """The boxes of annotated images, and apart from them those of areas to be ignored."""
        counts = torch.cat([torch.from_numpy(load(folder / "offsets.npy")).diff() for folder in self._folders])
        image = torch.repeat_interleave(torch.arange(self.count), counts)
        flags = self._column("flags")
        rows = (self._column("coords"), self._column("labels"), flags, image)
        return select_boxes(*rows, annotated, self.has_ignored)


def _renumbered(boxes: Boxes, places: Tensor) -> Boxes:
    labels = None if boxes.labels is None else places[boxes.labels]
    return Boxes(boxes.coords, boxes.offsets, labels, boxes.annotated)


def gather(boxes: Boxes, numbers: NDArray[np.int64]) -> Boxes:
    """Select the boxes of a few of very many images; `boxes[numbers]` would read all of them and start threads."""
    offsets = boxes.offsets.numpy()
    starts = offsets[numbers]
    counts = offsets[numbers + 1] - starts
    made = np.concatenate([[0], counts.cumsum()])
    rows = np.arange(made[-1]) + np.repeat(starts - made[:-1], counts)
    labels = None if boxes.labels is None else torch.from_numpy(boxes.labels.numpy()[rows])
    annotated = torch.from_numpy(boxes.annotated.numpy()[numbers])
    return Boxes(torch.from_numpy(boxes.coords.numpy()[rows]), torch.from_numpy(made), labels, annotated)


def select_boxes(
    coords: Tensor, labels: Tensor, flags: Tensor, image: Tensor, annotated: Tensor, has_ignored: bool
) -> tuple[Boxes, Boxes | None]:
    """Make the boxes, and the areas to ignore (None without `has_ignored`), from packed rows and the image index of
    each row; none of either for images that are not annotated.
    """
    ignored = (flags & IGNORE) != 0

    def chosen(keep: Tensor) -> Boxes:
        counts = torch.bincount(image[keep], minlength=len(annotated))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Boxes(coords[keep], offsets, labels[keep], annotated)

    known = annotated[image]
    return chosen(known & ~ignored), chosen(known & ignored) if has_ignored else None


def annotated_choice(count: int, fraction: float, seed: int) -> Tensor:
    """bool [count]: `fraction` of the images, at least one."""
    if not 0 < checks.number("annotated_fraction", fraction) <= 1:
        raise ValueError(f"annotated_fraction must be a share in (0, 1], got {fraction!r}")
    if checks.integer("seed", seed) < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    chosen = torch.zeros(count, dtype=torch.bool)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen[order[: max(1, round(fraction * count))]] = True
    return chosen


def inspect(folder: Path, files: dict[str, dict[str, Any]], verify: bool, marker: Path) -> None:
    """Raises DataError unless the files have their lengths and, with `verify`, checksums; without `marker` their shard
    would be rebuilt."""
    for name, known in files.items():
        file = folder / name
        try:
            length = file.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{file}: missing; remove {marker} and run the same `debiaskd prepare` again") from None
        if length != known["bytes"] or (verify and shards.sha256(file) != known["sha256"]):
            raise DataError(f"{file}: damaged; remove {marker} and run the same `debiaskd prepare` again")
