"""The gradient of relations inside of classes, from what class_relation.py keeps of them, and the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .class_cosines import Matrix, columns, read, vector
from .class_groups import DIRECT, TILE, Classes, Stretch, first_kept, known, members, number_of_classes, place_of, share
from .launch import LARGE_TILES, launch
from .layout import multiple
from .precision import add, divide

MATES = 64 if LARGE_TILES else 16  # rows of a class that a program has in hand at a time
PIECE = 2048 if LARGE_TILES else 128  # columns of a program, of float32
LOSSES = 64 if LARGE_TILES else 512  # parts of the loss that are added up at a time

_MATES = tl.constexpr(MATES)
_DIRECT = tl.constexpr(DIRECT)
_LOSSES = tl.constexpr(LOSSES)


class Kept(NamedTuple):
    """What _relate leaves: [places kept, N], by the ranks of mates in their class; and a number for each place."""

    weights: Tensor
    pulls: Tensor
    inverse: Tensor  # 1 / norm of the student's row
    losses: Tensor

    @classmethod
    def empty(cls, places: int, samples: int, like: Tensor, dtype: torch.dtype) -> Kept:
        sizes = [places * samples, places * samples, samples, samples]
        return cls(*like.new_empty(sum(sizes), dtype=dtype).split(sizes))


@triton.jit
def _add_up_losses(kept, loss, samples, count):
    dtype: tl.constexpr = kept.losses.dtype.element_ty
    result = tl.zeros([_LOSSES], dtype)
    lost = tl.zeros([_LOSSES], dtype)
    for start in range(0, samples, _LOSSES):
        i = start + tl.arange(0, _LOSSES)
        result, lost = add(result, lost, tl.load(kept.losses + i.to(tl.int64), mask=i < samples, other=0))
    tl.store(loss, divide(tl.sum(result, 0), count.to(dtype)))


@triton.jit
def _weights(kept, place, samples, r, c, size):
    """Of the mates of ranks c in the gradients of ranks r, and the sums of those pulls."""
    there = (r < size)[:, None] & (c < size)[None, :]
    at = (place + r).to(tl.int64)[:, None] * samples + c[None, :]
    pulls = tl.sum(tl.load(kept.pulls + at, mask=there, other=0), 1)
    return tl.load(kept.weights + at, mask=there, other=0), pulls


@triton.jit
def _write(student, gradient, kept, group, r, start, sums, pulls, count, VECTOR: tl.constexpr, COLS: tl.constexpr):
    first, size = group[0], group[1]
    there = r < size
    related = r < tl.where(size > 1, size, 0)  # of a sample alone in its class nothing has been kept
    rows = members(group, r)
    inverse = tl.load(kept.inverse + (first + r).to(tl.int64), mask=related, other=0)
    whole = size.to(sums.dtype)
    factor = divide(tl.full([], 4, sums.dtype), whole * whole * count.to(sums.dtype)) * inverse
    own = read(student, rows, related, start, VECTOR, COLS)
    element = factor[:, None] * (sums - (pulls * inverse)[:, None] * own)
    cols = start + tl.arange(0, COLS).to(tl.int64)
    width = multiple(student.width, VECTOR)
    places = rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(gradient + places, element, mask=there[:, None] & (cols < width)[None, :])


@triton.jit
def _combine_row(
    student, gradient, kept, samples, group, rank, place, start, count, VECTOR: tl.constexpr, COLS: tl.constexpr
):
    """The gradient of one sample."""
    dtype: tl.constexpr = kept.losses.dtype.element_ty
    size = group[1]
    r = rank + tl.zeros([1], tl.int32)
    sums = tl.zeros([1, COLS], dtype)
    pulls = tl.zeros([1], dtype)
    for begin in range(0, tl.where(size > 1, size, 0), _MATES):
        c = begin + tl.arange(0, _MATES)
        weights, pull = _weights(kept, place, samples, r, c, size)
        x = read(student, members(group, c), c < size, start, VECTOR, COLS)
        sums += tl.sum(tl.trans(weights) * x, 0)[None, :]
        pulls += pull
    _write(student, gradient, kept, group, r, start, sums, pulls, count, VECTOR, COLS)


@triton.jit
def _combine_tile(
    student,
    gradient,
    kept,
    samples,
    group,
    rank,
    place,
    start,
    count,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
):
    """The gradients of TILE samples."""
    dtype: tl.constexpr = kept.losses.dtype.element_ty
    size = group[1]
    r = rank + tl.arange(0, TILE)
    sums = tl.zeros([TILE, COLS], dtype)
    pulls = tl.zeros([TILE], dtype)
    for begin in range(0, size, _MATES):
        c = begin + tl.arange(0, _MATES)
        weights, pull = _weights(kept, place, samples, r, c, size)
        x = read(student, members(group, c), c < size, start, VECTOR, COLS)
        sums = tl.dot(weights, x, sums, input_precision="ieee")
        pulls += pull
    _write(student, gradient, kept, group, r, start, sums, pulls, count, VECTOR, COLS)


@triton.jit(do_not_specialize=("samples", "pieces", "parts"))
def _combine(
    student,
    gradient,  # None where nobody asks for it
    loss,  # None where more launches follow
    classes,
    kept,
    samples,
    stretch,
    pieces,
    parts,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0)
    count = number_of_classes(classes, parts)
    if loss is not None:  # noqa: SIM102 - a condition for the compiler, and one for the kernel
        if program == 0:
            _add_up_losses(kept, loss, samples, count)
    if gradient is not None:
        group, rank = known(classes, place_of(stretch, program // pieces))
        size = group[1]
        low, high = share(group, stretch)
        place = first_kept(group, stretch)
        start = (program % pieces).to(tl.int64) * COLS
        inside = (low <= rank) & (rank < high)
        if inside & ((not TILES) | (size <= _DIRECT)):
            _combine_row(student, gradient, kept, samples, group, rank, place, start, count, VECTOR, COLS)
        if TILES:  # noqa: SIM102
            if inside & (size > _DIRECT) & ((rank - low) % TILE == 0):
                _combine_tile(student, gradient, kept, samples, group, rank, place, start, count, VECTOR, TILE, COLS)


def combine(
    student: Tensor,
    gradient: Tensor | None,
    loss: Tensor | None,
    classes: Classes,
    kept: Kept,
    stretch: Stretch | None,
    places: int,
    parts: int,
    tiles: bool,
) -> None:
    """The gradients of a stretch's samples, which has so many places; and the loss."""
    samples, width = student.shape
    cols = columns(width, kept.losses.dtype, PIECE)
    pieces = max(1, triton.cdiv(width, cols))
    programs = 1 if gradient is None else places * pieces
    arguments = (Matrix.of(student), gradient, loss, classes, kept, samples, stretch, pieces, parts)
    options = {"TILES": tiles, "VECTOR": vector(student), "TILE": TILE, "COLS": cols, "num_stages": 1}
    launch(_combine, programs, student, *arguments, **options, warps=8)
