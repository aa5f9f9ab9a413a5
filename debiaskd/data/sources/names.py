"""Tolerant parsing of names and numbers of other tools: splits, class names, paths, integers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from debiaskd.data.sources.problems import DataError, Problems

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
#: Names of splits in the order in which they are read, by how they are written in lower case.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "valid",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
# Folders that operating systems and tools leave among images. Some hold images: thumbnails.
_OF_TOOLS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
_WHOLE = re.compile(r"([+-]?[0-9]{1,40})(?:\.0*)?")


def whole(value: Any) -> int | None:
    """The integer that `value` is, also as a float or as text (12, 12.0, "12", "12.0"); None if it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    match = _WHOLE.fullmatch(value.strip()) if isinstance(value, str) else None
    return None if match is None else int(match[1])


def number(value: Any) -> float | None:
    """Convert a number or its text ("12.5", "1e2"); None if it is neither, infinity if a float cannot hold it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def split_name(text: str) -> str | None:
    """The split that `text` names, whatever its case: "Train" and "training" are "train". None for other words."""
    return SPLITS.get(text.casefold())


def named_splits(found: Iterable[str], where: object, problems: Problems) -> dict[str, str]:
    """By the name of the split: how it is written. Words that name no split keep their own.

    Raises:
        DataError: two of `found` name the same split.
    """
    made: dict[str, str] = {}
    for text in found:
        name = split_name(text) or text
        if name in made:
            raise DataError(f"{where}: both {made[name]!r} and {text!r} name the split {name!r}; remove or rename one")
        made[name] = text
        if name != text:
            problems.note("split written otherwise", f"{text!r} read as {name!r}")
    return made


def of_tools(folder: str) -> bool:
    """Whether a folder of this name belongs to a tool or is hidden, and is not part of the data."""
    return folder.startswith(".") or folder.casefold() in _OF_TOOLS


def fold_case(by_split: Mapping[str, Iterable[str]], problems: Problems) -> dict[str, str]:
    """For every class name the one that is used for it.

    Names that differ in case alone are one class, written as in the first split that has it, unless a split has several
    of them: then they are classes of their own.

    Args:
        by_split: the names that occur in each split.
        problems: takes a note of either.
    """
    spellings: dict[str, list[str]] = {}
    together: dict[str, str] = {}
    for split, names in by_split.items():
        seen: dict[str, str] = {}
        for name in sorted(set(names)):
            folded = name.casefold()
            if seen.setdefault(folded, name) != name:
                together.setdefault(folded, split)
            if name not in spellings.setdefault(folded, []):
                spellings[folded].append(name)
    used = {}
    for folded, same in spellings.items():
        for name in same:
            used[name] = name if folded in together else same[0]
            if used[name] != name:
                problems.note("class written in another case", f"{name!r} read as {same[0]!r}")
        if folded in together:
            problems.note("classes that differ in case alone", f"{', '.join(sorted(same))} in {together[folded]}")
    return used


def match_paths(written: Iterable[str], present: Iterable[str], prefix: str) -> dict[str, str]:
    """For those of `written` that are not `present`, but are in another case or below `prefix`: the path that is meant.

    Paths that fit none or several are left out. `present` is gone through once, and only what fits is kept of it.
    """
    unknown = set(written)
    keys: dict[str, tuple[str, ...]] = {}
    for path in unknown:
        first, _, rest = path.casefold().partition("/")
        keys[path] = (path.casefold(), rest) if first == prefix.casefold() else (path.casefold(),)
    folded: dict[str, list[str]] = {key: [] for both in keys.values() for key in both}
    for path in present:
        unknown.discard(path)
        if (same := folded.get(path.casefold())) is not None:
            same.append(path)
    made = {}
    for path in sorted(unknown):
        candidates = next((folded[key] for key in keys[path] if folded[key]), [])
        if len(candidates) == 1:
            made[path] = candidates[0]
    return made
