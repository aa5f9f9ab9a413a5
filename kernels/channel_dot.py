"""A dot product over channels with Triton.

The formula is that of debiaskd/ops/channel_dot.py. A sample is one block of rows that follow each other without a gap:

    _place_sums   at every place in a row, the sum over rows: contiguous maps, whose rows are channels of positions
    _row_dots     for every row, the sum over its places: channels_last maps, whose rows are positions of channels, and
                  the sums over positions that are the gradient of one number a channel

Rows need not begin at multiples of 16 bytes: `together` of them do, and what is added up first are places in those
periods, which are the same in all of them.

Bytes: each input is read once, and the map that is written is a C-th of them: that is the floor, and no more moves.

Launches: 1; for sums that are too few for FEW_PROGRAMS programs, or too long for one, PyTorch's sum of what several
programs leave comes after.

Strides: contiguous and channels_last maps are read in place, 16 bytes at a time where samples (contiguous) or rows
(channels_last) are multiples of that; maps in other strides, and a gradient in another order than its feature, are
copied. Sizes alone decide, so that the same inputs are summed in the same order on every device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LARGE_TILES, launch
from .layout import multiple
from .precision import accumulator, widen

# Triton's interpreter pays by the operation and not by the element, hence larger tiles and fewer programs.
TILE = 32768 if LARGE_TILES else 4096
FEW_PROGRAMS = 4 if LARGE_TILES else 512  # with fewer, rows are cut
MOST_COLS = 4096 if LARGE_TILES else 512  # of a tile of one long row; of several rows together, LONGEST
LONGEST = 2048
MOST_PERIODS = 64  # side by side in a tile, which the interpreter adds up one after the other
MOST_STEPS = 128  # tiles that a program adds up in one sum
LEAST_STEPS = 4  # not worth sharing out


@triton.jit(do_not_specialize=("samples", "rows", "length", "tiles", "shares", "steps"))
def _place_sums(
    a,
    g,  # None where there are weights
    weights,  # [samples, rows]
    sums,  # [shares, samples, length]
    samples,
    rows,
    length,
    tiles,
    shares,
    steps,
    TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    PERIODS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = sums.dtype.element_ty
    share = (tl.program_id(0) % shares).to(tl.int64)
    tile = (tl.program_id(0) // shares % tiles).to(tl.int64)
    sample = (tl.program_id(0) // shares // tiles).to(tl.int64)
    cols = tile * COLS + tl.arange(0, COLS)
    elements = multiple(rows.to(tl.int64) * length, VECTOR)
    span = multiple(length.to(tl.int64) * TOGETHER, VECTOR)
    total = tl.zeros([PERIODS, COLS], dtype)
    for step in range(steps):
        period = (share * steps + step) * PERIODS + tl.arange(0, PERIODS)
        own = (period * span)[:, None] + cols[None, :]
        mask = (cols < span)[None, :] & (own < elements)
        term = widen(tl.load(a + (sample * elements + own), mask=mask, other=0), dtype)
        if weights is None:
            term *= widen(tl.load(g + (sample * elements + own), mask=mask, other=0), dtype)
        else:
            row = (period * TOGETHER)[:, None] + (cols // length)[None, :]
            term *= tl.load(weights + (sample * rows + row), mask=mask, other=0)
        total += term
    result = tl.sum(total, 0)
    if TOGETHER > 1:  # the same place in each row of a period, which are one tile
        each = result
        result = tl.zeros([COLS], dtype)
        for row in tl.static_range(TOGETHER):
            source = tl.minimum(tl.arange(0, COLS) + row * length, COLS - 1)
            result += tl.gather(each, source, 0)
    tl.store(sums + ((share * samples + sample) * length + cols), result, mask=cols < length)


@triton.jit(do_not_specialize=("samples", "rows", "length", "chunks", "shares", "steps"))
def _row_dots(
    a,
    g,  # None where there are weights
    weights,  # [samples, length]
    sums,  # [shares, samples, rows]
    samples,
    rows,
    length,
    chunks,
    shares,
    steps,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = sums.dtype.element_ty
    share = (tl.program_id(0) % shares).to(tl.int64)
    chunk = (tl.program_id(0) // shares % chunks).to(tl.int64)
    sample = (tl.program_id(0) // shares // chunks).to(tl.int64)
    row = chunk * ROWS + tl.arange(0, ROWS)
    whole = multiple(length.to(tl.int64), VECTOR)
    start = (sample * rows + row) * whole
    total = tl.zeros([ROWS, COLS], dtype)
    for step in range(steps):
        place = (share * steps + step) * COLS + tl.arange(0, COLS)
        mask = (row < rows)[:, None] & (place < whole)[None, :]
        term = widen(tl.load(a + (start[:, None] + place[None, :]), mask=mask, other=0), dtype)
        if weights is None:
            term *= widen(tl.load(g + (start[:, None] + place[None, :]), mask=mask, other=0), dtype)
        else:
            term *= tl.load(weights + (sample * whole + place), mask=place < whole, other=0)[None, :]
        total += term
    tl.store(sums + ((share * samples + sample) * rows + row), tl.sum(total, 1), mask=row < rows)


# ---- the functions of csrc/schema.cpp ----


def channel_dot(gradient: Tensor, feature: Tensor) -> Tensor:
    samples, _, *size = feature.shape
    out = feature.new_empty((samples, *size), dtype=accumulator(feature.dtype))
    if feature.numel() == 0:
        return out.zero_()
    last = has_adjacent_channels(feature)
    a, g, weights = dense(feature, last), None, None
    if is_constant(gradient):
        weights = numbers_of(gradient, out.dtype)
    else:
        g = dense(gradient, last)
    _dot_rows(a, g, weights, out) if last else _sum_places(a, g, weights, out)
    return out


def _sum_places(a: Tensor, g: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    samples, rows, length = a.shape[0], a.shape[1], a.shape[2] * a.shape[3]
    vector, together = periods_of(rows, length, (a, g), LONGEST)
    span, periods = length * together, triton.cdiv(rows, together)
    cols = power(span) if together > 1 else min(power(span), max(MOST_COLS, TILE // min(MOST_PERIODS, power(periods))))
    side_by_side = min(MOST_PERIODS, power(periods), TILE // cols)
    tiles = triton.cdiv(span, cols)
    shares, steps = _shares(samples * tiles, triton.cdiv(periods, side_by_side))
    sums = out if shares == 1 else out.new_empty((shares, *out.shape))
    arguments = (a, g, weights, sums, samples, rows, length, tiles, shares, steps)
    constants = {"TOGETHER": together, "VECTOR": vector, "PERIODS": side_by_side, "COLS": cols}
    launch(_place_sums, samples * tiles * shares, out, *arguments, **constants, warps=warps_for(side_by_side * cols))
    _add_up(sums, out)


def _dot_rows(a: Tensor, g: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    samples, rows, length = a.shape[0], a.shape[1] * a.shape[2], a.shape[3]
    if weights is None:
        samples, rows = 1, samples * rows  # no weights tell samples apart
    vector = widest((a, g)) if length % widest((a, g)) == 0 else 1
    side_by_side = min(power(rows), max(1, TILE // power(length)))
    while side_by_side > 1 and samples * triton.cdiv(rows, side_by_side) < FEW_PROGRAMS:
        side_by_side //= 2
    cols = min(power(length), TILE // side_by_side)
    chunks = triton.cdiv(rows, side_by_side)
    shares, steps = _shares(samples * chunks, triton.cdiv(length, cols))
    sums = out if shares == 1 else out.new_empty((shares, *out.shape))
    arguments = (a, g, weights, sums, samples, rows, length, chunks, shares, steps)
    constants = {"VECTOR": vector, "ROWS": side_by_side, "COLS": cols}
    launch(_row_dots, samples * chunks * shares, out, *arguments, **constants, warps=warps_for(side_by_side * cols))
    _add_up(sums, out)


def _shares(programs: int, steps: int) -> tuple[int, int]:
    """Into how many shares to cut sums of so many steps, and steps of each, where that makes as many programs."""
    shares = triton.cdiv(steps, MOST_STEPS)
    if 3 * programs < FEW_PROGRAMS:
        shares = max(shares, min(triton.cdiv(FEW_PROGRAMS, programs), steps // LEAST_STEPS))
    each = triton.cdiv(steps, max(1, shares))
    return triton.cdiv(steps, each), each


def _add_up(sums: Tensor, out: Tensor) -> None:
    if sums is not out:
        torch.sum(sums, 0, out=out)


# ---- maps as rows ----


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor [N,C] stands for the whole map: given so, or [N,C,H,W] expanded from it."""
    return tensor.dim() == 2 or tensor.stride()[2:] == (0, 0)


