"""What kernels compute in and how they round: halves in float32, everything else in its own precision.

No kernel sums in float64 what came in float32, because not every GPU has it. Long sums are compensated instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums over tensors of this one."""
    return torch.promote_types(dtype, torch.float32)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Loaded values, to compute with."""
    # To the interpreter a bfloat16 is 16 bits, and its own conversion loses the subnormal ones.
    if _INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Results, to store as `dtype`: rounded to nearest, ties to even."""
    # The interpreter's own conversion cuts the lower bits off. NaN would be rounded up to infinity.
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(x == x, rounded, 0x7FC00000) >> 16
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def divide(x, y):
    """x / y, rounded as IEEE 754 asks; Triton's own division of float32 is a little off."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    """Rounded as IEEE 754 asks; Triton's own square root of float32 is an approximation."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def add(total, lost, term):
    """total + term, and what rounding has lost on the way so far, which the next call gives back (Kahan)."""
    term -= lost
    result = total + term
    # Once a sum is infinite nothing is given back: infinity less infinity would turn it into NaN.
    return result, tl.where(tl.abs(result) < float("inf"), (result - total) - term, 0)
