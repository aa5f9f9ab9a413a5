"""Products of rows, and cosines from them: of one row with a few others, or of two times TILE rows, each with each.

Rows are read in place, whatever their strides. Sums are float32 (float64 for float64): tiles are multiplied without
tensor cores, whose sums are coarser.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import multiple
from .precision import divide, widen

_SQUARE = tl.constexpr(1e-24)  # of a norm of 1e-12, below which a row has no direction


class Matrix(NamedTuple):
    """Rows in a kernel. Besides it knows VECTOR, which divides their length and where they begin."""

    data: Tensor
    row_step: int
    step: int
    width: int

    @classmethod
    def of(cls, x: Tensor) -> Matrix:
        return cls(x, x.stride(0), x.stride(1), x.shape[1])


def vector(x: Tensor) -> int:
    """Elements an access."""
    if x.stride(1) != 1:
        return 1
    return math.gcd(16 // x.element_size(), x.shape[1], x.stride(0))


def columns(width: int, dtype: torch.dtype, most: int) -> int:
    """How many a program takes at a time, for which registers suffice; `most` of float32."""
    whole: int = max(16, triton.next_power_of_2(width))
    return min(most * 4 // dtype.itemsize, whole)


@triton.jit
def read(x, rows, there, start, VECTOR: tl.constexpr, COLS: tl.constexpr):
    """COLS columns of some rows; 0 where there are none."""
    cols = start + tl.arange(0, COLS).to(tl.int64)
    mask = there[:, None] & (cols < multiple(x.width, VECTOR))[None, :]
    places = rows.to(tl.int64)[:, None] * multiple(x.row_step, VECTOR) + cols[None, :] * x.step
    values = tl.load(x.data + places, mask=mask, other=0)
    return widen(values, tl.float64 if values.dtype == tl.float64 else tl.float32)


@triton.jit
def _inverse(square):
    """1 / norm, 0 without a direction; NaN stays."""
    root = tl.sqrt_rn(square) if square.dtype == tl.float32 else tl.sqrt(square)
    return tl.where(square < _SQUARE, 0, divide(tl.full(square.shape, 1, square.dtype), root))


@triton.jit
def _cosines(products, mine, theirs, same):
    """With itself, a row has a cosine of 1, or of 0 where it has no direction."""
    own = tl.where(mine > 0, 1, mine)
    return tl.where(same, own[:, None], products * mine[:, None] * theirs[None, :])


@triton.jit
def cosines_of_row(x, row, mates, there, same, VECTOR: tl.constexpr, COLS: tl.constexpr):
    """[1, MATES] cosines of one row with some others, 1 / norm of it and of those. `same`: where it is among them."""
    dtype: tl.constexpr = tl.float64 if x.data.dtype.element_ty == tl.float64 else tl.float32
    products = tl.zeros([mates.shape[0], COLS], dtype)
    mine = tl.zeros([1, COLS], dtype)
    theirs = tl.zeros([mates.shape[0], COLS], dtype)
    for start in range(0, tl.cast(x.width, tl.int64), COLS):
        own = read(x, row, row >= 0, start, VECTOR, COLS)
        others = read(x, mates, there, start, VECTOR, COLS)
        products += own * others
        mine += own * own
        theirs += others * others
    inverse = _inverse(tl.sum(mine, 1))
    inverses = _inverse(tl.sum(theirs, 1))
    return _cosines(tl.sum(products, 1)[None, :], inverse, inverses, same), inverse, inverses


@triton.jit
def cosines_of_tile(
    x, rows, mates, row_there, mate_there, same, VECTOR: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr
):
    """[TILE, TILE] cosines of float32 rows with others, 1 / norm of the ones and of the others."""
    products = tl.zeros([TILE, TILE], tl.float32)
    mine = tl.zeros([TILE, COLS], tl.float32)
    theirs = tl.zeros([TILE, COLS], tl.float32)
    for start in range(0, tl.cast(x.width, tl.int64), COLS):
        own = read(x, rows, row_there, start, VECTOR, COLS)
        others = read(x, mates, mate_there, start, VECTOR, COLS)
        products = tl.dot(own, tl.trans(others), products, input_precision="ieee")
        mine += own * own
        theirs += others * others
    inverse = _inverse(tl.sum(mine, 1))
    inverses = _inverse(tl.sum(theirs, 1))
    return _cosines(products, inverse, inverses, same), inverse, inverses
