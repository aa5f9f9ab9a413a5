"""The manifest of a data set whose splits are packed one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from debiaskd.data.packed import manifest, shards
from debiaskd.data.packed import output_folder as output
from debiaskd.data.packed.prepare import Prepared
from debiaskd.data.packed.write_shard import finished
from debiaskd.data.sources.masks import CLASS_EMPTY, CLASS_UNKNOWN, EMPTY
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.data.sources.records import Source, Split


def finish(
    out: Path, options: dict[str, Any], packed: dict[str, Any], split: str, written: int, reused: int
) -> Prepared:
    """Write the manifest of all splits that are complete.

    Args:
        out: the folder.
        options: what all of it is packed with.
        packed: of each split that was begun: count, dataset, classes, groups.
        split: the one that was packed just now.
        written, reused: its shards.

    Raises:
        DataError: too much of it was skipped, or splits do not fit together.
        OSError: the manifest cannot be written.
    """
    whole: dict[tuple[str, int], dict[str, Any]] = {}
    for name, known in packed.items():
        found = list(_finished(out / name, known["count"], options["shard_size"]))
        if None not in found:
            whole |= {(name, index): facts for index, facts in enumerate(found) if facts is not None}
    splits = [name for name in packed if any(name == part for part, _ in whole)]
    problems = Problems()
    for facts in whole.values():
        problems.merge(facts["problems"])
    mine = [facts for (name, _), facts in whole.items() if name == split]
    tally = problems.tally(split, "items")
    tally.total = packed[split]["count"]
    for facts in mine:
        for kind, texts in facts["problems"].items():
            if kind in (EMPTY, CLASS_EMPTY, CLASS_UNKNOWN):  # of an image that is not skipped
                continue
            tally.skip(kind, texts[0], len(texts))
    problems.check([split])
    targets = {name: _column(out / name, "target", whole, name) for name in splits}
    multi_label = _one_kind(targets)
    classes = packed[split]["classes"] or _numbered(max(_highest(found) for found in targets.values()))
    numbers = [_column(out / name, "group", whole, name) for name in splits]
    groups = packed[split]["groups"] or _numbered(max(int(found.max(initial=-1)) + 1 for found in numbers))
    for name, found in zip(splits, numbers):
        if groups and len(found) and found.min() < 0:
            raise DataError(f"{name}: some items have a group and others none; give each one a group, or none")
    made = {name: Split(out) for name in splits}
    source = Source("pack", out, tuple(classes), multi_label, tuple(groups), made)
    document = manifest.make(out, source, {**options, "splits": splits}, whole, problems)
    document["source"] = {"kind": "pack", "path": packed[split]["dataset"], "fingerprint": source.fingerprint()}
    if not written and (out / shards.MANIFEST).is_file() and shards.read_json(out / shards.MANIFEST) == document:
        return Prepared(document, problems, written, reused)
    output.writing(out, lambda: manifest.write(out, document, whole, problems))
    return Prepared(document, problems, written, reused)


def _finished(folder: Path, count: int, shard_size: int) -> Iterator[dict[str, Any] | None]:
    for index in range(-(-count // shard_size)):
        yield finished(folder, f"{index:05d}", "npy") if folder.is_dir() else None


def _column(folder: Path, column: str, whole: dict[tuple[str, int], Any], split: str) -> Any:
    parts = [np.load(folder / f"{index:05d}" / f"{column}.npy") for name, index in sorted(whole) if name == split]
    used = [part for part in parts if len(part)]
    return np.concatenate(used) if used else np.zeros(0, np.int64)


def _one_kind(targets: dict[str, Any]) -> bool:
    kinds = {name: found.ndim for name, found in targets.items() if len(found)}
    if len(set(kinds.values())) > 1:
        (first, _), *_ = kinds.items()
        other = next(name for name in kinds if kinds[name] != kinds[first])
        raise DataError(
            f"{other}: targets are {'vectors' if kinds[other] == 2 else 'classes'}, those of {first} are not"
        )
    return 2 in kinds.values()


def _highest(targets: Any) -> int:
    return int(targets.shape[1]) if targets.ndim == 2 else int(targets.max(initial=-1)) + 1


def _numbered(count: int) -> list[str]:
    return [str(number) for number in range(count)]
