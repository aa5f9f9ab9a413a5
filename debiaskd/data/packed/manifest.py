"""Read and write manifest.json, the contents of a prepared data set. It is written last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from debiaskd.data.packed import shards
from debiaskd.data.sources.records import DataError, Problems, Source
from debiaskd.version import __version__


def make(
    out: Path,
    source: Source,
    settings: dict[str, Any],
    whole: dict[tuple[str, int], dict[str, Any]],
    problems: Problems,
) -> dict[str, Any]:
    """Make the manifest of the shards in `out`, with the number of images by class and by group for each split."""
    splits: dict[str, Any] = {}
    for name in source.splits:
        mine = [(index, facts) for (split, index), facts in sorted(whole.items()) if split == name]
        splits[name] = {
            "count": sum(facts["count"] for _, facts in mine),
            "boxes": sum(facts["boxes"] for _, facts in mine),
            **_counts(out / name, [f"{index:05d}" for index, _ in mine], source),
            **({"masks": sum(facts["masks"] for _, facts in mine)} if mine and "masks" in mine[0][1] else {}),
            "skipped": sorted(position for _, facts in mine for position in facts["skipped"]),
            "shards": [
                {"name": f"{index:05d}", "count": facts["count"], "files": facts["files"]} for index, facts in mine
            ],
        }
    return {
        "format": shards.FORMAT,
        "version": shards.VERSION,
        "made_by": f"debiaskd {__version__}",
        "source": {"kind": source.kind, "path": os.path.abspath(source.path), "fingerprint": source.fingerprint()},
        "options": settings,
        "classes": list(source.classes),
        "groups": list(source.groups),
        "multi_label": source.multi_label,
        "splits": splits,
        "problems": {kind: {"count": len(n), "first": n[:10]} for kind, n in sorted(problems.found.items())},
        "notes": {kind: {"count": len(n), "first": n[:10]} for kind, n in sorted(problems.notes.items())},
    }


def _counts(folder: Path, shards: list[str], source: Source) -> dict[str, Any]:
    """Images by class, by group, and annotated ones."""
    classes, groups = np.zeros(len(source.classes), np.int64), np.zeros(len(source.groups), np.int64)
    annotated = 0
    for name in shards:
        target, group, known = (np.load(folder / name / f"{c}.npy") for c in ("target", "group", "annotated"))
        if len(target):
            classes += (
                target.sum(0, dtype=np.int64) if source.multi_label else np.bincount(target, minlength=len(classes))
            )
        if len(groups):
            groups += np.bincount(group[group >= 0], minlength=len(groups))
        annotated += int(known.sum())
    return {"annotated": annotated, "class_counts": classes.tolist(), "group_counts": groups.tolist()}


def write(
    out: Path, manifest: dict[str, Any], whole: dict[tuple[str, int], dict[str, Any]], problems: Problems
) -> None:
    if manifest["options"]["format"] == "litdata":
        for name in manifest["splits"]:
            mine = [facts for (split, _), facts in sorted(whole.items()) if split == name and facts["chunks"]]
            index = {
                "chunks": [chunk for facts in mine for chunk in facts["chunks"]],
                "config": mine[0]["config"] if mine else None,
                "updated_at": manifest["source"]["fingerprint"],
            }
            shards.write_json(out / name / shards.INDEX, index)
    lines = [f"{kind}: {name}\n" for kind, names in sorted(problems.found.items()) for name in names]
    with open(out / "problems.txt", "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(lines)
    shards.write_json(out / shards.MANIFEST, manifest)


def read(path: Path, format: str | None = None) -> dict[str, Any]:
    """Read the manifest of a prepared data set, and check its `format` if given.

    Raises:
        DataError: there is none, or it is damaged, of another version or format.
    """
    try:
        manifest = shards.read_json(path / shards.MANIFEST)
    except (ValueError, NotADirectoryError):
        raise DataError(f"{path / shards.MANIFEST}: damaged; prepare again into another folder") from None
    if manifest is None:
        if (path / shards.PLAN).is_file():
            raise DataError(f"{path}: preparing did not come to its end; run the same `debiaskd prepare` again")
        raise DataError(f"{path}: no {shards.MANIFEST} here; make it with `debiaskd prepare`")
    if not isinstance(manifest, dict) or manifest.get("format") != shards.FORMAT:
        raise DataError(f"{path / shards.MANIFEST}: not that of a prepared data set")
    if manifest["version"] != shards.VERSION:
        raise DataError(
            f"{path}: prepared in version {manifest['version']}, this reads {shards.VERSION}; prepare again"
        )
    if format not in (None, manifest["options"]["format"]):
        other = {"npy": "PackedDataset", "litdata": "StreamedDataset"}.get(manifest["options"]["format"], "nothing")
        raise DataError(f"{path}: prepared with format {manifest['options']['format']!r}, which {other} reads")
    return manifest


def choose_split(path: Path, manifest: dict[str, Any], split: str | None) -> tuple[str, dict[str, Any]]:
    names = list(manifest["splits"])
    if split is None and len(names) == 1:
        split = names[0]
    if split is None or split not in names:
        what = "split must be given" if split is None else f"no split {split!r}"
        raise DataError(f"{path}: {what}; there are {', '.join(names)}")
    return split, manifest["splits"][split]


def has_masks(manifest: dict[str, Any]) -> bool:
    """Return whether the data was prepared with masks."""
    return bool(manifest["options"].get("masks"))


def check_masks(path: Path, manifest: dict[str, Any], masks: bool, dilate: float) -> None:
    """Raises ValueError or DataError where `masks` are asked for and cannot be read."""
    if masks and dilate:
        raise ValueError(f"dilate enlarges boxes: with masks it must be 0, got {dilate}")
    if masks and not has_masks(manifest):
        raise DataError(f"{path}: prepared without masks; run `debiaskd prepare` with --masks into another folder")


def has_ignored(manifest: dict[str, Any]) -> bool:
    """Return whether crowds or difficult objects are marked as areas to ignore."""
    return "mask" in (manifest["options"].get("crowd"), manifest["options"].get("difficult"))
