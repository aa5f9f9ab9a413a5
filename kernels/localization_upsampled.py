"""Localization on maps that are interpolated to the boxes' size: no pixel of an upsampled map is ever in memory.

Where an output pixel lies in the map is a fraction of two integers, and is computed as such: exactly, and without
float64, which not every GPU has.

Forward, each pixel of a tile is blended from the four cells around it, which the cache holds. Backward, a program has
a block of cells: up to 16 of a row of the map, and of several rows where few columns of the output feed those. The
pixels that feed a row of the map lie between three rows of it, which are blended along x once for all rows of the
output. The program adds up what each column of the output gives to a row of the map, then what the columns give to each
cell: always in the same order, and no number is added to memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .coverage import ROWS, Boxes, are_annotated, cover, is_covered
from .launch import LARGE_TILES, launch
from .layout import Map, Values
from .localization_tiles import COLUMNS, factors_of, pixel_gradients
from .precision import divide, narrow, widen

# Of a program, at most.
CELLS = 64 if LARGE_TILES else 16  # of a row of the map
LINES = 1024 if LARGE_TILES else 8  # rows of the output at once, half of that in float64: each thread keeps them all
ELEMENTS = 2**19 if LARGE_TILES else 4096  # of a tile, and of what its columns give to cells


class Resampling(NamedTuple):
    """One axis: `input` cells of a map make `output` pixels."""

    input: int
    output: int


@triton.jit
def _taps(pixels, axis, INDEX: tl.constexpr, dtype: tl.constexpr):
    """The two cells that each pixel blends, and the weight of the second."""
    period = 2 * axis.output
    position = tl.maximum((2 * pixels + 1) * axis.input - axis.output, 0).to(INDEX)
    low = position // period
    weight = divide((position % period).to(dtype), (tl.zeros_like(position) + period).to(dtype))
    return low, tl.minimum(low + 1, axis.input - 1).to(INDEX), weight


@triton.jit
def _fed_by(first, last, axis, INDEX: tl.constexpr):
    """Pixels among which are all that blend one of the cells [first, last)."""
    period = 2 * axis.input
    begin = tl.maximum((2 * first - 1) * axis.output - axis.input, 0) + period - 1
    end = (2 * last + 1) * axis.output - axis.input + period - 1
    begin = (begin.to(INDEX) // period).to(tl.int64)
    return begin, tl.minimum((end.to(INDEX) // period).to(tl.int64), axis.output)


@triton.jit
def _blended(maps, images, rows, taps, there, dtype: tl.constexpr):
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
    upper, lower, down = _taps(rows, vertical, INDEX, dtype)
    taps = _taps(cols, horizontal, INDEX, dtype)
    pixels = (1 - down)[:, :, None] * _blended(maps, images, upper, taps, there, dtype)
    pixels += down[:, :, None] * _blended(maps, images, lower, taps, there, dtype)
    return pixels


@triton.jit
def _given(
    maps,
    boxes,
    image,
    counted,
    own,
    cols,
    across,
    taps,
    factors,
    vertical,
    KIND: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What columns of the output, those `across`, give to rows of maps."""
    dtype: tl.constexpr = taps[2].dtype
    begin, end = _fed_by(own, own + 1, vertical, INDEX)
    end = tl.where(counted, end, begin)
    own = own[:, None]
    there = counted[:, None, None] & across[None, None, :]
    before = _blended(maps, image, tl.maximum(own - 1, 0), taps, there, dtype)
    at = _blended(maps, image, own, taps, there, dtype)
    after = _blended(maps, image, tl.minimum(own + 1, vertical.input - 1), taps, there, dtype)
    own = own.to(INDEX)
    sums = tl.zeros([own.shape[0], cols.shape[0]], dtype)
    for top in range(0, tl.max(end - begin, 0), ROWS):
        tops = begin + top
        rows = tops[:, None] + tl.arange(0, ROWS)[None, :]
        upper, lower, down = _taps(rows, vertical, INDEX, dtype)
        is_upper = (upper == own)[:, :, None]
        pixels = (1 - down)[:, :, None] * tl.where(is_upper, at, before)
        pixels += down[:, :, None] * tl.where(is_upper, after, at)
        covered = is_covered(cover(boxes, image, counted, tops, cols), ROWS)
        change = pixel_gradients(pixels, covered, factors[0], factors[1], KIND)
        share = tl.where(upper == own, 1 - down, 0) + tl.where(lower == own, down, 0)
        share = tl.where(rows < end[:, None], share, 0)
        sums += tl.sum(share[:, :, None] * change, 1)
    return sums


