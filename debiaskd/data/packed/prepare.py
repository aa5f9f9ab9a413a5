"""Decode a data set once for training (`debiaskd prepare`).

The result depends only on the source and the options, not on the number of processes. An interrupted run can be
resumed; complete shards are never written again; incomplete shards are never read (see `shards`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debiaskd.data import pixels
from debiaskd.data.packed import completeness as enough
from debiaskd.data.packed import manifest, shards
from debiaskd.data.packed import output_folder as output
from debiaskd.data.packed import write_shard as making
from debiaskd.data.packed.fit_masks import with_mask_files
from debiaskd.data.packed.write_shard import Job
from debiaskd.data.sources import celeba, cifar, coco, csv_file, digits, folder, mnist_on_cifar, voc, waterbirds
from debiaskd.data.sources.records import DataError, Problems, Source
from debiaskd.utils import checks
from debiaskd.utils.workers import cores, interrupts_blocked, main_hidden


@dataclass(frozen=True)
class Reader:
    """How a kind of data set is read.

    Attributes:
        read: makes its `Source`.
        size: side at which its images are stored unless another is asked for.
        draws: whether it draws its images, and is told that size.
        files: whether it reads any files.
        one_file: whether its source is one file and not a folder.
        masks: whether its own files hold masks; others take a folder of PNG files.
    """

    read: Callable[..., Source]
    size: int = 224
    draws: bool = False
    files: bool = True
    one_file: bool = False
    masks: bool = False


READERS = {
    "coco": Reader(coco.read, masks=True),
    "voc": Reader(voc.read, masks=True),
    "waterbirds": Reader(waterbirds.read),
    "celeba": Reader(celeba.read),
    "folder": Reader(folder.read),
    "csv": Reader(csv_file.read, one_file=True),
    "cifar": Reader(cifar.read, size=32),
    "mnist_on_cifar": Reader(mnist_on_cifar.read, size=64, draws=True),
    "digits": Reader(digits.read, size=48, draws=True, files=False),
}
#: With fewer images than this, starting a process takes longer than it would save.
FEW = 200
#: Images in a shard: at 224 pixels 77 MB, what object stores like to be asked for at once.
SHARD_SIZE = 512


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`.

    Attributes:
        manifest: the content of OUT/manifest.json.
        problems: what was skipped, by kind, in the order of the images.
        written, reused: number of shards that were written, and of those that existed.
    """

    manifest: dict[str, Any]
    problems: Problems
    written: int
    reused: int


def prepare(
    kind: str,
    src: Path | str | None,
    out: Path | str,
    *,
    size: int | None = None,
    fit: str = "squash",
    format: str = "npy",
    workers: int | None = 1,
    splits: Sequence[str] | None = None,
    strict: bool = False,
    lenient: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[str, float], None] | None = None,
    **options: Any,
) -> Prepared:
    """Decode a data set into shards below `out`.

    Memory does not grow with the number of images, except for their annotations: one image per process for "npy", one
    shard per process for "litdata".

    Args:
        kind: "coco", "voc", "waterbirds", "celeba", "folder", "csv", "cifar", "mnist_on_cifar" or "digits".
        src: the data set as it is distributed, the CSV file for csv; see the reader of that name. None for digits,
            which reads no files.
        out: output folder, created if needed; empty, or from an earlier run with the same options.
        size: side of the stored images in pixels; None: 32 for cifar, 64 for mnist_on_cifar, 48 for digits, 224
            for all others.
        fit: "squash" to a square, or "pad": keep the aspect ratio, centred on black.
        format: "npy" for `PackedDataset`, "litdata" for `ChunkedDataset` and `StreamedDataset`.
        workers: number of processes that decode. They do not import the calling script, which needs no main guard.
            None: one for each core, or this one alone for fewer than 200 images.
        splits: names of the splits to read; None: see the reader.
        strict: raise at the first error instead of skipping the entry.
        lenient: continue if more than 90 % of a split's images or boxes, or of a list's rows, were skipped, or a split
            has no images. Neither `strict` nor `lenient` changes what is written: a refused run can be continued with
            `lenient`.
        shard_size: images per shard.
        progress: called with (split, share of the total that is done).
        **options: `masks`: True for coco (its segmentations) and voc (SegmentationClass), a folder for waterbirds,
            celeba, folder and csv, with a PNG file at the path of each image; any pixel but 0 is of the image's class
            or, with csv's label_columns, value k of column k. Their masks are stored besides the boxes. And the
            reader's own: crowd for coco, difficult for voc, boxes for waterbirds and folder, bias for
            folder, target and bias for celeba, images, path_column, label_column, label_columns, bias_columns and
            split_column for csv, labels for cifar, and for mnist_on_cifar and digits agreement, seed,
            train, val and test.

    Raises:
        DataError: the source cannot be used, almost nothing of it is left and `lenient` is False, `strict` found an
            error, or `out` has other content.
        OSError: `src` cannot be read, or `out` cannot be written or is full.
        TypeError, ValueError: arguments out of range.
        ModuleNotFoundError: pillow, or for "litdata" LitData, is not installed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image = Path(folder, "src", "cat", "1.png")
        ...     image.parent.mkdir(parents=True)
        ...     Image.new("RGB", (40, 30)).save(image)
        ...     prepared = prepare("folder", image.parent.parent, Path(folder, "out"), size=16)
        >>> prepared.manifest["classes"], prepared.manifest["splits"]["train"]["count"]
        (['cat'], 1)
    """
    import PIL  # noqa: F401  # here rather than once for every image

    checks.option("kind", kind, tuple(READERS))
    reader = READERS[kind]
    size = reader.size if size is None else size
    checks.option("fit", fit, pixels.FITS)
    checks.option("format", format, shards.FORMATS)
    for name, value in (("size", size), ("workers", 1 if workers is None else workers), ("shard_size", shard_size)):
        if checks.integer(name, value) < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}")
    if strict and lenient:
        raise ValueError("strict and lenient exclude each other, got both")
    if format == "litdata":
        import litdata  # noqa: F401  # before anything is done, rather than after the annotations
    if (src is None) == reader.files:
        wanted = f"the {'CSV file' if reader.one_file else 'folder'} of the data set" if reader.files else "None"
        raise ValueError(f"src must be {wanted} for {kind}, got {src!r}")
    src, out = Path(kind if src is None else src), Path(out)
    if reader.files and not (src.is_file() if reader.one_file else src.is_dir()):
        raise DataError(f"{src}: no such {'file' if reader.one_file else 'folder'}")
    if out.resolve() == src.resolve() or (kind == "folder" and src.resolve() in out.resolve().parents):
        raise DataError(f"{out}: must not lie in the data set that is read")
    problems = Problems(strict, lenient)
    if reader.draws:
        options["size"] = size
    folder_of_masks = None if reader.masks else options.pop("masks", None)
    source = reader.read(src, problems, splits=splits, **options)
    if folder_of_masks is not None:
        source = with_mask_files(source, Path(folder_of_masks))
    enough.check_annotations(source, problems)
    settings = {
        "kind": kind,
        "format": format,
        "size": size,
        "fit": fit,
        "splits": list(source.splits),
        "shard_size": shard_size,
        **source.options,
    }
    with output.begun(out, settings, source):
        return _run(source, out, settings, workers, problems, progress)


