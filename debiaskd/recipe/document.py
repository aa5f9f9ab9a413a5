"""Parse YAML strictly: duplicate keys and other surprises that YAML accepts silently are errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml


class DocumentError(ValueError):
    """Text that is not YAML, or not what it seems to be."""


def load(text: str) -> tuple[Any, list[str]]:
    """The document, and the names of the keys with nothing behind them; `key: null` has something.

    Raises:
        DocumentError: not YAML; a key is given twice, of which PyYAML keeps the last; a number that YAML 1.1 does not
            read in base 10, such as 010 and 1:30.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        empty = list(_empty(node, "", set()))
        return _unshared(loader.construct_document(node), ()), empty
    except yaml.YAMLError as error:
        raise DocumentError(f"not YAML ({_place(error)}{_problem(error)})") from None


def _empty(node: Any, name: str, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:  # an anchor's node stands wherever it is referred to
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        before: set[str] = set()
        for key, value in node.value:
            inner = f"{name}.{key.value}" if name else str(key.value)
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in before:
                    raise DocumentError(f"{inner}: is given twice, again in line {key.start_mark.line + 1}")
                before.add(key.value)
            yield from _empty(value, inner, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _empty(value, name, seen)
    elif node.tag == "tag:yaml.org,2002:null" and node.value == "":
        yield name
    elif node.tag == "tag:yaml.org,2002:int" and re.match(r"[-+]?0[0-9_]|.*:", node.value):
        base = "60" if ":" in node.value else "8"
        raise DocumentError(f"{name or 'value'}: {node.value} is a number in base {base} in YAML; write it in base 10")


def _unshared(value: Any, above: tuple[int, ...]) -> Any:
    """A copy in which what an anchor names is not one and the same wherever it is referred to."""
    if id(value) in above:
        raise DocumentError("an anchor stands within what it names")
    inside = (*above, id(value))
    if isinstance(value, dict):
        return {key: _unshared(inner, inside) for key, inner in value.items()}
    return [_unshared(inner, inside) for inner in value] if isinstance(value, list) else value


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "


def _problem(error: yaml.YAMLError) -> str:
    parts = [getattr(error, name, None) for name in ("context", "problem")]
    said = ", ".join(part for part in parts if part) or str(error)
    return " ".join(said.replace("\t", r"\t").split())
