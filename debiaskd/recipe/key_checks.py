"""Check names and types of a recipe's keys before they are parsed; errors name the key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from debiaskd.recipe.checking import RecipeError
from debiaskd.recipe.keys import expected, free, hints, keys, nullable, section
from debiaskd.recipe.options import Recipe, Terms


def refuse_unknown(
    document: Mapping[Any, Any],
    where: str,
    *,
    cls: type = Recipe,
    prefix: str = "",
    shown: str | None = None,
    more: Sequence[str] = (),
) -> None:
    """Refuse a key that does not exist, and a section that is no mapping.

    Args:
        document: values by key, of `cls`.
        where: what the message begins with.
        cls: the dataclass of the section.
        prefix: name of the section, with a dot behind.
        shown: what the message calls the key instead of its own name.
        more: keys beside those of `cls`, which the message may suggest.

    Raises:
        RecipeError: names the keys that are close to it.
    """
    kinds = hints(cls)
    for key, value in document.items():
        name = f"{prefix}{key}"
        if key not in kinds and cls is Terms and isinstance(value, Mapping) and value:
            continue  # perhaps a term of the user's own: see `own_terms`
        if key not in kinds:
            near = difflib.get_close_matches(str(key), [*kinds, *more], 3) or list(kinds)
            raise RecipeError(
                f"{where}{shown or name}: no such key; did you mean {', '.join(prefix + n for n in near)}?"
            )
        inner = section(kinds[key])
        if inner is not None and isinstance(value, Mapping):
            refuse_unknown(value, where, cls=inner, prefix=f"{name}.", shown=shown)
        elif free(kinds[key]):
            _refuse_no_names(value, f"{where}{name}")
        elif shown and value:
            raise RecipeError(f"{where}{shown}: no such key; did you mean {name}?")
        elif inner is not None and value is not None:
            raise RecipeError(f"{where}{name}: must be a mapping of keys, got {value!r}")


def _refuse_no_names(value: Any, where: str) -> None:
    """Refuse what is no mapping whose keys are names, for `**` in a call."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: must be a mapping of names to values, got {value!r}")
    for name in value:
        if not isinstance(name, str) or not name.isidentifier():
            raise RecipeError(f"{where}: names must be those of keyword arguments, got {name!r}")


def refuse_null(document: Mapping[str, Any], where: str, *, cls: type = Recipe, prefix: str = "") -> None:
    """Refuse null and empty texts where the type has no such value.

    Args:
        document, where, cls, prefix: as for `refuse_unknown`, which comes first.

    Raises:
        RecipeError: says what was expected.
    """
    kinds = hints(cls)
    for key, value in document.items():
        if key not in kinds:
            continue
        inner = section(kinds[key])
        if value is None and not nullable(kinds[key]):
            raise RecipeError(f"{where}{prefix}{key}: must be {expected(kinds[key])}, got null")
        if isinstance(value, str) and not value.strip():
            raise RecipeError(f"{where}{prefix}{key}: must be {expected(kinds[key])}, got {value!r}")
        if inner is not None and isinstance(value, Mapping):
            refuse_null(value, where, cls=inner, prefix=f"{prefix}{key}.")


def without_value(name: str) -> str:
    """The message for `name:` with nothing behind it: null to YAML, but its writer may have meant the defaults."""
    key = next((key for key in keys() if key.name == name), None)
    if key is None:  # in a mapping whose keys are the user's
        return f"{name}: has no value; write null if that is meant"
    last, inner = name.rpartition(".")[2], key.section
    if inner is None or not nullable(key.kind):
        or_null = ", or null to leave it out" if nullable(key.kind) else ""
        return f"{name}: has no value; must be {expected(key.kind)}{or_null}"
    given = next((k.name for k in keys(inner) if k.required), None)
    what = f"`{last}: {{}}` for its defaults" if given is None else f"`{last}: {{{given}: …}}`"
    return f"{name}: has no value; write {what}, or `{last}: null` to leave it out"
