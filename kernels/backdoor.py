"""Exact backdoor adjustment with Triton: two log-matrix-products forward, their adjoints backward.

The formula is that of debiaskd/ops/backdoor.py. With A [N,K], B [Z,K], the log prior L [N,Z] and maxima a, b over
classes and w over strata,

    P_nk = exp(A - a_n)    Q_zk = exp(B - b_z)    W_nz = exp(L - S + b_z - w_n)
    _norm         S = log P Q' + a + b
    _output       A + T,  T = log W Q + w
    _grad_norm    -h = -W . (G Q'),  G_nk = g exp(w_n - T)
    _grad_logits  g + P . (H Q)  and  Q . (W' G + H' P),  H_nz = -h exp(a_n + b_z - S)
    _maxima       a, b and, backward, w_n = max_k T_nk, no more than log Z above the largest L - S + b

None of these matrices is ever written: each tile takes the exponentials that it multiplies as it reads logits. A sum
that is too small, and in backward what it divides in G or H, is taken term by term instead; csrc/common/log_range.h
says when.

Arithmetic: 2 products of N Z K multiplications forward and 4 backward, in full float32 ("ieee"; TF32 would leave three
digits), and one exponential for 32 of them in tiles of 64 by 64. Bytes: both sides of each tile, which caches hold;
besides the results, h [N,Z] and vectors are written.

Launches: 2 forward, 2 backward; S has to be whole before T, and h before the gradients. With more than OWN_MAXIMA
classes programs no longer find the maxima of their own rows, and _maxima goes before.

Strides: everything is read in place. 16 bytes at a time where each of a launch's matrices allows it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backdoor_exponents import (
    INFINITY,
    LOWEST,
    Exponents,
    Logits,
    Matrix,
    inside,
    largest_of,
    logs_of,
    maxima_of,
    read,
    row_shifts,
    shifted,
    tile_at,
    write,
)
from .backdoor_products import add_far, multiply, sum_logs
from .launch import INTERPRETED, launch

ENOUGH_TILES = 128  # of 64 by 64; with fewer, smaller ones keep more of the device busy
# Terms at a time. Triton's interpreter pays by the operation and not by the element.
DEPTH = 64 if INTERPRETED else 16
MAXIMA_ROWS, MAXIMA_COLS = 8, 256


@triton.jit
def _maxima(
    a,
    b,
    t,  # None forward; ALL says so once more, since within an `if` on the device None is no value to every Triton
    a_max,
    b_max,
    w_max,
    ALL: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.cdiv(a.height, ROWS)
    lines = tl.arange(0, ROWS)
    if program < programs:
        rows = program.to(tl.int64) * ROWS + lines
        maxima_of(a, a_max, rows, True, VECTOR, COLS)
        if ALL:
            maxima_of(t, w_max, rows, True, VECTOR, COLS)
    else:
        maxima_of(b, b_max, (program - programs).to(tl.int64) * ROWS + lines, True, VECTOR, COLS)


@triton.jit
def _norm(
    p,
    q,
    prior,
    a_max,
    b_max,
    norm,
    parts,
    OWN: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Also parts [N, tiles in a row]: the largest L - S + b in each tile's share of a row."""
    program = tl.program_id(0)
    lines = tile_at(program, q.height, TILE)
    rows, cols = lines
    a = maxima_of(p, a_max, rows, OWN, VECTOR, DEPTH)
    b = maxima_of(q, b_max, cols, OWN, VECTOR, DEPTH)
    total = tl.zeros([TILE, TILE], a.dtype)
    total, _ = multiply(total, 0.0, p, -a, False, q, -b, False, lines, p.width, VECTOR, DEPTH)
    there = inside(p.height, q.height, rows, cols, VECTOR)
    result = sum_logs(total, a, b, p, False, q, False, lines, there, p.width)
    write(norm, result, there, q.height, rows, cols, VECTOR)
    evidence = read(prior, there, rows, cols, 0.0, VECTOR) - result + b[None, :]
    largest = tl.max(tl.where(there, evidence, LOWEST), 1)
    across = tl.cdiv(q.height, TILE)
    tl.store(parts + (rows * across + program % across), largest, mask=rows < p.height)


