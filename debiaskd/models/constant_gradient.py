"""Two kinds of backward pass: those of an attribution, and all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The backward passes that compute an attribution, by autograd's own numbers for them: a backward pass may run in
#: several threads, and other threads may run other passes at the same time.
_attributions: set[int] = set()


def attributing() -> bool:
    """Whether the backward pass that is running computes an attribution."""
    return torch._C._current_graph_task_id() in _attributions


def attribution_gradient(score: Tensor, feature: Tensor, upstream: Tensor, *, create_graph: bool) -> Tensor | None:
    """The gradient of `score` at `feature` with batch statistics held constant; None where there is no path.

    The forward pass must have run within `constant_statistics`, or have normalized without batch statistics.
    """
    passes: list[int] = []

    def begin(gradient: Tensor) -> None:
        passes.append(torch._C._current_graph_task_id())
        _attributions.add(passes[-1])

    handle = score.register_hook(begin)
    try:
        (found,) = torch.autograd.grad(
            score, feature, upstream, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
    finally:
        handle.remove()
        _attributions.difference_update(passes)
    return found


class Constant(torch.autograd.Function):
    """The identity; a constant in the backward pass of an attribution."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return None if attributing() else gradient


def over_channels(value: Tensor, like: Tensor) -> Tensor:
    """Reshape [C] to broadcast over [N,C,...]."""
    return value.reshape(1, -1, *(1,) * (like.dim() - 2))
