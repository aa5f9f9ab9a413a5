"""Layouts of feature maps: [N,C,H,W], [N,H,W,C] or tokens [N,L,C], with or without class tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class LayoutError(ValueError):
    """An output is not a feature map."""


@dataclass(frozen=True)
class Layout:
    """The layout of a model's last features, with conversion to [N,C,H,W] and back."""

    axes: str = "NCHW"
    prefix: int = 0
    stride: int = 1
    grid: tuple[int, int] | None = None  # of tokens, where it does not follow from the images' size

    def to_map(self, raw: Tensor, images: Tensor) -> Tensor:
        if self.axes == "NCHW":
            return raw
        if self.axes == "NHWC":
            return raw.permute(0, 3, 1, 2)
        tokens = raw[:, self.prefix :].transpose(1, 2)
        height, width = self.grid or (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        return tokens.reshape(tokens.shape[0], tokens.shape[1], height, width)

    def from_map(self, feature: Tensor) -> Tensor:
        if self.axes == "NCHW":
            return feature
        if self.axes == "NHWC":
            return feature.permute(0, 2, 3, 1)
        tokens = feature.flatten(2).transpose(1, 2)
        return torch.cat([tokens.new_zeros(tokens.shape[0], self.prefix, tokens.shape[2]), tokens], dim=1)


def layout_of(role: str, model: nn.Module, raw: Tensor, images: Tensor) -> Layout:
    if raw.dim() == 4:
        first, second, third = raw.shape[1:]
        named = third == getattr(model, "num_features", None) != first
        looks = like(images, first, second) and not like(images, second, third)
        return Layout("NHWC") if named or looks else Layout()
    if raw.dim() == 3:
        named = int(getattr(model, "num_prefix_tokens", 0))
        for prefix in dict.fromkeys([named, 0, 1, 2]):  # not every model counts its class token
            positions = raw.shape[1] - prefix
            stride = math.isqrt(images.shape[-1] * images.shape[-2] // max(positions, 1))
            # Class tokens alone (PiT) are no map of one position.
            if positions > 1 and stride and (images.shape[-2] // stride) * (images.shape[-1] // stride) == positions:
                return Layout("NLC", prefix, stride)
        for prefix in dict.fromkeys([named, 0, 1, 2]):  # images that are resized within the model
            side = math.isqrt(max(raw.shape[1] - prefix, 0))
            if side > 1 and side**2 == raw.shape[1] - prefix and images.shape[-2] == images.shape[-1]:
                return Layout("NLC", prefix, 1, (side, side))
    raise LayoutError(
        f"layer of the {role} must give a feature map [N,C,H,W] (or [N,H,W,C], or a grid of tokens [N,L,C]), "
        f"got {list(raw.shape)}: name the last layer before global pooling"
    )


def like(images: Tensor, height: int, width: int) -> bool:
    """Whether a map of this size has the proportions of the images, up to one row or column of rounding."""
    if images.dim() != 4:
        return False
    return abs(height * images.shape[-1] - width * images.shape[-2]) <= max(images.shape[-2:])
