"""From a YAML file and `--key value` overrides to a `Recipe`, and back. jsonargparse does the typing."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

from debiaskd.recipe.checking import RecipeError, check
from debiaskd.recipe.options import Recipe

__all__ = ["RecipeError", "names", "read", "to_dict"]


def names() -> list[str]:
    """The recipes that come with debiaskd: `read` and `debiaskd train` take these names, too."""
    found = (file.name for file in files("debiaskd.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        if len(Path(path).parts) != 1 or Path(path).suffix:
            raise
        if str(path) in names():
            return (files("debiaskd.recipes") / f"{path}.yaml").read_text(encoding="utf-8")
        raise RecipeError(f"{path}: no such file; recipes that come with debiaskd: {', '.join(names())}") from None


def read(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with overrides.

    Args:
        path: a file, or one of `names`; see `debiaskd.recipe.options.Recipe` for what it may say.
        overrides: as typed: "--schedule.epochs", "5", "--terms.guide.loss=l1".

    Raises:
        RecipeError: no such name; unknown keys, values of another type, unused options, impossible combinations.
        OSError: the file cannot be read.
        ModuleNotFoundError: jsonargparse is not installed (`pip install 'debiaskd[train]'`).
    """
    import yaml

    try:
        document = yaml.safe_load(_text(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, got {type(document).__name__}")
    unknown(Recipe, document, f"{path}: ")
    _precision(document)
    for key in _keys(overrides):
        unknown(Recipe, _nested(key), "--", key)
    return check(_typed(document, overrides, path))


def _precision(document: dict[str, Any]) -> None:
    """YAML takes `precision: 16` for a number."""
    compute = document.get("compute")
    if isinstance(compute, dict) and type(compute.get("precision")) is int:
        compute["precision"] = str(compute["precision"])


def _typed(document: dict[str, Any], overrides: Sequence[str], path: Path | str) -> Recipe:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, prog="debiaskd train")
    parser.add_class_arguments(Recipe, None)
    try:
        instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes  # as it was called
        parsed = _parse(parser, document, overrides)
        for name, kind in get_type_hints(Recipe).items():
            if dataclasses.is_dataclass(kind) and parsed.get(name) is None:
                raise RecipeError(f"{path}: {name}: must be a mapping of keys, got null")
        made = instantiate(parsed)
    except ArgumentError as error:
        raise RecipeError(f"{path}: {_one_line(str(error))}") from None
    return Recipe(**{field.name: made[field.name] for field in dataclasses.fields(Recipe)})


def _parse(parser: Any, document: dict[str, Any], overrides: Sequence[str]) -> Any:
    import yaml

    parser.add_argument("--recipe", action="config")
    parsed = parser.parse_args(["--recipe", yaml.safe_dump(document), *overrides])
    parsed.pop("recipe")
    return parsed


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Everything that was said and everything that was left to its default; what `read` takes again."""
    found = dataclasses.asdict(recipe)
    if found["data"]["crop_scale"] is not None:
        found["data"]["crop_scale"] = list(found["data"]["crop_scale"])
    return found


def unknown(cls: type, document: Mapping[str, Any], where: str, shown: str | None = None, prefix: str = "") -> None:
    """Refuses a key that is none, naming the ones that are close to it."""
    hints = get_type_hints(cls)
    for key, value in document.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 3) or list(hints)
            raise RecipeError(
                f"{where}{shown or name}: no such key; did you mean {', '.join(prefix + n for n in near)}?"
            )
        inner = next((kind for kind in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(kind)), None)
        if isinstance(inner, type) and isinstance(value, Mapping):
            unknown(inner, value, where, shown, f"{name}.")
        elif shown and value:
            raise RecipeError(f"{where}{shown}: no such key; did you mean {name}?")
        elif inner is not None and value is not None:
            raise RecipeError(f"{where}{name}: must be a mapping of keys, got {value!r}")


def _keys(overrides: Sequence[str]) -> list[str]:
    found = []
    for text in overrides:
        if text.startswith("--"):
            found.append(text[2:].partition("=")[0])
    return found


def _nested(key: str) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nested(rest) if rest else {}}


def _one_line(text: str) -> str:
    """jsonargparse's message without its account of every alternative that it tried."""
    text = re.sub(r"^Parser key \"([^\"]*)\":", r"\1:", text.strip())
    text = re.sub(r"Does not validate against any of the Union subtypes\s+Subtypes:.*?Errors:\s*", "", text, flags=re.S)
    text = re.sub(r"\s+Given value type:.*", "", text, flags=re.S)
    text = re.sub(r"\s+- Expected a <class 'NoneType'>", "", text)
    text = re.sub(r"Problem with given class_path '[^']*':", "", text)
    text = " ".join(text.split()).replace(": - ", ": ")
    text = re.sub(r": Parser key \"([^\"]*)\":", r".\1:", text)
    text = re.sub(r"Expected a <class '(\w+)'>", r"must be of type \1", text)
    text = re.sub(r"Expected a typing\.Literal\[([^\]]*)\]", r"must be one of \1", text)
    return text.replace(". Got value:", ", got")
