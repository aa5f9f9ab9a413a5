"""Prepared images in LitData's chunks, read by index in any order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.packed.mapped import PackedDataset, inspect
from debiaskd.data.sources.records import DataError
from debiaskd.utils import files

#: Chunks that are fetched at a time.
FETCHES = 8


class ChunkedDataset(PackedDataset):
    """A split written by `debiaskd prepare --format litdata`, read by index. Recipes use it.

    It behaves like a `PackedDataset`: the same images have the same indices, targets, groups and boxes, samplers and
    DataLoaders choose the order, and pixels stay on the disk. `StreamedDataset` reads the same files sequentially, in
    LitData's order.

    Args:
        path: the folder that was prepared.
        split, annotated_fraction, seed, dilate, jitter, masks, verify, pin_memory: as for `PackedDataset`.
        url: where the split's chunks are, if they are not all below `path`: any location that LitData reads, such as
            "s3://bucket/coco-224/train2017". All files but `chunk-*.bin` must be below `path`. A missing chunk is
            downloaded when an image of it is first requested, compared with its checksum, and kept there; only one of
            several processes downloads it.

    Raises:
        ModuleNotFoundError: LitData is not installed (`pip install 'debiaskd[data]'`).
        DataError: as for `PackedDataset`; prepared by a version that wrote no annotation arrays; no disk space for the
            chunks; or, later, a chunk cannot be downloaded or has another checksum.
        TypeError, ValueError: arguments out of range.

    Example:
        >>> dataset = ChunkedDataset("coco-224", "train2017", url="s3://bucket/coco-224/train2017")  # doctest: +SKIP
        >>> dataset.__getitems__([3, 1, 2]).images.shape  # doctest: +SKIP
        torch.Size([3, 3, 224, 224])
    """

    format = "litdata"

    def __init__(
        self,
        path: Path | str,
        split: str | None = None,
        *,
        url: str | None = None,
        annotated_fraction: float = 1.0,
        seed: int = 0,
        dilate: float = 0.0,
        jitter: float = 0.0,
        masks: bool = False,
        verify: bool = False,
        pin_memory: bool = False,
    ) -> None:
        import litdata  # noqa: F401  # before hours of training rather than at their first image

        if url is not None and (not isinstance(url, str) or not url):
            raise ValueError(f"url must be None or say where the chunks lie, got {url!r}")
        self.url = None if url is None else url.rstrip("/")
        self._reader: tuple[int, Any] | None = None
        super().__init__(
            path,
            split,
            annotated_fraction=annotated_fraction,
            seed=seed,
            dilate=dilate,
            jitter=jitter,
            masks=masks,
            verify=verify,
            pin_memory=pin_memory,
        )

    def _inspect(self, parts: Sequence[dict[str, Any]], verify: bool) -> None:
        folder = self.path / self.split
        self._chunks: list[tuple[Path, dict[str, Any]]] = []
        first = []
        for part, start in zip(parts, self._starts):
            marker, columns = folder / f"{part['name']}.json", f"{part['name']}/"
            if f"{columns}target.npy" not in part["files"]:
                raise DataError(
                    f"{self.path}: prepared by a version whose LitData format recipes cannot read; run the same "
                    "`debiaskd prepare` again, which adds what is missing"
                )
            chunks = {name: known for name, known in part["files"].items() if not name.startswith(columns)}
            looked_at = {name: known for name, known in part["files"].items() if name not in chunks}
            for name, known in chunks.items():
                self._chunks.append((folder / name, known))
                first.append(start)
                if self.url is None and not (folder / name).exists():
                    raise DataError(
                        f"{folder / name}: missing; say where it lies (url), or remove {marker} and run the same "
                        "`debiaskd prepare` again"
                    )
                if self.url is None or _whole(folder / name, known):
                    looked_at[name] = known
            inspect(folder, looked_at, verify, marker)
        self._first = np.array(first, np.int64)
        self._here = np.array([_whole(*chunk) for chunk in self._chunks], np.bool_)
        self._check_room()

    def _check_room(self) -> None:
        missing = sum(known["bytes"] for (_, known), here in zip(self._chunks, self._here) if not here)
        room = shutil.disk_usage(self.path).free
        if missing > room:
            raise DataError(
                f"{self.path}: has room for {room / 1e9:.1f} GB, and {missing / 1e9:.1f} GB are to be fetched from "
                f"{self.url}"
            )

    def _read(self, rows: NDArray[np.uint8], numbers: NDArray[np.int64]) -> None:
        from litdata.streaming.sampler import ChunkedIndex

        chunk_of = np.searchsorted(self._first, numbers, side="right") - 1
        if not self._here.all():
            self._fetch(np.unique(chunk_of))
        stream = self._stream()
        for row, number, chunk in zip(rows, numbers.tolist(), chunk_of.tolist()):
            # Of a number alone LitData looks for the chunk by going through all of them.
            row[...] = stream[ChunkedIndex(index=number, chunk_index=chunk)]["image"]

    def _stream(self) -> Any:
        """LitData's reader of this process: one that another process began shares its files' positions with that."""
        if self._reader is None or self._reader[0] != os.getpid():
            import litdata

            # One image is decoded for one that is asked for, and every chunk stays mapped as far as memory allows:
            # by itself LitData decodes hundreds, and closes a chunk as soon as another is read.
            options = {"batch_decode": 0, "max_pre_download": max(2, len(self._chunks))}
            self._reader = os.getpid(), litdata.StreamingDataset(str(self.path / self.split), **options)
        return self._reader[1]

    def _fetch(self, chunks: NDArray[np.int64]) -> None:
        wanted = chunks[~self._here[chunks]].tolist()
        if not wanted:
            return
        assert self.url is not None
        with ThreadPoolExecutor(min(FETCHES, len(wanted))) as pool:
            for _ in pool.map(lambda chunk: fetch(str(self.url), *self._chunks[chunk]), wanted):
                pass
        self._here[wanted] = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_reader": None}


def fetch(url: str, file: Path, known: dict[str, Any]) -> None:
    """`file`, of the length and checksum that are `known`, from the folder `url`, whole or not at all.

    Raises:
        DataError: it cannot be fetched, or is another one there.
        OSError: it cannot be written.
    """
    from filelock import FileLock
    from litdata.streaming.downloader import get_downloader

    source, lock = f"{url}/{file.name}", file.with_name(f"{files.TEMPORARY}{file.name}.turn")

    def fill(unfinished: Path) -> None:
        unfinished.unlink(missing_ok=True)  # of a process that was killed
        try:
            get_downloader(url, str(file.parent), []).download_file(source, str(unfinished))
        except Exception as error:  # every store's client has its own
            reason = " ".join(str(error).split())
            raise DataError(f"{source}: cannot be fetched ({type(error).__name__}: {reason})") from None
        if not _whole(unfinished, known) or files.sha256(unfinished) != known["sha256"]:
            raise DataError(f"{source}: missing, cut short, or not what {file.parent.parent} was prepared with")

    with FileLock(lock):
        if not _whole(file, known):
            files.write(file, fill)
        lock.unlink(missing_ok=True)  # whoever waits for it, or rebuilds it, finds the file


def _whole(file: Path, known: dict[str, Any]) -> bool:
    try:
        return file.stat().st_size == int(known["bytes"])
    except FileNotFoundError:
        return False
