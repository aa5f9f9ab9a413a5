"""Maps [N,C,H,W] as the kernels of channel_dot see them: rows of elements, and how those are dealt out to programs.

Rows are channels, of positions each, or positions, of channels each: whichever has elements that lie side by side.
Rows that do not begin at multiples of 16 bytes, as those of 7×7 positions, are read in the aligned pieces that they
touch, the first and the last of which hold neighbours' elements, too. Rows whose numbers differ by a multiple of
`alike` begin at the same place within a piece.

Sizes and strides alone decide, so that the same inputs are summed in the same order on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED
from .layout import multiple

# Triton's interpreter pays by the operation and not by the element, hence larger tiles and fewer programs.
TILE = 32768 if INTERPRETED else 4096
FEW_PROGRAMS = 4 if INTERPRETED else 512  # with fewer, rows are cut


class Map(NamedTuple):
    """A tensor [N,C,H,W] in a kernel: the steps from one sample, row, line of positions and element to the next."""

    data: Tensor
    sample: int
    row: int
    line: int
    step: int


class Factor(NamedTuple):
    """Numbers [N, ...] in a kernel, one for each row, or for each place in all rows of a sample."""

    data: Tensor
    sample: int
    step: int


@dataclass(frozen=True)
class Planes:
    """Samples of `rows` rows of `length` elements. Positions lie evenly spaced, or on lines of `width` that do.

    steps: of each tensor, as in Map.
    vector: elements that are moved at once. alike: as above.
    shifted: whether rows begin elsewhere than at multiples of 16 bytes.
    """

    samples: int
    rows: int
    length: int
    width: int
    lines: bool
    steps: tuple[tuple[int, int, int, int], ...]
    vector: int = 1
    alike: int = 1
    shifted: bool = False

    @property
    def window(self) -> int:
        """Elements that are read for a row."""
        return self.length + (self.vector - 1 if self.shifted else 0)

    def map(self, tensor: Tensor, index: int = 0) -> Map:
        """One of the tensors that the planes were made for."""
        return Map(tensor, *self.steps[index])

    def options(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {"LINES": self.lines, "VECTOR": self.vector, "SHIFTED": self.shifted}


def lay_out(tensors: tuple[Tensor, ...], channel_rows: bool, merged: bool = False) -> Planes:
    """Of tensors of one shape and dtype. `merged`: samples count alike, and are one where no gap parts them."""
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    widest = 16 // tensors[0].itemsize if aligned else 1
    return _lay_out(tuple(tensors[0].shape), tuple(t.stride() for t in tensors), channel_rows, merged, widest)


@lru_cache(maxsize=4096)
def _lay_out(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], channel_rows: bool, merged: bool, widest: int
) -> Planes:
    samples, channels, height, width = shape
    even = all(1 in (height, width) or s[2] == s[3] * width for s in strides)
    positions = height * width
    position = [s[2] if even and width == 1 else s[3] for s in strides]
    if merged and even and not channel_rows and all(s[0] == positions * p for s, p in zip(strides, position)):
        samples, positions = 1, samples * positions

    def steps(s: tuple[int, ...], position: int) -> tuple[int, int, int, int]:
        # An axis of one element leads nowhere, whatever its stride.
        channel, position = s[1] if channels > 1 else 0, position if positions > 1 else 0
        row, step = (channel, position) if channel_rows else (position, channel)
        return s[0] if samples > 1 else 0, row, 0 if even else s[2], step

    rows, length = (channels, positions) if channel_rows else (positions, channels)
    each = tuple(map(steps, strides, position))
    planes = Planes(samples, rows, length, width, not even, each)
    # Aligned pieces that hold any of a tensor's elements hold nothing but its memory if that ends with such a piece.
    ends = [1 + sum((size - 1) * step for size, step in zip(shape, s)) for s in strides]
    return planes if any(end % widest for end in ends) else _widen(planes, widest, channel_rows)


def _widen(planes: Planes, vector: int, channel_rows: bool) -> Planes:
    """With accesses of `vector` elements, where rows allow that."""
    first = planes.steps[0]
    if any(s[3] != 1 or any((a - b) % vector for a, b in zip(s[:3], first)) for s in planes.steps):
        return planes
    whole = planes.width if planes.lines and channel_rows else planes.length
    if not any(number % vector for number in (whole, *first[:3])):
        return replace(planes, vector=vector)
    if planes.lines:
        return planes
    return replace(planes, vector=vector, alike=vector // math.gcd(first[1], vector), shifted=True)


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor [N,C] stands for the whole map: given so, or [N,C,H,W] expanded from it."""
    return tensor.dim() == 2 or tensor.stride()[2:] == (0, 0)


def power(number: int) -> int:
    """The smallest power of 2 that is no less."""
    return int(triton.next_power_of_2(number))


def warps_for(tile: int) -> int:
    return min(8, max(1, tile // 512))


# ---- in kernels ----


@triton.jit
def row_offset(tensor, rows, width, LINES: tl.constexpr, VECTOR: tl.constexpr):
    """Where rows begin in a sample; `LINES`: they are positions on lines. VECTOR divides every step."""
    if LINES:
        return rows // width * multiple(tensor.line, VECTOR) + rows % width * multiple(tensor.row, VECTOR)
    else:
        return rows * multiple(tensor.row, VECTOR)


@triton.jit
def place_offset(tensor, places, width, LINES: tl.constexpr, VECTOR: tl.constexpr):
    """Where elements lie in a row; `LINES`: they are positions on lines. VECTOR divides the lines' width and step."""
    if LINES:
        size = multiple(width, VECTOR)
        return places // size * multiple(tensor.line, VECTOR) + places % size * tensor.step
    else:
        return places * tensor.step
