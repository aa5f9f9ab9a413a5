"""Write one shard: decode and resize images, and write them with their boxes. Runs in worker processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from debiaskd.data import pixels
from debiaskd.data.packed import shards
from debiaskd.data.packed.fit_masks import fitted_masks
from debiaskd.data.packed.shards import Sample, Writer
from debiaskd.data.sources.records import DataError, Part, Problems
from debiaskd.utils.workers import begin_worker

#: Kinds of problems that cost boxes, not images.
OUTSIDE = "box outside of its image"
OTHER_SIZE = "image of another size than annotated, its boxes not used"


class StoppedError(Exception):
    """Another process asked for the end."""


@dataclass(frozen=True)
class Job:
    """What a process has to know to make one shard. `classes` counts them where an image may show several."""

    part: Part
    folder: Path
    index: int
    size: int
    fit: str
    format: str
    classes: int | None
    strict: bool

    @property
    def name(self) -> str:
        return f"{self.index:05d}"


def finished(folder: Path, name: str, format: str) -> dict[str, Any] | None:
    """The facts of a shard that is whole, or None, also for one that LitData can stream and recipes cannot train on:
    earlier versions wrote no columns beside the chunks.

    Raises:
        DataError: it was whole once: a file of it is missing or has another length.
    """
    place = folder / name if format == "npy" else folder
    marker = place / shards.SHARD if format == "npy" else folder / f"{name}.json"
    remedy = f"remove {place if format == 'npy' else marker} to have it rebuilt"
    try:
        facts: dict[str, Any] | None = shards.read_json(marker)
    except ValueError:
        raise DataError(f"{marker}: damaged; {remedy}") from None
    if facts is not None and format == "litdata" and f"{name}/target.npy" not in facts["files"]:
        return None
    for file, known in ({} if facts is None else facts["files"]).items():
        if not (place / file).is_file() or (place / file).stat().st_size != known["bytes"]:
            raise DataError(f"{place / file}: missing or cut short; {remedy}")
    return facts


def make(job: Job, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Write the shard of `job`; returns its facts.

    Raises:
        OSError: the output cannot be written; names the folder.
        DataError: a bad file, with `strict`.
        StoppedError: `stop()` was true.
    """
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f"{shards.TEMPORARY}{job.name}-", dir=job.folder))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(job.folder)) from None
    try:
        # Private by mkdtemp's choice; data is for whom its folder is for.
        unfinished.chmod(job.folder.stat().st_mode & 0o777)
        return _fill(job, unfinished, stop)
    except OSError as error:
        # Names of temporary files would mean nothing to a user, and a full disk comes with no name at all.
        raise OSError(error.errno, error.strerror, str(job.folder)) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(job: Job, unfinished: Path, stop: Callable[[], bool]) -> dict[str, Any]:
    problems = Problems(job.strict)
    count = boxes = masked = 0
    skipped: list[int] = []
    writer: Writer = (
        shards.NpyWriter(unfinished, job.size, job.part.masks is not None)
        if job.format == "npy"
        else shards.LitdataWriter(
            unfinished, unfinished / job.name, job.index, None if job.part.masks is None else job.size
        )
    )
    try:
        for position, sample in _samples(job, problems):
            if stop():
                raise StoppedError
            if sample is None:
                skipped.append(position)
                continue
            writer.add(sample)
            count += 1
            boxes += len(sample.coords)
            masked += sample.masks is not None
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    facts = {"count": count, "boxes": boxes, "skipped": skipped, "problems": problems.found}
    if job.part.masks is not None:
        facts["masks"] = masked
    if job.format == "npy":
        shards.seal(unfinished, facts)
        shards.move(unfinished, job.folder / job.name)
        return shards.read_json(job.folder / job.name / shards.SHARD)  # type: ignore[no-any-return]
    return _place_chunk(job, unfinished, facts)


def _place_chunk(job: Job, unfinished: Path, facts: dict[str, Any]) -> dict[str, Any]:
    index = shards.read_json(unfinished / f"0.{shards.INDEX}") or {"chunks": [], "config": None}
    files = {}
    for chunk in index["chunks"]:
        name = chunk["filename"]
        path = unfinished / name
        files[name] = {"bytes": path.stat().st_size, "sha256": shards.sha256(path)}
        (job.folder / name).unlink(missing_ok=True)  # of a run that ended before the shard was declared whole
        shards.move(path, job.folder / name)
    columns = job.folder / job.name
    files |= {f"{job.name}/{name}": known for name, known in shards.known(unfinished / job.name).items()}
    shutil.rmtree(columns, ignore_errors=True)  # of the same
    shards.move(unfinished / job.name, columns)
    made = {**facts, **index, "files": files}
    shards.write_json(job.folder / f"{job.name}.json", made)
    return made


def _samples(job: Job, problems: Problems) -> Iterator[tuple[int, Sample | None]]:
    """Each image's place in the split and its sample, None where the file is bad."""
    for i, name in enumerate(job.part.paths):
        position = job.part.start + i
        try:
            yield position, _sample(job, i, problems)
        except pixels.UnreadableError as error:
            problems.add(error.kind, f"{name} ({error})")
            yield position, None


def _sample(job: Job, i: int, problems: Problems) -> Sample:
    part = job.part
    name = part.paths[i]
    image = pixels.decode(part.root / name) if part.pictures is None else pixels.from_array(part.pictures[i])
    width, height = image.size
    fitted, placed, corner = pixels.fit(image, job.size, job.fit)
    rows = slice(part.offsets[i], part.offsets[i + 1])
    annotated = bool(part.annotated[i])
    labels, flags = part.labels[rows], part.flags[rows]
    target: Any = int(part.classes[i])
    recorded = tuple(int(v) for v in part.sizes[i])
    if recorded not in ((0, 0), (height, width)):
        problems.add(
            OTHER_SIZE,
            f"{name} ({width}×{height}, annotated {recorded[1]}×{recorded[0]})",
        )
        annotated = False
        coords = np.zeros((0, 4), np.int32)
    else:
        coords, inside = pixels.to_pixels(part.coords[rows], height, width)
        for _ in range(int((~inside).sum())):
            problems.add(OUTSIDE, name)
        coords, labels, flags = coords[inside], labels[inside], flags[inside]
        coords = pixels.fit_boxes(coords, (height, width), job.size, placed, corner)
    found = None
    if recorded in ((0, 0), (height, width)):
        found = fitted_masks(part, i, (height, width), job.size, placed, corner, (coords, labels, flags), problems)
    if found is not None and not annotated:
        coords, labels, flags, annotated = found.bounds, found.labels, np.zeros(len(found.labels), np.uint8), True
    if job.classes is not None:
        target = np.zeros(job.classes, np.uint8)
        target[labels] = 1
    if not annotated:
        coords, labels, flags = coords[:0], labels[:0], flags[:0]
    size, group = (height, width), int(part.groups[i])
    stored = (None, None) if found is None else (found.words, found.labels)
    return Sample(fitted, coords, labels, flags, target, group, annotated, size, part.start + i, name, *stored)


# -- in worker processes --------------------------------------------------------------------------------------------

_stop: Any = None


def start_worker(stop: Any) -> None:
    """Set up a worker process; `stop` is the event by which the process that started it asks for the end."""
    global _stop
    _stop = stop
    begin_worker()


def make_in_worker(job: Job) -> dict[str, Any]:
    return make(job, _stop.is_set)