@triton.jit
def _output(w, q, a, parts, output, VECTOR: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    lines = tile_at(tl.program_id(0), q.width, TILE)
    rows, cols = lines
    w_max = largest_of(parts, rows, 1, DEPTH)
    total = tl.zeros([TILE, TILE], w_max.dtype)
    total, _ = multiply(total, 0.0, w, -w_max, False, q, None, True, lines, q.height, VECTOR, DEPTH)
    there = inside(w.height, q.width, rows, cols, VECTOR)
    result = sum_logs(total, w_max, tl.zeros([TILE], total.dtype), w, False, q, True, lines, there, q.height)
    write(output, result + read(a, there, rows, cols, 0.0, VECTOR), there, q.width, rows, cols, VECTOR)


@triton.jit
def _grad_norm(
    g,
    q,
    w,
    p,
    t,
    a_max,
    b_max,
    w_max,
    grad_norm,
    OWN: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    lines = tile_at(tl.program_id(0), q.height, TILE)
    rows, cols = lines
    if OWN:
        maxima_of(p, a_max, rows, OWN, VECTOR, DEPTH)  # for _grad_logits
    own_w = maxima_of(t, w_max, rows, OWN, VECTOR, DEPTH)
    b = maxima_of(q, b_max, cols, OWN, VECTOR, DEPTH)
    total = tl.zeros([TILE, TILE], b.dtype)
    total, farthest = multiply(total, -INFINITY, g, own_w, False, q, -b, False, lines, q.width, VECTOR, DEPTH)
    logs = logs_of(w, rows, cols, VECTOR)
    total *= tl.exp(logs + b[None, :] - own_w[:, None])
    total = add_far(total, w, farthest, g, own_w, False, q, -b, False, lines, q.width)
    there = inside(w.height, w.width, rows, cols, VECTOR)
    write(grad_norm, -total, there, w.width, rows, cols, VECTOR)


@triton.jit
def _grad_logits(
    h,
    q,
    p,
    w,
    g,
    grad_output,
    grad_feature,
    grad_context,  # None where nobody asked for it, which BOTH says, too
    BOTH: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.cdiv(p.height, TILE).to(tl.int64) * tl.cdiv(p.width, TILE)
    total = tl.zeros([TILE, TILE], grad_feature.dtype.element_ty)
    if program < programs:
        lines = tile_at(program, p.width, TILE)
        rows, cols = lines
        a = row_shifts(h, rows)
        total, farthest = multiply(total, -INFINITY, h, a, False, q, None, True, lines, q.height, VECTOR, DEPTH)
        logs = logs_of(p, rows, cols, VECTOR)
        total *= tl.exp(logs - a[:, None])
        total = add_far(total, p, farthest, h, a, False, q, None, True, lines, q.height)
        there = inside(p.height, p.width, rows, cols, VECTOR)
        total += read(grad_output, there, rows, cols, 0.0, VECTOR)
        write(grad_feature, total, there, p.width, rows, cols, VECTOR)
    elif BOTH:
        lines = tile_at(program - programs, q.width, TILE)
        rows, cols = lines
        total, farthest = multiply(total, -INFINITY, w, None, True, g, None, True, lines, p.height, VECTOR, DEPTH)
        total, farthest = multiply(total, farthest, h, None, True, p, None, True, lines, p.height, VECTOR, DEPTH)
        logs = logs_of(q, rows, cols, VECTOR)
        total *= tl.exp(shifted(q, logs, row_shifts(q, rows), cols))
        total = add_far(total, q, farthest, w, None, True, g, None, True, lines, p.height)
        total = add_far(total, q, farthest, h, None, True, p, None, True, lines, p.height)
        there = inside(q.height, q.width, rows, cols, VECTOR)
        write(grad_context, total, there, q.width, rows, cols, VECTOR)


# ---- the functions of csrc/schema.cpp ----


def _find_maxima(logits: Logits, vector: int, t: Exponents | None) -> None:
    """Before another launch, unless its programs find those of their own rows."""
    if logits.own:
        return
    programs = triton.cdiv(logits.samples, MAXIMA_ROWS) + triton.cdiv(logits.strata, MAXIMA_ROWS)
    maxima = (logits.a_max, logits.b_max, logits.w_max)
    constants = {"ALL": t is not None, "VECTOR": vector, "ROWS": MAXIMA_ROWS, "COLS": MAXIMA_COLS}
    launch(_maxima, programs, logits.a_max, logits.p(), logits.q(), t, *maxima, warps=4, **constants)


def _tiles(dtype: torch.dtype, *results: tuple[int, int]) -> tuple[int, dict[str, int]]:
    """How many tiles there are, and the constants of a kernel. Sizes alone decide."""

    def count(tile: int) -> int:
        return sum(triton.cdiv(height, tile) * triton.cdiv(width, tile) for height, width in results)

    large = dtype == torch.float32 and min(map(min, results)) > 32 and count(64) >= ENOUGH_TILES
    tile = 64 if large or INTERPRETED else 32
    return count(tile), {"TILE": tile, "DEPTH": DEPTH, "warps": 8 if large else 4, "num_stages": 1}


def backdoor(feature_logits: Tensor, context_logits: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    logits = Logits(feature_logits, context_logits, log_prior)
    samples, strata, classes = logits.samples, logits.strata, logits.classes
    norm = feature_logits.new_empty(samples, strata)
    output = feature_logits.new_empty(samples, classes)
    if output.numel() == 0:
        return output, norm
    p, q, vector = logits.p(), logits.q(), logits.vector()
    _find_maxima(logits, vector, None)
    tiles, constants = _tiles(norm.dtype, (samples, strata))
    parts = norm.new_empty(samples, triton.cdiv(strata, constants["TILE"]))
    maxima = (logits.a_max, logits.b_max)
    launch(_norm, tiles, norm, p, q, logits.prior, *maxima, norm, parts, OWN=logits.own, VECTOR=vector, **constants)
    tiles, constants = _tiles(norm.dtype, (samples, classes))
    largest = Exponents(*parts.shape, plus=Matrix.of(parts))
    launch(_output, tiles, norm, logits.w(norm), q, logits.a, largest, output, VECTOR=vector, **constants)
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
    logits = Logits(feature_logits, context_logits, log_prior)
    samples, strata, classes = logits.samples, logits.strata, logits.classes
    grad_norm = feature_logits.new_empty(samples, strata)
    grad_feature = feature_logits.new_empty(samples, classes)
    grad_context = context_logits.new_empty(strata, classes) if with_context else context_logits.new_empty(0)
    if grad_feature.numel() == 0:
        return grad_feature, grad_context.zero_()
    p, q, w, t = logits.p(), logits.q(), logits.w(norm), logits.t(output)
    g, h = logits.g(output, grad_output), logits.h(norm, grad_norm)
    vector = logits.vector(norm, output, grad_output)
    _find_maxima(logits, vector, t)
    tiles, constants = _tiles(norm.dtype, (samples, strata))
    maxima = (logits.a_max, logits.b_max, logits.w_max)
    launch(_grad_norm, tiles, norm, g, q, w, p, t, *maxima, grad_norm, OWN=logits.own, VECTOR=vector, **constants)
    results = [(samples, classes), (strata, classes)][: 1 + with_context]
    tiles, constants = _tiles(norm.dtype, *results)
    gradients = (grad_feature, grad_context if with_context else None)
    launch(
        _grad_logits,
        tiles,
        norm,
        h,
        q,
        p,
        w,
        g,
        Matrix.of(grad_output),
        *gradients,
        BOTH=with_context,
        VECTOR=vector,
        **constants,
    )
    return grad_feature, grad_context
