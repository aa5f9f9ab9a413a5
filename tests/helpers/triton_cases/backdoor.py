"""Calls of backdoor's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Case, some


def _backdoor(samples: int, strata: int, classes: int, dtype: torch.dtype = torch.float32) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        a, b, prior = (some(*s, dtype=dtype) for s in ((samples, classes), (strata, classes), (samples, strata)))
        output, norm = module.backdoor(a, b, prior)
        return module.backdoor_backward(some(*a.shape, dtype=dtype), a, b, prior, norm, output, True)

    return call


_FORWARD = ("_product", "_log_sums") * 2
_LAUNCHES = (*_FORWARD, *("_product", "_add_far") * 2, *("_product",) * 2, *("_add_far",) * 2)
_WIDE = {"_product": (2, 0)}  # a tile of 16 terms of 64 lines is one load for each of 256 threads, of either factor

CASES = {
    "1000 classes": Case(_backdoor(1024, 1000, 1000), _LAUNCHES),
    "odd": Case(_backdoor(5, 7, 11), _LAUNCHES, _WIDE),
    "float64": Case(_backdoor(128, 100, 100, torch.float64), _LAUNCHES, aside={"_add_far": 8}),
    "2^32 logits": Case(_backdoor(2**30, 4, 4), _LAUNCHES, _WIDE, True),
}
