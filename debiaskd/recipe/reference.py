"""Format the reference of all recipe keys, for the terminal and as a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from debiaskd.recipe.keys import Key, keys, type_name

INTRODUCTION = (
    "Keys of a recipe, with what they hold and (their default). `--KEY VALUE` overrides one; `null` leaves out what "
    "may be left out. A section whose default is (left out) is there once one of its keys is given. In a file, "
    "`extends: NAME` or `extends: PATH.yaml` takes over the keys of another recipe, which those of the file override."
)


_TIED = "\N{NO-BREAK SPACE}"


def as_text(width: int = 80) -> str:
    """For `debiaskd train --help`, in lines of at most `width`."""
    lines = [*_wrapped(INTRODUCTION, width, "")]
    for title, here, again in _sections():
        lines += ["", *_wrapped(title, width, "")]
        for key in here:
            lines += _wrapped(f"--{key.name} {type_name(key.kind)} ({default(key)})", width, "  ")
            lines += _wrapped(key.meaning, width, " " * 8)
        for source, alike in again.items():
            named = ", ".join(f"--{key.name}{_TIED}({default(key)})" for key in alike)
            lines += _wrapped(f"as in {source}: {named}", width, "  ")
    return "\n".join(lines) + "\n"


def as_markdown() -> str:
    """For docs/recipe.md."""
    lines = [INTRODUCTION]
    for title, here, again in _sections():
        name, _, meaning = title.partition(": ")
        lines += ["", f"## {name}", *(["", meaning] if meaning else [])]
        if here:
            lines += ["", "| key | holds | default | meaning |", "| --- | --- | --- | --- |"]
        for key in here:
            cells = (f"`{key.name}`", type_name(key.kind), default(key), key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        for source, alike in again.items():
            named = ", ".join(f"`{key.name}` ({default(key)})" for key in alike)
            lines += ["", f"As in `{source}`: {named}"]
    return "\n".join(lines) + "\n"


def default(key: Key) -> str:
    """As it is written in YAML."""
    if key.required:
        return "required"
    return "left out" if key.default is None else _yaml(key.default)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sections() -> Iterator[tuple[str, list[Key], dict[str, list[Key]]]]:
    """(title, keys that are told of, those that were told of in another section, by its name)."""
    told: dict[tuple[str, str, str], str] = {}
    tops = [key for key in keys() if key.section is None and "." not in key.name]
    for key in keys():
        if key.section is None:
            continue
        inner = [k for k in keys() if k.section is None and k.name.rpartition(".")[0] == key.name]
        here: list[Key] = []
        again: dict[str, list[Key]] = {}
        for one in inner:
            mark = (one.name.rpartition(".")[2], type_name(one.kind), one.meaning)
            if mark in told:
                again.setdefault(told[mark], []).append(one)
            else:
                told[mark] = key.name
                here.append(one)
        optional = " (left out)" if key.default is None else ""
        yield f"{key.name}{optional}: {key.meaning}", here, again
    yield "The run", tops, {}


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    further = indent + ("    " if indent == "  " else "")
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_TIED, " ") for line in lines]