def _run(
    source: Source,
    out: Path,
    settings: dict[str, Any],
    workers: int | None,
    problems: Problems,
    progress: Callable[[str, float], None] | None,
) -> Prepared:
    whole: dict[tuple[str, int], dict[str, Any]] = {}
    missing: list[tuple[str, int]] = []
    for name, split in source.splits.items():
        (out / name).mkdir(exist_ok=True)
        shards.clear(out / name)
        for index in range(-(-len(split) // settings["shard_size"])):
            facts = making.finished(out / name, f"{index:05d}", settings["format"])
            if facts is None:
                missing.append((name, index))
            else:
                whole[name, index] = facts
    reused = len(whole)
    total = max(sum(len(split) for split in source.splits.values()), 1)

    def tell(name: str) -> None:
        if progress is not None:
            done = sum(f["count"] + len(f["skipped"]) for f in whole.values())
            progress(name, done / total)

    def jobs() -> Iterator[Job]:
        for name, index in missing:
            start = index * settings["shard_size"]
            part = source.splits[name].part(start, min(start + settings["shard_size"], len(source.splits[name])))
            classes = len(source.classes) if source.multi_label else None
            yield Job(
                part, out / name, index, settings["size"], settings["fit"], settings["format"], classes, problems.strict
            )

    if workers is None:
        workers = cores() if total >= FEW else 1
    if missing:
        tell(missing[0][0])
    for job, facts in _made(jobs(), min(workers, len(missing))):
        whole[job.folder.name, job.index] = facts
        tell(job.folder.name)
    for key in sorted(whole, key=lambda key: (list(source.splits).index(key[0]), key[1])):
        problems.merge(whole[key]["problems"])
    for name, split in source.splits.items():
        if len(split) and not any(facts["count"] for (part, _), facts in whole.items() if part == name):
            raise DataError(f"{name}: none of its {len(split)} images could be read; {problems.lines()[0]}")
    enough.check_decoded(source, whole, problems)
    document = manifest.make(out, source, settings, whole, problems)
    existing = shards.read_json(out / shards.MANIFEST) if not missing else None
    if existing != document:
        output.writing(out, lambda: manifest.write(out, document, whole, problems))
    return Prepared(document, problems, len(missing), reused)


def _made(jobs: Iterator[Job], workers: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run jobs and yield their results in order, with only as many in flight as keep the workers busy."""
    if workers <= 1:
        for job in jobs:
            yield job, making.make(job)
        return
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and their locks
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, making.start_worker, (stop,))
    waiting: deque[tuple[Job, Future[dict[str, Any]]]] = deque()
    try:
        for job in jobs:
            with interrupts_blocked(), main_hidden():
                waiting.append((job, pool.submit(making.make_in_worker, job)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    except BrokenProcessPool:
        raise DataError("a process that decodes was killed, perhaps for want of memory: try fewer workers") from None
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
