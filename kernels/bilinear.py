"""Bilinear interpolation (align_corners=False) in kernels: which cells a pixel blends, and which pixels a cell feeds.

Where an output pixel lies in the map is a fraction of two integers, and is computed as such: exactly, and without
float64, which not every GPU has.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .coverage import ROWS
from .launch import LARGE_TILES
from .map_tiles import COLUMNS
from .precision import divide, widen

# Of a program, at most.
CELLS = 64 if LARGE_TILES else 16  # of a row of the map
LINES = 1024 if LARGE_TILES else 8  # rows of the output at once, half of that in float64: each thread keeps them all
ELEMENTS = 2**19 if LARGE_TILES else 4096  # of a tile, and of what its columns give to cells


class Resampling(NamedTuple):
    """One axis: `input` cells of a map make `output` pixels."""

    input: int
    output: int


@triton.jit
def taps_of(pixels, axis, INDEX: tl.constexpr, dtype: tl.constexpr):
    """The two cells that each pixel blends, and the weight of the second."""
    period = 2 * axis.output
    position = tl.maximum((2 * pixels + 1) * axis.input - axis.output, 0).to(INDEX)
    low = position // period
    weight = divide((position % period).to(dtype), (tl.zeros_like(position) + period).to(dtype))
    return low, tl.minimum(low + 1, axis.input - 1).to(INDEX), weight


@triton.jit
def fed_by(first, last, axis, INDEX: tl.constexpr):
    """Pixels among which are all that blend one of the cells [first, last)."""
    period = 2 * axis.input
    begin = tl.maximum((2 * first - 1) * axis.output - axis.input, 0) + period - 1
    end = (2 * last + 1) * axis.output - axis.input + period - 1
    begin = (begin.to(INDEX) // period).to(tl.int64)
    return begin, tl.minimum((end.to(INDEX) // period).to(tl.int64), axis.output)


@triton.jit
def blend_along_x(maps, images, rows, taps, there, dtype: tl.constexpr):
    """Rows of these images' maps, blended along x."""
    data = maps.data + ((images * maps.strides[0])[:, None] + rows.to(tl.int64) * maps.strides[1])[:, :, None]
    left = (taps[0].to(tl.int64) * maps.strides[2])[None, None, :]
    right = (taps[1].to(tl.int64) * maps.strides[2])[None, None, :]
    first = widen(tl.load(data + left, mask=there, other=0), dtype)
    second = widen(tl.load(data + right, mask=there, other=0), dtype)
    across = taps[2][None, None, :]
    return (1 - across) * first + across * second


@triton.jit
def blend(maps, images, rows, cols, there, vertical, horizontal, INDEX: tl.constexpr, dtype: tl.constexpr):
    """The pixels of a tile, each from the four cells of its image's map around it."""
    upper, lower, down = taps_of(rows, vertical, INDEX, dtype)
    taps = taps_of(cols, horizontal, INDEX, dtype)
    pixels = (1 - down)[:, :, None] * blend_along_x(maps, images, upper, taps, there, dtype)
    pixels += down[:, :, None] * blend_along_x(maps, images, lower, taps, there, dtype)
    return pixels


def fed(axis: Resampling, cells: int) -> int:
    """How many pixels blend one of so many neighbouring cells, at most."""
    return min(axis.output, int(triton.cdiv((cells + 1) * axis.output, axis.input)) + 1)


def index_of(*axes: Resampling | None) -> tl.dtype:
    """What positions along these axes are divided in, which with 64 bits takes several times as long."""
    most = max((size for axis in axes if axis for size in axis), default=0)
    return tl.int32 if (2 * most + 4096) * most < 2**31 else tl.int64


def block(images: int, vertical: Resampling, horizontal: Resampling, itemsize: int) -> dict[str, int]:
    """How many cells a program owns, and how many rows and columns of the output it does at once: all that feed them,
    if a tile has room for those."""
    lines = LINES * 4 // itemsize
    cells = min(CELLS, triton.next_power_of_2(horizontal.input))
    while cells > 1 and fed(horizontal, cells) > COLUMNS:
        cells //= 2
    cols = min(COLUMNS, triton.next_power_of_2(fed(horizontal, cells)))
    rows = min(ROWS, lines, triton.next_power_of_2(fed(vertical, 1)))
    map_rows = min(lines // rows, triton.next_power_of_2(images * vertical.input))
    while map_rows > 1 and map_rows * max(rows, cells) * cols > ELEMENTS:
        map_rows //= 2
    return {"MAP_ROWS": map_rows, "CELLS": cells, "ROWS": rows, "COLS": cols}
