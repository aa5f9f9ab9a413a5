"""Override keys of a recipe with `--key value` on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from debiaskd.recipe.checking import RecipeError
from debiaskd.recipe.key_checks import refuse_null, refuse_unknown
from debiaskd.recipe.keys import expected, free, keys


def parse(texts: Sequence[str]) -> dict[str, Any]:
    """Values by key, "schedule.epochs"; of equal keys the last.

    Args:
        texts: "--key", "value" or "--key=value". Values are read as YAML, except those of keys that hold text.

    Raises:
        RecipeError: no such key, no value, a value that the key cannot have.
    """
    found: dict[str, Any] = {}
    rest = list(texts)
    while rest:
        text = rest.pop(0)
        if not text.startswith("--"):
            raise RecipeError(f"unrecognized arguments: {' '.join([text, *rest])}")
        key, sign, value = text[2:].partition("=")
        refuse_unknown(nested(key, {}), "--", shown=key)
        if not sign:
            if not rest or rest[0].startswith("--"):
                raise RecipeError(f"--{key}: expected one argument")
            value = rest.pop(0)
        elif not value:
            raise RecipeError(f"--{key}: has no value after '='; null leaves out what may be left out")
        found[key] = _value(key, value)
        refuse_unknown(nested(key, found[key]), "--")
        refuse_null(nested(key, found[key]), "--")
    return found


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key, {"schedule.epochs": 5, "terms": {"guide": {}}}, whose keys exist.

    Raises:
        RecipeError: no such key, or a null where it means nothing.
    """
    for key, value in values.items():
        refuse_unknown(nested(key, value), "")
        refuse_null(nested(key, value), "")
    return dict(values)


def put(document: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a document in place; a mapping changes the keys that it names and leaves the others."""
    *above, last = key.split(".")
    for name in above:
        if not isinstance(document.get(name), dict):
            document[name] = {}
        document = document[name]
    if isinstance(value, Mapping) and isinstance(document.get(last), dict):
        for name, inner in value.items():
            put(document[last], name, inner)
    else:
        document[last] = value


def nested(key: str, value: Any) -> dict[str, Any]:
    """ "a.b" and 1 to {"a": {"b": 1}}."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def _value(key: str, text: str) -> Any:
    from debiaskd.recipe.document import DocumentError, load

    kind = _kind(key)
    if _holds_text(kind):
        return None if text in ("null", "~") else text
    try:
        value, empty = load(text)
    except DocumentError as error:
        raise RecipeError(f"--{key}: must be {expected(kind)}, got {text!r} ({error})") from None
    for name in empty:
        raise RecipeError(f"--{key}.{name}: has no value")
    return text if value is None and text not in ("null", "~") else value


def _kind(key: str) -> Any:
    """What a key holds; of a key in a mapping whose keys are the user's, anything."""
    found = {known.name: known.kind for known in keys()}
    while key not in found:
        key = key.rpartition(".")[0]
        if free(found.get(key)) or key == "terms":  # the latter with terms of the user's own
            return Any
    return found[key]


def _holds_text(kind: Any) -> bool:
    if kind is str or get_origin(kind) is Literal:
        return True
    return any(_holds_text(part) for part in get_args(kind)) and get_origin(kind) not in (list, tuple, dict)
