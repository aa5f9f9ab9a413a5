"""The terms of a recipe that name their class: `terms.mine: {of: "package.module:MyTerm", …}`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from debiaskd.recipe.checking import RecipeError
from debiaskd.recipe.options import Terms
from debiaskd.terms import TERMS
from debiaskd.terms.own import OF, OwnTerm, options_class, term_class, unresolved


def take_own_terms(document: dict[str, Any], where: str, typed: Sequence[str], *, resolve: bool) -> dict[str, OwnTerm]:
    """Take them out of a recipe's keys.

    Args:
        document: the recipe's keys; changed in place.
        where: the recipe, for messages.
        typed: keys of the command line.
        resolve: import their classes, and type their options by these.

    Raises:
        RecipeError: no such class, or options that it does not have; a term that does not exist.
    """
    section = document.get("terms")
    if not isinstance(section, dict):
        return {}
    known, found = {field.name for field in dataclasses.fields(Terms) if field.init}, {}
    for name in [name for name in section if name not in known]:
        options = section.pop(name)
        start = "--" if any(key.startswith(f"terms.{name}.") for key in typed) else f"{where}: "
        if not isinstance(options, dict) or OF not in options:
            near = ", ".join(f"terms.{n}" for n in difflib.get_close_matches(name, known, 3))
            hint = f"; did you mean {near}?" if near else ""
            raise RecipeError(f"{start}terms.{name}: no such key{hint or '; a term of your own needs `of`, its class'}")
        if name in TERMS or not name.isidentifier():
            raise RecipeError(f"{start}terms.{name}: choose another name for a term of your own")
        of = options[OF]
        if not isinstance(of, str):
            raise RecipeError(f"{start}terms.{name}.of: must be package.module:Class, got {of!r}")
        found[name] = _resolved(f"{start}terms.{name}", of, options) if resolve else unresolved(of, options)
    return found


def _resolved(where: str, of: str, section: dict[str, Any]) -> OwnTerm:
    from jsonargparse import ArgumentError, ArgumentParser

    try:
        kind = term_class(of, RecipeError)
        cls = options_class(kind, RecipeError)
    except RecipeError as error:
        raise RecipeError(f"{where}.of: {error}") from None
    given, names = {k: v for k, v in section.items() if k != OF}, [field.name for field in dataclasses.fields(cls)]
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 3) or names
            raise RecipeError(f"{where}.{key}: no such option of {of}; did you mean {', '.join(near)}?")
    parser: Any = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(cls, None)
        parsed = parser.parse_object(given)
        instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return OwnTerm(of, cls(**vars(instantiate(parsed))), kind)
    except ArgumentError as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}") from None
