"""Tensors [N, ...] of one shape as kernels see them, and how their elements are dealt out to programs.

A sample's elements are numbered in the student's memory order, that is the order of the first tensor given. Axes on
which all tensors run on without a gap are merged, so that tensors dense in one order, whichever it is, have one axis of
stride 1. Kernels take up to MOST_AXES axes with any strides, 0 among them, and know that stride 1 is 1.

A program works on a tile of [ROWS, COLS] elements: several whole samples where they are short, else one sample's COLS
elements at a time, `steps` times. No sample has more than MOST_PARTS programs, so that one tile can add up what they
leave. Sizes alone decide: the same inputs are summed in the same order on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED
from .precision import widen

MOST_AXES = 4
SHORT = 2**30  # elements of a sample, at most, for which 32 bits do, with room for those that a tile has too many
# Triton's interpreter pays by the operation and not by the element, hence larger tiles, and it is there for tests,
# hence bounds that tests exceed.
TILE = 16384 if INTERPRETED else 4096
WHOLE = 4096 if INTERPRETED else 8192  # elements of a sample that one program holds at once
MOST_PARTS = 8 if INTERPRETED else 1024
MOST_PROGRAMS = 64 if INTERPRETED else 8192  # about, where samples are long


class Map(NamedTuple):
    """A tensor [N, ...] in a kernel: strides from sample to sample and along the merged axes, slowest first."""

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
    sizes: tuple[int, ...]
    parts: int
    steps: int


@dataclass(frozen=True)
class Layout:
    """Samples of `elements` elements each along `sizes`, slowest first; `strides` of each tensor as in Map."""

    samples: int
    elements: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

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
        return Shape(self.elements, self.sizes, self.parts, self.steps)

    def map(self, index: int, tensor: Tensor) -> Map:
        """One of the tensors that the layout was made for."""
        return Map(tensor, self.strides[index])

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
        """Divides where rows of elements begin, and their length; 1 where elements do not lie side by side."""
        if any(strides[-1] != 1 for strides in self.strides):
            return 1
        return math.gcd(16, self.sizes[-1], *(step for strides in self.strides for step in strides[:-1]))


def lay_out(tensors: Sequence[Tensor], alike: bool = False) -> Layout:
    """The layout of tensors of one shape [N, ...]. Samples that count alike are one where no gap parts them."""
    return _lay_out(tuple(tensors[0].shape), tuple(tensor.stride() for tensor in tensors), alike)


@lru_cache(maxsize=4096)
def _lay_out(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], alike: bool) -> Layout:
    if alike:
        sizes, merged = _merge(shape, strides)
        if len(sizes) == 1:
            return Layout(1, math.prod(shape), sizes, tuple((0, *inner) for inner in merged))
    sizes, merged = _merge(shape[1:], tuple(steps[1:] for steps in strides))
    # A single sample leads nowhere, whatever its stride.
    leading = [steps[0] if shape[0] > 1 else 0 for steps in strides]
    return Layout(shape[0], math.prod(sizes), sizes, tuple((step, *inner) for step, inner in zip(leading, merged)))


def _merge(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Sizes and each tensor's strides of the fewest axes that say the same, slowest first."""
    axes = [(size, *(steps[i] for steps in strides)) for i, size in enumerate(shape) if size != 1]
    axes.sort(key=lambda axis: axis[1:], reverse=True)
    merged: list[tuple[int, ...]] = []
    for size, *steps in axes:
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1:], steps)):
            size *= merged.pop()[0]
        merged.append((size, *steps))
    sizes, *steps_of_each = zip(*(merged or [(1,) * (len(strides) + 1)]))
    return sizes, steps_of_each


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
def pointers(tensor, shape, rows, cols, VECTOR: tl.constexpr):
    """To the elements of a tile. Where VECTOR is not 1, the last stride is, and all others are multiples of it."""
    last: tl.constexpr = len(shape.sizes) - 1
    offset = rows[:, None] * multiple(tensor.strides[0], VECTOR)
    rest = cols
    for axis in tl.static_range(last, 0, -1):
        if axis == last:
            size = multiple(shape.sizes[axis], VECTOR)
            step = tensor.strides[axis + 1]
        else:
            size = shape.sizes[axis]
            step = multiple(tensor.strides[axis + 1], VECTOR)
        offset += (rest % size).to(tl.int64)[None, :] * step
        rest = rest // size
    step = tensor.strides[1]
    if last > 0:
        step = multiple(tensor.strides[1], VECTOR)
    return tensor.data + (offset + rest.to(tl.int64)[None, :] * step)


@triton.jit
def values_of(values, samples, rows, dtype: tl.constexpr):
    """A number for each sample of a tile: 1 where there are none to read, 0 where there is no sample."""
    there = rows < samples
    if values is None:
        return there.to(dtype)
    else:
        return widen(tl.load(values.data + rows * values.stride, mask=there, other=0), dtype)
