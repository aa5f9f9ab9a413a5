"""The masks of a prepared split, mapped into memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from debiaskd.boxes import Boxes
from debiaskd.data.packed.jitter import jitter_masks, noise
from debiaskd.data.packed.reading import load
from debiaskd.masks import Masks


class StoredMasks:
    """Masks by image number; labels are in memory, pixels stay in the files.

    Args:
        folders: of the shards.
        starts: number of the first image of each shard.
        side: of the stored images.
        annotated: bool [N], the images whose masks count.
    """

    def __init__(self, folders: Sequence[Path], starts: NDArray[np.int64], side: int, annotated: Tensor) -> None:
        self.folders, self.starts, self.side = folders, starts, side
        offsets = [load(folder / "mask_offsets.npy") for folder in folders]
        self.first = np.cumsum([0, *(int(o[-1]) for o in offsets)])
        self.offsets = np.concatenate([[0], *(o[1:] + first for o, first in zip(offsets, self.first))])
        self.labels = np.concatenate([np.zeros(0, np.int64), *(load(f / "mask_labels.npy") for f in folders)])
        self.known = (np.diff(self.offsets) > 0) & annotated.numpy()
        self.shares: Tensor | None = None
        self.words: list[NDArray[np.int32] | None] = [None] * len(folders)

    def renumber(self, places: Tensor) -> None:
        self.labels = places.numpy()[self.labels]

    def jitter(self, fraction: float, seed: int) -> None:
        """Move the sides of every mask by up to `fraction`; see `debiaskd.data.packed.jitter`."""
        self.shares = fraction * noise(len(self.labels), seed)

    def applied(self, boxes: Boxes, numbers: NDArray[np.int64]) -> Boxes:
        """The boxes of images `numbers`, with masks instead of boxes where there are masks."""
        known = self.known[numbers]
        rows = [np.arange(self.offsets[n], self.offsets[n + 1]) for n in numbers[known]]
        chosen = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        counts = np.where(known, self.offsets[numbers + 1] - self.offsets[numbers], 0)
        words = np.empty((len(chosen), -(-self.side // 32), self.side), np.int32)
        shard_of = np.searchsorted(self.first, chosen, side="right") - 1
        for row, number, shard in zip(words, chosen.tolist(), shard_of.tolist()):
            row[...] = self._shard(shard)[number - self.first[shard]]
        offsets = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int64))
        labels = torch.from_numpy(self.labels[chosen])
        masks = Masks(torch.from_numpy(words), self.side, offsets, labels)
        if self.shares is not None:
            masks = jitter_masks(masks, self.shares[torch.from_numpy(chosen)])
        return boxes.without(torch.from_numpy(known)).with_masks(masks)

    def _shard(self, shard: int) -> NDArray[np.int32]:
        words = self.words[shard]
        if words is None:
            words = self.words[shard] = load(self.folders[shard] / "masks.npy", mapped=True)
        return words

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "words": [None] * len(self.folders)}  # another process maps the files itself
