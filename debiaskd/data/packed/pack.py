"""Decode any map-style data set once: `debiaskd.pack`.

A split is packed by one call; several calls pack the splits of one data set into the same folder. The files are those
of `debiaskd prepare`, and so are the guarantees (see `shards`): a run that was interrupted continues, complete shards
are not written again, and manifest.json names a split once all of it is on the disk.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from debiaskd.data import pixels
from debiaskd.data.packed import manifest, shards
from debiaskd.data.packed import output_folder as output
from debiaskd.data.packed.item_masks import with_masks
from debiaskd.data.packed.items import Fault, Items, names_of, source_name
from debiaskd.data.packed.packed_splits import finish
from debiaskd.data.packed.prepare import SHARD_SIZE, Prepared
from debiaskd.data.packed.write_shard import finished
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.utils import checks

#: Side of the stored images where the first one is larger, or no square.
SIDE = 224


def pack(
    dataset: Any,
    out: Path | str,
    *,
    split: str,
    classes: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    masks: bool | None = None,
    size: int | None = None,
    fit: str = "squash",
    workers: int = 0,
    strict: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Callable[[str, float], None] | None = None,
) -> Prepared:
    """Write a data set as prepared data, which recipes read.

    Args:
        dataset: has a length and is read by number. Its items are (image, target), or mappings with "image", "target"
            (or "label") and, where there are such, "boxes" [k,4] as (x0, y0, x1, y1) in half-open pixels of the image
            (None: not annotated), "box_labels" [k], "group", "mask". An image is a PIL image, or an array or tensor:
            uint8 [H,W], [H,W,3] or [3,H,W], or float [3,H,W] in 0..1. A target is a class, or a vector of 0 and 1 for
            each class where an image may show several. A group is a number, or one of `groups`. A mask has the image's
            size: [k,H,W] of 0 and 1, one for each object (the boxes', or those of "box_labels"); or [H,W], where any
            value but 0 is of the image's class or, where it may show several, a value k from 1 is of class k - 1, and 0
            and 255 are of none. None: it has none, and keeps its boxes.
        out: folder, made if it does not exist; empty, or what earlier calls began.
        split: its name, such as "train".
        classes: names. None: `dataset.classes`, the names of a Hugging Face `ClassLabel`, those of the splits packed
            before, or else the numbers.
        groups: names. None: those of the splits packed before, or else the numbers.
        masks: whether masks are stored, one bit a pixel, as `debiaskd prepare --masks` does it; an image without boxes
            gets the bounds of its masks. None: as the splits packed before, else where the first item has a "mask".
        size: side of the stored images; None: that of the first image where it is square and at most 224, else 224.
        fit: "squash" to the square, or "pad": keep the shape, centred on black.
        workers: processes that read the data set; 0: this one.
        strict: raise at the first item that cannot be read instead of skipping it.
        shard_size: images in a shard.
        progress: called with (split, share of it that is done).

    Returns:
        The manifest, and what was skipped.

    Raises:
        DataError: an item is something else than described, by its number; a class or group out of range; more than
            90 % of the items cannot be read; `out` holds something else, or the split was begun of another data set.
        OSError: `out` cannot be written.
        TypeError, ValueError: arguments out of range.

    Example:
        >>> import tempfile
        >>> import debiaskd as dk
        >>> from torchvision.datasets import FakeData
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     packed = dk.pack(FakeData(6, (3, 32, 32), 2), folder, split="train", progress=False)
        >>> packed.manifest["classes"], packed.manifest["splits"]["train"]["count"]
        (['0', '1'], 6)
    """
    _check(dataset, split, fit, workers, shard_size)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with output.locked(out):
        plan = _plan(out)
        known = plan.get("packed", {})
        before = manifest.read(out) if (out / shards.MANIFEST).is_file() else None
        size = size or plan.get("options", {}).get("size") or _side(dataset)
        options = {"kind": "pack", "format": "npy", "size": size, "fit": fit, "shard_size": shard_size}
        stored = with_masks(dataset, masks, plan.get("options"))
        options |= {"masks": True} if stored else {}
        before_options = plan.get("options", options)
        for key in {**before_options, **options}:
            old, new = before_options.get(key), options.get(key)
            if old != new:
                raise DataError(f"{out}: begun with {key}={old!r}, now {key}={new!r}")
        names = {
            "classes": _names("classes", classes, names_of(dataset), before),
            "groups": _names("groups", groups, None, before),
        }
        mine = {"count": len(dataset), "dataset": source_name(dataset), **names}
        _same(out, split, known.get(split), mine)
        wanted = {
            "format": shards.FORMAT,
            "version": shards.VERSION,
            "options": options,
            "packed": {**known, split: mine},
        }
        output.writing(out, lambda: shards.write_json(out / shards.PLAN, wanted))
        items = Items(dataset, split, size, fit, names["classes"], names["groups"], workers, stored)
        written, reused = _shards(out / split, items, shard_size, strict, progress)
        return finish(out, options, {**known, split: mine}, split, written, reused)


def _check(dataset: Any, split: str, fit: str, workers: int, shard_size: int) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"dataset must have a length and be read by number, got {type(dataset).__name__}")
    if not len(dataset):
        raise DataError(f"{split}: the data set is empty")
    if not isinstance(split, str) or not split.isidentifier():
        raise ValueError(f"split must be a name such as 'train', got {split!r}")
    checks.option("fit", fit, pixels.FITS)
    if checks.integer("workers", workers) < 0:
        raise ValueError(f"workers must be >= 0, got {workers}")
    if checks.integer("shard_size", shard_size) < 1:
        raise ValueError(f"shard_size must be >= 1, got {shard_size}")


def _plan(out: Path) -> dict[str, Any]:
    strangers = sorted(p.name for p in out.iterdir() if not p.name.startswith(".") and p.name != "lost+found")
    if strangers and not (out / shards.PLAN).exists():
        raise DataError(f"{out}: holds {strangers[0]!r} and is not a prepared data set; choose another folder")
    try:
        plan: Any = shards.read_json(out / shards.PLAN)
    except ValueError:
        raise DataError(f"{out / shards.PLAN}: damaged; choose another folder or remove this one") from None
    if plan is None:
        return {}
    if plan.get("format") != shards.FORMAT or plan.get("version") != shards.VERSION or "packed" not in plan:
        raise DataError(f"{out}: was not made by debiaskd.pack; choose another folder")
    return dict(plan)


def _side(dataset: Any) -> int:
    """By the first image that can be read."""
    items = Items(dataset, "", 1, "squash", None, None, 0)
    for number in range(min(len(dataset), 10)):
        try:
            width, height = items.image(number).size
        except DataError:
            if number + 1 == min(len(dataset), 10):
                raise
            continue
        return int(width) if width == height <= SIDE else SIDE
    return SIDE


def _names(
    what: str, given: Sequence[str] | None, own: Sequence[str] | None, before: dict[str, Any] | None
) -> list[str] | None:
    """Those that were given, else the data set's own, else those of the splits packed before."""
    earlier = None if before is None else before[what]
    chosen = given if given is not None else own
    if chosen is None:
        return earlier or None
    names = list(chosen)
    if isinstance(chosen, str) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{what} must be names, each once, got {chosen!r}")
    if earlier is not None and names != earlier:
        raise DataError(f"{what}: the splits packed before have {_short(earlier)}, this one {_short(names)}")
    return names


def _short(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"


def _same(out: Path, split: str, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    for key in ("count", "dataset", "classes", "groups") if before is not None else ():
        if before is not None and before[key] != now[key] and before[key] is not None:
            raise DataError(
                f"{out / split}: begun with {key}={before[key]!r}, now {now[key]!r}; choose another folder or remove it"
            )


def _shards(
    folder: Path,
    items: Items,
    shard_size: int,
    strict: bool,
    progress: Callable[[str, float], None] | None,
) -> tuple[int, int]:
    """(shards written, shards that were complete already)."""
    folder.mkdir(exist_ok=True)
    shards.clear(folder)
    count, written, reused, alike = len(items), 0, 0, _Targets()
    for index, start in enumerate(range(0, count, shard_size)):
        stop, name = min(start + shard_size, count), f"{index:05d}"

        def tell(done: int) -> None:
            if progress is not None:
                progress(items.split, done / count)

        if finished(folder, name, "npy") is not None:
            _compare(folder / name, items)
            alike.check(items.split, start, np.load(folder / name / "target.npy")[:1])
            reused += 1
            tell(stop)
            continue
        _write(folder, name, items, range(start, stop), strict, tell, alike)
        written += 1
    return written, reused


class _Targets:
    """Whether all targets of a split are of one kind."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None

    def check(self, split: str, number: int, targets: Any) -> None:
        """`targets` is an array of some rows.

        Raises:
            DataError: they are of another kind than those before.
        """
        if not len(targets):
            return
        if self.shape is None:
            self.shape = targets.shape[1:]
        if targets.shape[1:] != self.shape:
            now, before = (f"a vector of {s[0]}" if s else "a class" for s in (targets.shape[1:], self.shape))
            raise DataError(f"{split}, item {number}: its target is {now}, those before are {before}")


def _compare(shard: Path, items: Items) -> None:
    """The first image of a complete shard is still the data set's."""
    positions = np.load(shard / "position.npy")
    if not len(positions):
        return
    first, stored = int(positions[0]), np.load(shard / "images.npy", mmap_mode="r")[0]
    found = items[first]
    if isinstance(found, Fault) or not np.array_equal(found.image, stored):
        raise DataError(f"{shard}: was packed of another data set: its item {first} differs; choose another folder")


def _write(
    folder: Path, name: str, items: Items, numbers: range, strict: bool, tell: Callable[[int], None], alike: _Targets
) -> None:
    problems, skipped, boxes, count, masked = Problems(strict), list[int](), 0, 0, 0
    unfinished = Path(tempfile.mkdtemp(prefix=f"{shards.TEMPORARY}{name}-", dir=folder))
    unfinished.chmod(folder.stat().st_mode & 0o777)  # mkdtemp's choice is private
    writer = shards.NpyWriter(unfinished, items.size, bool(items.masks))
    try:
        for number, found in zip(numbers, items.read(numbers)):
            if isinstance(found, Fault):
                if found.kind is None:
                    raise DataError(f"{items.split}, item {number}: {found.text}")
                problems.add(found.kind, f"{items.split}, item {number}: {found.text}")
                skipped.append(number)
            else:
                alike.check(items.split, number, np.asarray(found.target)[None])
                writer.add(found)
                count, boxes, masked = count + 1, boxes + len(found.coords), masked + (found.masks is not None)
                for kind, text in found.problems:
                    where = f"{items.split}, item {number}"
                    problems.add(kind, f"{where} ({text})" if text else where)
            if number % 32 == 0:
                tell(number)
        writer.close()
        facts = {"count": count, "boxes": boxes, "skipped": skipped, "problems": problems.found}
        facts |= {"masks": masked} if items.masks else {}
        output.writing(folder, lambda: shards.seal(unfinished, facts))
        shards.move(unfinished, folder / name)
        tell(numbers.stop)
    except BaseException:
        writer.abandon()
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
