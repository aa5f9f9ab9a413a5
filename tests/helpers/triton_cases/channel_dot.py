"""Calls of channel_dot's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Case, some


def _dot(
    *shape: int, constant: bool = False, last: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[Any], object]:
    """channel_dot of a gradient [N,C,H,W] or, if constant, [N,C]; in both maps channels may be last."""

    def call(module: Any) -> object:
        layout = torch.channels_last if last else torch.contiguous_format
        feature = some(*shape, dtype=dtype).to(memory_format=layout)
        return module.channel_dot(some(*shape[:2]) if constant else feature, feature)

    return call


def _over_positions(*shape: int, last: bool = False, dtype: torch.dtype = torch.float32) -> Callable[[Any], object]:
    """channel_dot with positions and channels exchanged: the gradient of one number a channel."""

    def call(module: Any) -> object:
        layout = torch.channels_last if last else torch.contiguous_format
        feature = some(*shape, dtype=dtype).to(memory_format=layout).flatten(2)
        return module.channel_dot(some(*feature.shape[::2]), feature.transpose(1, 2).unsqueeze(-1))

    return call


def _scale_maps(
    *shape: int, constant: bool = False, last: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        layout = torch.channels_last if last else torch.contiguous_format
        values = some(*shape[:2]) if constant else some(*shape, dtype=dtype).to(memory_format=layout)
        from debiaskd.kernels.channel_scale import channel_scale

        return channel_scale(some(shape[0], *shape[2:]), values, last, dtype)

    return call


def _float64(*shape: int) -> torch.Tensor:
    return some(*shape, dtype=torch.float64)


CASES = {
    "maps": Case(_dot(64, 2048, 7, 7), ("_place_sums",), {"_place_sums": (8, 0)}),
    "bfloat16 maps": Case(_dot(64, 2048, 7, 7, dtype=torch.bfloat16), ("_place_sums",), {"_place_sums": (4, 0)}),
    "many maps": Case(_dot(256, 2048, 7, 7), ("_place_sums",), {"_place_sums": (8, 0)}),
    "large maps": Case(_dot(16, 256, 56, 56), ("_place_sums",), {"_place_sums": (8, 0)}),
    "large odd maps": Case(_dot(16, 256, 57, 57, dtype=torch.float16), ("_place_sums",)),
    "closed form": Case(_dot(256, 2048, 7, 7, constant=True), ("_place_sums",), {"_place_sums": (4, 0)}),
    "channels_last": Case(_dot(64, 2048, 7, 7, last=True), ("_row_dots",), {"_row_dots": (8, 0)}),
    "channels_last, closed form": Case(
        _dot(64, 2048, 7, 7, last=True, constant=True, dtype=torch.bfloat16),
        ("_row_dots",),
        {"_row_dots": (2, 0)},
    ),
    "odd channels_last": Case(_dot(64, 517, 8, 8, last=True), ("_row_dots",)),
    "one map": Case(_dot(1, 2048, 7, 7), ("_place_sums",), {"_place_sums": (8, 0)}),
    "over positions": Case(_over_positions(64, 2048, 7, 7), ("_row_dots",)),
    "over even positions": Case(_over_positions(64, 2048, 8, 8), ("_row_dots",), {"_row_dots": (4, 0)}),
    "over positions, bfloat16": Case(
        _over_positions(64, 2048, 8, 8, dtype=torch.bfloat16), ("_row_dots",), {"_row_dots": (2, 0)}
    ),
    "over positions, channels_last": Case(
        _over_positions(64, 2048, 7, 7, last=True), ("_place_sums",), {"_place_sums": (4, 0)}
    ),
    "over many odd positions": Case(_over_positions(2, 3, 1023, 1024), ("_row_dots",), {"_row_dots": (4, 0)}),
    "over positions of few channels": Case(_over_positions(2, 3, 512, 512, last=True), ("_place_sums",)),
    "cropped": Case(
        lambda module: module.channel_dot(*[some(64, 256, 32, 48)[:, :, :16, 4:36]] * 2),
        ("_place_sums",),
        {"_place_sums": (8, 0)},
    ),
    "mixed": Case(
        lambda module: module.channel_dot(
            some(64, 64, 14, 14), some(64, 64, 14, 14).to(memory_format=torch.channels_last)
        ),
        ("_row_dots",),
        {"_row_dots": (8, 0)},
    ),
    "float64": Case(
        lambda module: module.channel_dot(_float64(64, 256, 14, 14), _float64(64, 256, 14, 14)),
        ("_place_sums",),
        {"_place_sums": (16, 0)},
    ),
    "4 numbers": Case(_dot(1, 4, 1, 1), ("_row_dots",)),
    "2^32 elements": Case(_dot(2**10, 2**10, 2**6, 2**6), ("_place_sums",), {"_place_sums": (8, 0)}, True),
    "2^32 positions": Case(_dot(1, 1, 2**16, 2**16), ("_place_sums",), {"_place_sums": (8, 0)}, True),
    "sums of 2^31 terms": Case(_over_positions(1, 2, 2**16, 2**15), ("_row_dots",), {"_row_dots": (4, 0)}, True),
    "scaled": Case(_scale_maps(64, 2048, 7, 7), ("_scale",), {"_scale": (4, 4)}),
    "scaled, bfloat16": Case(_scale_maps(64, 2048, 7, 7, dtype=torch.bfloat16), ("_scale",), {"_scale": (2, 2)}),
    "scaled, channels_last": Case(_scale_maps(64, 2048, 7, 7, last=True), ("_scale",), {"_scale": (4, 4)}),
    "scaled numbers": Case(
        _scale_maps(64, 2048, 7, 7, constant=True, dtype=torch.bfloat16), ("_scale",), {"_scale": (0, 2)}
    ),
    "scaled numbers, channels_last": Case(
        _scale_maps(64, 2048, 7, 7, constant=True, last=True), ("_scale",), {"_scale": (0, 4)}
    ),
    "scaled odd": Case(_scale_maps(3, 5, 7, 9), ("_scale",)),
    "2^32 elements scaled": Case(_scale_maps(2**6, 2**2, 2**12, 2**12), ("_scale",), {"_scale": (4, 4)}, True),
}
