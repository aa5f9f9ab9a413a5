"""Cosines of attribution maps with Triton: three products of each pair of maps, then the student's gradient.

The formula is that of debiaskd/ops/map_cosine.py. Maps are cut into tiles at the larger map's size:

    _products   what a tile adds to <s, t>, |s|^2 and |t|^2; the pixels of a smaller map are blended from its cells
    _finish     losses, and two coefficients a sample, from the sums of its tiles
    _gradient   u (a t + b s), where the student is the larger map
    _gathered   the same gathered into the cells of a smaller student

where a = -f / (|s| |t|) and b = f c / |s|^2 for a sample that counts f, and u is the upstream gradient.

Bytes: the larger map is read twice, for the sums and for the gradient, and the gradient is written once.

Launches: 3 for a loss with its gradient; 1 more for the sum of many samples, and 1 more for the sum of more than
MOST_PARTS weights. Backward of float16 and of compiled graphs does it all again.

Maps [N,C,H,W] are contiguous, and one of them is the larger along both axes: debiaskd/ops/map_cosine.py sees to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .bilinear import Resampling, blend, blend_along_x, block, fed_by, index_of, taps_of
from .launch import LARGE_TILES, launch
from .layout import Map, Values, values_of
from .map_tiles import WORDS, cut, inside_tile, pixels_of, tile_of, vector_of
from .precision import accumulator, add, divide, narrow, square_root, widen
from .sums import MEAN, NONE, add_up, few, total

_SAMPLES = 16  # of a program that adds up what tiles leave, at most
_PARTS = 8 if LARGE_TILES else 64  # of a sample that it reads at once, at most


class Axes(NamedTuple):
    """How a map comes to the size at which maps meet; None where it has that size."""

    vertical: Resampling
    horizontal: Resampling


@triton.jit
def _loaded(maps, axes, planes, rows, cols, mask, INDEX: tl.constexpr, VECTOR: tl.constexpr, dtype: tl.constexpr):
    """The pixels of a tile, blended where the map is smaller."""
    if axes is None:
        return widen(tl.load(pixels_of(maps, planes, rows, cols, VECTOR), mask=mask, other=0), dtype)
    else:
        return tl.where(mask, blend(maps, planes, rows, cols, mask, axes.vertical, axes.horizontal, INDEX, dtype), 0)


@triton.jit(do_not_specialize=("planes",))
def _products(
    student,
    teacher,
    partial,
    planes,
    tiles,
    student_axes,
    teacher_axes,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    BANDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = partial.dtype.element_ty
    plane, _tops, rows, left = tile_of(tiles, BANDS, ROWS, COLS)
    cols = left + tl.arange(0, COLS)
    counted = plane < planes
    mask = inside_tile(tiles, counted, rows, cols, VECTOR)
    s = _loaded(student, student_axes, plane, rows, cols, mask, INDEX, VECTOR, dtype)
    t = _loaded(teacher, teacher_axes, plane, rows, cols, mask, INDEX, VECTOR, dtype)
    program = tl.program_id(0)
    band = (program // tiles.strips).to(tl.int64) * BANDS + tl.arange(0, BANDS)
    place = 3 * (band * tiles.strips + program % tiles.strips)
    tl.store(partial + place, tl.sum(tl.sum(s * t, 2), 1), mask=counted)
    tl.store(partial + (place + 1), tl.sum(tl.sum(s * s, 2), 1), mask=counted)
    tl.store(partial + (place + 2), tl.sum(tl.sum(t * t, 2), 1), mask=counted)


@triton.jit(do_not_specialize=("count", "samples"))
def _finish(
    partial,
    weight,
    weights,  # `count` of those to divide by the sum of, or sums of them
    count,
    divisor,
    loss,  # None where nobody asked for it
    coefficients,
    samples,
    parts,
    TINY: tl.constexpr,
    EACH: tl.constexpr,
    SAMPLES: tl.constexpr,
    PARTS: tl.constexpr,
):
    dtype: tl.constexpr = partial.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    there = sample < samples
    dot = tl.zeros([SAMPLES], dtype)
    own = tl.zeros([SAMPLES], dtype)
    other = tl.zeros([SAMPLES], dtype)
    dot_lost = tl.zeros([SAMPLES], dtype)
    own_lost = tl.zeros([SAMPLES], dtype)
    other_lost = tl.zeros([SAMPLES], dtype)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = 3 * (sample[:, None] * parts + part[None, :])
        mask = there[:, None] & (part < parts)[None, :]
        dot, dot_lost = add(dot, dot_lost, tl.sum(tl.load(partial + place, mask=mask, other=0), 1))
        own, own_lost = add(own, own_lost, tl.sum(tl.load(partial + (place + 1), mask=mask, other=0), 1))
        other, other_lost = add(other, other_lost, tl.sum(tl.load(partial + (place + 2), mask=mask, other=0), 1))
    scale = tl.full([], divisor, dtype)
    if weights is not None:
        scale *= total(weights.data, weights.stride, count, dtype)
    # Where nothing has weight the mean is 0.
    factor = tl.where(scale > 0, divide(values_of(weight, samples, sample, dtype), scale), 0)
    zeros = (own < TINY) | (other < TINY)
    nothing = 0 * dot  # NaN where the other map has one
    own = tl.where(zeros, 1, own)
    norms = square_root(own) * square_root(tl.where(zeros, 1, other))
    cosine = tl.where(zeros, nothing, divide(dot, norms))
    each = factor * (1 - cosine)
    if loss is not None:
        if EACH:
            tl.store(loss + sample, each, mask=there)
        else:
            tl.store(loss + tl.program_id(0).to(tl.int64), tl.sum(tl.where(there, each, 0), 0))
    if coefficients is not None:
        tl.store(coefficients + 2 * sample, tl.where(zeros, nothing, -divide(factor, norms)), mask=there)
        by_student = tl.where(zeros, nothing, divide(factor * cosine, own))
        tl.store(coefficients + (2 * sample + 1), by_student, mask=there)


@triton.jit
def _factors(coefficients, sample, counted):
    """Of the teacher's and of the student's pixels in the gradient of each plane."""
    by_teacher = tl.load(coefficients + 2 * sample, mask=counted, other=0)
    by_student = tl.load(coefficients + (2 * sample + 1), mask=counted, other=0)
    return by_teacher[:, None, None], by_student[:, None, None]


@triton.jit
def _scales(upstream, sample, counted, dtype: tl.constexpr):
    """The upstream gradient of each plane. It comes last, so that a backward pass through a retained graph rounds as
    scaling after the forward pass does."""
    if upstream is None:
        return counted.to(dtype)
    else:
        return widen(tl.load(upstream.data + sample * upstream.stride, mask=counted, other=0), dtype)


@triton.jit(do_not_specialize=("planes",))
def _gradient(
    student,
    teacher,
    coefficients,
    upstream,
    gradient,
    planes,
    channels,
    tiles,
    teacher_axes,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    BANDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = coefficients.dtype.element_ty
    plane, _tops, rows, left = tile_of(tiles, BANDS, ROWS, COLS)
    cols = left + tl.arange(0, COLS)
    counted = plane < planes
    mask = inside_tile(tiles, counted, rows, cols, VECTOR)
    s = _loaded(student, None, plane, rows, cols, mask, INDEX, VECTOR, dtype)
    t = _loaded(teacher, teacher_axes, plane, rows, cols, mask, INDEX, VECTOR, dtype)
    by_teacher, by_student = _factors(coefficients, plane // channels, counted)
    scale = _scales(upstream, plane // channels, counted, dtype)
    values = (by_teacher * t + by_student * s) * scale[:, None, None]
    place = pixels_of(gradient, plane, rows, cols, VECTOR)
    tl.store(place, narrow(values, gradient.data.dtype.element_ty), mask=mask)


@triton.jit
def _given(student, teacher, plane, counted, own, cols, across, taps, factors, axes, INDEX: tl.constexpr, ROWS):
    """What columns of the teacher's size, those `across`, give to rows of the student's maps."""
    dtype: tl.constexpr = taps[2].dtype
    begin, end = fed_by(own, own + 1, axes.vertical, INDEX)
    end = tl.where(counted, end, begin)
    own = own[:, None]
    there = counted[:, None, None] & across[None, None, :]
    before = blend_along_x(student, plane, tl.maximum(own - 1, 0), taps, there, dtype)
    at = blend_along_x(student, plane, own, taps, there, dtype)
    after = blend_along_x(student, plane, tl.minimum(own + 1, axes.vertical.input - 1), taps, there, dtype)
    own = own.to(INDEX)
    sums = tl.zeros([own.shape[0], cols.shape[0]], dtype)
    for top in range(0, tl.max(end - begin, 0), ROWS):
        rows = (begin + top)[:, None] + tl.arange(0, ROWS)[None, :]
        upper, lower, down = taps_of(rows, axes.vertical, INDEX, dtype)
        is_upper = (upper == own)[:, :, None]
        s = (1 - down)[:, :, None] * tl.where(is_upper, at, before)
        s += down[:, :, None] * tl.where(is_upper, after, at)
        inside = (rows < end[:, None])[:, :, None] & there
        t = widen(tl.load(pixels_of(teacher, plane, rows, cols, 1), mask=inside, other=0), dtype)
        change = factors[0] * t + factors[1] * s
        share = tl.where(upper == own, 1 - down, 0) + tl.where(lower == own, down, 0)
        share = tl.where(rows < end[:, None], share, 0)
        sums += tl.sum(share[:, :, None] * change, 1)
    return sums


@triton.jit(do_not_specialize=("planes",))
def _gathered(
    student,
    teacher,
    coefficients,
    upstream,
    gradient,
    planes,
    channels,
    groups,  # of cells, in a row of the map
    axes,
    INDEX: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = coefficients.dtype.element_ty
    program = tl.program_id(0)
    # A row of a map, numbered throughout the batch.
    line = (program // groups).to(tl.int64) * MAP_ROWS + tl.arange(0, MAP_ROWS)
    plane = line // axes.vertical.input
    own = line % axes.vertical.input
    first = (program % groups).to(tl.int64) * CELLS
    counted = plane < planes
    factors = _factors(coefficients, plane // channels, counted)
    begin, end = fed_by(first, first + CELLS, axes.horizontal, INDEX)
    cells = first + tl.arange(0, CELLS)
    sums = tl.zeros([MAP_ROWS, CELLS], dtype)
    for start in range(begin, end, COLS):
        cols = start + tl.arange(0, COLS)
        taps = taps_of(cols, axes.horizontal, INDEX, dtype)
        there = cols < end
        given = _given(student, teacher, plane, counted, own, cols, there, taps, factors, axes, INDEX, ROWS)
        left, right, across = taps
        share = tl.where(left[None, :] == cells[:, None], (1 - across)[None, :], 0)
        share += tl.where(right[None, :] == cells[:, None], across[None, :], 0)
        share = tl.where(there[None, :], share, 0)
        sums += tl.sum(share[None, :, :] * given[:, None, :], 2)
    sums *= _scales(upstream, plane // channels, counted, dtype)[:, None]
    mask = counted[:, None] & (cells < axes.horizontal.input)[None, :]
    place = gradient + ((line * axes.horizontal.input)[:, None] + cells[None, :])
    tl.store(place, narrow(sums, gradient.dtype.element_ty), mask=mask)


# ---- the functions of csrc/schema.cpp ----


def map_cosine(
    student: Tensor, teacher: Tensor, weight: Tensor | None, reduction: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    gradient = student.new_empty(student.shape if with_gradient else 0)
    loss = student.new_empty(student.shape[:1] if reduction == NONE else (), dtype=accumulator(student.dtype))
    _run(student, teacher, weight, reduction, loss, gradient if with_gradient else None, None)
    return loss, gradient


def map_cosine_backward(
    grad_output: Tensor, student: Tensor, teacher: Tensor, weight: Tensor | None, reduction: int
) -> Tensor:
    gradient = student.new_empty(student.shape)
    _run(student, teacher, weight, reduction, None, gradient, Values.of(grad_output))
    return gradient


def _run(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    reduction: int,
    loss: Tensor | None,
    gradient: Tensor | None,
    upstream: Values | None,
) -> None:
    samples, channels = student.shape[:2]
    if student.numel() == 0:
        if loss is not None:
            loss.zero_()
        return
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    planes, height, width = max(student, teacher, key=lambda maps: maps.shape[1] * maps.shape[2]).shape
    student_axes, teacher_axes = _axes(student, height, width), _axes(teacher, height, width)
    maps = Map(student, student.stride()), Map(teacher, teacher.stride())
    vector = math.gcd(*(vector_of(x, width) for x in (student, teacher) if x.shape[1:] == (height, width)))
    index = index_of(*(axis for axes in (student_axes, teacher_axes) if axes for axis in axes))
    tiles, programs, size = cut(planes, height, width, WORDS // 4)  # two maps, of which one may be a blend
    partial = student.new_empty((planes * tiles.parts, 3), dtype=accumulator(student.dtype))
    arguments = (*maps, partial, planes, tiles, student_axes, teacher_axes)
    launch(_products, programs, student, *arguments, INDEX=index, VECTOR=vector, **size, warps=8)
    coefficients = None if gradient is None else partial.new_empty((samples, 2))
    _finish_samples(partial, weight, reduction, loss, coefficients, samples)
    if gradient is None:
        return
    if student_axes is None:
        to = Map(gradient.flatten(0, 1), student.stride())
        arguments = (*maps, coefficients, upstream, to, planes, channels, tiles, teacher_axes)
        launch(_gradient, programs, student, *arguments, INDEX=index, VECTOR=vector, **size, warps=8)
        return
    sizes = block(planes, student_axes.vertical, student_axes.horizontal, partial.itemsize)
    groups = triton.cdiv(student.shape[2], sizes["CELLS"])
    programs = triton.cdiv(planes * student.shape[1], sizes["MAP_ROWS"]) * groups
    arguments = (*maps, coefficients, upstream, gradient, planes, channels, groups, student_axes)
    launch(_gathered, programs, student, *arguments, INDEX=index, **sizes, warps=8 if sizes["COLS"] > 128 else 4)


def _axes(maps: Tensor, height: int, width: int) -> Axes | None:
    if maps.shape[1:] == (height, width):
        return None
    return Axes(Resampling(maps.shape[1], height), Resampling(maps.shape[2], width))


def _finish_samples(
    partial: Tensor,
    weight: Tensor | None,
    reduction: int,
    loss: Tensor | None,
    coefficients: Tensor | None,
    samples: int,
) -> None:
    """The loss and the coefficients, from the sums of tiles."""
    parts = partial.shape[0] // samples
    rows = min(_SAMPLES, triton.next_power_of_2(samples))
    programs, mean = triton.cdiv(samples, rows), reduction == MEAN
    weights = few(weight, partial.dtype) if mean and weight is not None else None
    sums = loss
    if loss is not None and reduction != NONE and programs > 1:
        sums = loss.new_empty(programs)
    arguments = (
        partial,
        None if weight is None else Values.of(weight),
        None if weights is None else Values.of(weights),
        0 if weights is None else weights.numel(),
        samples if mean and weight is None else 1,
        sums,
        coefficients,
        samples,
        parts,
    )
    constants = {
        "TINY": 1.1754943508222875e-38 if partial.itemsize == 4 else 2.2250738585072014e-308,
        "EACH": reduction == NONE,
        "SAMPLES": rows,
        "PARTS": min(_PARTS, triton.next_power_of_2(parts)),
    }
    launch(_finish, programs, partial, *arguments, **constants, warps=4)
    if loss is not None and sums is not None and sums is not loss:
        add_up(sums, loss)
