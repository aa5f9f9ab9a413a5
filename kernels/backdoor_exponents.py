"""Matrices of exponentials, which are never written: tiles of them, computed from the logits that they are made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import multiple

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
INFINITY = tl.constexpr(float("inf"))
OWN_MAXIMA = 256  # classes up to which programs find the maxima of their own rows


class Matrix(NamedTuple):
    """Without data it is not there. Whether a tuple is None, not every Triton can tell."""

    data: Tensor | None = None
    row: int = 0
    column: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Matrix:
        return cls(tensor, tensor.stride(0), tensor.stride(1))


class Exponents(NamedTuple):
    """exp(plus - minus - taken + added + columns) * factor, [height, width]; what has no data is not there.

    `taken` and `added` have a number for each row, `columns` for each column. With a factor, what lies beyond
    exp(FARTHEST) counts 0, and is added term by term afterwards.
    """

    height: int
    width: int
    plus: Matrix = Matrix()
    minus: Matrix = Matrix()
    taken: Tensor | None = None
    added: Tensor | None = None
    columns: Tensor | None = None
    factor: Matrix = Matrix()


class Logits:
    """The op's inputs, and the vectors of maxima that go with them."""

    def __init__(self, a: Tensor, b: Tensor, prior: Tensor) -> None:
        self.samples, self.classes = a.shape
        self.strata = b.shape[0]
        self.a, self.b, self.prior = Matrix.of(a), Matrix.of(b), Matrix.of(prior)
        self.a_max, self.b_max, self.w_max = (a.new_empty(n) for n in (self.samples, self.strata, self.samples))
        self.own = self.classes <= OWN_MAXIMA and self.samples > 0 and self.strata > 0

    def p(self) -> Exponents:
        return Exponents(self.samples, self.classes, plus=self.a, taken=self.a_max)

    def q(self) -> Exponents:
        return Exponents(self.strata, self.classes, plus=self.b, taken=self.b_max)

    def w(self, norm: Tensor) -> Exponents:
        minus = Matrix.of(norm)
        return Exponents(self.samples, self.strata, self.prior, minus, taken=self.w_max, columns=self.b_max)

    def t(self, output: Tensor) -> Exponents:
        return Exponents(self.samples, self.classes, plus=Matrix.of(output), minus=self.a)

    def g(self, output: Tensor, grad_output: Tensor) -> Exponents:
        factor = Matrix.of(grad_output)
        return Exponents(self.samples, self.classes, self.a, Matrix.of(output), added=self.w_max, factor=factor)

    def h(self, norm: Tensor, grad_norm: Tensor) -> Exponents:
        minus, factor = Matrix.of(norm), Matrix.of(grad_norm)
        return Exponents(self.samples, self.strata, minus=minus, added=self.a_max, columns=self.b_max, factor=factor)

    def vector(self, *others: Tensor) -> int:
        """Elements of 16 bytes, where all matrices can be read so many at a time, else 1."""
        matrices = (self.a, self.b, self.prior, *map(Matrix.of, others))
        if any(matrix.column != 1 for matrix in matrices):
            return 1
        widest = 16 // self.a.data.itemsize
        return math.gcd(widest, self.classes, self.strata, *(matrix.row for matrix in matrices))


# ---- tiles of matrices ----


@triton.jit
def smallest(dtype: tl.constexpr):
    """Sums below this are taken term by term."""
    if dtype == tl.float64:
        return 2.0**-512
    else:
        return 2.0**-64


@triton.jit
def farthest_log(dtype: tl.constexpr):
    """-log of the same."""
    if dtype == tl.float64:
        return 354.8913564466919
    else:
        return 44.36141955583649


@triton.jit
def inside(height, width, rows, cols, VECTOR: tl.constexpr):
    return (rows < height)[:, None] & (cols < multiple(width, VECTOR))[None, :]


