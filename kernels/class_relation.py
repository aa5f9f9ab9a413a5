"""Relations inside of classes with Triton: cosines of rows, then loss and gradient.

The formula is that of debiaskd/ops/class_relation.py. With D = Gs - Gt the difference of cosines,

    _find       each sample's class, and its place in an order sorted by class: where there are many samples
    _relate     weight_ij = D_ij / |s_j| and pull_ij = D_ij Gs_ij for all i != j of a class; sum_j D_ij^2 / n^2
    _combine    dL/ds_i = 4 / (Q n^2 |s_i|) (sum_j weight_ij s_j - s_i sum_j pull_ij / |s_i|); the loss

Bytes: student and teacher read, gradient written, 3 passes, and the student read once more for the gradient, mostly
from caches. Arithmetic: in a class of DIRECT samples or fewer a program takes the row of one sample and all rows of its
class. Above, programs take tiles of TILE times TILE pairs, each of which counts for both of its samples.

Launches: forward 2, and 1 more for over OWN samples. There is a program for each sample, which shares the tiles of its
class with those of the others; in _combine one for each sample and piece of its columns. The number of classes, by
which everything is divided, is counted by every program there; the first adds up the loss.

Memory: as many weights and pulls as the student has numbers, or KEPT, whichever is more, and never N^2. A batch one of
whose classes could have more is gone through in stretches of places, with _relate and _combine for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .class_cosines import Matrix, columns, cosines_of_row, cosines_of_tile, vector
from .class_gradient import Kept, combine
from .class_groups import (
    BAND,
    DIRECT,
    OWN,
    TILE,
    Classes,
    Stretch,
    find,
    first_kept,
    known,
    look,
    members,
    place_of,
    share,
)
from .launch import LARGE_TILES, launch
from .layout import Values
from .precision import accumulator, add, divide

FEW = 64 if LARGE_TILES else 8  # rows of a class that a program multiplies with one at a time
DEPTH = 256 if LARGE_TILES else 16  # columns of TILE rows at a time
COLS = 1024 if LARGE_TILES else 256  # columns of a row, of float32, at a time
KEPT = 2**11 if LARGE_TILES else 2**22

_FEW = tl.constexpr(FEW)
_DIRECT = tl.constexpr(DIRECT)


@triton.jit
def _keep(kept, place, samples, cosines, teacher, mine, theirs, r, c, size, mirrored):
    """Leaves the weights and pulls of a tile; returns the sum of its squared differences."""
    there = (r < size)[:, None] & (c < size)[None, :]
    difference = tl.where(there, cosines - teacher, 0)
    apart = tl.where(r[:, None] == c[None, :], 0, difference)
    at = (place + r).to(tl.int64)[:, None] * samples + c[None, :]
    tl.store(kept.weights + at, apart * theirs[None, :], mask=there)
    tl.store(kept.pulls + at, apart * cosines, mask=there)
    if mirrored:
        at = (place + c).to(tl.int64)[None, :] * samples + r[:, None]
        tl.store(kept.weights + at, apart * mine[:, None], mask=there)
        tl.store(kept.pulls + at, apart * cosines, mask=there)
    return tl.sum(tl.sum(difference * difference, 1), 0)


@triton.jit
def _relate_row(
    student, teacher, kept, samples, group, own, VECTOR: tl.constexpr, TEACHER_VECTOR: tl.constexpr, COLS: tl.constexpr
):
    dtype: tl.constexpr = kept.losses.dtype.element_ty
    first, size = group[0], group[1]
    rank, stretch = own[0], own[3]
    r = rank + tl.zeros([1], tl.int32)
    row = members(group, r)
    loss = tl.zeros([], dtype)
    lost = tl.zeros([], dtype)
    for start in range(0, size, _FEW):
        c = start + tl.arange(0, _FEW)
        mates = members(group, c)
        same = r[:, None] == c[None, :]
        others = cosines_of_row(teacher, row, mates, c < size, same, TEACHER_VECTOR, COLS)[0]
        cosines, mine, theirs = cosines_of_row(student, row, mates, c < size, same, VECTOR, COLS)
        place = first_kept(group, stretch)
        term = _keep(kept, place, samples, cosines, others.to(dtype), mine, theirs, r, c, size, False)
        loss, lost = add(loss, lost, term)
        tl.store(kept.inverse + (first + r).to(tl.int64), mine)
    return loss


@triton.jit
def _relate_tiles(
    student,
    teacher,
    kept,
    samples,
    group,
    own,
    VECTOR: tl.constexpr,
    TEACHER_VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
):
    """The tiles of the class that are this program's share."""
    first, size = group[0], group[1]
    rank, low, high, stretch = own
    across = tl.cdiv(size, TILE).to(tl.int64)
    down = tl.cdiv(high - low, TILE)
    # Tile (i, j) is also (j, i), unless one of the two lies outside of the stretch. Counting from the diagonal on,
    # around the end, up to half of the tiles in each row of tiles are each of those pairs once; with an even number,
    # the last ones twice.
    offsets = across // 2 + 1 if stretch is None else across
    loss = tl.zeros([], tl.float32)
    lost = tl.zeros([], tl.float32)
    for item in range(rank - low, down * offsets, high - low):
        i = low // TILE + item % down
        offset = item // down
        j = (i + offset) % across
        if (stretch is not None) | (2 * offset != across) | (2 * i < across):
            r = (i * TILE + tl.arange(0, TILE)).to(tl.int32)
            c = (j * TILE + tl.arange(0, TILE)).to(tl.int32)
            rows = members(group, r)
            mates = members(group, c)
            same = r[:, None] == c[None, :]
            others = cosines_of_tile(teacher, rows, mates, r < size, c < size, same, TEACHER_VECTOR, TILE, COLS)[0]
            cosines, mine, theirs = cosines_of_tile(student, rows, mates, r < size, c < size, same, VECTOR, TILE, COLS)
            mirrored = i != j if stretch is None else False
            place = first_kept(group, stretch)
            term = _keep(kept, place, samples, cosines, others, mine, theirs, r, c, size, mirrored)
            loss, lost = add(loss, lost, tl.where(mirrored, 2 * term, term))
            if i == j:
                tl.store(kept.inverse + (first + r).to(tl.int64), mine, mask=r < size)
    return loss


