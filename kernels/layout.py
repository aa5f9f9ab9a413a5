"""Samples as kernels see them: sample after sample in memory, without gaps, dealt out to programs.

A program works on a tile of [ROWS, COLS] elements: several whole samples where they are short, else one sample's COLS
elements at a time, `steps` times. No sample has more than MOST_PARTS programs, so that one tile can add up what they
leave. Sizes alone decide: the same inputs are summed in the same order on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import LARGE_TILES
from .precision import widen

SHORT = 2**30  # elements of a sample, at most, for which 32 bits do, with room for those that a tile has too many
TILE = 16384 if LARGE_TILES else 4096
WHOLE = 4096 if LARGE_TILES else 8192  # elements of a sample that one program holds at once
MOST_PARTS = 8 if LARGE_TILES else 1024
MOST_PROGRAMS = 64 if LARGE_TILES else 8192  # about, where samples are long


class Map(NamedTuple):
    """A tensor in a kernel, with its strides."""

    data: Tensor
    strides: tuple[int, ...]


class Values(NamedTuple):
    """A vector in a kernel."""

    data: Tensor
    stride: int

    @classmethod
    def of(cls, tensor: Tensor) -> Values:
        """A scalar repeats itself for as long as it is read."""
        return cls(tensor, tensor.stride(0) if tensor.dim() else 0)


class Shape(NamedTuple):
    """A sample in a kernel. Their number is an argument of its own, which Triton can be told not to compile in."""

    elements: int
    parts: int
    steps: int


@dataclass(frozen=True)
class Layout:
    """Samples of `elements` elements each."""

    samples: int
    elements: int

    @cached_property
    def cols(self) -> int:
        return triton.next_power_of_2(self.elements) if self.elements <= self._whole else TILE

    @cached_property
    def rows(self) -> int:
        return max(1, TILE // self.cols)

    @cached_property
    def steps(self) -> int:
        tiles = triton.cdiv(self.elements, self.cols)
        return max(triton.cdiv(tiles, MOST_PARTS), min(tiles, self.samples * tiles // MOST_PROGRAMS))

    @cached_property
    def parts(self) -> int:
        """Programs for one sample."""
        return triton.cdiv(self.elements, self.cols * self.steps)

    @cached_property
    def programs(self) -> int:
        return triton.cdiv(self.samples, self.rows) * self.parts

    @cached_property
    def shape(self) -> Shape:
        return Shape(self.elements, self.parts, self.steps)

    def options(self, itemsize: int) -> dict[str, Any]:
        """The constants of a kernel, and its number of warps."""
        return {
            "INDEX": tl.int32 if self.elements <= SHORT else tl.int64,
            "VECTOR": min(self._divisor, 16 // itemsize),
            "ROWS": self.rows,
            "COLS": self.cols,
            "warps": 8 if self._divisor > 1 and self.cols <= TILE else 16,
        }

    @cached_property
    def _whole(self) -> int:
        # Elements that move one by one have an address each: registers suffice for 8 of them a thread, and not for 16.
        return WHOLE if self._divisor > 1 else WHOLE // 2

    @cached_property
    def _divisor(self) -> int:
        """Divides where samples begin, and their length."""
        return math.gcd(16, self.elements)


def lay_out(tensor: Tensor, merged: bool = False) -> Layout:
    """The layout of a dense tensor [N, ...], as one sample where all samples have the same factor (`merged`)."""
    samples = 1 if merged else tensor.shape[0]
    return Layout(samples, tensor.numel() // samples)


# ---- in kernels ----


@triton.jit
def multiple(number, VECTOR: tl.constexpr):
    """The number itself. That VECTOR divides it is what lets the compiler move 16 bytes at once."""
    if VECTOR > 1:
        return number // VECTOR * VECTOR
    else:
        return number


@triton.jit
def samples_of(shape, ROWS: tl.constexpr):
    """The samples of this program, and which part of them it does."""
    program = tl.program_id(0)
    return (program // shape.parts).to(tl.int64) * ROWS + tl.arange(0, ROWS), program % shape.parts


@triton.jit
def elements_of(shape, part, step, INDEX: tl.constexpr, COLS: tl.constexpr):
    """The elements that this program does in a step."""
    return (part.to(INDEX) * shape.steps + step) * COLS + tl.arange(0, COLS)


@triton.jit
def inside(samples, shape, rows, cols, VECTOR: tl.constexpr):
    """Which of a tile's elements there are."""
    return (rows < samples)[:, None] & (cols < multiple(shape.elements, VECTOR))[None, :]


@triton.jit
def pointers(data, shape, rows, cols, VECTOR: tl.constexpr):
    """To the elements of a tile."""
    return data + ((rows * multiple(shape.elements, VECTOR))[:, None] + cols.to(tl.int64)[None, :])


@triton.jit
def values_of(values, samples, rows, dtype: tl.constexpr):
    """A number for each sample of a tile: 1 where there are none to read, 0 where there is no sample."""
    there = rows < samples
    if values is None:
        return there.to(dtype)
    else:
        return widen(tl.load(values.data + rows * values.stride, mask=there, other=0), dtype)
