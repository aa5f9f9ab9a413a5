"""Parse parts of a prepared split such as "train[:80%]", and count the images that two parts share."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from debiaskd.data.packed import manifest
from debiaskd.recipe import Data, Recipe, RecipeError

_PART = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>\d+(\.\d+)?%)?:(?P<end>\d+(\.\d+)?%)?\])?")


class Part(NamedTuple):
    """A part as it is written: the name of its split, and where it begins and ends, "80%" or None."""

    name: str
    start: str | None
    end: str | None


class OverlapWarning(UserWarning):
    """Evaluation images were also used for training or for selection."""


def parse(text: str, key: str) -> Part:
    """Parse a part; raises RecipeError, naming `key`, if the text is not one."""
    found = _PART.fullmatch(text)
    if found is None:
        raise RecipeError(f'{key}: must be a split such as "train" or "train[:80%]", got {text!r}')
    return Part(found["name"], found["start"], found["end"])


def numbers(part: Part, count: int, seed: int, key: str) -> Tensor:
    """int64, rising: which of the `count` images of its split a part holds; of a random order that `seed` decides.

    Raises:
        RecipeError: none. Names `key`.
    """
    low, high = (
        round(count * float(share[:-1]) / 100) if share else whole
        for share, whole in ((part.start, 0), (part.end, count))
    )
    if not 0 <= low < high <= count:
        raise RecipeError(f"{key}: [{part.start or ''}:{part.end or ''}] of {count} images holds none")
    if high - low == count:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[low:high].sort().values


def divided(groups: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places, rising, of a share of each group, rounded up, drawn at random, and of the rest.

    Args:
        groups: int64 [N], for example the classes.
        share: in (0, 1].
        generator: of the draw.
    """
    taken, left = [], []
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = -int(-len(members) * share // 1)
        taken.append(members[:count])
        left.append(members[count:])
    return torch.cat(taken).sort().values, torch.cat(left).sort().values


def shared(data: Data, key: str, other: str) -> int:
    """How many images two of `data`'s keys train, validation and test have in common; opens neither.

    Images that were prepared in two splits are not seen, unless these are copies of each other.

    Raises:
        RecipeError, DataError: no part; not prepared.
    """
    parts = [parse(getattr(data, name), f"data.{name}") for name in (key, other)]
    splits = manifest.read(Path(data.path))["splits"]
    if any(part.name not in splits for part in parts):  # a test split that is asked for when it is measured
        return 0
    counts = [splits[part.name]["count"] for part in parts]
    if parts[0].name != parts[1].name and _content(splits[parts[0].name]) != _content(splits[parts[1].name]):
        return 0
    held = [numbers(part, count, data.seed, f"data.{name}") for part, count, name in zip(parts, counts, (key, other))]
    return int(torch.isin(held[0], held[1]).sum())


def _content(split: dict[str, Any]) -> list[str]:
    """SHA-256 of the files of pixels."""
    known = [item for shard in split["shards"] for item in shard["files"].items()]
    return [facts["sha256"] for name, facts in known if name.endswith(("images.npy", ".bin"))]


def check_overlap(recipe: Recipe, *, warn: bool = True) -> None:
    """Images that are in more than one of train, validation and test.

    Args:
        recipe: as checked.
        warn: whether to warn, which one of several processes has to do.

    Raises:
        RecipeError: an epoch would be chosen by images that were trained on.

    Warns:
        OverlapWarning: the same where nothing is chosen (`selection.rule: last`); the test holds others' images.
    """
    data, found = recipe.data, []
    count = shared(data, "validation", "train")
    if count:
        what = f"data.validation: {data.validation} and data.train: {data.train} share {_pictures(count)}"
        if recipe.selection.rule != "last":
            raise RecipeError(f"{what}, by which no epoch can be chosen; take other parts, or selection.rule: last")
        found.append(f"{what}: figures on validation are partly of what was trained on")
    for key, done in {"train": "trained on", "validation": "chosen by"}.items():
        count = shared(data, "test", key)
        if count:
            what = f"data.test: {data.test} and data.{key}: {getattr(data, key)} share {_pictures(count)}"
            found.append(f"{what}: the test is partly of what was {done}")
    for message in found if warn else ():
        warnings.warn(message, OverlapWarning, stacklevel=2)


def _pictures(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
