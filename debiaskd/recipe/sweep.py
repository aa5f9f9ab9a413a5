"""Values of recipe keys to be tried: parsing `--over KEY=V1,V2`, and the combinations of several keys."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from debiaskd.recipe.checking import RecipeError
from debiaskd.recipe.overrides import checked, parse

#: Keys that cannot be swept, and why not.
FIXED = {
    "seed": "--seeds repeats each combination",
    "data.path": "all combinations are compared on the same validation images",
    "data.url": "all combinations are compared on the same validation images",
    "data.validation": "all combinations are compared on the same validation images",
    "data.seed": "all combinations are compared on the same validation images",
    "data.groups": "all combinations are compared by the same groups",
    "data.test": "nothing is measured on it",
    "selection.rule": "all combinations are compared by the same rule",
    "selection.reuse": "all combinations are compared on the same validation images",
    "teacher.validation_share": "all combinations are compared on the same validation images",
    "compute": "it has no influence on what is learned, or too little to be compared",
}
#: Characters of a folder's name.
_SAFE, _LONGEST = re.compile(r"[A-Za-z0-9_.+=-]+"), 100


@dataclass(frozen=True)
class Setting:
    """A combination of values.

    Attributes:
        values: by key, "weights.up".

    Example:
        >>> from debiaskd.recipe.sweep import Setting
        >>> setting = Setting({"weights.up": 5, "terms.kd.temperature": 4})
        >>> str(setting), setting.slug
        ('weights.up=5, terms.kd.temperature=4', 'weights.up=5+terms.kd.temperature=4')
    """

    values: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{key}={text(value)}" for key, value in self.values.items())

    @property
    def slug(self) -> str:
        """The name of a folder; no two settings have the same."""
        name = "+".join(f"{key}={text(value)}" for key, value in self.values.items())
        if _SAFE.fullmatch(name) and len(name) <= _LONGEST:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9_.+=-]+', '_', name)[:_LONGEST]}-{digest}"


def text(value: Any) -> str:
    """A value as YAML has it, in one line."""
    return value if isinstance(value, str) else json.dumps(value)


def parse_over(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values by key.

    Args:
        texts: "KEY=V1,V2" each. A comma within brackets, braces or quotes separates nothing.

    Raises:
        RecipeError: no such key, one that cannot be swept, one given twice or inside another; no values, equal values.

    Example:
        >>> from debiaskd.recipe.sweep import parse_over
        >>> parse_over(["weights.up=1,5", "data.crop_scale=[0.5,1],null", "student.name=resnet18,resnet34"])
        {'weights.up': [1, 5], 'data.crop_scale': [[0.5, 1], None], 'student.name': ['resnet18', 'resnet34']}
    """
    found: dict[str, list[Any]] = {}
    for one in texts:
        key, sign, values = one.partition("=")
        if not sign or not values or not key:
            raise RecipeError(f"--over: must be KEY=V1,V2,…, got {one!r}")
        if key in found:
            raise RecipeError(f"--over: {key} is given twice")
        _check_key(key)
        pieces = _split(values)
        if "" in pieces:
            raise RecipeError(f"--over: {key} has an empty value, got {values!r}")
        try:
            found[key] = [parse([f"--{key}={piece}"])[key] for piece in pieces]
        except RecipeError as error:
            raise RecipeError(f"--over: {str(error).removeprefix('--')}") from None
    return _compatible(found)


def check_over(over: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The same for values by key that are given from Python.

    Raises:
        RecipeError: as `parse_over`.
        TypeError: no mapping from keys to lists.
    """
    if not isinstance(over, Mapping) or not over:
        raise TypeError(f"over must be a dict of values by key, such as {{'weights.up': [1, 5]}}, got {over!r}")
    found: dict[str, list[Any]] = {}
    for key, values in over.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise TypeError(f"over must have a list of values for {key}, got {values!r}")
        found[key] = []
        for value in values:
            plain = list(value) if isinstance(value, tuple) else value
            try:
                checked({key: plain})
            except RecipeError as error:
                raise RecipeError(f"over: {str(error).removeprefix('--')}") from None
            found[key].append(plain)
        _check_key(key)
    return _compatible(found)


def _check_key(key: str) -> None:
    fixed = next((name for name in FIXED if key == name or key.startswith(f"{name}.")), None)
    if fixed is None:
        fixed = next((name for name in FIXED if name.startswith(f"{key}.")), None)
    if fixed is not None:
        raise RecipeError(f"--over: {key} cannot be swept: {FIXED[fixed]}")


def _compatible(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    for key, values in found.items():
        if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            raise RecipeError(f"--over: {key} has equal values, got {','.join(map(text, values))}")
    for key, other in itertools.permutations(found, 2):
        if other.startswith(f"{key}."):
            raise RecipeError(f"--over: {key} holds {other}; sweep one of them")
    return found


def _split(values: str) -> list[str]:
    """At the commas that lie outside of brackets, braces and quotes."""
    pieces, depth, quote = [""], 0, ""
    for letter in values:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and not quote and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def settings(over: Mapping[str, Sequence[Any]], *, draw: int | None = None) -> list[Setting]:
    """All combinations, the last key's values changing fastest.

    Args:
        over: values by key.
        draw: so many of them, drawn at random, always the same ones; None: all.

    Raises:
        RecipeError: there are fewer than `draw`.
    """
    found = [Setting(dict(zip(over, values))) for values in itertools.product(*over.values())]
    if draw is None:
        return found
    if draw > len(found):
        raise RecipeError(f"--random: must be <= {len(found)}, the number of combinations, got {draw}")
    return [found[i] for i in sorted(random.Random(0).sample(range(len(found)), draw))]
