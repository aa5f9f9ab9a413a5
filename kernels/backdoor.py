"""Exact backdoor adjustment with Triton: two log-matrix-products forward, their adjoints backward.

The formula is that of debiaskd/ops/backdoor.py, scaled as in csrc/cuda/backdoor.cu. With the logits A [N,K] and
B [Z,K], the log prior L [N,Z] and maxima d, b, a and w that leave 1 as the largest entry of every row,

    _scale        Q_zk = exp(B_zk - d_k - b_z)   P_nk = exp(A_nk + d_k - a_n)   W_nz = exp(V_nz + b_z - w_n)
    _product      P Q', W Q and, backward, G Q', H Q, W' G + H' P
    _log_sums     S = log P Q' + a + b,  V = L - S,  T = log W Q + w + d,  output A + T
    _over_sums    G = g exp(w + d - T) and H = h exp(a + b - S), which are g and h over those sums
    _finish       h = -W . (G Q')   dA = g + P . (H Q)   dB = Q . (W' G + H' P)

A sum that is too small (csrc/common/log_range.h says when) is taken term by term in _log_sums, and so is, in
_add_far, what it would have divided. Products are in full float32 ("ieee"), whatever PyTorch's settings for TF32 are.
Exponentials are padded with 0 to multiples of TILE, so that products have no bounds to check.

Arithmetic: 2 products of N Z K multiplications forward and 4 backward. Bytes: a few passes over [N,K], [N,Z] and [Z,K].
Launches: 4 forward and 8 backward (4 without a gradient of the contexts), and between those PyTorch's own of what goes
element by element. Inputs that are not contiguous are copied.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LARGE_TILES, launch

TILE = 64  # rows and columns of a product that a program computes
DEPTH = 64 if LARGE_TILES else 16  # terms of a product at a time
SUMS, TERMS = (4096, 16) if LARGE_TILES else (64, 8)  # of sums that are taken term by term
FAR_ROWS, FAR_TERMS, FAR_COLS = (32, 32, 64) if LARGE_TILES else (1, 8, 128)  # of a gradient
#: -log of the smallest sum that keeps its precision, as in csrc/common/log_range.h.
FARTHEST = {torch.float32: 44.36141955583649, torch.float64: 354.8913564466919}
_LOWEST = tl.constexpr(-3.4e38)  # a maximum is finite even where everything is -inf


@triton.jit
def _indices(block, SIZE: tl.constexpr):
    return block.to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def _pairs(i, rows, j, columns):
    """Which of the pairs there are."""
    return (i < rows)[:, None] & (j < columns)[None, :]


@triton.jit
def _product(
    x,
    y,
    out,
    x_pitch,
    y_pitch,
    terms,
    height,
    width,
    ADD: tl.constexpr,  # to what out holds
    X_ACROSS: tl.constexpr,  # x' instead of x
    Y_ACROSS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(width, TILE)
    i, j = _indices(tl.program_id(0) // tiles, TILE), _indices(tl.program_id(0) % tiles, TILE)
    total = tl.zeros([TILE, TILE], out.dtype.element_ty)
    for begin in range(0, terms, DEPTH):
        term = begin + tl.arange(0, DEPTH).to(tl.int64)
        if X_ACROSS:
            left = tl.trans(tl.load(x + (term[:, None] * x_pitch + i[None, :])))
        else:
            left = tl.load(x + (i[:, None] * x_pitch + term[None, :]))
        if Y_ACROSS:
            right = tl.load(y + (term[:, None] * y_pitch + j[None, :]))
        else:
            right = tl.trans(tl.load(y + (j[:, None] * y_pitch + term[None, :])))
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=total.dtype)
    to, there = out + (i[:, None] * width + j[None, :]), _pairs(i, height, j, width)
    if ADD:
        total += tl.load(to, mask=there, other=0)
    tl.store(to, total, mask=there)


@triton.jit
def _terms(x, y, i, j, small, term, terms):
    there = small[:, None] & (term < terms)[None, :]
    of_x = tl.load(x + (i[:, None] * terms + term[None, :]), mask=there, other=-float("inf"))
    return of_x + tl.load(y + (j[:, None] * terms + term[None, :]), mask=there, other=-float("inf"))


@triton.jit
def _log_sums(
    sums,
    shift,
    offset,
    base,
    x,
    y,
    height,
    width,
    terms,
    FARTHEST: tl.constexpr,
    SUMS: tl.constexpr,
    TERMS: tl.constexpr,
):
    at = _indices(tl.program_id(0), SUMS)
    i, j = at // width, at % width
    there = i < height
    total = tl.load(sums + at, mask=there, other=1)
    logs = tl.log(total)
    result = logs + (tl.load(offset + j) + tl.load(shift + i, mask=there, other=0))
    small = logs < -FARTHEST
    if tl.max(small.to(tl.int32), 0) > 0:
        largest = tl.full([SUMS], _LOWEST, total.dtype)
        for begin in range(0, terms, TERMS):
            term = begin + tl.arange(0, TERMS).to(tl.int64)
            largest = tl.maximum(largest, tl.max(_terms(x, y, i, j, small, term, terms), 1))
        again = tl.zeros([SUMS], total.dtype)
        for begin in range(0, terms, TERMS):
            term = begin + tl.arange(0, TERMS).to(tl.int64)
            again += tl.sum(tl.exp(_terms(x, y, i, j, small, term, terms) - largest[:, None]), 1)
        result = tl.where(small, largest + tl.log(again), result)
    if base is not None:
        result += tl.load(base + at, mask=there, other=0)
    tl.store(sums + at, result, mask=there)


@triton.jit
def _add_far(
    out,
    out_row,
    out_column,
    far,  # whether there is anything to add
    factor,
    logs,
    row,  # from one to the next, of factor and logs
    column,
    x,
    y,
    shift,
    offset,
    rows,
    length,
    others,
    FARTHEST: tl.constexpr,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    COLS: tl.constexpr,
):
    if tl.load(far) != 0:
        blocks = tl.cdiv(length, COLS)
        i, k = _indices(tl.program_id(0) // blocks, ROWS), _indices(tl.program_id(0) % blocks, COLS)
        there = _pairs(i, rows, k, length)
        to = out + (i[:, None] * out_row + k[None, :] * out_column)
        total = tl.load(to, mask=there, other=0)
        of_x = tl.load(x + (i[:, None] * length + k[None, :]), mask=there, other=0)
        of_row = tl.load(shift + i, mask=i < rows, other=0)
        for begin in range(0, others, TERMS):
            j = begin + tl.arange(0, TERMS).to(tl.int64)
            at = i[:, None] * row + j[None, :] * column
            log_sum = tl.load(logs + at, mask=_pairs(i, rows, j, others), other=float("inf"))
            of_column = tl.load(offset + j, mask=j < others, other=0)
            beyond = (of_column[None, :] + of_row[:, None]) - log_sum > FARTHEST
            if tl.max(tl.max(beyond.to(tl.int32), 1), 0) > 0:
                weight = tl.load(factor + at, mask=beyond, other=0)
                of_y = tl.load(y + (j[:, None] * length + k[None, :]), mask=_pairs(j, others, k, length), other=0)
                term = tl.exp((of_x[:, None, :] + of_y[None, :, :]) - log_sum[:, :, None])
                total += tl.sum(tl.where((weight != 0)[:, :, None], weight[:, :, None] * term, 0), 1)
        tl.store(to, total, mask=there)


# ---- on the host ----


class Scaled(NamedTuple):
    """Logits [rows, length], the maxima that they were shifted by, and their exponentials, padded."""

    logs: Tensor
    shift: Tensor
    exponentials: Tensor


def _padded(x: Tensor) -> Tensor:
    padded = x.new_zeros([triton.cdiv(size, TILE) * TILE for size in x.shape])
    padded[: x.shape[0], : x.shape[1]] = x
    return padded


def _largest(x: Tensor, axis: int) -> Tensor:
    """Finite even where everything is -inf, as a prior of 0 is."""
    return x.amax(axis).clamp_(min=torch.finfo(x.dtype).min)


def _scale(logs: Tensor, offset: Tensor) -> Scaled:
    values = logs + offset
    shift = _largest(values, 1)
    return Scaled(logs, shift, _padded(values.sub_(shift[:, None]).exp_()))


def _scaled(feature_logits: Tensor, context_logits: Tensor) -> tuple[Scaled, Scaled, Scaled]:
    """P, Q, and the contexts' logits by classes, of which the maxima alone are wanted."""
    context = context_logits.contiguous()
    classes = _largest(context, 0)
    q = _scale(context, -classes)
    return _scale(feature_logits.contiguous(), classes), q, Scaled(context.mT.contiguous(), classes, q.exponentials)


