"""Which samples are of one class, found where the labels lie, since nobody may wait for them on the host.

Samples have places in an order sorted by label, those of one label in the order in which they came; a sample's rank is
how many of its class come before it. In a batch of OWN samples or fewer every program looks through all labels for
itself. In larger ones a launch before, `_find`, leaves what is known of each place.

A class is to a kernel's functions a tuple (first, size, order, ranks): its first place, how many samples it has, the
samples by place, and, where those are not yet known, the rank in it of each sample, -1 outside of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LARGE_TILES, launch
from .layout import Values

OWN = 32 if LARGE_TILES else 256
ROWS = 2 if LARGE_TILES else 16  # samples that a program of _find finds the places of
COLS = 64 if LARGE_TILES else 128  # labels that it compares at a time
DIRECT = 32 if LARGE_TILES else 64  # members of a class up to which a program takes one of them at a time
TILE = 32  # members of a larger class that it takes
BAND = 32 if LARGE_TILES else 64  # members of a class that no stretch parts: whole tiles

_OWN = tl.constexpr(OWN)
_BAND = tl.constexpr(BAND)


class Classes(NamedTuple):
    """By place: the sample, and its class's first place and size. By program: classes of two or more that it met."""

    order: Tensor
    first: Tensor
    size: Tensor
    starts: Tensor

    @classmethod
    def empty(cls, samples: int, like: Tensor) -> Classes:
        return cls(*like.new_empty((4, samples), dtype=torch.int32).unbind())


class Stretch(NamedTuple):
    """Places that are gone through at a time. Bands belong to the stretch that their first member lies in."""

    begin: int
    rows: int


def find(labels: Tensor, classes: Classes) -> int:
    """What is known of each place, by a launch; returns how many programs have counted classes."""
    samples = labels.shape[0]
    programs: int = triton.cdiv(samples, ROWS)
    launch(_find, programs, labels, Values.of(labels), classes, samples, ROWS=ROWS, COLS=COLS, warps=8)
    return programs


@triton.jit(do_not_specialize=("samples",))
def _find(labels, classes, samples, ROWS: tl.constexpr, COLS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    there = rows < samples
    own = tl.load(labels.data + rows * labels.stride, mask=there, other=0)
    below = tl.zeros([ROWS], tl.int32)
    before = tl.zeros([ROWS], tl.int32)
    size = tl.zeros([ROWS], tl.int32)
    for start in range(0, samples, COLS):
        i = start + tl.arange(0, COLS)
        label = tl.load(labels.data + i.to(tl.int64) * labels.stride, mask=i < samples, other=0)
        inside = (i < samples)[None, :]
        same = (label[None, :] == own[:, None]) & inside
        below += tl.sum(((label[None, :] < own[:, None]) & inside).to(tl.int32), 1)
        before += tl.sum((same & (i[None, :] < rows[:, None])).to(tl.int32), 1)
        size += tl.sum(same.to(tl.int32), 1)
    place = (below + before).to(tl.int64)
    tl.store(classes.order + place, rows.to(tl.int32), mask=there)
    tl.store(classes.first + place, below, mask=there)
    tl.store(classes.size + place, size, mask=there)
    tl.store(classes.starts + program, tl.sum((there & (before == 0) & (size > 1)).to(tl.int32), 0))


@triton.jit
def look(labels, classes, samples):
    """The class of the sample that has this program's number, and its rank. Leaves them for later launches.

    A class is its first place, its size, and where to find its samples: the rank of each sample of the batch in it, or
    a pointer to the samples in order.
    """
    sample = tl.program_id(0)
    i = tl.arange(0, _OWN)
    there = i < samples
    label = tl.load(labels.data + i.to(tl.int64) * labels.stride, mask=there, other=0)
    own = tl.load(labels.data + sample.to(tl.int64) * labels.stride)
    same = ((label == own) & there).to(tl.int32)
    first = tl.sum(((label < own) & there).to(tl.int32), 0)
    size = tl.sum(same, 0)
    rank = tl.sum(tl.where(i < sample, same, 0), 0)
    place = (first + rank).to(tl.int64)
    tl.store(classes.order + place, sample)
    tl.store(classes.first + place, first)
    tl.store(classes.size + place, size)
    tl.store(classes.starts + sample.to(tl.int64), ((rank == 0) & (size > 1)).to(tl.int32))
    return (first, size, tl.where(same > 0, tl.cumsum(same, 0) - 1, -1)), rank


@triton.jit
def known(classes, place):
    """The class of the sample at a place, and its rank."""
    first = tl.load(classes.first + place.to(tl.int64))
    return (first, tl.load(classes.size + place.to(tl.int64)), classes.order), place - first


@triton.jit
def members(group, ranks):
    """The samples that have these ranks in a class; those of its size and beyond have sample 0."""
    first, size, found = group
    if found.dtype.is_ptr():
        return tl.load(found + (first + ranks).to(tl.int64), mask=ranks < size, other=0)
    else:
        i = tl.arange(0, _OWN)
        return tl.sum(tl.where(found[None, :] == ranks[:, None], i[None, :], 0), 1)


@triton.jit
def share(group, stretch):
    """From which rank on, and up to which, a class lies in a stretch; None is the only one."""
    first, size = group[0], group[1]
    if stretch is None:
        return 0, size
    else:
        low = (tl.maximum(stretch.begin - first, 0) + _BAND - 1) // _BAND * _BAND
        high = (tl.maximum(stretch.begin + stretch.rows - first, 0) + _BAND - 1) // _BAND * _BAND
        return low, tl.minimum(high, size)


@triton.jit
def place_of(stretch, number):
    """The place that a program with this number starts from."""
    if stretch is None:
        return number
    else:
        return stretch.begin + number


@triton.jit
def first_kept(group, stretch):
    """Where among the places of a stretch a class's first would be."""
    if stretch is None:
        return group[0]
    else:
        return group[0] - stretch.begin


@triton.jit
def number_of_classes(classes, parts):
    """Those of two samples or more, of which at least 1 is divided by."""
    count = tl.zeros([], tl.int32)
    for start in range(0, parts, _OWN):
        i = start + tl.arange(0, _OWN)
        count += tl.sum(tl.load(classes.starts + i.to(tl.int64), mask=i < parts, other=0), 0)
    return tl.maximum(count, 1)
