"""Look up and copy modules of a model without copying its tensors."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from torch import nn

from debiaskd.models.caches import caches


def has_protocol(model: nn.Module) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head", "get_classifier"))


def share(model: nn.Module) -> nn.Module:
    """A copy of the structure on the same parameters and buffers: what is done to its modules leaves the model be."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # what a layer caches may hang on a graph, which cannot be copied
        memo.update({id(vars(module)[name]): {} for name in caches(module)})
    return copy.deepcopy(model, memo)


def named_module(argument: str, role: str, model: nn.Module, name: object) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a module name of the {role}, got {type(name).__name__}")
    if name not in modules or name == "":
        close = difflib.get_close_matches(name, modules, 3) or [child for child, _ in model.named_children()][:12]
        pair = "; where the names differ, pass (teacher's, student's)" if role == "student" else ""
        raise ValueError(
            f"{argument} must name a module of the {role}, got {name!r}; did you mean one of {close}?{pair}"
        )
    return modules[name]
