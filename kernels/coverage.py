"""Which pixels of a tile lie inside of a box or of the mask: a word a column of a band of up to 32 rows, a bit a row.

A program looks at BOXES boxes at once. Each contributes its rows as bits to the columns that it spans, and all of them
are joined by or: up to BOXES boxes take as long as one, and a pixel costs the test of one bit however many there are.
What further boxes cost is about 4 instructions for each box and column, shared by the column's 32 rows. A mask comes as
such words, of 32 rows from a multiple of 32 on: two of them make up the word of a column.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED
from .layout import Values

_INTERPRETED = tl.constexpr(INTERPRETED)
_BOXES = tl.constexpr(8)  # every thread keeps all of them in registers
ROWS = 32  # of a band, at most: the bits of a word


class Boxes(NamedTuple):
    """The boxes of a batch in a kernel, and its masks or None; coords and masks are contiguous."""

    coords: Tensor
    offsets: Values
    annotated: Values
    mask: Tensor | None
    mask_bands: int
    mask_columns: int

    @classmethod
    def of(cls, coords: Tensor, offsets: Tensor, annotated: Tensor, mask: Tensor | None) -> Boxes:
        words, size = (None, (0, 0)) if mask is None else (mask.contiguous(), mask.shape[1:])
        return cls(coords.contiguous(), Values.of(offsets), Values.of(annotated), words, *size)


@triton.jit
def are_annotated(boxes, images, count):
    """Which of these images are; those from `count` on, which there are none of, are not."""
    return tl.load(boxes.annotated.data + images * boxes.annotated.stride, mask=images < count, other=0) != 0


@triton.jit
def _rows_above(row):
    """The bits of the rows above one of 33, from above the first to below the last."""
    return tl.where(row < 32, (1 << tl.minimum(row, 31)) - 1, -1)


@triton.jit
def _joined(bits):
    """Or over the first of three axes."""
    # The interpreter goes through this reduction one element after the other: there, halves are joined to halves.
    if _INTERPRETED:
        count: tl.constexpr = bits.shape[0]
        if count > 1:
            halves = tl.reshape(bits, [2, count // 2, bits.shape[1], bits.shape[2]])
            one, other = tl.split(tl.permute(halves, [1, 2, 3, 0]))
            return _joined(one | other)
        else:
            return tl.reshape(bits, [bits.shape[1], bits.shape[2]])
    else:
        return tl.reduce_or(bits, 0)


@triton.jit
def cover(boxes, images, counted, tops, cols):
    """A word for each band and column: a bit for each of the 32 rows from its one of `tops` on. No bit where a band's
    image is not counted."""
    begin = tl.load(boxes.offsets.data + images * boxes.offsets.stride, mask=counted, other=0)
    end = tl.load(boxes.offsets.data + (images + 1) * boxes.offsets.stride, mask=counted, other=0)
    words = tl.zeros([tops.shape[0], cols.shape[0]], tl.int32)
    for first in range(0, tl.max(end - begin, 0), _BOXES):
        box = begin[None, :] + first + tl.arange(0, _BOXES)[:, None]
        there = box < end[None, :]
        x0 = tl.load(boxes.coords + 4 * box, mask=there, other=0)[:, :, None]
        y0 = tl.load(boxes.coords + (4 * box + 1), mask=there, other=0)
        x1 = tl.load(boxes.coords + (4 * box + 2), mask=there, other=0)[:, :, None]
        y1 = tl.load(boxes.coords + (4 * box + 3), mask=there, other=0)
        above = tl.minimum(tl.maximum(y0 - tops[None, :], 0), 32).to(tl.int32)
        below = tl.minimum(tl.maximum(y1 - tops[None, :], 0), 32).to(tl.int32)
        rows = _rows_above(below) & ~_rows_above(above)
        spans = (cols[None, None, :] >= x0) & (cols[None, None, :] < x1)
        words |= _joined(tl.where(spans, rows[:, :, None], 0))
    if boxes.mask is not None:
        words |= _masked(boxes, images, counted, tops, cols)
    return words


@triton.jit
def _masked(boxes, images, counted, tops, cols):
    """The same words of the masks."""
    band = tops // 32
    shift = (tops % 32).to(tl.int32)[:, None]
    first = ((images * boxes.mask_bands + band) * boxes.mask_columns)[:, None] + cols[None, :]
    there = (counted & (band < boxes.mask_bands))[:, None] & (cols < boxes.mask_columns)[None, :]
    upper = tl.load(boxes.mask + first, mask=there, other=0)
    there = (counted & (band + 1 < boxes.mask_bands))[:, None] & (cols < boxes.mask_columns)[None, :] & (shift > 0)
    lower = tl.load(boxes.mask + (first + boxes.mask_columns), mask=there, other=0)
    # A shift of a signed number brings its sign along: the bits that come from it are taken off.
    return ((upper >> shift) & _rows_above(32 - shift)) | (lower << ((32 - shift) & 31))


@triton.jit
def is_covered(words, ROWS: tl.constexpr):
    """For each band, row and column."""
    return ((words[:, None, :] >> tl.arange(0, ROWS)[None, :, None]) & 1) != 0
