"""Sums in two stages: each program leaves one partial sum, and later ones add them up in their order. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .layout import MOST_PARTS, Values
from .precision import accumulator, add, widen

NONE, MEAN, SUM = range(3)  # the codes of debiaskd/ops/backend.py

_MOST_PARTS = tl.constexpr(MOST_PARTS)
_TILE = 4096


@triton.jit
def total(data, stride, count, dtype: tl.constexpr):
    """The sum of at most MOST_PARTS values, which any program can afford to compute for itself."""
    i = tl.arange(0, _MOST_PARTS)
    values = tl.load(data + i.to(tl.int64) * stride, mask=i < count, other=0)
    return tl.sum(widen(values, dtype), 0)


@triton.jit(do_not_specialize=("length", "count"))
def _add_up(values, sums, length, count, TILE: tl.constexpr):
    dtype: tl.constexpr = sums.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    begin = program * count
    result = tl.zeros([TILE], dtype)
    lost = tl.zeros([TILE], dtype)
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        mask = (i < count) & (begin + i < length)
        loaded = tl.load(values.data + (begin + i) * values.stride, mask=mask, other=0)
        result, lost = add(result, lost, widen(loaded, dtype))
    tl.store(sums + program, tl.sum(result, 0))


def add_up(values: Tensor, sums: Tensor) -> None:
    """As many sums of neighbouring values as `sums` has places, of equally many each but for the last ones."""
    length = values.numel()
    count = triton.cdiv(length, sums.numel())
    launch(_add_up, sums.numel(), sums, Values.of(values), sums, length, count, TILE=_TILE, warps=8)


def few(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights, or sums of them, few enough for every program to add them up."""
    if weight.numel() <= MOST_PARTS:
        return weight
    sums = weight.new_empty(MOST_PARTS, dtype=accumulator(dtype))
    add_up(weight, sums)
    return sums