@triton.jit
def read(matrix, mask, rows, cols, other: tl.constexpr, VECTOR: tl.constexpr):
    step = cols[None, :]
    if VECTOR == 1:
        step *= matrix.column
    return tl.load(matrix.data + (rows[:, None] * multiple(matrix.row, VECTOR) + step), mask=mask, other=other)


@triton.jit
def logs_of(of, rows, cols, VECTOR: tl.constexpr):
    """plus - minus; -inf outside of the matrix."""
    mask = inside(of.height, of.width, rows, cols, VECTOR)
    if of.plus.data is None:
        return -read(of.minus, mask, rows, cols, INFINITY, VECTOR)
    elif of.minus.data is None:
        return read(of.plus, mask, rows, cols, -INFINITY, VECTOR)
    else:
        plus = read(of.plus, mask, rows, cols, -INFINITY, VECTOR)
        return plus - read(of.minus, mask, rows, cols, 0.0, VECTOR)


@triton.jit
def vector_of(data, at, count):
    return tl.load(data + at, mask=at < count, other=0.0)


@triton.jit
def row_shifts(of, rows):
    """What is added to the logarithms of each row."""
    if of.taken is not None:
        return -vector_of(of.taken, rows, of.height)
    else:
        return vector_of(of.added, rows, of.height)


@triton.jit
def shifted(of, logs, of_rows, cols):
    if of.columns is not None:
        logs += vector_of(of.columns, cols, of.width)[None, :]
    return logs + of_rows[:, None]


@triton.jit
def exponentials(of, of_rows, rows, cols, VECTOR: tl.constexpr):
    """A tile of the matrix, and the logarithms in it, -inf where none could be too large."""
    logs = shifted(of, logs_of(of, rows, cols, VECTOR), of_rows, cols)
    values = tl.exp(logs)
    if of.factor.data is not None:
        mask = inside(of.height, of.width, rows, cols, VECTOR)
        factor = read(of.factor, mask, rows, cols, 0.0, VECTOR)
        values = tl.where(logs > farthest_log(logs.dtype), 0.0, values * factor)
    return values, logs


@triton.jit
def far_factors(of, of_rows, rows, cols):
    """The factors of what counted 0 for being too large, and 0 in place of all others."""
    mask = inside(of.height, of.width, rows, cols, 1)
    factor = read(of.factor, mask, rows, cols, 0.0, 1)
    logs = shifted(of, logs_of(of, rows, cols, 1), of_rows, cols)
    return tl.where(logs > farthest_log(logs.dtype), factor, 0.0)


@triton.jit
def write(out, values, there, width, rows, cols, VECTOR: tl.constexpr):
    """Into a contiguous matrix."""
    tl.store(out + (rows[:, None] * multiple(width, VECTOR) + cols[None, :]), values, mask=there)


@triton.jit
def tile_at(index, width, TILE: tl.constexpr):
    """The rows and the columns of the tile with this index."""
    across = tl.cdiv(width, TILE)
    lines = tl.arange(0, TILE)
    return (index // across).to(tl.int64) * TILE + lines, (index % across).to(tl.int64) * TILE + lines


# ---- maxima ----


@triton.jit
def largest_of(of, rows, VECTOR: tl.constexpr, COLS: tl.constexpr):
    """The largest logarithm in each row, finite."""
    largest = tl.full([rows.shape[0], COLS], LOWEST, of.plus.data.dtype.element_ty)
    for begin in range(0, of.width, COLS):
        cols = begin + tl.arange(0, COLS).to(tl.int64)
        largest = tl.maximum(largest, logs_of(of, rows, cols, VECTOR))
    return tl.max(largest, 1)


@triton.jit
def maxima_of(of, vector, rows, OWN: tl.constexpr, VECTOR: tl.constexpr, COLS: tl.constexpr):
    """The maxima of some rows: found here, and left where others will read them, or read."""
    if OWN:
        largest = largest_of(of, rows, VECTOR, COLS)
        tl.store(vector + rows, largest, mask=rows < of.height)
        return largest
    else:
        return vector_of(vector, rows, of.height)
