"""A map times each channel with Triton: the gradients of channel_dot.

Bytes: the values, if there are any, are read once and the result is written once.

Launches: 1.

Strides: anything is read in place, 16 bytes at a time where rows are dense and the tensors aligned; nothing is copied.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
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
from .precision import narrow, widen


@triton.jit(do_not_specialize=("rows", "length", "period", "chunks", "tiles", "steps"))
def _scale(
    values,  # None: 1
    place,  # factors; None: 1
    row,
    out,
    rows,
    length,
    width,
    period,
    chunks,
    tiles,
    steps,
    CHANNEL_ROWS: tl.constexpr,
    ALIKE: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    chunk = (tl.program_id(0) // tiles % chunks).to(tl.int64)
    sample = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    cols = tile * COLS + tl.arange(0, COLS)
    whole = multiple(length, VECTOR)
    inner = tl.full([1, COLS], 1, dtype)
    if place is not None:
        number = cols.to(tl.int32) % period if ALIKE > 1 else cols
        factors = place.data + (sample * place.sample + number.to(tl.int64) * place.step)
        inner = widen(tl.load(factors, mask=cols < length, other=0), dtype)[None, :]
    for step in range(steps):
        r = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & (cols < whole)[None, :]
        result = inner
        if row is not None:
            own = r[:, None]
            there = own < rows
            if ALIKE > 1:
                own = own * ALIKE + (cols.to(tl.int32) // period).to(tl.int64)[None, :]
                there = mask
            at = row.data + (sample * row.sample + own * row.step)
            result = result * widen(tl.load(at, mask=there, other=0), dtype)
        if values is not None:
            start = sample * multiple(values.sample, VECTOR)
            start += row_offset(values, r, width, LINES and not CHANNEL_ROWS, VECTOR)
            at = start[:, None] + place_offset(values, cols, width, LINES and CHANNEL_ROWS, VECTOR)[None, :]
            result = result * widen(tl.load(values.data + at, mask=mask, other=0), dtype)
        result, mask = tl.broadcast(result, mask)
        at = out + (((sample * rows + r) * whole)[:, None] + cols[None, :])
        tl.store(at, narrow(result, out.dtype.element_ty), mask=mask)


def channel_scale(map: Tensor, values: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    samples, channels = values.shape[:2]
    shape = (samples, *map.shape[1:], channels) if channels_last else (samples, channels, *map.shape[1:])
    out = map.new_empty(shape, dtype=dtype)
    positions = map.shape[1] * map.shape[2]
    if out.numel():
        of_map, of_channel = Factor(map, positions, 1), Factor(values, *values.stride()[:2])
        channel_rows = not channels_last and positions > 1  # else the same memory, in longer rows
        if not is_constant(values):
            planes = lay_out((values,), channel_rows, merged=True)
            place, row = (of_map, None) if channel_rows else (None, of_map)
            _start_scale(_dense(planes), values, place, row, out, channel_rows)
        else:
            rows, length = (channels, positions) if channel_rows else (positions, channels)
            place, row = (of_map, of_channel) if channel_rows else (of_channel, of_map)
            planes = Planes(samples, rows, length, length, False, ((rows * length, length, 0, 1),), 16 // out.itemsize)
            _start_scale(_dense(planes), None, place, row, out, channel_rows)
    return out.permute(0, 3, 1, 2) if channels_last else out


def _dense(planes: Planes) -> Planes:
    """For an output that is dense: rows taken together until they begin at multiples of 16 bytes."""
    sample, row, line, step = planes.steps[0]
    together = planes.vector // math.gcd(planes.vector, planes.length)
    wide = not planes.shifted
    if together > 1:  # whose places are numbered in 32 bits
        apart = planes.lines or row != planes.length or sample % planes.vector or planes.rows % together
        wide = not apart and planes.length * together < 2**30
    if not wide:
        return replace(planes, vector=1, alike=1, shifted=False)
    sizes = {"rows": planes.rows // together, "length": planes.length * together, "alike": together}
    return replace(planes, **sizes, steps=((sample, row * together, line, step),), shifted=False)


def _start_scale(
    planes: Planes, values: Tensor | None, place: Factor | None, row: Factor | None, out: Tensor, channel_rows: bool
) -> None:
    cols = min(power(planes.length), max(1024, TILE // power(planes.rows)))
    rows = min(power(planes.rows), TILE // cols)
    tiles, blocks = triton.cdiv(planes.length, cols), triton.cdiv(planes.rows, rows)
    steps = max(1, min(8, planes.samples * tiles * blocks // (8 * FEW_PROGRAMS)))
    chunks = triton.cdiv(blocks, steps)
    arguments = (None if values is None else planes.map(values), place, row, out)
    sizes = (planes.rows, planes.length, planes.width, planes.length // planes.alike, chunks, tiles, steps)
    constants = {"CHANNEL_ROWS": channel_rows, "ALIKE": planes.alike, "ROWS": rows, "COLS": cols}
    options = {"LINES": planes.lines, "VECTOR": planes.vector, "warps": warps_for(rows * cols)}
    launch(_scale, planes.samples * tiles * chunks, out, *arguments, *sizes, **constants, **options)
