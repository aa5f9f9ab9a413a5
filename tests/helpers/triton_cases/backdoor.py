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


# Around and in the loop that takes far terms one by one, which hardly any input has.
_ASIDE = {"_norm": 8, "_grad_norm": 16}
_BACKDOOR = ("_norm", "_output", "_grad_norm", "_grad_logits")
# Fewer than a tile would suggest: how the operands of products lie in threads is the compiler's choice.
_WIDE = {"_norm": (2, 2), "_output": (2, 2), "_grad_norm": (4, 2), "_grad_logits": (6, 4)}

CASES = {
    "1000 classes": Case(
        _backdoor(1024, 1000, 1000), ("_maxima", *_BACKDOOR[:2], "_maxima", *_BACKDOOR[2:]), aside=_ASIDE
    ),
    "100 classes": Case(_backdoor(128, 100, 100), _BACKDOOR, _WIDE),
    "odd": Case(_backdoor(5, 7, 11), _BACKDOOR, aside=_ASIDE),
    "float64": Case(_backdoor(128, 100, 100, torch.float64), _BACKDOOR),
    "2^32 logits": Case(_backdoor(2**30, 4, 4), _BACKDOOR, _WIDE, True),
}