@triton.jit(do_not_specialize=("images",))
def _upsampled_gradient(
    maps,
    boxes,
    coefficients,
    upstream,
    gradient,
    images,
    groups,  # of cells, in a row of the map
    vertical,
    horizontal,
    KIND: tl.constexpr,
    INDEX: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = coefficients.dtype.element_ty
    program = tl.program_id(0)
    line = (program // groups).to(tl.int64) * MAP_ROWS + tl.arange(
        0, MAP_ROWS
    )  # a row of a map, numbered throughout the batch
    image = line // vertical.input
    first = (program % groups).to(tl.int64) * CELLS
    counted = are_annotated(boxes, image, images)
    sums = tl.zeros([MAP_ROWS, CELLS], dtype)
    if tl.max(counted.to(tl.int32), 0) > 0:
        own = line % vertical.input
        factors = factors_of(coefficients, upstream, image, counted)
        begin, end = _fed_by(first, first + CELLS, horizontal, INDEX)
        for start in range(begin, end, COLS):
            cols = start + tl.arange(0, COLS)
            taps = _taps(cols, horizontal, INDEX, dtype)
            there = cols < end
            given = _given(maps, boxes, image, counted, own, cols, there, taps, factors, vertical, KIND, INDEX, ROWS)
            left, right, across = taps
            cells = first.to(INDEX) + tl.arange(0, CELLS)
            share = tl.where(left[None, :] == cells[:, None], (1 - across)[None, :], 0)
            share += tl.where(right[None, :] == cells[:, None], across[None, :], 0)
            share = tl.where(there[None, :], share, 0)
            sums += tl.sum(share[None, :, :] * given[:, None, :], 2)
    cells = first + tl.arange(0, CELLS)
    there = (image < images)[:, None] & (cells < horizontal.input)[None, :]
    place = gradient + ((line * horizontal.input)[:, None] + cells[None, :])
    tl.store(place, narrow(sums, gradient.dtype.element_ty), mask=there)


def upsampled_gradient(
    attribution: Tensor,
    boxes: Boxes,
    coefficients: Tensor,
    upstream: Values,
    kind: int,
    height: int,
    width: int,
    gradient: Tensor,
) -> None:
    images, map_height, map_width = gradient.shape
    vertical, horizontal = Resampling(map_height, height), Resampling(map_width, width)
    size = _block(images, vertical, horizontal, LINES * 4 // coefficients.itemsize)
    groups = triton.cdiv(map_width, size["CELLS"])
    programs = triton.cdiv(images * map_height, size["MAP_ROWS"]) * groups
    maps = Map(attribution, attribution.stride())
    arguments = (maps, boxes, coefficients, upstream, gradient, images, groups, vertical, horizontal)
    warps = 8 if size["COLS"] > 128 else 4
    constants = {"KIND": kind, "INDEX": index_of(vertical, horizontal), **size}
    launch(_upsampled_gradient, programs, gradient, *arguments, **constants, warps=warps)


def _block(images: int, vertical: Resampling, horizontal: Resampling, lines: int) -> dict[str, int]:
    """How many cells a program owns, and how many rows and columns of the output it does at once: all that feed them,
    if a tile has room for those."""
    cells = min(CELLS, triton.next_power_of_2(horizontal.input))
    while cells > 1 and _fed(horizontal, cells) > COLUMNS:
        cells //= 2
    cols = min(COLUMNS, triton.next_power_of_2(_fed(horizontal, cells)))
    rows = min(ROWS, lines, triton.next_power_of_2(_fed(vertical, 1)))
    map_rows = min(lines // rows, triton.next_power_of_2(images * vertical.input))
    while map_rows > 1 and map_rows * max(rows, cells) * cols > ELEMENTS:
        map_rows //= 2
    return {"MAP_ROWS": map_rows, "CELLS": cells, "ROWS": rows, "COLS": cols}


def _fed(axis: Resampling, cells: int) -> int:
    """How many pixels blend one of so many neighbouring cells, at most."""
    return min(axis.output, int(triton.cdiv((cells + 1) * axis.output, axis.input)) + 1)


def index_of(*axes: Resampling | None) -> tl.dtype:
    """What positions along these axes are divided in, which with 64 bits takes several times as long."""
    most = max((size for axis in axes if axis for size in axis), default=0)
    return tl.int32 if (2 * most + 4096) * most < 2**31 else tl.int64
