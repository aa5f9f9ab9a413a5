"""The functions of PyTorch that `constant_statistics` replaces with the layers of `second_order.py`.

Each takes the mode, the function and its arguments. What the layers do not handle (autocast, other dtypes and
dimensions, `padding="same"`, tensors without a gradient) goes to PyTorch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.models.second_order import Convolution, Geometry, MaxPool, ReLU
from debiaskd.utils import checks


def _plain(x: Any, *others: Any) -> bool:
    """Whether x [N,C,H,W] is of one dtype with all others, and autocast leaves it so."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or not x.numel():
        return False
    if torch.is_autocast_enabled(x.device.type) or checks.transformed():
        return False
    return all(t is None or (isinstance(t, Tensor) and t.dtype == x.dtype) for t in others)


def _conv2d(
    mode: Any,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    grads = any(isinstance(t, Tensor) and t.requires_grad for t in (input, weight, bias))
    if not grads or isinstance(padding, str) or not _plain(input, weight, bias):
        return func(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
    shape = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    source = input.is_leaf and any(input is each for each in mode.explained or ())
    y: Tensor = Convolution.apply(input, weight, bias, shape, source)
    mode.convolved = (weakref.ref(y), (input, weight, bias, shape, source))
    return y


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def _relu(mode: Any, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    inplace = inplace or func in (torch.relu_, Tensor.relu_)
    if not input.requires_grad or not _plain(input) or (inplace and (input._is_view() or input.is_leaf)):
        return func(input, inplace) if func is F.relu else func(input)
    return ReLU.apply(input, inplace)  # type: ignore[no-any-return]


def _max_pool2d(
    mode: Any,
    func: Any,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    if not input.requires_grad or not _plain(input):
        return func(input, kernel_size, stride, padding, dilation, ceil_mode)  # type: ignore[no-any-return]
    window = (_pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation), ceil_mode)
    return MaxPool.apply(input, window)  # type: ignore[no-any-return]


#: By the function that they replace.
CALLS: dict[Any, Callable[..., Any]] = {
    F.conv2d: _conv2d,
    torch.max_pool2d: _max_pool2d,
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
}
