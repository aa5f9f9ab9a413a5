"""Clear the tensors that modules cache between forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def caches(module: nn.Module) -> list[str]:
    """Names of the dicts in which a module keeps tensors that it has computed, such as LeViT's attention biases."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, dict) and name.endswith("cache") and all(isinstance(t, Tensor) for t in value.values())
    ]


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """A cached tensor belongs to the graph, and to the weights, of the pass that computed it."""
    clear_caches(model)
    try:
        yield
    finally:
        clear_caches(model)


def clear_caches(model: nn.Module) -> None:
    for module in model.modules():
        for name in caches(module):
            setattr(module, name, {})
