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


def add_statistics(
    for_x: Tensor | None,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    for_mean: Tensor | None,
    for_inverse: Tensor | None,
) -> Tensor:
    """Adds what the gradients of the statistics owe to x: ∂μ/∂x = 1/M, ∂(1/σ)/∂x = -(x - μ) / (M σ³)."""
    count = x.numel() // x.shape[1]
    shift = None if for_mean is None else for_mean / count
    slope = None if for_inverse is None else for_inverse * inverse**3 / -count
    if slope is not None:
        shift = -slope * mean if shift is None else shift - slope * mean
    assert shift is not None
    shift, slope = over_channels(shift, x), None if slope is None else over_channels(slope, x)
    if for_x is not None and not torch.is_grad_enabled() and for_x.dtype == x.dtype == shift.dtype:
        # What PyTorch's batch norm has just computed is nobody else's.
        return for_x.add_(shift) if slope is None else for_x.addcmul_(x, slope).add_(shift)
    added = shift if slope is None else torch.addcmul(shift, x.to(shift.dtype), slope)
    return (added.expand_as(x) if for_x is None else for_x + added).to(x.dtype)
