"""List the keys of a recipe from the dataclasses: type, default and description of each."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from debiaskd.recipe.options import Recipe


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: with dots, "schedule.epochs".
        kind: its type.
        default: its value where it is left out; `dataclasses.MISSING` for keys that must be given.
        meaning: one paragraph from the docstring of its dataclass; for a section, the docstring's summary.
    """

    name: str
    kind: Any
    default: Any
    meaning: str

    @property
    def section(self) -> type | None:
        """The dataclass of the keys below it, if it has any."""
        return section(self.kind)

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


@cache
def keys(cls: type = Recipe, prefix: str = "") -> tuple[Key, ...]:
    """All of them, each section before the keys below it."""
    return tuple(_keys(cls, prefix))


def _keys(cls: type, prefix: str) -> Iterator[Key]:
    kinds, meanings = hints(cls), described(cls)[1]
    for field in dataclasses.fields(cls):
        if field.name not in kinds:
            continue
        kind, inner = kinds[field.name], section(kinds[field.name])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        summary = "" if inner is None else described(inner)[0]
        yield Key(f"{prefix}{field.name}", kind, default, meanings.get(field.name, summary))
        if inner is not None:
            yield from keys(inner, f"{prefix}{field.name}.")


@cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a section's keys, by name; fields that no YAML file gives are left out."""
    found = get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls) if field.init}


def section(kind: Any) -> type | None:
    """The dataclass that a type hint is, or may be."""
    parts = (kind, *get_args(kind))
    return next((part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


def free(kind: Any) -> bool:
    """Whether it holds a mapping whose keys are the user's."""
    return any(get_origin(part) is dict for part in (kind, *get_args(kind)))


def nullable(kind: Any) -> bool:
    """Whether null says "left out"."""
    return type(None) in get_args(kind)


def type_name(kind: Any) -> str:
    """What a value of the type is, for help: "int", "'a' or 'b'", "[int, ...]"."""
    origin, parts = get_origin(kind), get_args(kind)
    if section(kind) is not None:
        return "mapping of keys"
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in parts if part is not type(None))
    if origin is Literal:
        return ", ".join(repr(part) for part in parts)
    if origin is dict:
        return "mapping of names to values"
    if origin is list:
        return f"[{type_name(parts[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(type_name(part) for part in parts)}]"
    return str(kind.__name__)


def expected(kind: Any) -> str:
    """The same for messages, behind "must be"."""
    name = type_name(kind)
    if name.startswith("mapping"):
        return f"a {name}"
    return f"a list {name}" if name[0] == "[" else f"one of {name}" if name[0] == "'" else f"of type {name}"


def shown(value: Any) -> str:
    """A value in a message, as it is written in YAML where that is not ambiguous."""
    if value is None:
        return "null"
    return value if isinstance(value, str) and value.strip() else repr(value)


@cache
def described(cls: type) -> tuple[str, dict[str, str]]:
    """The summary of a dataclass and the meanings of its fields, those of its bases included."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        meanings |= _arguments(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    return inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " "), meanings


def _arguments(text: str) -> dict[str, str]:
    """The section "Args:" of a docstring; "a, b: text" is about both."""
    block = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n {4}(?=\w)", f"\n{block}")[1:]:
        names, _, meaning = entry.partition(": ")
        for name in names.split(","):
            found[name.strip()] = " ".join(meaning.split())
    return found
