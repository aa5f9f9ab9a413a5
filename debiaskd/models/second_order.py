"""Convolution, ReLU and max pooling whose attribution gradient is cheap to differentiate.

In the backward pass of an attribution each of these layers is a linear map of the gradient `g`:

    convolution       g ↦ convᵀ(g, w)          derivative for g: conv(s, w), for w: the weight gradient of (s, g)
    the same + norm   g ↦ convᵀ(g, w · γ / σ)  the norm's constant scale goes into the weights: no pass over a map
    ReLU, max pool    g ↦ g at fixed places    derivative for g: s at these places; none for the layer's input

PyTorch's own second derivatives are more general: they compute the weight gradient as a convolution with the batch in
the place of the channels, add zeros for the places of ReLU and max pooling, and differentiate `g · γ / σ` as products
and sums over whole maps. Every other backward pass is PyTorch's. `batch_statistics.py` puts these layers in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.models.constant_gradient import add_statistics, attributing

aten = torch.ops.aten


class Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Shape(NamedTuple):
    """What the gradient of a tensor is made like; the values are not needed."""

    sizes: tuple[int, ...]
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> Shape:
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return cls(tuple(x.shape), last)

    def like(self, gradient: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(self.sizes, dtype=gradient.dtype, device=gradient.device, memory_format=layout)


# ---- convolution ----


def _gradients(
    g: Tensor, x: Tensor, w: Tensor, bias: list[int] | None, shape: Geometry, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups = shape
    found: tuple[Tensor | None, ...] = aten.convolution_backward(
        g, x, w, bias, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return found


def input_gradient(g: Tensor, w: Tensor, x: Shape, shape: Geometry) -> Tensor:
    """convᵀ(g, w) [N,C,H,W]."""
    few = g.device.type == "cpu" and w.shape[1] <= 4 and shape.groups == 1
    if few and shape.stride == (2, 2) and shape.dilation == (1, 1):
        found = _by_phases(g, w, x.sizes[2:], shape.padding)
        if found is not None:
            return found
    gradient = _gradients(g, x.like(g), w, None, shape, [True, False, False])[0]
    assert gradient is not None
    return gradient


def _by_phases(g: Tensor, w: Tensor, size: tuple[int, ...], padding: tuple[int, int]) -> Tensor | None:
    """The input gradient of a convolution with stride 2 as one with stride 1, to 4 times as many channels.

    Rows of the same parity see the same taps: `x[2i + a]` gets `g[i + d] · w[u]` where `u = a + padding - 2d`. For an
    image of 3 channels this is several times as fast as oneDNN's backward. None where `g` does not reach far enough.
    """
    taps = [
        [(a, u, (a + pad - u) // 2) for a in (0, 1) for u in range((a + pad) % 2, kernel, 2)]
        for kernel, pad in zip(w.shape[2:], padding)
    ]
    low = [min(d for _, _, d in axis) for axis in taps]
    high = [max(d for _, _, d in axis) for axis in taps]
    around = [max(-least, most, 0) for least, most in zip(low, high)]
    half = [(length + 1) // 2 for length in size]
    if any(n > m + a - h for n, m, a, h in zip(half, g.shape[2:], around, high)):
        return None
    kernel = w.new_zeros(w.shape[1], 2, 2, w.shape[0], *(h - n + 1 for n, h in zip(low, high)))
    for a, u, d in taps[0]:
        for b, v, e in taps[1]:
            kernel[:, a, b, :, d - low[0], e - low[1]] = w[:, :, u, v].t()
    phases = torch.conv2d(g, kernel.flatten(0, 2), None, 1, around)
    top, left = (a + n for a, n in zip(around, low))
    phases = phases[:, :, top : top + half[0], left : left + half[1]]
    return F.pixel_shuffle(phases, 2)[:, :, : size[0], : size[1]]


class InputGradient(torch.autograd.Function):
    """g ↦ convᵀ(g, w · scale), differentiable in g [N,D,h,w], w [D,C,·,·] and scale [D] or None."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, scale: Tensor | None, x: Shape, shape: Geometry) -> Tensor:
        ctx.save_for_backward(g, w, scale)
        ctx.shape = shape
        return input_gradient(g, _scaled(w, scale), x, shape)

    @staticmethod
    def backward(ctx: Any, s: Tensor) -> tuple[Tensor | None, ...]:
        g, w, scale = ctx.saved_tensors
        scaled = _scaled(w, scale)
        for_g = for_w = for_scale = None
        if ctx.needs_input_grad[0]:
            for_g = torch.conv2d(s, scaled, None, *ctx.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            for_w = _gradients(g, s, scaled, None, ctx.shape, [False, True, False])[1]
            assert for_w is not None
            if scale is not None:
                for_scale = (for_w * w).sum((1, 2, 3))
                for_w = _scaled(for_w, scale)
        return for_g, for_w, for_scale, None, None


def _scaled(w: Tensor, scale: Tensor | None) -> Tensor:
    return w if scale is None else w * scale[:, None, None, None]


class Convolution(torch.autograd.Function):
    """conv2d; `source`: no backward pass but an attribution's needs the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, shape: Geometry, source: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.bias, ctx.shape, ctx.source = None if bias is None else list(bias.shape), shape, source
        return torch.conv2d(x, w, bias, *shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        if attributing():
            return InputGradient.apply(g, w, None, Shape.of(x), ctx.shape), None, None, None, None
        wanted = [ctx.needs_input_grad[0] and not ctx.source, *ctx.needs_input_grad[1:3]]
        return *_gradients(g, x, w, ctx.bias, ctx.shape, wanted), None, None


class NormalizedConvolution(torch.autograd.Function):
    """Batch norm of a convolution's output y0, as one layer: (y, mean, 1/σ), all of them differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        offset: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        y0: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        shape: Geometry,
        source: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse = torch.native_batch_norm(y0, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, w, offset, weight, y0, mean, inverse)
        ctx.eps, ctx.shape, ctx.source = eps, shape, source
        ctx.set_materialize_grads(False)
        return y, mean, inverse

    @staticmethod
    def backward(
        ctx: Any, for_y: Tensor | None, for_mean: Tensor | None, for_inverse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, w, offset, weight, y0, mean, inverse = ctx.saved_tensors
        nothing = (None,) * 6
        if attributing():
            if for_y is None:
                return (None,) * 11
            scale = inverse if weight is None else inverse * weight
            return InputGradient.apply(for_y, w, scale, Shape.of(x), ctx.shape), *(None,) * 4, *nothing
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            y0 = torch.conv2d(x, w, offset, *ctx.shape)  # the same values, with a graph
        for_y0 = for_weight = for_bias = None
        if for_y is not None:
            for_y0, for_weight, for_bias = aten.native_batch_norm_backward(
                for_y,
                y0,
                weight,
                None,
                None,
                mean.detach(),
                inverse.detach(),
                True,
                ctx.eps,
                [any(needs[:3]), *needs[3:5]],
            )
        if any(needs[:3]) and (for_mean is not None or for_inverse is not None):
            for_y0 = add_statistics(for_y0, y0, mean, inverse, for_mean, for_inverse)
        if for_y0 is None:
            return None, None, None, for_weight, for_bias, *nothing
        wanted = [needs[0] and not ctx.source, *needs[1:3]]
        offsets = None if offset is None else list(offset.shape)
        return *_gradients(for_y0, x, w, offsets, ctx.shape, wanted), for_weight, for_bias, *nothing


# ---- layers that pass a gradient at fixed places ----


class _At(torch.autograd.Function):
    """g where y > 0."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        found: Tensor = aten.threshold_backward(g, y, 0)
        return found

    @staticmethod
    def backward(ctx: Any, s: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return aten.threshold_backward(s, y, 0), None


class ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _At.apply(g, y.detach()) if attributing() else aten.threshold_backward(g, y, 0), None


class _Unpool(torch.autograd.Function):
    """g at the places that max pooling chose, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, chosen: Tensor, x: Shape, window: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(chosen)
        found: Tensor = aten.max_pool2d_with_indices_backward(g, x.like(g), *window, chosen.long())
        return found

    @staticmethod
    def backward(ctx: Any, s: Tensor) -> tuple[Tensor | None, ...]:
        (chosen,) = ctx.saved_tensors
        return s.flatten(2).gather(2, chosen.long().flatten(2)).view(chosen.shape), None, None, None


class MaxPool(torch.autograd.Function):
    """max_pool2d; `window`: kernel, stride, padding, dilation, ceil_mode. Chosen places are kept in 32 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> Tensor:
        y, chosen = aten.max_pool2d_with_indices(x, *window)
        ctx.save_for_backward(chosen.int() if x.shape[2] * x.shape[3] < 2**31 else chosen)
        ctx.x, ctx.window = Shape.of(x), window
        found: Tensor = y
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (chosen,) = ctx.saved_tensors
        if attributing():
            return _Unpool.apply(g, chosen, ctx.x, ctx.window), None
        return aten.max_pool2d_with_indices_backward(g, ctx.x.like(g), *ctx.window, chosen.long()), None
