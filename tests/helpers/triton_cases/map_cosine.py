"""Calls of map_cosine's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import Case, some


def _loss(
    samples: int,
    channels: int,
    student: tuple[int, int],
    teacher: tuple[int, int],
    *,
    weighted: bool = False,
    reduction: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        weight = some(samples) if weighted else None
        maps = (some(samples, channels, *size, dtype=dtype) for size in (student, teacher))
        return module.map_cosine(*maps, weight, reduction, True)

    return call


def _backward(student: tuple[int, int], teacher: tuple[int, int], dtype: torch.dtype) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        maps = (some(64, 1, *size, dtype=dtype) for size in (student, teacher))
        return module.map_cosine_backward(some(), *maps, None, 1)

    return call


SMALL, LARGE = (7, 7), (224, 224)
GATHERED = ("_products", "_finish", "_add_up", "_gathered")
DIRECT = ("_products", "_finish", "_add_up", "_gradient")
CASES = {
    "maps of one size": Case(
        _loss(64, 1, LARGE, LARGE, weighted=True), DIRECT, {"_products": (4, 0), "_gradient": (4, 2)}
    ),
    "bfloat16 maps": Case(_loss(64, 1, LARGE, LARGE, dtype=torch.bfloat16), DIRECT, {"_gradient": (2, 1)}),
    "small student": Case(_loss(64, 1, SMALL, LARGE), GATHERED, {"_products": (1, 0)}),
    "small teacher": Case(_loss(64, 1, LARGE, SMALL, reduction=0), ("_products", "_finish", "_gradient")),
    "closed form": Case(_loss(64, 1, SMALL, SMALL), DIRECT),
    "weights of the input": Case(_loss(16, 6, LARGE, LARGE), ("_products", "_finish", "_gradient")),
    "float64": Case(_loss(16, 1, SMALL, (30, 41), dtype=torch.float64), ("_products", "_finish", "_gathered")),
    "float16 backward": Case(_backward(SMALL, LARGE, torch.float16), ("_products", "_finish", "_gathered")),
    "many weights": Case(
        _loss(5000, 1, SMALL, SMALL, weighted=True), ("_products", "_add_up", "_finish", "_add_up", "_gradient")
    ),
    "2^32 pixels": Case(_loss(1, 1, (2**16, 2**16), (2**16, 2**16)), ("_products", "_finish", "_gradient"), {}, True),
    "2^32 pixels of cells": Case(
        _loss(1, 1, (2**15, 2**15), (2**16, 2**16)), ("_products", "_finish", "_gathered"), {}, True
    ),
}
