"""For gradients that can be computed, but not differentiated again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, op: str) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError(
            f"the gradient of {ctx.op} was differentiated again, which only the eager backend can do: "
            'compute the loss inside `with debiaskd.backend("eager"):`'
        )


def unrecorded() -> AbstractContextManager[Any]:
    """`torch.no_grad()` for a backward pass, where gradients of gradients are asked for; nothing, which takes no time,
    where they are not."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def is_one(grad_output: Tensor) -> bool:
    """Whether an upstream gradient is known to be the 1 that `loss.backward()` sends: on the CPU, where looking costs
    less than a call of a kernel that looks. On other devices it would wait for the device, and kernels decide."""
    return grad_output.dim() == 0 and grad_output.device.type == "cpu" and grad_output.item() == 1


def differentiable_once(gradient: Tensor, op: str) -> Tensor:
    """The gradient that a backward pass returns, so that a second derivative raises.

    `torch.autograd.function.once_differentiable` promises the same, but under `create_graph=True` it lets a gradient
    pass as a constant when the upstream gradient is one, and that is what `loss.backward()` sends: a gradient penalty
    would silently count for nothing. Compiled graphs refuse second derivatives themselves.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    return _Once.apply(gradient.detach().requires_grad_(), op)  # type: ignore[no-any-return]
