"""Cache the outputs of a frozen teacher for every training image on disk.

A distillation epoch then runs the student alone. Augmentation comes from a fixed number of views: view v of an image is
the same in every epoch e with e mod views = v, so that the teacher's outputs belong to the student's input.

    teacher-cache/view-00/00000/{feature,pooled,logits,…}.npy   512 images, whole once the folder has its name

bfloat16, which numpy does not know, is stored as the int16 of the same bits.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from debiaskd.data import Batch
from debiaskd.terms import Outputs
from debiaskd.training.batches import SplitLoader
from debiaskd.training.teacher_outputs import TeacherOutputs
from debiaskd.utils import files

#: Images a shard.
SHARD = 512
PARTS = ("feature", "pooled", "logits", "explanation", "explained")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ViewDraws:
    """Random numbers that depend on an image's number and view only, in the way that `Draws` depends on the step."""

    def __init__(self, seed: int, numbers: Tensor, view: int, device: torch.device) -> None:
        self.seed, self.numbers, self.view, self.device = seed, numbers, view, device

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """One for each image; most steps draw nothing."""
        seeds = ((self.seed * 1_000_003 + self.view) * 1_000_003 + n for n in self.numbers.tolist())
        return [torch.Generator().manual_seed(s * 2_654_435_761 % 2**63) for s in seeds]

    def rand(self, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        rows = [torch.rand(shape[1:], generator=generator) for generator in self.generators]
        joined = torch.stack(rows) if rows else torch.zeros(shape)
        return joined.to(device or self.device, non_blocking=True)


class CachedTeacher:
    """Teacher outputs read from the files of `write_cache`.

    Args:
        folder: of the cache.
        place: int64 [M], of each image's number in the prepared split its place in the cache; -1 for none.
        views: how many there are.
        width: of pooled features.
    """

    def __init__(self, folder: Path, place: Tensor, views: int, width: int) -> None:
        self.folder, self.place, self.width = folder, place, width
        self.views: int | None = views
        self.count = views
        self.device = torch.device("cpu")
        self.mapped: dict[tuple[int, int, str], NDArray[Any]] = {}

    def __call__(self, batch: Batch, epoch: int, numbers: Tensor | None = None) -> Outputs:
        assert batch.index is not None
        # Those on the device would have to be waited for.
        places = self.place[batch.index.cpu() if numbers is None else numbers]
        found = {part: self._rows(epoch % self.count, part, places) for part in PARTS}
        logits = found["logits"]
        assert logits is not None
        return Outputs(found["feature"], found["pooled"], logits, found["explanation"], found["explained"])

    def to(self, device: torch.device) -> CachedTeacher:
        self.device = device
        return self

    def _rows(self, view: int, part: str, places: Tensor) -> Tensor | None:
        wanted, rows = places.numpy(), None
        shard_of = wanted // SHARD
        for number in np.unique(shard_of).tolist():
            shard = self._shard(view, number, part)
            if shard is None:
                return None
            if rows is None:
                rows = np.empty((len(wanted), *shard.shape[1:]), shard.dtype)
            own = np.flatnonzero(shard_of == number)
            rows[own] = shard[wanted[own] % SHARD]
        if rows is None:
            raise ValueError("places must be at least one, got none")
        joined = torch.from_numpy(rows)
        joined = joined.view(torch.bfloat16).float() if joined.dtype == torch.int16 else joined
        if joined.dim() == 4:
            joined = joined.permute(0, 3, 1, 2)  # stored as convolutions lay it out
        return joined.to(self.device, non_blocking=True)

    def _shard(self, view: int, number: int, part: str) -> NDArray[Any] | None:
        key = (view, number, part)
        if key not in self.mapped:
            path = self.folder / f"view-{view:02d}" / f"{number:05d}" / f"{part}.npy"
            if not path.exists():
                return None
            self.mapped[key] = np.load(path, mmap_mode="r").view(np.ndarray)
        return self.mapped[key]


def write_cache(
    folder: Path,
    teacher: TeacherOutputs,
    loader: SplitLoader,
    *,
    seed: int,
    views: int,
    dtype: str,
    parts: tuple[str, ...],
    share: tuple[int, int] = (0, 1),
) -> Iterator[float]:
    """Write the missing shards and yield the fraction that is complete.

    Args:
        folder: of the cache.
        teacher: on the images' device.
        loader: augmented as in training; its order does not matter.
        seed, views: see `ViewDraws`.
        dtype: "fp32" or "bf16".
        parts: those of PARTS that are wanted.
        share: (rank, world_size): this process makes every world_size-th shard.
    """
    numbers = loader.split.numbers
    shards = -(-len(numbers) // SHARD)
    jobs = [(view, number) for view in range(views) for number in range(shards)]
    for done, (view, number) in enumerate(jobs):
        final = folder / f"view-{view:02d}" / f"{number:05d}"
        if done % share[1] == share[0] and not final.exists():
            final.parent.mkdir(parents=True, exist_ok=True)
            for unfinished in final.parent.glob(f"{files.TEMPORARY}{number:05d}-*"):
                shutil.rmtree(unfinished)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{files.TEMPORARY}{number:05d}-", dir=final.parent))
            rows = numbers[number * SHARD : (number + 1) * SHARD]
            _write(unfinished, teacher, loader, rows, seed, view, dtype, parts)
            unfinished.chmod(0o755)
            unfinished.rename(final)
            files.sync(final.parent)
        yield (done + 1) / len(jobs)


def _write(
    folder: Path,
    teacher: TeacherOutputs,
    loader: SplitLoader,
    rows: Tensor,
    seed: int,
    view: int,
    dtype: str,
    parts: tuple[str, ...],
) -> None:
    found: dict[str, list[Tensor]] = {part: [] for part in parts}
    for numbers in rows.split(loader.dataloader.batch_size):
        batch = loader.split.whole.__getitems__(numbers)
        placed = loader.transform(batch, ViewDraws(seed, numbers, view, loader.device))
        outputs = teacher(placed, view)
        for part in parts:
            value: Tensor = getattr(outputs, part)
            value = value.permute(0, 2, 3, 1) if value.dim() == 4 else value
            found[part].append((value.to(_DTYPES[dtype]) if value.is_floating_point() else value).cpu())
    for part, values in found.items():
        joined = torch.cat(values).contiguous()
        stored = joined.view(torch.int16) if joined.dtype == torch.bfloat16 else joined
        path = folder / f"{part}.npy"
        np.save(path, stored.numpy())
        files.sync(path)