@triton.jit(do_not_specialize=("samples",))
def _relate(
    student,
    teacher,
    labels,  # None where classes are known
    classes,
    kept,
    samples,
    stretch,  # None: the only one
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    TEACHER_VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
):
    if labels is not None:
        group, rank = look(labels, classes, samples)
    else:
        group, rank = known(classes, place_of(stretch, tl.program_id(0)))
    first, size = group[0], group[1]
    low, high = share(group, stretch)
    own = (rank, low, high, stretch)
    if (low <= rank) & (rank < high):
        loss = tl.zeros([], kept.losses.dtype.element_ty)
        if (size > 1) & ((not TILES) | (size <= _DIRECT)):
            loss = _relate_row(student, teacher, kept, samples, group, own, VECTOR, TEACHER_VECTOR, COLS)
        if TILES:  # noqa: SIM102 - otherwise nothing of them is compiled
            if size > _DIRECT:
                loss = _relate_tiles(student, teacher, kept, samples, group, own, VECTOR, TEACHER_VECTOR, TILE, DEPTH)
        pairs = size.to(loss.dtype) * size.to(loss.dtype)
        tl.store(kept.losses + (first + rank).to(tl.int64), divide(loss, pairs))


# ---- the function of csrc/schema.cpp ----


def class_relation(student: Tensor, teacher: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    samples, width = student.shape
    dtype = accumulator(student.dtype)
    gradient = student.new_empty((samples if with_gradient else 0, width), dtype=dtype)
    loss = student.new_empty((), dtype=dtype)
    if samples == 0:
        return loss.zero_(), gradient

    rows = min(samples, max(BAND, max(samples * width, KEPT) // samples))
    only = rows == samples
    classes = Classes.empty(samples, student)
    kept = Kept.empty(rows if only else rows + BAND - 1, samples, student, dtype)
    looking = only and samples <= OWN
    parts = samples if looking else find(labels, classes)

    x, t = Matrix.of(student), Matrix.of(teacher)
    tiles = samples > DIRECT and accumulator(teacher.dtype) == dtype == torch.float32
    vectors = {"VECTOR": vector(student), "TEACHER_VECTOR": vector(teacher)}
    sizes = {"TILE": TILE, "DEPTH": DEPTH, "COLS": columns(max(width, teacher.shape[1]), dtype, COLS)}
    for begin in range(0, samples, rows):
        stretch = None if only else Stretch(begin, rows)
        places = samples if only else min(samples - begin, rows + BAND - 1)
        arguments = (x, t, Values.of(labels) if looking else None, classes, kept, samples, stretch)
        # More stages of the loops over columns have more in hand than there are registers.
        launch(_relate, places, student, *arguments, TILES=tiles, **vectors, **sizes, num_stages=1, warps=8)
        last = loss if begin + rows >= samples else None
        if with_gradient or last is not None:
            results = (gradient if with_gradient else None, last)
            combine(student, *results, classes, kept, stretch, places, parts, tiles)
    return loss, gradient
