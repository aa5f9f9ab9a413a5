"""Compare the recipe of a resumed run with the one that it was started with.

The fingerprints of a run are computed from the recipe that it was started with, which is kept in its folder as
`begun.yaml`. A key that was added by a newer version and has its default value is not part of them. Weight files are
identified by their content, wherever they are. Everything else that influences the result must be unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from debiaskd.recipe import Compute, Data, Discovery, Network, Recipe, Schedule, Selection, Teacher
from debiaskd.utils import files

#: Keys of a stage's inputs that hold sections of a recipe, and the class of each section.
SECTIONS: dict[str, type] = {
    "recipe": Recipe,
    "pictures": Data,
    "compute": Compute,
    "selection": Selection,
    "student": Network,
    "network": Network,
    "teacher": Teacher,
    "schedule": Schedule,
    "discovery": Discovery,
}


def read(folder: Path) -> dict[str, Any] | None:
    """Read the recipe that the run in a folder was started with; None if there is no run yet."""
    import yaml

    # In this order: of a run of an earlier version, another process writes begun.yaml before it changes recipe.yaml.
    texts = []
    for name in ("recipe.yaml", "begun.yaml"):
        try:
            texts.append((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
    if not texts:
        return None
    found: dict[str, Any] = yaml.safe_load(texts[-1])
    return found


def as_yaml(document: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(document, sort_keys=False)
    return text


def write(path: Path, document: Mapping[str, Any], *, again: bool = True) -> None:
    """Write a recipe as YAML if the file does not exist or, with `again`, if its text differs."""
    text = as_yaml(document)
    if not path.exists() or (again and path.read_text(encoding="utf-8") != text):
        files.write_text(path, text)


def align_recipe(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe `now` without keys that `before` lacks and that have their defaults, and with the weight paths
    of `before`."""
    found = without_new_defaults(Recipe, before, now)
    for name in ("student", "teacher"):
        here, there = found.get(name), before.get(name)
        if isinstance(here, dict) and isinstance(there, Mapping) and here.get("weights") and there.get("weights"):
            here["weights"] = there["weights"]
    return found


def without_new_defaults(cls: type, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return `now` without the keys that `before` lacks and that have their defaults.

    Args:
        cls: the dataclass of both.
        before, now: results of `dataclasses.asdict`; both may lack keys.
    """
    hints, fields = get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    found: dict[str, Any] = {}
    for name, value in now.items():
        if name not in before and name in fields and value == _default(fields[name]):
            continue
        kinds = (hints.get(name), *get_args(hints.get(name)))
        inner = next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
        both = isinstance(value, Mapping) and isinstance(before.get(name), Mapping)
        found[name] = without_new_defaults(inner, before[name], value) if inner is not None and both else value
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def same_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two stages have the same inputs, up to keys that only one of them has and that have their defaults."""
    return _align_inputs(before, now) == _align_inputs(now, before)


def _align_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: without_new_defaults(SECTIONS[name], before[name], value)
        if name in SECTIONS and isinstance(value, Mapping) and isinstance(before.get(name), Mapping)
        else value
        for name, value in now.items()
    }
