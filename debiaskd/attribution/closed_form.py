"""Detect whether only global average pooling and one linear layer follow a feature map.

The test uses the graph of one forward pass, not values: zero weights, or a norm that is still the identity, look like a
closed form in values until they are trained. The graph does not show how a pooling weights positions; that is tested
with random numbers and does not depend on any weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from debiaskd.models.cut import close

#: Operations that move numbers and compute none.
_MOVES = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Permute", "Transpose", "T", "Clone"),
        *("ToCopy", "Alias", "Flatten", "Contiguous"),
    )
    for number in range(3)
)
#: Operations that may be part of pooling: linear, and of constant weights.
_POOLS = _MOVES | {
    f"{name}Backward{number}"
    for name in ("Mean", "AdaptiveAvgPool2D", "AvgPool2D", "Slice", "Select", "MkldnnAdaptiveAvgPool2D")
    for number in range(3)
}
_LINEAR = frozenset({"AddmmBackward0", "MmBackward0", "LinearBackward0"})


class LinearCalls:
    """What a model's linear layers read and gave in one forward pass: (name, layer, input, output)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, nn.Linear, Tensor, Tensor]] = []

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        thread, handles = threading.get_ident(), []

        def note(name: str) -> Any:
            def hook(module: nn.Linear, arguments: Any, output: Any) -> None:
                if threading.get_ident() == thread and arguments and isinstance(output, Tensor) and output.dim() == 2:
                    self.found.append((name, module, arguments[0], output))

            return hook

        for name, module in model.named_modules():
            plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
            if plain and not parametrize.is_parametrized(module):
                handles.append(module.register_forward_hook(note(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def pooled_linear(calls: LinearCalls, logits: Tensor, raw: Tensor, to_map: Callable[[Tensor], Tensor]) -> str | None:
    """The linear layer behind the pooled map, by name; None if there is more, or something else, behind the map.

    Args:
        calls: of the pass.
        logits: [N,K].
        raw: the map as the model lays it out; `to_map` makes it [N,C,H,W].
    """
    channels = to_map(raw).shape[1]
    for name, layer, pooled, output in reversed(calls.found):
        if (layer.in_features, layer.out_features) != (channels, logits.shape[1]) or pooled.dim() != 2:
            continue
        if output.grad_fn is None or output.grad_fn.name() not in _LINEAR:
            continue
        once = sum(other is layer for _, other, _, _ in calls.found) == 1
        if once and _is_chain(logits, output, _MOVES) and _is_chain(pooled, raw, _POOLS):
            return name if _averages(pooled, raw, to_map) else None
    return None


def _is_chain(end: Tensor, begin: Tensor, allowed: frozenset[str]) -> bool:
    """Whether `end` is computed from `begin`, and from nothing else, by a sequence of operations that are allowed."""
    if end is begin:
        return True
    if end.grad_fn is None:
        return False
    node, place = end.grad_fn, end.output_nr
    while True:
        if node is begin.grad_fn:
            return place == begin.output_nr
        if begin.grad_fn is None and getattr(node, "variable", None) is begin:
            return True
        following = [(each, number) for each, number in node.next_functions if each is not None]
        if node.name() not in allowed or len(following) != 1:
            return False
        node, place = following[0]


def _averages(pooled: Tensor, raw: Tensor, to_map: Callable[[Tensor], Tensor]) -> bool:
    """Whether every position counts alike, and no channel for another one."""
    if pooled is raw:  # of a single position
        return True
    generator = torch.Generator().manual_seed(0)
    upstream = (1 + torch.rand(pooled.shape, generator=generator)).to(pooled)
    (gradient,) = torch.autograd.grad(pooled, raw, upstream, retain_graph=True)
    found = to_map(gradient)
    positions = found.shape[2] * found.shape[3]
    return close(found, (upstream / positions)[:, :, None, None].expand_as(found).to(found.dtype))
