"""What recipes differ in, key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from debiaskd.recipe import Recipe

#: Of something that a recipe does not ask for.
ABSENT = "–"


@dataclass(frozen=True)
class Difference:
    """A recipe's key, such as terms.guide.weight, and what each recipe says there, in words."""

    key: str
    values: tuple[str, ...]


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """What they differ in. Where one asks for something that another does not, that is one difference, in which the
    former is told in short: its weight, what is not as by default, and what others have otherwise.

    Args:
        recipes: as `debiaskd.recipe.to_dict` has them, or parts of it.

    Example:
        >>> from debiaskd.reports.differences import differences
        >>> plain = {"terms": {"supervised": {"weight": 1.0}, "guide": None}, "seed": 0}
        >>> guided = {"terms": {"supervised": {"weight": 1.0}, "guide": {"weight": 0.1, "loss": "l1"}}, "seed": 0}
        >>> differences([plain, guided])
        [Difference(key='terms.guide', values=('–', 'weight 0.1, loss l1'))]
        >>> differences([guided, {**guided, "seed": 1}])
        [Difference(key='seed', values=('0', '1'))]
    """
    return list(_differences("", recipes, Recipe))


def _differences(key: str, values: Sequence[Any], kind: type | None) -> Iterator[Difference]:
    if all(value == values[0] for value in values):
        return
    if all(isinstance(value, Mapping) for value in values):
        for name in {name: None for value in values for name in value}:
            inside = [value.get(name) for value in values]
            yield from _differences(f"{key}.{name}" if key else name, inside, _inner(kind, name))
        return
    there = [value for value in values if isinstance(value, Mapping)]
    yield Difference(key, tuple(_text(value, kind, there) for value in values))


def _text(value: Any, kind: type | None, others: Sequence[Mapping[str, Any]]) -> str:
    if isinstance(value, Mapping):
        return _brief(value, kind, others)
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(part, None, ()) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _brief(value: Mapping[str, Any], kind: type | None, others: Sequence[Mapping[str, Any]]) -> str:
    default = _defaults(kind)
    told = []
    for name, inside in value.items():
        there = [other.get(name) for other in others]
        usual = name in default and inside == default[name] and all(other == inside for other in there)
        if usual and name != "weight":
            continue
        nested = [other for other in there if isinstance(other, Mapping)]
        text = _text(inside, _inner(kind, name), nested)
        told.append(text if name == "name" else f"{name} ({text})" if isinstance(inside, Mapping) else f"{name} {text}")
    return ", ".join(told) or "yes"


def _defaults(kind: type | None) -> dict[str, Any]:
    if kind is None:
        return {}
    found = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _inner(kind: type | None, name: str) -> type | None:
    """The dataclass that a recipe's part has under a name."""
    hint = None if kind is None else get_type_hints(kind).get(name)
    return next(
        (one for one in (hint, *get_args(hint)) if isinstance(one, type) and dataclasses.is_dataclass(one)), None
    )
