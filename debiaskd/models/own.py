"""Networks of the user's own: registered functions, callables by import path, and modules given from Python.

mynet                  a function that `register_model("mynet")` decorates, in this process
my_nets:Net            `Net` of the module `my_nets`, found on the Python path or in the working directory
object/Net-1a2b3c4d    an `nn.Module` given to `debiaskd.train`, by its class and a digest of its tensors' shapes
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from debiaskd.models.weight_reading import NetworkError, one_line
from debiaskd.utils.imports import imported

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])

_registered: dict[str, Callable[..., nn.Module]] = {}
_given: dict[str, nn.Module] = {}

#: What the names of modules begin with that were given from Python.
GIVEN = "object/"


def register_model(name: str) -> Callable[[_Builder], _Builder]:
    """Register a function that builds a network; its name then stands in recipes.

    Args:
        name: letters, digits, ".", "_" and "-", none of timm's names. A later registration replaces an earlier one.

    Returns:
        A decorator for a function or class `(num_classes, **options) -> nn.Module`, which it returns unchanged.
        `options` are the recipe's `student.options` or `teacher.options`. The network takes images [N,3,H,W] and gives
        logits [N,num_classes].

    Raises:
        ValueError: a name that means something else in recipes.
        TypeError: what is decorated is not callable.

    Example:
        >>> import debiaskd as dk
        >>> from torch import nn
        >>> @dk.register_model("tiny")
        ... def tiny(num_classes, width=8):
        ...     pooled = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        ...     return nn.Sequential(pooled, nn.Linear(width, num_classes))
        >>> from debiaskd.models.registry import build
        >>> build("tiny", 3, options={"width": 4})[1]
        Linear(in_features=4, out_features=3, bias=True)
    """
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "._-" for c in name):
        raise ValueError(f"name must be made of letters, digits, '.', '_' and '-', got {name!r}")

    def decorate(builder: _Builder) -> _Builder:
        if not callable(builder):
            raise TypeError(f"register_model({name!r}) must decorate a function or class, got {type(builder).__name__}")
        _registered[name] = builder
        return builder

    return decorate


def give(module: nn.Module) -> str:
    """The name by which `build` finds a copy of a module, in this process."""
    name = given_name(module)
    _given[name] = module
    return name


def given_name(module: nn.Module) -> str:
    """Its class, and a digest of the names and shapes of its tensors."""
    shapes = [(key, tuple(tensor.shape)) for key, tensor in module.state_dict().items()]
    return f"{GIVEN}{type(module).__name__}-{hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]}"


def is_own(name: str) -> bool:
    """Whether a name is one of this module's kinds."""
    return ":" in name or name in _registered or name.startswith(GIVEN)


def build_own(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """The network of a name that `is_own`.

    Raises:
        NetworkError: it is not found, cannot be called so, or gives no module; what is missing, in one line.
    """
    if name.startswith(GIVEN):
        return _copied(name, options)
    builder = _registered[name] if name in _registered else imported(name, NetworkError)
    if not callable(builder):
        raise NetworkError(f"{name}: must be a function or a class, got {type(builder).__name__}")
    if isinstance(builder, nn.Module):
        raise NetworkError(f"{name}: must be a function or class that builds a network, got one that is built already")
    try:
        made = builder(*_classes(builder, num_classes), **_named(builder, num_classes), **options)
    except Exception as error:  # whatever the user's code raises
        called = ", ".join(["num_classes", *options])
        raise NetworkError(
            f"{name}: could not be built from ({called}): {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(made, nn.Module):
        raise NetworkError(f"{name}: must return an nn.Module, got {type(made).__name__}")
    return made


def _parameters(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(builder).parameters
    except (TypeError, ValueError):  # of some built-in callables
        return {}


def _named(builder: Callable[..., Any], num_classes: int) -> dict[str, int]:
    return {"num_classes": num_classes} if "num_classes" in _parameters(builder) else {}


def _classes(builder: Callable[..., Any], num_classes: int) -> tuple[int, ...]:
    """The first positional argument, unless a parameter is called num_classes."""
    return () if "num_classes" in _parameters(builder) else (num_classes,)


def _copied(name: str, options: Mapping[str, Any]) -> nn.Module:
    if options:
        raise NetworkError(f"{name}: is a module that was built already and takes no options, got {', '.join(options)}")
    if name not in _given:
        raise NetworkError(
            f"{name}: is an nn.Module that was given to debiaskd.train; give one of the same tensors again: "
            "debiaskd.load(folder, student=…), or teacher=…"
        )
    return copy.deepcopy(_given[name])
