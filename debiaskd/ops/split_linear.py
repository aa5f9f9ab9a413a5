"""A linear head whose weight has two parts, for inputs that are never put side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.utils import checks


def split_linear(feature: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, summed: bool) -> Any:
    """feature W1' + bias [N,K] and rows W2' [M,K] of weight [W1 W2] [K,D+E]; their sum where `summed`.

    feature [N,D], weight and bias get gradients; rows [M,E] are constants.
    """
    if checks.transformed():
        first, second = weight.split([feature.shape[1], rows.shape[1]], 1)
        of_feature, of_rows = F.linear(feature, first, bias), F.linear(rows, second)
        return of_feature + of_rows if summed else (of_feature, of_rows)
    return _SplitLinear.apply(feature, weight, bias, rows, summed)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Products in the dtype that they are given, on the tensor's device."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _SplitLinear(torch.autograd.Function):
    """Autograd over a split weight makes two gradients and then puts them together: one more pass over a head that may
    well be larger than the batch. Here each is written where it belongs.
    """

    @staticmethod
    def forward(ctx: Any, feature: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, summed: bool) -> Any:
        ctx.save_for_backward(feature, weight, rows)
        first, second = weight.split([feature.shape[1], rows.shape[1]], 1)
        of_feature = F.linear(feature, first, bias)
        if summed:
            return of_feature.addmm_(rows, second.mT)
        of_rows = F.linear(rows, second)
        if not ctx.needs_input_grad[1]:  # constants of a frozen head: nothing is to be computed for them
            ctx.mark_non_differentiable(of_rows)
            ctx.set_materialize_grads(False)
        return of_feature, of_rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        feature, weight, rows = ctx.saved_tensors
        of_feature, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_first, grad_second = grad_outputs[0], grad_outputs[-1]
        grad_feature = grad_weight = grad_bias = None
        with without_autocast(feature):
            if of_feature:
                grad_feature = grad_first @ weight[:, : feature.shape[1]]
            if of_weight and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
                grad_weight = torch.cat([grad_first.mT @ feature, grad_second.mT @ rows], 1)
            elif of_weight:
                grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
                torch.mm(grad_first.mT, feature, out=grad_weight[:, : feature.shape[1]])
                torch.mm(grad_second.mT, rows, out=grad_weight[:, feature.shape[1] :])
            if of_bias:
                grad_bias = grad_first.sum(0)
        return grad_feature, grad_weight, grad_bias, None, None