def numbers_of(constant: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [N,C] that a constant stands for."""
    return (constant if constant.dim() == 2 else constant[:, :, 0, 0]).to(dtype).contiguous()


def has_adjacent_channels(tensor: Tensor) -> bool:
    return tensor.shape[1] > 1 and tensor.stride(1) == 1


def dense(tensor: Tensor, channels_last: bool) -> Tensor:
    """[N,C,H,W] or [N,H,W,C] in that order, which for most maps copies nothing."""
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).contiguous()


def widest(tensors: tuple[Tensor | None, ...]) -> int:
    """Elements of 16 bytes, or 1 where the tensors are not aligned to those."""
    present = [tensor for tensor in tensors if tensor is not None]
    return 16 // present[0].itemsize if all(tensor.data_ptr() % 16 == 0 for tensor in present) else 1


def periods_of(rows: int, length: int, tensors: tuple[Tensor | None, ...], longest: int) -> tuple[int, int]:
    """Elements to move at once, and the rows together that are a multiple of it: no more than `longest` elements."""
    vector = widest(tensors)
    together = vector // math.gcd(vector, length)
    if rows * length % vector or (together > 1 and length * together > longest):
        return 1, 1
    return vector, together


def power(number: int) -> int:
    """The smallest power of 2 that is no less."""
    return int(triton.next_power_of_2(number))


def warps_for(tile: int) -> int:
    return min(8, max(1, tile // 512))
