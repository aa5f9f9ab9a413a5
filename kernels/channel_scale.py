"""A map times each channel with Triton: the gradients of channel_dot.

Bytes: the values, if there are any, are read once and the result is written once. Launches: 1.

The output is dense, rows of channels or of positions as in channel_dot.py, and so are the values: others are copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_dot import FEW_PROGRAMS, TILE, dense, is_constant, numbers_of, periods_of, power, warps_for
from .launch import launch
from .layout import multiple
from .precision import accumulator, narrow, widen


@triton.jit(do_not_specialize=("rows", "length", "chunks", "tiles", "steps"))
def _scale(
    values,  # None: 1
    places,  # factors [samples, length]; None: 1
    row_factors,  # [samples, rows]; None: 1
    out,
    rows,
    length,
    chunks,
    tiles,
    steps,
    TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    PERIODS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    chunk = (tl.program_id(0) // tiles % chunks).to(tl.int64)
    sample = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    cols = tile * COLS + tl.arange(0, COLS)
    elements = multiple(rows.to(tl.int64) * length, VECTOR)
    span = multiple(length.to(tl.int64) * TOGETHER, VECTOR)
    inner = tl.full([1, COLS], 1, dtype)
    if places is not None:
        inner = tl.load(places + (sample * length + cols % length), mask=cols < span, other=0)[None, :]
    for step in range(steps):
        period = (chunk * steps + step) * PERIODS + tl.arange(0, PERIODS)
        own = (period * span)[:, None] + cols[None, :]
        mask = (cols < span)[None, :] & (own < elements)
        result = inner
        if row_factors is not None:
            row = (period * TOGETHER)[:, None]
            there = row < rows
            if TOGETHER > 1:
                row = row + (cols // length)[None, :]
                there = mask
            result = result * tl.load(row_factors + (sample * rows + row), mask=there, other=0)
        if values is not None:
            result = result * widen(tl.load(values + (sample * elements + own), mask=mask, other=0), dtype)
        result, mask = tl.broadcast(result, mask)
        tl.store(out + (sample * elements + own), narrow(result, out.dtype.element_ty), mask=mask)


def channel_scale(map: Tensor, values: Tensor, channels_last: bool, dtype: torch.dtype) -> Tensor:
    samples, channels = values.shape[:2]
    shape = (samples, *map.shape[1:], channels) if channels_last else (samples, channels, *map.shape[1:])
    out = map.new_empty(shape, dtype=dtype)
    positions = map.shape[1] * map.shape[2]
    if out.numel():
        of_map, of_channel, of_values = map.to(accumulator(dtype)).contiguous(), None, None
        if is_constant(values):
            of_channel = numbers_of(values, of_map.dtype)
        else:
            of_values = dense(values, channels_last)
        if channels_last or positions == 1:  # the same memory, in longer rows
            _start_scale(of_values, of_channel, of_map, out, samples, positions, channels)
        else:
            _start_scale(of_values, of_map, of_channel, out, samples, channels, positions)
    return out.permute(0, 3, 1, 2) if channels_last else out


def _start_scale(
    values: Tensor | None,
    places: Tensor | None,
    row_factors: Tensor | None,
    out: Tensor,
    samples: int,
    rows: int,
    length: int,
) -> None:
    vector, together = periods_of(rows, length, (values, out), 2**30)
    span, periods = length * together, triton.cdiv(rows, together)
    cols = min(power(span), max(1024, TILE // power(periods)))
    side_by_side = min(power(periods), TILE // cols)
    tiles, blocks = triton.cdiv(span, cols), triton.cdiv(periods, side_by_side)
    steps = max(1, min(8, samples * tiles * blocks // (8 * FEW_PROGRAMS)))
    chunks = triton.cdiv(blocks, steps)
    arguments = (values, places, row_factors, out, rows, length, chunks, tiles, steps)
    constants = {"TOGETHER": together, "VECTOR": vector, "PERIODS": side_by_side, "COLS": cols}
    launch(_scale, samples * tiles * chunks, out, *arguments, **constants, warps=warps_for(side_by_side * cols))
