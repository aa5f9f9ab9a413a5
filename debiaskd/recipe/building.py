"""Build the dataclasses of a recipe from its keys; errors name the key, its type and the value."""

from __future__ import annotations

import copy
import dataclasses
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from debiaskd.recipe.checking import RecipeError
from debiaskd.recipe.keys import expected, hints, section, shown


def build(cls: type, document: Mapping[str, Any], prefix: str = "", default: Any = None) -> Any:
    """An object of a section's dataclass.

    Args:
        cls: the dataclass; its types are str, int, float, bool, Literal, list, tuple, dict[str, Any], dataclasses, and
            each of them or None.
        document: values by key, which `refuse_unknown` has let pass. Text is read as YAML where the type is not text.
        prefix: name of the section, with a dot behind.
        default: an object of the dataclass with the values that are left out; None: those of the dataclass.

    Raises:
        RecipeError: a value of another type; keys that are missing.
    """
    if missing := list(_missing(cls, document, prefix)):
        raise RecipeError(f"the following arguments are required: {', '.join(missing)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    for name, kind in hints(cls).items():
        before, inner = getattr(default, name, _default(fields[name])), section(kind)
        value = document.get(name)
        if inner is not None:
            if name in document and value is None:
                given[name] = None
            elif value is not None or before is dataclasses.MISSING:
                given[name] = build(inner, value or {}, f"{prefix}{name}.", before)
            else:
                given[name] = copy.deepcopy(before)
        elif name in document:
            given[name] = _checked(kind, value, f"{prefix}{name}")
        else:
            given[name] = copy.deepcopy(before)
    return cls(**given)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _missing(cls: type, document: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Names of keys that must be given and are not, those of sections included."""
    for field in dataclasses.fields(cls):
        kind = hints(cls).get(field.name)
        if kind is None:
            continue
        required, inner, value = _default(field) is dataclasses.MISSING, section(kind), document.get(field.name)
        if inner is not None and (required or value is not None):
            yield from _missing(inner, value or {}, f"{prefix}{field.name}.")
        elif required and value is None:
            yield f"{prefix}{field.name}"


def _checked(kind: Any, value: Any, name: str) -> Any:
    try:
        return convert(kind, value)
    except (TypeError, ValueError, OverflowError):
        raise RecipeError(f"{name}: must be {expected(kind)}, got {shown(value)}") from None


def convert(kind: Any, value: Any) -> Any:
    """The value as its type has it: 1 as 1.0 for float, [0.5, 1] as (0.5, 1.0) for a tuple, "1e-2" as 0.01.

    Raises:
        TypeError, ValueError, OverflowError: it is of another type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (part for part in parts if part is not type(None))
        return None if value is None or value in ("null", "~") else convert(kind, value)
    if origin is Literal:
        if not isinstance(value, str) or value not in parts:
            raise ValueError
        return str(value)
    if kind is str:
        return str(_of(str, value))
    if isinstance(value, str):
        value = _read(value)
    if kind is bool:
        return _of(bool, value)
    if isinstance(value, bool):
        raise TypeError
    if kind is int:
        return int(_of(int, value))
    if kind is float:
        return float(_of((int, float), value))
    if origin is dict:
        return _plain(_of(Mapping, value))
    items = list(_of((list, tuple), value))
    if origin is list:
        return [convert(parts[0], item) for item in items]
    if len(items) != len(parts):
        raise ValueError
    return tuple(convert(part, item) for part, item in zip(parts, items))


def _of(kinds: Any, value: Any) -> Any:
    if not isinstance(value, kinds):
        raise TypeError
    return value


def _read(text: str) -> Any:
    """What a text is in YAML, and 1e5, which is text in YAML 1.1, as a number."""
    from debiaskd.recipe.document import load

    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text.strip()):
        return float(text)
    return load(text)[0]


def _plain(options: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy of a mapping whose keys are the user's."""
    import yaml

    try:
        yaml.safe_dump(options)
    except yaml.YAMLError:
        raise ValueError from None
    return copy.deepcopy(dict(options))
