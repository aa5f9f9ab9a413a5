"""Attribution from a gradient and a feature map: their dot product over the channels, at every position.

Formula:

    out_np = sum_c g_ncp a_ncp     gradient g [N,C,H,W]: input x gradient
    out_np = sum_c w_nc a_ncp      gradient w [N,C], the same at every position: closed form, Grad-CAM before its ReLU

Gradients, with the upstream map m [N,H,W]:

    dL/dg_ncp = m_np a_ncp     dL/dw_nc = sum_p m_np a_ncp     dL/da_ncp = m_np g_ncp     (or m_np w_nc)

Guidance trains through the attribution's own gradient, so that g needs a gradient as much as a does, and so may these
derivatives. They are made of the same two contractions again: a dot product over one axis (`sum_p` is one, with
positions and channels exchanged) and a product with a map. Each is the other's derivative, hence every order exists.

Source: input x gradient and Grad-CAM as trained through by Rao et al. 2023, arXiv 2303.11932.

Bytes that must move: gradient and feature read once in forward; in backward, for either argument, the other one read
and a gradient written. With a gradient [N,C] the feature alone counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debiaskd.ops.backend import choose, kernels, register_fake
from debiaskd.utils import checks


def channel_dot(gradient: Tensor, feature: Tensor) -> Tensor:
    """Sum over channels of gradient times feature, at every position: input × gradient.

    Args:
        gradient: [N,C,H,W], the derivative of a class score by `feature`, or [N,C] where it is (or is to be) the same
            at every position: `weight[target] / (H·W)` behind global average pooling, `gradient.mean((2, 3))` for
            Grad-CAM. Gets a gradient. An [N,C] gradient may have any floating dtype.
        feature: [N,C,H,W]; gets a gradient. Any floating dtype. Contiguous and channels_last maps are both read in
            their own order. The CPU reads any other strides in place; GPUs copy such maps first, and so a gradient
            [N,C,H,W] whose channels and positions are in another order than the feature's.

    Returns:
        [N,H,W], not clamped. float32 for half precisions (the map is a C-th of what was read, and signs cancel in it),
        else the dtype of feature. Differentiable any number of times in both arguments.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> feature = torch.ones(1, 2, 1, 3)
        >>> channel_dot(torch.tensor([[2.0, -0.5]]), feature)
        tensor([[[1.5000, 1.5000, 1.5000]]])

    Source: Rao et al. 2023, arXiv 2303.11932.
    """
    gradient = _check(gradient, feature)
    backend = choose("channel_dot", feature)
    if backend == "eager":
        return eager(gradient, feature)
    return _dot(backend, gradient, feature)


def eager(gradient: Tensor, feature: Tensor) -> Tensor:
    """The oracle: the formula as it stands, in PyTorch."""
    wide = torch.promote_types(feature.dtype, torch.float32)
    if gradient.dim() == 2:
        gradient = gradient[:, :, None, None]
    return (gradient.to(wide) * feature.to(wide)).sum(1)


# ---- the two contractions, each the derivative of the other ----


def _dot(backend: str, gradient: Tensor, feature: Tensor) -> Tensor:
    result: Tensor
    if torch.is_grad_enabled() and (gradient.requires_grad or feature.requires_grad):
        result = _Dot.apply(backend, gradient, feature)
    else:
        result = kernels(backend).channel_dot(gradient, feature)
    return result


def _scale(backend: str, map: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """map [N,H,W] times values [N,C,H,W] or [N,C], in the layout and dtype of `like`."""
    channels_last = like.dim() == 4 and like.stride(1) == 1 and like.shape[1] > 1
    arguments = (map.contiguous(), values, channels_last, like.dtype)
    result: Tensor
    if torch.is_grad_enabled() and (map.requires_grad or values.requires_grad):
        result = _Scale.apply(backend, *arguments)
    else:
        result = kernels(backend).channel_scale(*arguments)
    return result


def _over_positions(backend: str, map: Tensor, feature: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over positions of map [N,H,W] times feature [N,C,H,W]: the same, with channels and positions exchanged."""
    exchanged = feature.flatten(2).transpose(1, 2).unsqueeze(-1)
    return _dot(backend, map.flatten(1), exchanged).squeeze(-1).to(dtype)


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, gradient: Tensor, feature: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(gradient, feature)
        return kernels(backend).channel_dot(gradient, feature)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        gradient, feature = ctx.saved_tensors
        for_gradient = for_feature = None
        if ctx.needs_input_grad[1]:
            if gradient.dim() == 2:
                for_gradient = _over_positions(ctx.backend, upstream, feature, gradient.dtype)
            else:
                for_gradient = _scale(ctx.backend, upstream, feature, gradient)
        if ctx.needs_input_grad[2]:
            for_feature = _scale(ctx.backend, upstream, gradient, feature)
        return None, for_gradient, for_feature


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, map: Tensor, values: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(map, values)
        return kernels(backend).channel_scale(map, values, channels_last, dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
        map, values = ctx.saved_tensors
        for_map = for_values = None
        if ctx.needs_input_grad[1]:
            for_map = _dot(ctx.backend, values, upstream)
        if ctx.needs_input_grad[2]:
            if values.dim() == 2:
                for_values = _over_positions(ctx.backend, map, upstream, values.dtype)
            else:
                for_values = _scale(ctx.backend, map, upstream, values)
        return None, for_map, for_values, None, None


@register_fake("channel_dot")
def _(gradient: Tensor, feature: Tensor) -> Tensor:
    wide = torch.promote_types(feature.dtype, torch.float32)
    return feature.new_empty((feature.shape[0], *feature.shape[2:]), dtype=wide)


@register_fake("channel_scale")
def _(map: Tensor, values: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    samples, height, width = map.shape
    if channels_last:
        return values.new_empty((samples, height, width, values.shape[1]), dtype=dtype).permute(0, 3, 1, 2)
    return values.new_empty((samples, values.shape[1], height, width), dtype=dtype)


def _check(gradient: Tensor, feature: Tensor) -> Tensor:
    checks.floating("gradient", gradient)
    checks.floating("feature", feature)
    checks.rank("feature", feature, "[N,C,H,W]")
    if gradient.dim() == 2:
        checks.shape("gradient", gradient, "[N,C]", feature.shape[:2])
    elif gradient.dim() == 4:
        checks.shape("gradient", gradient, "that of feature", feature.shape)
    else:
        raise ValueError(f"gradient must have shape [N,C,H,W] or [N,C], got {list(gradient.shape)}")
    checks.same_device("gradient", gradient, "feature", feature)
    if gradient.dim() == 4 and gradient.dtype != feature.dtype:
        # Under autocast the two may come out of different ops' dtypes.
        if not torch.is_autocast_enabled(feature.device.type):
            checks.same_dtype("gradient", gradient, "feature", feature)
        gradient = gradient.to(feature.dtype)
    return gradient
