"""Find recipes and merge each with the recipe that it extends.

A recipe is a YAML file, or the name of one that comes with debiaskd ("waterbirds_dett", "quickstart/dett"). Its key
`extends` names another one, whose keys it takes over: mappings are merged key by key, any other value replaces the
value of the extended recipe, and null leaves a section out. Recipes whose file name begins with "_" hold what others
share. They can be extended, and are not listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from debiaskd.recipe.checking import RecipeError
from debiaskd.recipe.key_checks import refuse_null, refuse_unknown, without_value
from debiaskd.recipe.overrides import put

if TYPE_CHECKING:
    from importlib.abc import Traversable

#: The key that names the extended recipe.
EXTENDS = "extends"


def names() -> list[str]:
    """The recipes that come with debiaskd: `read` and `debiaskd train` take these names, too."""
    return sorted(name for name in _ours() if not name.rpartition("/")[2].startswith("_"))


def document(path: Path | str) -> dict[str, Any]:
    """The keys of a recipe as the YAML files give them, merged with those of the recipes that it extends.

    Args:
        path: a file, or one of `names`.

    Raises:
        RecipeError: not YAML; a key that does not exist or has no value; an extended recipe that does not exist or
            extends itself.
        OSError: the file cannot be read.
    """
    return _merged(_find(path), ())


def description(path: Path | str) -> str:
    """What the comment at the beginning of a recipe says, without the commands in it."""
    lines = _find(path).file.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line[1:].strip() for line in comment if not line.startswith("#   "))


def from_mapping(own: dict[str, Any]) -> dict[str, Any]:
    """The same for keys that are given from Python; a path in `extends` is relative to the working directory.

    Raises:
        RecipeError: as `document`.
    """
    source = _Source("recipe", Path("recipe"))
    extended, own = own.get(EXTENDS), {key: value for key, value in own.items() if key != EXTENDS}
    _refuse(own, source)
    if extended is None:
        return own
    return _over(_merged(_extended(source, extended), ()), own)


@dataclass(frozen=True)
class _Source:
    """A recipe's file, and what messages call it."""

    shown: str
    file: Path | Traversable

    @property
    def identity(self) -> str:
        return str(self.file.resolve() if isinstance(self.file, Path) else self.file)


def _ours() -> dict[str, Traversable]:
    return dict(_below(files("debiaskd.recipes"), ""))


def _below(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for file in folder.iterdir():
        if file.is_dir():
            yield from _below(file, f"{prefix}{file.name}/")
        elif file.name.endswith(".yaml"):
            yield prefix + file.name.removesuffix(".yaml"), file


def _find(path: Path | str) -> _Source:
    file = Path(path)
    if file.suffix or (file.exists() and not file.is_dir()):
        return _Source(str(path), file)
    ours = _ours()
    if file.as_posix() in ours:
        return _Source(str(path), ours[file.as_posix()])
    if len(file.parts) != 1:
        return _Source(str(path), file)
    raise RecipeError(f"{path}: no such file; recipes that come with debiaskd: {', '.join(names())}")


def _extended(source: _Source, value: Any) -> _Source:
    """The recipe that `source` extends: a file named relative to it, or one that comes with debiaskd."""
    where = f"{source.shown}: {EXTENDS}"
    if not isinstance(value, str) or not value.strip():
        shown = "null" if value is None else repr(value)
        raise RecipeError(f"{where}: must be the name of a recipe, or a path that ends in .yaml, got {shown}")
    if Path(value).suffix:
        folder = source.file.parent if isinstance(source.file, Path) else Path(str(source.file)).parent
        file = folder / value
        if not file.exists():
            raise RecipeError(f"{where}: {file}: no such file")
        return _Source(str(file), file)
    ours = _ours()
    if value not in ours:
        raise RecipeError(
            f"{where}: {value}: no such recipe; a path ends in .yaml, and recipes that come with debiaskd are: "
            + ", ".join(sorted(ours))
        )
    return _Source(value, ours[value])


def _merged(source: _Source, above: tuple[_Source, ...]) -> dict[str, Any]:
    chain = (*above, source)
    if source.identity in {one.identity for one in above}:
        raise RecipeError(f"{above[0].shown}: {EXTENDS}: a cycle: {' -> '.join(one.shown for one in chain)}")
    own = _parsed(source)
    if EXTENDS not in own:
        return own
    return _over(_merged(_extended(source, own.pop(EXTENDS)), chain), own)


def _over(found: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    for key, value in own.items():
        put(found, key, value)
    return found


def _refuse(own: dict[str, Any], source: _Source, empty: Sequence[str] = ()) -> None:
    refuse_unknown(own, f"{source.shown}: ", more=(EXTENDS,))
    for key in empty:
        if key != EXTENDS:
            raise RecipeError(f"{source.shown}: {without_value(key)}")
    refuse_null(own, f"{source.shown}: ")


def _parsed(source: _Source) -> dict[str, Any]:
    from debiaskd.recipe.document import DocumentError, load

    try:
        found, empty = load(source.file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source.shown}: not YAML ({error})") from None
    except DocumentError as error:
        raise RecipeError(f"{source.shown}: {error}") from None
    if not isinstance(found, dict):
        got = "nothing" if found is None else type(found).__name__
        raise RecipeError(f"{source.shown}: a recipe is a mapping of keys, got {got}")
    _refuse({key: value for key, value in found.items() if key != EXTENDS}, source, empty)
    return found
