"""Calls of localization's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Case, some


def _boxes(images: int, mask: tuple[int, int] | None) -> tuple[torch.Tensor | None, ...]:
    integers, flags = some(3 * images, 4, dtype=torch.int32), some(images, dtype=torch.bool)
    words = None if mask is None else some(images, (mask[0] + 31) // 32, mask[1], dtype=torch.int32)
    return integers, some(images + 1, dtype=torch.int64), flags, words


def _localized(
    maps: Callable[[], torch.Tensor],
    kind: int = 0,
    size: tuple[int, int] | None = None,
    reduction: int = 1,
    masked: bool = False,
) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        attribution = maps()
        height, width = size or attribution.shape[1:]
        boxes = _boxes(len(attribution), (height, width) if masked else None)
        return module.localization(attribution, *boxes, kind, height, width, reduction, True)

    return call


def _localized_backward(
    maps: Callable[[], torch.Tensor], kind: int = 0, size: tuple[int, int] | None = None, masked: bool = False
) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        attribution = maps()
        images, *own = attribution.shape
        by_bits = kind == 0 and size is None
        words = (images, own[0], (own[1] + 31) // 32) if by_bits else (0,)
        wide = torch.promote_types(attribution.dtype, torch.float32)
        state = (some(images, 2, dtype=wide), some(*words, dtype=torch.int32))
        given = None if by_bits else attribution
        upstream, sizes = some(dtype=wide), (*(size or own), *own)
        boxes = _boxes(images, sizes[:2] if masked else None)
        return module.localization_backward(upstream, given, *boxes, *state, kind, *sizes, attribution.dtype)

    return call


def _images(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    return lambda: some(*(shape or (64, 224, 224)), dtype=dtype)


CASES = {
    "energy": Case(_localized(_images()), ("_sums", "_finish"), {"_sums": (8, 0)}),
    "bfloat16 energy": Case(
        _localized(_images(dtype=torch.bfloat16), reduction=0), ("_sums", "_finish"), {"_sums": (4, 0)}
    ),
    "energy, masked": Case(_localized(_images(), masked=True), ("_sums", "_finish"), {"_sums": (8, 0)}),
    "backward by bits, masked": Case(
        _localized_backward(_images(), masked=True), ("_gradient",), {"_gradient": (0, 8)}
    ),
    "backward, upsampled, masked": Case(
        _localized_backward(_images(64, 7, 7), size=(224, 224), masked=True), ("_upsampled_gradient",)
    ),
    "l1 of many": Case(
        _localized(_images(5000, 56, 56), kind=1), ("_sums", "_add_up", "_finish", "_add_up"), {"_sums": (8, 0)}
    ),
    "ppce, odd": Case(_localized(lambda: some(64, 70, 300)[:, ::2, 1:], kind=2), ("_sums", "_finish")),
    "rrr of small float64": Case(_localized(_images(64, 7, 7, dtype=torch.float64), kind=3), ("_sums", "_finish")),
    "2^32 pixels": Case(
        _localized(_images(2**16, 2**8, 2**8)), ("_sums", "_add_up", "_finish", "_add_up"), {"_sums": (8, 0)}, True
    ),
    "backward by bits": Case(_localized_backward(_images()), ("_gradient",), {"_gradient": (0, 8)}),
    "backward of ppce": Case(_localized_backward(_images(), kind=2), ("_gradient",), {"_gradient": (8, 8)}),
    "backward of rrr, odd": Case(_localized_backward(_images(64, 35, 299), kind=3), ("_gradient",)),
    "backward of 2^32 pixels": Case(
        _localized_backward(_images(2**16, 2**8, 2**8), kind=1), ("_gradient",), {"_gradient": (8, 8)}, True
    ),
    "upsampled": Case(_localized(_images(64, 7, 7), size=(224, 224)), ("_sums", "_finish")),
    "backward, upsampled": Case(_localized_backward(_images(64, 7, 7), size=(224, 224)), ("_upsampled_gradient",)),
    "backward, a little larger": Case(
        _localized_backward(_images(64, 40, 40, dtype=torch.float64), size=(44, 44)),
        ("_upsampled_gradient",),
    ),
    "backward of float64 ppce, a little larger": Case(
        _localized_backward(_images(64, 40, 40, dtype=torch.float64), kind=2, size=(44, 44)),
        ("_upsampled_gradient",),
        aside={"_upsampled_gradient": 8},  # kept while a division of float64 is called
    ),
    "backward to 2^32 pixels": Case(
        _localized_backward(_images(2**16, 2**7, 2**7), kind=1, size=(2**8, 2**8)),
        ("_upsampled_gradient",),
        {},
        True,
    ),
}
