"""Objects of the user's own modules, by import path."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def imported(name: str, error: type[Exception]) -> Any:
    """The object that "package.module:name" names; the working directory is searched, too.

    Args:
        name: import path of a module, ":", and a name in it, with dots for one inside another.
        error: what is raised.

    Raises:
        `error`: there is none; says which part is missing, in one line.

    Example:
        >>> from debiaskd.utils.imports import imported
        >>> imported("math:sqrt", ValueError)(9.0)
        3.0
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise error(f"{name}: must be package.module:name")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # a console script has its own folder there instead
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        of_its_own = missing.name is not None and not f"{module}.".startswith(f"{missing.name}.")
        what = f"it imports {missing.name}, which is missing" if of_its_own else f"there is no module {missing.name}"
        raise error(f"{name}: {what}; searched the Python path and {here}") from None
    except Exception as failed:  # whatever the user's module raises
        why = " ".join(str(failed).split())
        raise error(f"{name}: importing {module} failed: {type(failed).__name__}: {why}") from failed
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise error(f"{name}: {getattr(found, '__file__', None) or module} has no {part}")
        found = getattr(found, part)
    return found
