"""Read a `Recipe` from a YAML file and `--key value` overrides, and write it back."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from debiaskd.recipe.building import build
from debiaskd.recipe.checking import RecipeError, check
from debiaskd.recipe.options import Recipe
from debiaskd.recipe.overrides import checked, parse, put
from debiaskd.recipe.own_terms import take_own_terms
from debiaskd.recipe.sources import document as merged
from debiaskd.recipe.sources import from_mapping, names

__all__ = ["RecipeError", "names", "read", "to_dict"]


def read(
    path: Path | str | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    resolve: bool = True,
) -> Recipe:
    """The recipe in a YAML file, or in a dict of the same keys, with overrides.

    "~" and environment variables are expanded in the paths that it names.

    Args:
        path: a file, or one of `names`, or what such a file holds, or a recipe; see `debiaskd.recipe.options.Recipe`
            for its keys, and `debiaskd.recipe.sources` for `extends`.
        overrides: as typed: "--schedule.epochs", "5", "--terms.guide.loss=l1". Or values by key: {"schedule.epochs": 5,
            "terms": {"guide": {"loss": "l1"}}}. A mapping changes the keys that it names and leaves the others of its
            section; null leaves a section or an optional key out.
        resolve: import the classes of the user's own terms; what a finished run needs to be measured needs none.

    Raises:
        RecipeError: no such name; a cycle of `extends`; unknown keys, keys without a value or given twice, values of
            another type, unused options, impossible combinations.
        OSError: the file cannot be read.
        ModuleNotFoundError: PyYAML is not installed (`pip install 'debiaskd[train]'`).
    """
    if isinstance(path, Recipe):
        document, where = to_dict(path), "recipe"
    elif isinstance(path, Mapping):
        document, where = from_mapping(_plain(path)), "recipe"
    else:
        document, where = merged(path), str(path)
    typed = checked(_plain(overrides)) if isinstance(overrides, Mapping) else parse(overrides)
    for key, value in typed.items():
        put(document, key, value)
    _precision(document)
    _expand(document)
    own = take_own_terms(document, where, list(typed), resolve=resolve)
    made = _typed(document, list(typed), where)
    made.terms.own.update(own)
    return check(made)


def _plain(value: Any) -> Any:
    """Python's values as YAML has them: paths as text, tuples as lists, mappings as dicts; all of it a copy."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


#: Keys of a recipe that hold paths; names of networks do in "hf/FOLDER".
PATHS = (
    "data.path",
    "student.name",
    "student.weights",
    "teacher.name",
    "teacher.weights",
    "teacher.head",
    "compute.stages",
)


def _expand(document: dict[str, Any]) -> None:
    """Replace "~" and environment variables in paths.

    Raises:
        RecipeError: a variable is not set.
    """
    for key in PATHS:
        name, _, last = key.partition(".")
        section = document.get(name)
        text = section.get(last) if isinstance(section, dict) else None
        if not isinstance(text, str) or (last == "head" and not text.endswith(".safetensors")):
            continue
        before = "hf/" if last == "name" else ""
        if not text.startswith(before):
            continue
        expanded = os.path.expandvars(os.path.expanduser(text.removeprefix(before)))
        missing = re.search(r"\$(\w+|\{[^}]*\})", expanded)
        if missing is not None and not os.path.exists(expanded):
            raise RecipeError(f"{key}: {missing[0]} is not set, in {text}")
        section[last] = before + expanded  # type: ignore[index]


def _precision(document: dict[str, Any]) -> None:
    """YAML takes `precision: 16` for a number."""
    compute = document.get("compute")
    if isinstance(compute, dict) and type(compute.get("precision")) is int:
        compute["precision"] = str(compute["precision"])


def _typed(document: dict[str, Any], overridden: Sequence[str], path: Path | str) -> Recipe:
    try:
        return cast(Recipe, build(Recipe, document))
    except RecipeError as error:
        typed = any(re.match(rf"{re.escape(key)}[.:]", str(error)) for key in overridden)
        raise RecipeError(f"--{error}" if typed else f"{path}: {error}") from None


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Everything that was said and everything that was left to its default; what `read` takes again."""
    found = dataclasses.asdict(recipe)
    del found["terms"]["own"]
    found["terms"] |= {name: term.to_dict() for name, term in recipe.terms.own.items()}
    return {name: _as_yaml_has_it(value) for name, value in found.items()}


def _as_yaml_has_it(value: Any) -> Any:
    """Lists in place of tuples, so that a recipe equals what is read of its file."""
    if isinstance(value, dict):
        return {name: _as_yaml_has_it(inner) for name, inner in value.items()}
    return [_as_yaml_has_it(inner) for inner in value] if isinstance(value, (list, tuple)) else value