def _over_sums(factor: Tensor, logs: Tensor, rows: Scaled, columns: Scaled) -> tuple[Tensor, Tensor]:
    """factor over sums of scaled terms, padded: 0 where those were too small; and whether any was."""
    distance = (columns.shift + rows.shift[:, None]).sub_(logs)
    far = distance > FARTHEST[logs.dtype]
    return _padded(distance.masked_fill_(far, -math.inf).exp_().mul_(factor)), far.any()


def _multiply(out: Tensor, x: Tensor, y: Tensor, x_across: bool, y_across: bool, add: bool = False) -> None:
    height, width = out.shape
    terms = x.shape[0 if x_across else 1]
    tiles = triton.cdiv(height, TILE) * triton.cdiv(width, TILE)
    arguments = (x, y, out, x.shape[1], y.shape[1], terms, height, width)
    options = {"ADD": add, "X_ACROSS": x_across, "Y_ACROSS": y_across, "TILE": TILE, "DEPTH": DEPTH}
    launch(_product, tiles, out, *arguments, **options, warps=8, num_stages=1)


def _take_logs(sums: Tensor, rows: Scaled, columns: Scaled, base: Tensor | None) -> None:
    arguments = (sums, rows.shift, columns.shift, base, rows.logs, columns.logs, *sums.shape, rows.logs.shape[1])
    options = {"FARTHEST": FARTHEST[sums.dtype], "SUMS": SUMS, "TERMS": TERMS}
    launch(_log_sums, triton.cdiv(sums.numel(), SUMS), sums, *arguments, **options, warps=8)


