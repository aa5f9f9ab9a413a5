"""A dot product over channels with Triton.

The formula is that of debiaskd/ops/channel_dot.py. Tensors are rows (channel_planes.py says which):

    _sum_rows     at every place, the sum over rows: channels apart, as in contiguous maps
    _sum_along    for every row, the sum over its places: channels side by side, as in channels_last, and the sums
                  over positions that are the gradient of one number a channel
    _add_shares   sums from what programs leave

Bytes: each input is read once, and the map that is written is a C-th of them: that is the floor, and no more moves.

Launches: 1; 2 for sums that are too few for FEW_PROGRAMS programs, or too long for one, whose terms are shared out
to several.

Strides: anything is read in place, 16 bytes at a time where rows are dense and the tensors aligned; nothing is copied.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .channel_planes import (
    FEW_PROGRAMS,
    TILE,
    Factor,
    Planes,
    is_constant,
    lay_out,
    place_offset,
    power,
    row_offset,
    warps_for,
)
from .launch import launch
from .layout import multiple
from .precision import accumulator, widen

MOST_STEPS = 128  # tiles that a program adds up in one sum
LEAST_STEPS = 4  # not worth sharing out


@triton.jit
def _pieces(shift, count, VECTOR: tl.constexpr):
    """Pieces that hold `count` elements after `shift` of others."""
    return (shift + count + (VECTOR - 1)) // VECTOR


@triton.jit
def _row_starts(tensor, sample, rows, width, LINES: tl.constexpr, VECTOR: tl.constexpr, SHIFTED: tl.constexpr):
    """Where rows begin, or the piece does that they begin in; and how many elements lie between the two."""
    if SHIFTED:
        start = sample * tensor.sample + row_offset(tensor, rows, width, LINES, 1)
        return start // VECTOR * VECTOR, start % VECTOR
    else:
        start = sample * multiple(tensor.sample, VECTOR) + row_offset(tensor, rows, width, LINES, VECTOR)
        return start, tl.zeros_like(start)


@triton.jit
def _weights(weight, sample, place, shift, length, dtype: tl.constexpr, SHIFTED: tl.constexpr):
    """Of places in a row, or of those that lie `shift` before them in each."""
    own = place[None, :]
    if SHIFTED:
        own = own - shift[:, None]
    at = sample * weight.sample + own * weight.step
    return widen(tl.load(weight.data + at, mask=(own >= 0) & (own < length), other=0), dtype)


@triton.jit
def _pointers(
    tensor, sample, row, begin, cols, width, LINES: tl.constexpr, VECTOR: tl.constexpr, SHIFTED: tl.constexpr
):
    """To rows from place `begin` on, one beside the other, and how many elements of others come before that."""
    if SHIFTED:
        start = sample * tensor.sample + row * tensor.row + begin
        place = (start // VECTOR * VECTOR)[None, :] + cols.to(tl.int64)[:, None]
        return tensor.data + place, start % VECTOR
    else:
        start, shift = _row_starts(tensor, sample, row, width, False, VECTOR, False)
        place = start[None, :] + place_offset(tensor, begin + cols, width, LINES, VECTOR)[:, None]
        return tensor.data + place, shift


@triton.jit(do_not_specialize=("samples", "rows", "length", "tiles", "shares", "steps"))
def _sum_rows(
    a,
    g,  # None where there are weights
    weight,
    sums,
    samples,
    rows,
    length,
    width,
    tiles,
    shares,
    steps,
    ALIKE: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
    PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = sums.dtype.element_ty
    share = (tl.program_id(0) % shares).to(tl.int64)
    tile = (tl.program_id(0) // shares % tiles).to(tl.int64)
    sample = (tl.program_id(0) // shares // tiles).to(tl.int64)
    begin = tile * PLACES
    count = tl.minimum(length - begin, PLACES)
    cols = tl.arange(0, COLS)
    # Rows that begin alike lie beside each other, to be added up first.
    order = (tl.arange(0, ROWS // ALIKE).to(tl.int64) * ALIKE)[None, :] + tl.arange(0, ALIKE)[:, None]
    order = tl.reshape(order, [ROWS])
    total = tl.zeros([COLS, ROWS], dtype)
    for step in range(steps):
        row = (share * steps + step) * ROWS + order
        pointers, shift = _pointers(a, sample, row, begin, cols, width, LINES, VECTOR, SHIFTED)
        if SHIFTED:
            inside = (cols // VECTOR)[:, None] < _pieces(shift, count, VECTOR)[None, :]
        else:
            inside = (cols < multiple(count, VECTOR))[:, None]
        mask = (row < rows)[None, :] & inside
        term = widen(tl.load(pointers, mask=mask, other=0), dtype)
        if weight is None:
            pointers, _ = _pointers(g, sample, row, begin, cols, width, LINES, VECTOR, SHIFTED)
            term *= widen(tl.load(pointers, mask=mask, other=0), dtype)
        else:
            at = sample * weight.sample + row * weight.step
            term *= widen(tl.load(weight.data + at, mask=row < rows, other=0), dtype)[None, :]
        total += term
    if SHIFTED:
        # Sums of the same place in rows that begin alike, and only in those: moved to where the others have it.
        alike = tl.sum(tl.reshape(total, [COLS, ALIKE, ROWS // ALIKE]), 2)
        start = sample * a.sample + (share * steps * ROWS + tl.arange(0, ALIKE)) * a.row + begin
        source = tl.minimum(cols[:, None] + (start % VECTOR).to(tl.int32)[None, :], COLS - 1)
        result = tl.sum(tl.gather(alike, source, 0), 1)
    else:
        result = tl.sum(total, 1)
    tl.store(sums + ((share * samples + sample) * length + begin + cols), result, mask=cols < count)


@triton.jit(do_not_specialize=("samples", "rows", "length", "chunks", "blocks", "shares", "steps"))
def _sum_along(
    a,
    g,  # None where there are weights
    weight,
    sums,
    samples,
    rows,
    length,
    width,
    chunks,
    blocks,
    shares,
    steps,
    ONCE: tl.constexpr,  # the same weights for every block of rows
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = sums.dtype.element_ty
    share = (tl.program_id(0) % shares).to(tl.int64)
    chunk = (tl.program_id(0) // shares % chunks).to(tl.int64)
    sample = (tl.program_id(0) // shares // chunks).to(tl.int64)
    cols = tl.arange(0, COLS)
    if ONCE:
        row = chunk * blocks * ROWS + tl.arange(0, ROWS)
        _, shift = _row_starts(a, sample, row, width, LINES, VECTOR, SHIFTED)
        factor = _weights(weight, sample, share * steps * COLS + cols, shift, length, dtype, SHIFTED)
    for block in range(blocks):
        row = (chunk * blocks + block) * ROWS + tl.arange(0, ROWS)
        start, shift = _row_starts(a, sample, row, width, LINES, VECTOR, SHIFTED)
        total = tl.zeros([ROWS, COLS], dtype)
        for step in range(steps):
            place = (share * steps + step) * COLS + cols
            if SHIFTED:
                inside = (place // VECTOR)[None, :] < _pieces(shift, length, VECTOR)[:, None]
            else:
                inside = (place < multiple(length, VECTOR))[None, :]
            mask = (row < rows)[:, None] & inside
            term = widen(tl.load(a.data + (start[:, None] + (place * a.step)[None, :]), mask=mask, other=0), dtype)
            if weight is None:
                other, _ = _row_starts(g, sample, row, width, LINES, VECTOR, SHIFTED)
                pointers = g.data + (other[:, None] + (place * g.step)[None, :])
                term *= widen(tl.load(pointers, mask=mask, other=0), dtype)
            elif ONCE:
                term *= factor
            else:
                term *= _weights(weight, sample, place, shift, length, dtype, SHIFTED)
            if SHIFTED:
                own = (place[None, :] >= shift[:, None]) & (place[None, :] < (shift + length)[:, None])
                term = tl.where(own, term, 0)
            total += term
        tl.store(sums + ((share * samples + sample) * rows + row), tl.sum(total, 1), mask=row < rows)


@triton.jit(do_not_specialize=("count", "shares"))
def _add_shares(partial, sums, count, shares, COLS: tl.constexpr):
    cols = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], sums.dtype.element_ty)
    for share in range(shares):
        total += tl.load(partial + (share.to(tl.int64) * count + cols), mask=cols < count, other=0)
    tl.store(sums + cols, total, mask=cols < count)


# ---- the functions of csrc/schema.cpp ----


def channel_dot(gradient: Tensor, feature: Tensor) -> Tensor:
    samples, channels, *size = feature.shape
    out = feature.new_empty((samples, *size), dtype=accumulator(feature.dtype))
    if feature.numel() == 0:
        return out.zero_()
    maps, weight = (feature, gradient), None
    if is_constant(gradient):
        maps, weight = (feature,), Factor(gradient, *gradient.stride()[:2])
    if channels > 1 and all(x.stride(1) == 1 for x in maps):
        _start_along(lay_out(maps, channel_rows=False, merged=weight is None), maps, weight, out)
    else:
        _start_rows(lay_out(maps, channel_rows=True), maps, weight, out)
    return out


def _shares(programs: int, steps: int) -> tuple[int, int]:
    """Into how many shares to cut sums of so many steps, and steps of each, where that makes as many programs."""
    shares = triton.cdiv(steps, MOST_STEPS)
    if 3 * programs < FEW_PROGRAMS:
        shares = max(shares, min(triton.cdiv(FEW_PROGRAMS, programs), steps // LEAST_STEPS))
    each = triton.cdiv(steps, max(1, shares))
    return triton.cdiv(steps, each), each


def _start_rows(planes: Planes, maps: tuple[Tensor, ...], weight: Factor | None, out: Tensor) -> None:
    rows = max(planes.alike, min(64, power(planes.rows)))
    cols = min(power(planes.window), TILE // rows)
    rows = max(rows, min(TILE // cols, power(planes.rows)))
    places = cols if planes.window <= cols or not planes.shifted else cols - planes.vector
    tiles = triton.cdiv(planes.length, places)
    shares, steps = _shares(planes.samples * tiles, triton.cdiv(planes.rows, rows))
    sums = out if shares == 1 else out.new_empty((shares, out.numel()))
    arguments = (*_tensors(planes, maps), weight, sums, planes.samples, planes.rows, planes.length, planes.width)
    constants = {"ALIKE": planes.alike, "PLACES": places, "ROWS": rows, "COLS": cols, "warps": warps_for(rows * cols)}
    programs = planes.samples * tiles * shares
    launch(_sum_rows, programs, out, *arguments, tiles, shares, steps, **planes.options(), **constants)
    _finish(sums, out)


def _start_along(planes: Planes, maps: tuple[Tensor, ...], weight: Factor | None, out: Tensor) -> None:
    rows, cols = min(power(planes.rows), max(1, TILE // power(planes.window))), power(planes.window)
    while rows > planes.alike and planes.samples * triton.cdiv(planes.rows, rows) < FEW_PROGRAMS:
        rows //= 2
    cols = min(cols, TILE // rows)
    tiles, steps = triton.cdiv(planes.rows, rows), triton.cdiv(planes.window, cols)
    once = weight is not None and steps == 1 and not (planes.shifted and (planes.lines or rows % planes.alike))
    blocks = max(1, min(8, planes.samples * tiles // FEW_PROGRAMS)) if once else 1
    chunks = triton.cdiv(tiles, blocks)
    shares, steps = _shares(planes.samples * chunks, steps)
    sums = out if shares == 1 else out.new_empty((shares, out.numel()))
    arguments = (*_tensors(planes, maps), weight, sums, planes.samples, planes.rows, planes.length, planes.width)
    constants = {"ONCE": once, "ROWS": rows, "COLS": cols, "warps": warps_for(rows * cols)}
    programs = planes.samples * chunks * shares
    launch(_sum_along, programs, out, *arguments, chunks, blocks, shares, steps, **planes.options(), **constants)
    _finish(sums, out)


def _tensors(planes: Planes, maps: tuple[Tensor, ...]) -> tuple[Any, Any]:
    return planes.map(maps[0]), planes.map(maps[1], 1) if len(maps) > 1 else None


def _finish(sums: Tensor, out: Tensor) -> None:
    if sums is not out:
        cols = 1024
        launch(_add_shares, triton.cdiv(out.numel(), cols), out, sums, out, out.numel(), len(sums), COLS=cols, warps=4)
