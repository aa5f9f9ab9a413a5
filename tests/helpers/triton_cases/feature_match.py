"""Calls of feature_match's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Case, some


def _match(
    make: Callable[[], torch.Tensor], weighted: bool, normalize: bool = False, reduction: int = 1
) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        student, teacher = make(), make()
        weight = some(len(student)) if weighted else None
        return module.feature_match(student, teacher, weight, normalize, reduction, True)

    return call


def _match_backward(make: Callable[[], torch.Tensor], normalize: bool = False) -> Callable[[Any], object]:
    return lambda module: module.feature_match_backward(some(), make(), make(), some(len(make())), normalize, 1)


def _maps(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return some(64, 2048, 7, 7, dtype=dtype)


def _half_maps() -> torch.Tensor:
    return _maps(torch.bfloat16)


CASES = {
    "maps": Case(_match(_maps, True), ("_match", "_add_up"), {"_match": (8, 4)}),
    "maps that count alike": Case(_match(_maps, False), ("_match", "_add_up"), {"_match": (8, 4)}),
    "bfloat16 maps": Case(_match(_half_maps, True), ("_match", "_add_up"), {"_match": (4, 2)}),
    "channels_last": Case(
        _match(lambda: _maps().to(memory_format=torch.channels_last), True),
        ("_match", "_add_up"),
        {"_match": (8, 4)},
    ),
    "odd": Case(_match(lambda: some(64, 5, 37, 33), True), ("_match", "_add_up")),
    "short samples": Case(_match(lambda: some(5000, 49), True), ("_add_up", "_match", "_add_up")),
    "rows of 1000": Case(
        _match(lambda: some(64, 1000, dtype=torch.float16), True, normalize=True, reduction=0),
        ("_match",),
        {"_match": (4, 2)},
    ),
    "long, relative": Case(
        _match(_maps, True, normalize=True), ("_norms", "_match", "_add_up"), {"_norms": (4, 0), "_match": (8, 4)}
    ),
    "float64, relative": Case(
        _match(lambda: some(64, 8192, dtype=torch.float64), True, normalize=True),
        ("_match", "_add_up"),
        {"_match": (16, 8)},
    ),
    "4 numbers": Case(_match(lambda: some(1, 4), False), ("_match",)),
    "2^32 elements": Case(_match(lambda: some(2**16, 2**16), False), ("_match", "_add_up"), {"_match": (8, 4)}, True),
    "2^31 elements a sample": Case(
        _match(lambda: some(2, 2**31 + 1), True, normalize=True), ("_norms", "_match", "_add_up"), {}, True
    ),
    "backward": Case(_match_backward(_maps), ("_match",), {"_match": (8, 4)}),
    "float16 backward": Case(_match_backward(_half_maps), ("_match",), {"_match": (4, 2)}),
    "scaled": Case(lambda module: module.feature_match_scale_(_maps(), some()), ("_scale",), {"_scale": (4, 4)}),
    "scaled by sample": Case(
        lambda module: module.feature_match_scale_(_half_maps(), some(64)), ("_scale",), {"_scale": (2, 2)}
    ),
}