def _finish(out: Tensor, rows: Scaled, columns: Scaled, far: Tensor, factor: Tensor, logs: Tensor) -> Tensor:
    """From a product with what is over sums of rows' and columns' terms, the gradient of the rows' logits."""
    return _with_far(out.mul_(rows.exponentials[: out.shape[0], : out.shape[1]]), rows, columns, far, factor, logs)


def _with_far(out: Tensor, rows: Scaled, columns: Scaled, far: Tensor, factor: Tensor, logs: Tensor) -> Tensor:
    """Adds to out_ik those terms factor_ij exp(rows_ik + columns_jk - logs_ij) that _over_sums has left out."""
    programs = triton.cdiv(out.shape[0], FAR_ROWS) * triton.cdiv(out.shape[1], FAR_COLS)
    arguments = (out, *out.stride(), far, factor, logs, *logs.stride(), rows.logs, columns.logs)
    sizes = (rows.shift, columns.shift, *out.shape, logs.shape[1])
    options = {"FARTHEST": FARTHEST[out.dtype], "ROWS": FAR_ROWS, "TERMS": FAR_TERMS, "COLS": FAR_COLS}
    launch(_add_far, programs, out, *arguments, *sizes, **options, warps=8)
    return out


# ---- the functions of csrc/schema.cpp ----


def backdoor(feature_logits: Tensor, context_logits: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    norm = feature_logits.new_empty(log_prior.shape)
    output = feature_logits.new_empty(feature_logits.shape)
    if output.numel() == 0:
        return output, norm
    p, q, classes = _scaled(feature_logits, context_logits)
    _multiply(norm, p.exponentials, q.exponentials, False, False)
    _take_logs(norm, p, q, None)
    w = _scale((log_prior - norm).contiguous(), q.shift)
    _multiply(output, w.exponentials, q.exponentials, False, True)
    _take_logs(output, w, classes, p.logs)
    return output, norm


def backdoor_backward(
    grad_output: Tensor,
    feature_logits: Tensor,
    context_logits: Tensor,
    log_prior: Tensor,
    norm: Tensor,
    output: Tensor,
    with_context: bool,
) -> tuple[Tensor, Tensor]:
    grad_norm, grad_feature = norm.new_empty(norm.shape), norm.new_empty(output.shape)
    grad_context = norm.new_empty(context_logits.shape if with_context else (0,))
    if grad_feature.numel() == 0:
        return grad_feature, grad_context.zero_()
    p, q, classes = _scaled(feature_logits, context_logits)
    w = _scale((log_prior - norm).contiguous(), q.shift)
    g, t = grad_output.contiguous(), (output - p.logs).contiguous()
    by_class, far_classes = _over_sums(g, t, w, classes)
    _multiply(grad_norm, by_class, q.exponentials, False, False)
    _finish(grad_norm, w, classes, far_classes, g, t).neg_()
    by_stratum, far_strata = _over_sums(grad_norm, norm, p, q)
    _multiply(grad_feature, by_stratum, q.exponentials, False, True)
    _finish(grad_feature, p, q, far_strata, grad_norm, norm).add_(g)
    if with_context:
        _multiply(grad_context, w.exponentials, by_class, True, True)
        _multiply(grad_context, by_stratum, p.exponentials, True, True, add=True)
        _finish(grad_context, q, p, far_strata, grad_norm.mT, norm.mT)
        _with_far(grad_context.mT, classes, w, far_classes, g.mT, t.mT)
    return grad_feature, grad_context
