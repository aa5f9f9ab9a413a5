"""Localization on maps that are interpolated to the boxes' size: no pixel of an upsampled map is ever in memory.

Forward, each pixel of a tile is blended from the four cells around it, which the cache holds. Backward, a program has
a block of cells: up to 16 of a row of the map, and of several rows where few columns of the output feed those. The
pixels that feed a row of the map lie between three rows of it, which are blended along x once for all rows of the
output. The program adds up what each column of the output gives to a row of the map, then what the columns give to each
cell: always in the same order, and no number is added to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bilinear import Resampling, blend_along_x, block, fed_by, index_of, taps_of
from .coverage import Boxes, are_annotated, cover, is_covered
from .launch import launch
from .layout import Map, Values
from .localization_tiles import factors_of, pixel_gradients
from .precision import narrow


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
    begin, end = fed_by(own, own + 1, vertical, INDEX)
    end = tl.where(counted, end, begin)
    own = own[:, None]
    there = counted[:, None, None] & across[None, None, :]
    before = blend_along_x(maps, image, tl.maximum(own - 1, 0), taps, there, dtype)
    at = blend_along_x(maps, image, own, taps, there, dtype)
    after = blend_along_x(maps, image, tl.minimum(own + 1, vertical.input - 1), taps, there, dtype)
    own = own.to(INDEX)
    sums = tl.zeros([own.shape[0], cols.shape[0]], dtype)
    for top in range(0, tl.max(end - begin, 0), ROWS):
        tops = begin + top
        rows = tops[:, None] + tl.arange(0, ROWS)[None, :]
        upper, lower, down = taps_of(rows, vertical, INDEX, dtype)
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
        begin, end = fed_by(first, first + CELLS, horizontal, INDEX)
        for start in range(begin, end, COLS):
            cols = start + tl.arange(0, COLS)
            taps = taps_of(cols, horizontal, INDEX, dtype)
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
    size = block(images, vertical, horizontal, coefficients.itemsize)
    groups = triton.cdiv(map_width, size["CELLS"])
    programs = triton.cdiv(images * map_height, size["MAP_ROWS"]) * groups
    maps = Map(attribution, attribution.stride())
    arguments = (maps, boxes, coefficients, upstream, gradient, images, groups, vertical, horizontal)
    warps = 8 if size["COLS"] > 128 else 4
    constants = {"KIND": kind, "INDEX": index_of(vertical, horizontal), **size}
    launch(_upsampled_gradient, programs, gradient, *arguments, **constants, warps=warps)
