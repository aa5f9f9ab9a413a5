"""Products of matrices of exponentials, and what of them cannot be trusted, term by term.

A product is sum_l X_il Y_jl, whose lines i and j are rows of a matrix or, ACROSS, its columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backdoor_exponents import (
    INFINITY,
    LOWEST,
    exponentials,
    far_factors,
    farthest_log,
    logs_of,
    row_shifts,
    smallest,
)
from .launch import INTERPRETED

# Terms at a time where each is taken by itself. Triton's interpreter pays by the operation and not by the element.
_TERMS = tl.constexpr(16 if INTERPRETED else 1)


@triton.jit
def _side(of, of_rows, lines, terms, ACROSS: tl.constexpr, VECTOR: tl.constexpr):
    """[lines, terms] of one side, and the logarithms of the matrix as they lie in it."""
    if ACROSS:
        values, logs = exponentials(of, row_shifts(of, terms), terms, lines, VECTOR)
        return tl.trans(values), logs
    else:
        return exponentials(of, of_rows, lines, terms, VECTOR)


@triton.jit
def multiply(
    total,
    farthest,
    x,
    of_x,
    X_ACROSS: tl.constexpr,
    y,
    of_y,
    Y_ACROSS: tl.constexpr,
    lines,
    terms,
    VECTOR: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """total + the product, and the larger of `farthest` and the largest logarithm beside a factor."""
    # Of each row of the matrices as they lie, which few registers hold.
    across: tl.constexpr = Y_ACROSS if x.factor.data is None else X_ACROSS
    largest = tl.full([DEPTH if across else total.shape[0]], -INFINITY, total.dtype)
    for begin in range(0, terms, DEPTH):
        at = begin + tl.arange(0, DEPTH).to(tl.int64)
        left, left_logs = _side(x, of_x, lines[0], at, X_ACROSS, VECTOR)
        right, right_logs = _side(y, of_y, lines[1], at, Y_ACROSS, VECTOR)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee", out_dtype=total.dtype)
        if x.factor.data is not None:
            largest = tl.maximum(largest, tl.max(left_logs, 1))
        elif y.factor.data is not None:
            largest = tl.maximum(largest, tl.max(right_logs, 1))
    return total, tl.maximum(farthest, tl.max(largest, 0))


@triton.jit
def _side_logs(of, lines, terms, ACROSS: tl.constexpr):
    """[lines, terms]"""
    if ACROSS:
        return tl.trans(logs_of(of, terms, lines, 1))
    else:
        return logs_of(of, lines, terms, 1)


@triton.jit
def _apart(left, right):
    """Two sides, shaped so that an operation pairs all lines of one with all of the other: [x, y], and terms last."""
    if _TERMS == 1:
        return left, tl.trans(right)
    else:
        return left[:, None, :], right[None, :, :]


@triton.jit
def _each(pairs):
    """[x, y], for an operation with every term of the pairs."""
    if _TERMS == 1:
        return pairs
    else:
        return pairs[:, :, None]


@triton.jit
def _log_terms(x, X_ACROSS: tl.constexpr, y, Y_ACROSS: tl.constexpr, lines, terms):
    left, right = _apart(_side_logs(x, lines[0], terms, X_ACROSS), _side_logs(y, lines[1], terms, Y_ACROSS))
    return left + right


@triton.jit
def _sum_terms(pairs):
    return pairs if _TERMS == 1 else tl.sum(pairs, 2)


@triton.jit
def _any(flags):
    # Of single bits the compiler makes vectors, and those it takes apart again in memory.
    return tl.max(tl.max(tl.where(flags, 1.0, 0.0), 1), 0) > 0


@triton.jit
def sum_logs(total, of_rows, of_cols, x, X_ACROSS: tl.constexpr, y, Y_ACROSS: tl.constexpr, lines, there, count):
    """log(total) + of_rows + of_cols; sums too small for that are added up again, each shifted by its largest term."""
    result = tl.log(total) + (of_rows[:, None] + of_cols[None, :])
    small = there & (total < smallest(total.dtype))
    if _any(small):
        largest = tl.full(total.shape, LOWEST, total.dtype)
        for begin in range(0, count, _TERMS):
            terms = begin + tl.arange(0, _TERMS).to(tl.int64)
            logs = _log_terms(x, X_ACROSS, y, Y_ACROSS, lines, terms)
            largest = tl.maximum(largest, logs if _TERMS == 1 else tl.max(logs, 2))
        again = tl.zeros(total.shape, total.dtype)
        for begin in range(0, count, _TERMS):
            terms = begin + tl.arange(0, _TERMS).to(tl.int64)
            logs = _log_terms(x, X_ACROSS, y, Y_ACROSS, lines, terms)
            again += _sum_terms(tl.exp(logs - _each(largest)))
        result = tl.where(small, largest + tl.log(again), result)
    return result


@triton.jit
def _side_far(of, of_rows, lines, terms, ACROSS: tl.constexpr):
    """[lines, terms] of the factors of what counted 0 for being too large, and 0 elsewhere. Without a factor, 1."""
    if of.factor.data is None:
        return tl.full([lines.shape[0], terms.shape[0]], 1.0, of.plus.data.dtype.element_ty)
    elif ACROSS:
        return tl.trans(far_factors(of, row_shifts(of, terms), terms, lines))
    else:
        return far_factors(of, of_rows, lines, terms)


@triton.jit
def add_far(total, of, farthest, x, of_x, X_ACROSS: tl.constexpr, y, of_y, Y_ACROSS: tl.constexpr, lines, count):
    """total + the terms that were left out, if any, times exp(of). Shifts cancel in them and are not used."""
    if farthest > farthest_log(total.dtype):
        scale = logs_of(of, lines[0], lines[1], 1)
        for begin in range(0, count, _TERMS):
            terms = begin + tl.arange(0, _TERMS).to(tl.int64)
            left = _side_far(x, of_x, lines[0], terms, X_ACROSS)
            right = _side_far(y, of_y, lines[1], terms, Y_ACROSS)
            if _any(left != 0) & _any(right != 0):
                one, other = _apart(left, right)
                factor = one * other
                logs = _log_terms(x, X_ACROSS, y, Y_ACROSS, lines, terms)
                total += _sum_terms(tl.where(factor != 0, factor * tl.exp(logs + _each(scale)), 0.0))
    return total
