"""Calls of class_relation's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Case, some


def _relation(
    samples: int, width: int, dtype: torch.dtype = torch.float32, with_gradient: bool = True
) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        labels = some(samples, dtype=torch.int64)
        student, teacher = some(samples, width, dtype=dtype), some(samples, 512, dtype=dtype)
        return module.class_relation(student, teacher, labels, with_gradient)

    return call


CASES = {
    "2^32 elements": Case(
        _relation(2**16, 2**16), ("_find", "_relate", "_combine"), {"_relate": (4, 0), "_combine": (8, 4)}, True
    ),
    "features": Case(_relation(256, 2048), ("_relate", "_combine"), {"_relate": (4, 0), "_combine": (8, 4)}),
    "float64": Case(_relation(256, 2048, torch.float64), ("_relate", "_combine"), {"_relate": (4, 0)}),
    "loss alone": Case(_relation(256, 2048, with_gradient=False), ("_relate", "_combine"), {"_relate": (4, 0)}),
    "thousands, bfloat16": Case(
        _relation(2000, 2048, torch.bfloat16),
        ("_find", "_relate", "_combine"),
        {"_combine": (2, 4)},
    ),
    "stretches, odd": Case(_relation(4096, 1001), ("_find", *("_relate", "_combine") * 4)),
}
