"""Docstrings as the API reference reads them.

`Example:` becomes `Examples:`, the section that griffe shows as doctests. An entry of `Args:` or `Attributes:` that
describes several names (`mean, std: …`) is repeated for each of them, since griffe knows one name per entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(\s*)Example:[ \t]*$", re.MULTILINE)
ARGUMENTS = re.compile(r"^([ \t]*)(Args|Attributes):[ \t]*\n((?:\1[ \t]+.*\n?|[ \t]*\n)+)", re.MULTILINE)
SHARED = re.compile(r"(\w+(?:, \w+)+):(.*)", re.DOTALL)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = ARGUMENTS.sub(one_name_an_entry, obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)


def one_name_an_entry(section: re.Match[str]) -> str:
    return f"{section[1]}{section[2]}:\n" + "".join(separate(section[3]))


def separate(body: str) -> Iterator[str]:
    indent = body[: len(body) - len(body.lstrip())]
    for entry in re.split(rf"^{indent}(?=\S)", body, flags=re.MULTILINE)[1:]:
        shared = SHARED.match(entry)
        names = shared[1].split(", ") if shared else []
        yield "".join(f"{indent}{name}:{shared[2]}" for name in names) if shared else indent + entry
